"""How the next token is drawn, for rows that each have settings of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from seqeff.checks import check_types, require

Way = Literal["greedy", "sampled", "filtered"]
# the later can do what the earlier do
WAYS: tuple[Way, ...] = get_args(Way)
# of what logits are divided by or multiplied with
_GREATEST = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution of the next token.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only so many of the likeliest are drawn; None: all.
      top_p: only the likeliest are, as few as together have this probability (Holtzman et al.
        2020, section 3.1); None: all.
      min_p: only those at least this times as likely as the likeliest are; None: all.
      repetition_penalty: divides the positive logits of tokens that occur in the prompt or were
        drawn, and multiplies the negative ones (Keskar et al. 2019, section 4.1); 1: none.
      seed: what is drawn is a function of it and of the number of tokens drawn before.

    Of tokens as likely as the last that may be drawn, all may be.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require(
            0 <= self.temperature <= _GREATEST,
            f"Sampling.temperature = {self.temperature} must be from 0 to {_GREATEST:g}",
        )
        require(
            self.top_k is None or 1 <= self.top_k < 2**31,
            f"Sampling.top_k = {self.top_k} must be at least 1, below 2**31, or null for all",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"Sampling.top_p = {self.top_p} must be above 0, and at most 1, or null for all",
        )
        require(
            self.min_p is None or 0 <= self.min_p <= 1,
            f"Sampling.min_p = {self.min_p} must be from 0 to 1, or null for all",
        )
        require(
            1 / _GREATEST <= self.repetition_penalty <= _GREATEST,
            f"Sampling.repetition_penalty = {self.repetition_penalty} must be above 0, from "
            f"{1 / _GREATEST:g} to {_GREATEST:g}",
        )
        require(
            0 <= self.seed < 2**32, f"Sampling.seed = {self.seed} must be at least 0, below 2**32"
        )

    @property
    def way(self) -> Way:
        """What a program has to be able to, to draw so."""
        if self.repetition_penalty != 1:
            return "filtered"
        if self.temperature == 0:
            return "greedy"
        chosen = (self.top_k, self.top_p, self.min_p)
        return "sampled" if all(value is None for value in chosen) else "filtered"


class Settings(NamedTuple):
    """`Sampling` of each row; a `top_k` of 0 is none."""

    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]
    repetition_penalty: Float[Array, " rows"]
    seed: UInt32[Array, " rows"]

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> Self:
        """Arrays on the host."""

        def array(name: str, dtype: type, absent: float = 0) -> Any:
            values = (getattr(row, name) for row in rows)
            return np.array([absent if value is None else value for value in values], dtype)

        top_p = array("top_p", np.float32, 1)
        return cls(
            array("temperature", np.float32),
            array("top_k", np.int32),
            # above what rounded sums of probabilities reach
            cast(Any, np.where(top_p == 1, np.float32(2), top_p)),
            array("min_p", np.float32),
            array("repetition_penalty", np.float32),
            array("seed", np.uint32),
        )


def draw(
    logits: Float[Array, "rows vocabulary"],
    settings: Settings,
    drawn: Int[Array, " rows"],
    seen: Bool[Array, "rows vocabulary"],
    way: Way,
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """The rows' next tokens, and their log-probabilities under the model itself.

    A row's token depends on nothing of the other rows, and is the same with every `way` that is
    able to give it, as is its log-probability, to the last bit.

    Args:
      drawn: how many tokens were drawn before.
      seen: tokens of the prompt and those drawn; read where `way` is "filtered".
      way: "greedy" takes the likeliest; "sampled" draws at each row's temperature; "filtered"
        heeds all of the settings.
    """
    # apart from what each way does with them, so that all ways compute them alike
    logits = jax.lax.optimization_barrier(logits)
    logits = logits.astype(jnp.float32)
    total = jax.lax.optimization_barrier(jax.nn.logsumexp(logits, axis=-1))
    scores = filtered(logits, settings, seen) if way == "filtered" else logits
    token = jnp.argmax(scores, axis=-1)
    if way != "greedy":
        if way == "sampled":
            scores = scores / _divisor(settings)
        keys = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(
            settings.seed, drawn
        )
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
        greedy = settings.temperature == 0
        token = jnp.where(greedy, token, jnp.argmax(scores + noise, axis=-1))
    token = token.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - total


def filtered(
    logits: Float[Array, "rows vocabulary"],
    settings: Settings,
    seen: Bool[Array, "rows vocabulary"],
) -> Float[Array, "rows vocabulary"]:
    """Logits of the distribution that is drawn from: -inf where nothing may be.

    Of a row whose temperature is 0, the largest is that of the token to take.
    """
    penalty = settings.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    scores = jnp.where(seen, penalised, logits) / _divisor(settings)
    return jnp.where(scores < _floor(scores, settings)[:, None], -jnp.inf, scores)


def _divisor(settings: Settings) -> Float[Array, "rows 1"]:
    return jnp.where(settings.temperature == 0, 1, settings.temperature)[:, None]


def _floor(scores: Float[Array, "rows vocabulary"], settings: Settings) -> Float[Array, " rows"]:
    """The least score that may be drawn: the filters follow each other, as their fields do."""
    size = scores.shape[1]
    ordered = -jnp.sort(-scores, axis=1)
    place = jnp.arange(size)
    top_k = jnp.where(settings.top_k == 0, size, jnp.minimum(settings.top_k, size))[:, None]
    among = jnp.where(place < top_k, ordered, -jnp.inf)
    probability = jax.nn.softmax(among, axis=1)
    before = jnp.cumsum(probability, axis=1) - probability
    kept = (place < top_k) & (before < settings.top_p[:, None]) | (place == 0)
    last = kept.sum(1, keepdims=True) - 1
    floor = jnp.take_along_axis(ordered, last, axis=1)[:, 0]
    return jnp.maximum(floor, ordered[:, 0] + jnp.log(settings.min_p))
