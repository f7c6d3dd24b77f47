"""Loss, perplexity and bits per byte on held-out documents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqeff.data import Batch
from seqeff.models import token_losses


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Totals over the evaluated tokens: `nats` of loss, `tokens` predicted, UTF-8 `bytes`."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text; end-of-text tokens cost bits and carry no bytes."""
        return self.nats / math.log(2) / max(self.bytes, 1)

    def as_metrics(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def make_evaluate(
    graph: nnx.GraphDef, byte_lengths: np.ndarray
) -> Callable[[Any, Iterable[Batch]], Perplexity]:
    """A function of (parameters, batches) that is compiled once.

    Args:
      byte_lengths: UTF-8 bytes that each token id stands for, int [vocabulary].
    """
    lengths = jnp.asarray(byte_lengths, jnp.float32)

    @jax.jit
    def sums(parameters: Any, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, parameters)
        hidden = model(batch.tokens, batch.document_start)
        losses = token_losses(hidden, model.head(), batch.targets)
        counted = (batch.loss_weights > 0).astype(jnp.float32)
        sizes = jnp.take(lengths, batch.targets, mode="clip")
        return jnp.stack([jnp.sum(counted * losses), jnp.sum(counted), jnp.sum(counted * sizes)])

    def evaluate(parameters: Any, batches: Iterable[Batch]) -> Perplexity:
        # the next batch is on its way while the last one computes
        parts = [sums(parameters, batch) for batch in batches]
        nats, tokens, size = np.sum(np.asarray(jax.device_get(parts), np.float64), axis=0)
        return Perplexity(nats=float(nats), tokens=int(tokens), bytes=int(size))

    return evaluate
