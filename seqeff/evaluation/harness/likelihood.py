"""How likely continuations are, from whole rows and so with the mask of training."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqeff.models import TransformerConfig
from seqeff.models.flops import abstract_model

# rows are padded to few lengths, for each of which it compiles
_LEAST_LENGTH = 64
# tokens whose logits are there at a time
_SCORED = 512
# calls that are under way while the host prepares the next
_AHEAD = 2


class Pair(NamedTuple):
    """Token ids; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Of a continuation after its context.

    Attributes:
      log_probability: nats, the sum over its tokens.
      is_greedy: whether each of its tokens is the likeliest.
    """

    log_probability: float
    is_greedy: bool


class Likelihoods:
    """Scores continuations, many at a time.

    Pairs that differ in their last token alone, as the choices of a question often do, share a row.
    A row's scores do not depend on the others: the shapes that it is computed in follow from its
    own length.
    """

    def __init__(
        self, config: TransformerConfig, parameters: Any, *, rows: int, length: int
    ) -> None:
        """
        Args:
          config: of the model, knowing its vocabulary.
          parameters: of the `Transformer`.
          rows: at a time.
          length: tokens that a row has at most.
        """
        config.require_positions(length)
        self._parameters, self._rows, self._length = parameters, rows, length
        graph = nnx.split(abstract_model(config))[0]
        self._read = jax.jit(functools.partial(_read, graph))
        self._score = jax.jit(functools.partial(_score, graph))

    def scores(
        self, pairs: Sequence[Pair], told: Callable[[int], object] = lambda _: None
    ) -> list[Score]:
        """The scores of pairs, in their order.

        The last token of a continuation is read by no row. Contexts lose their beginnings where
        the rest would be longer than a row; no continuation may be.

        Args:
          told: is called with the number of pairs that were scored, as they are.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, pair in enumerate(pairs):
            whole = (*pair.context, *pair.continuation)
            rows.setdefault(whole[-self._length - 1 : -1], []).append(number)
        # the longest first, as what does not fit fails at once then
        ordered = sorted(rows, key=lambda row: (-len(row), row))
        found: dict[int, Score] = {}
        calls: collections.deque[_Call] = collections.deque()
        for part in itertools.chain(self._of_one_size(ordered), [None] * _AHEAD):
            if part is not None:
                calls.append(self._start(part, [rows[row] for row in part], pairs))
            if calls and (part is None or len(calls) > _AHEAD):
                call = calls.popleft()
                found |= zip(call.numbers, call.scores(), strict=True)
                told(len(call.numbers))
        return [found[number] for number in range(len(pairs))]

    def _of_one_size(self, rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        """The rows of each call, from rows in the order of their lengths."""
        for _, group in itertools.groupby(rows, lambda row: self._padded(len(row))):
            same = list(group)
            for first in range(0, len(same), self._rows):
                yield same[first : first + self._rows]

    def _start(
        self,
        rows: Sequence[tuple[int, ...]],
        numbers: Sequence[Sequence[int]],
        pairs: Sequence[Pair],
    ) -> _Call:
        """Begins to score the pairs whose rows these are."""
        size = self._padded(len(rows[0]))
        tokens = np.zeros((self._rows, size), np.int32)
        places, targets, owners = [], [], []
        for index, (row, of_row) in enumerate(zip(rows, numbers, strict=True)):
            tokens[index, : len(row)] = row
            for number in of_row:
                continuation = pairs[number].continuation
                end = index * size + len(row)
                places.append(np.arange(end - len(continuation), end))
                targets.append(np.asarray(continuation))
                owners.append(number)
        place, target = (np.concatenate(x).astype(np.int32) for x in (places, targets))
        padding = (0, -len(place) % _SCORED)
        hidden = self._read(self._parameters, tokens)
        blocks = [
            self._score(self._parameters, hidden, *block)
            for block in zip(
                *(np.pad(x, padding).reshape(-1, _SCORED) for x in (place, target)), strict=True
            )
        ]
        return _Call(owners, [len(x) for x in targets], blocks)

    def _padded(self, length: int) -> int:
        """The length of a row's call: a power of two, or one and a half of it."""
        step = max(_LEAST_LENGTH, 1 << max((length - 1).bit_length() - 2, 0))
        return min(-(-length // step) * step, self._length)


class _Call(NamedTuple):
    """Pairs that the device is scoring.

    Attributes:
      lengths: of their continuations, which follow each other in the blocks.
      blocks: what `_score` gives.
    """

    numbers: Sequence[int]
    lengths: Sequence[int]
    blocks: Sequence[tuple[Array, Array]]

    def scores(self) -> list[Score]:
        """Waits for them."""
        chance, best = (np.concatenate(x) for x in zip(*jax.device_get(self.blocks), strict=True))
        ends = np.cumsum(self.lengths)
        return [
            Score(
                float(chance[end - length : end].sum(dtype=np.float64)),
                bool(np.all(best[end - length : end])),
            )
            for end, length in zip(ends, self.lengths, strict=True)
        ]


def _read(
    graph: nnx.GraphDef, parameters: Any, tokens: Int[Array, "rows length"]
) -> Float[Array, "rows*length width"]:
    hidden = nnx.merge(graph, parameters)(tokens)
    return hidden.reshape(-1, hidden.shape[-1])


def _score(
    graph: nnx.GraphDef,
    parameters: Any,
    hidden: Float[Array, "rows*length width"],
    places: Int[Array, " scored"],
    targets: Int[Array, " scored"],
) -> tuple[Float[Array, " scored"], Bool[Array, " scored"]]:
    """The log-probabilities of tokens after places, and whether they are the likeliest there."""
    logits = nnx.merge(graph, parameters).logits(hidden[places][None])[0]
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == targets
