"""Loss, perplexity and bits per byte on held-out documents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from seqeff.data import Batch, ByteLengths
from seqeff.models import token_losses
from seqeff.models.flops import entries_of_tokens


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Totals over the evaluated tokens.

    Attributes:
      nats: of loss.
      tokens: predicted.
      bytes: of their text in UTF-8.
      read: entries that they attend in a layer, themselves included, in the mean over the layers.
      resident: most entries that a layer has to hold for one of them.
    """

    nats: float
    tokens: int
    bytes: int
    read: float = 0.0
    resident: int = 0

    @classmethod
    def of(cls, parts: Float[np.ndarray, "parts 5"]) -> Perplexity:
        """From rows of the attributes, in their order."""
        nats, tokens, size, read = parts[:, :4].sum(0)
        resident = parts[:, 4].max(initial=0)
        return cls(float(nats), int(tokens), int(size), float(read), int(resident))

    @classmethod
    def total(cls, results: Sequence[Perplexity]) -> Perplexity:
        """Of all tokens together."""
        return cls.of(np.array([dataclasses.astuple(result) for result in results], np.float64))

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

    @property
    def entries_read(self) -> float:
        """Entries a token and layer."""
        return self.read / max(self.tokens, 1)

    def as_metrics(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "entries_read": self.entries_read,
            "entries_resident": self.resident,
        }


def sums_by_part(
    part: Int[Array, "*tokens"],
    parts: int,
    losses: Float[Array, "*tokens"],
    bytes: Int[Array, "*tokens"],
    read: Shaped[Array, "*tokens"],
    most: Shaped[Array, "*tokens"],
) -> Float[Array, "parts 5"]:
    """Rows of `Perplexity`'s attributes.

    Args:
      part: that each token counts in; -1: in none.
      read, most: of its entries.
    """
    here = part == jnp.arange(parts).reshape(-1, *(1,) * part.ndim)

    def over(reduce: Callable[..., Array], x: Any) -> Array:
        return reduce(jnp.where(here, x, 0.0), axis=tuple(range(1, here.ndim)))

    sums = [over(jnp.sum, x) for x in (losses, 1.0, bytes, read)]
    return jnp.stack([*sums, over(jnp.max, most)], axis=1)


def make_evaluate(
    graph: nnx.GraphDef, byte_lengths: ByteLengths, parts: int = 1
) -> Callable[[Any, Iterable[Batch]], list[Perplexity]]:
    """A function of (parameters, batches) that is compiled once; gives scores by position.

    Args:
      parts: equal parts of a row's length. A token counts in that of its place in its document:
        how much context there is for the one after it.
    """

    @jax.jit
    def sums(parameters: Any, batch: Batch) -> Array:
        model = nnx.merge(graph, parameters)
        hidden = model(batch.tokens, batch.document_start)
        losses = token_losses(hidden, model.head(), batch.targets)
        counted = batch.loss_weights > 0
        sizes = byte_lengths.of(batch.targets, batch.tokens)
        read, most = entries_of_tokens(model.config, batch.tokens, batch.document_start)
        length = batch.tokens.shape[1]
        place = jnp.broadcast_to(jnp.arange(length), counted.shape)
        if batch.document_start is not None:
            place = place - batch.document_start
        part = jnp.where(counted, place * parts // length, -1)
        return sums_by_part(part, parts, losses, sizes, read, most)

    def evaluate(parameters: Any, batches: Iterable[Batch]) -> list[Perplexity]:
        # the next batch is on its way while the last one computes
        found = [sums(parameters, batch) for batch in batches]
        by_part = np.asarray(jax.device_get(found), np.float64).reshape(-1, parts, 5)
        return [Perplexity.of(by_part[:, part]) for part in range(parts)]

    return evaluate
