"""What a training step minimises."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from seqeff.checks import check_types, require
from seqeff.data import Batch
from seqeff.models import Transformer, cross_entropy_sums


@runtime_checkable
class Objective(Protocol):
    """Config of a loss. It returns sums, so that parts of a batch add up to the whole exactly."""

    def sums(self, model: Transformer, batch: Batch) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The loss summed over the batch's weighted tokens, and sums to report beside it.

        The trainer divides all of them by the sum of `batch.loss_weights`.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy of the next token; `z_loss` times the squared log-partition keeps it small."""

    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        require(self.z_loss >= 0, f"NextToken.z_loss = {self.z_loss} must not be negative")

    def sums(self, model: Transformer, batch: Batch) -> tuple[Float[Array, ""], dict[str, Any]]:
        hidden = model(batch.tokens, batch.document_start)
        with jax.named_scope("cross_entropy"):
            total, parts = cross_entropy_sums(
                hidden, model.head(), batch.targets, batch.loss_weights, self.z_loss
            )
        return total, {"loss": parts.loss}
