"""Skips a training step whose loss or gradient is not finite or spikes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqeff.checks import UserError, check_types, require

# below this share of the mean a deviation is no spike, however steady the values were
_LEAST_DEVIATION = 0.01


GuardState = dict[str, Array]
"""`losses` and `gradient_norms` [window], float32: those of the last finite steps, none above the
bound of its time, the oldest overwritten; `skips` [window], bool: which of the last steps were
skipped; `finite`, `accepted`, `skipped` and `in_a_row` (skipped since the last accepted step),
int32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Which steps are skipped, and how many skipped ones end the run.

    A step is skipped when its loss or gradient norm is not finite, or exceeds the mean of the last
    `window` finite steps by more than `spike_factor` standard deviations, its bound. Spikes are
    looked for once the window is full. A value past its bound is remembered as that bound: a spike
    leaves the next bounds near where they were, and what stays high is accepted after some steps.

    Attributes:
      spike_factor: None: only steps that are not finite are skipped.
      window: steps that spikes and the share of skipped steps are judged by.
      limit: skipped steps in a row that the run survives.
      share: part of the last `window` steps that the run survives the skipping of.
    """

    spike_factor: float | None = 6.0
    window: int = 128
    limit: int = 20
    share: float = 0.25

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.spike_factor is None or self.spike_factor > 0,
            f"Guard.spike_factor = {self.spike_factor} must be above 0, or null",
        )
        require(self.window >= 2, f"Guard.window = {self.window} must be at least 2")
        require(self.limit >= 0, f"Guard.limit = {self.limit} must not be negative")
        require(0 <= self.share <= 1, f"Guard.share = {self.share} must be from 0 to 1")

    def init(self) -> GuardState:
        values, count = jnp.zeros(self.window, jnp.float32), jnp.zeros((), jnp.int32)
        return {
            "losses": values,
            "gradient_norms": values,
            "skips": jnp.zeros(self.window, bool),
            "finite": count,
            "accepted": count,
            "skipped": count,
            "in_a_row": count,
        }

    def judge(
        self, state: GuardState, loss: Float[Array, ""], gradient_norm: Float[Array, ""]
    ) -> tuple[Bool[Array, ""], GuardState]:
        """Whether to take the step, and the statistics with it; pure, for use inside `jit`."""
        seen = {"losses": loss, "gradient_norms": gradient_norm}
        accept = finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        if self.spike_factor is not None:
            full = state["finite"] >= self.window
            bounds = {
                name: jnp.where(full, _bound(state[name], self.spike_factor), jnp.inf)
                for name in seen
            }
            for name, bound in bounds.items():
                accept &= seen[name] <= bound
            seen = {name: jnp.minimum(value, bounds[name]) for name, value in seen.items()}
        slot = state["finite"] % self.window
        values = {
            name: state[name].at[slot].set(jnp.where(finite, value, state[name][slot]))
            for name, value in seen.items()
        }
        steps = state["accepted"] + state["skipped"]
        return accept, values | {
            "skips": state["skips"].at[steps % self.window].set(~accept),
            "finite": state["finite"] + finite,
            "accepted": state["accepted"] + accept,
            "skipped": state["skipped"] + ~accept,
            "in_a_row": jnp.where(accept, 0, state["in_a_row"] + 1),
        }

    def metrics(self, state: GuardState) -> dict[str, Array]:
        """Skipped steps: all, those since the last accepted one, those of the last `window`."""
        return {
            "skipped": state["skipped"],
            "skipped_in_a_row": state["in_a_row"],
            "skipped_lately": jnp.sum(state["skips"], dtype=jnp.int32),
        }

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Ends the run when too many steps were skipped.

        Args:
          metrics: those of `metrics` after step number `step`, among any others.

        Raises:
          UserError: more than `limit` in a row, or more than `share` of the last `window`.
        """
        in_a_row, lately = int(metrics["skipped_in_a_row"]), int(metrics["skipped_lately"])
        if in_a_row > self.limit:
            skipped, bound = f"{in_a_row} steps in a row", f"Guard.limit = {self.limit}"
        elif lately > self.share * self.window:
            skipped = f"{lately} of the last {self.window} steps"
            bound = f"Guard.share = {self.share}"
        else:
            return
        raise UserError(
            f"{skipped} up to step {step} were skipped because their loss or gradient was not "
            f"finite or spiked ({bound}); lower the learning rate, lengthen the warm-up, or look "
            "at the data of these steps"
        )


def _bound(values: jax.Array, factor: float) -> jax.Array:
    mean = jnp.mean(values)
    return mean + factor * jnp.maximum(jnp.std(values), _LEAST_DEVIATION * jnp.abs(mean))
