"""What a cache must do: remember a row's tokens, so that the next ones can attend them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, DTypeLike, Float, Int

from seqeff.models.heads import Heads
from seqeff_kernels.range_attention import Backend


class Sizes(NamedTuple):
    """Of a layer's cache.

    Attributes:
      capacity: most tokens that a row has, for caches that keep all or might.
      kept: most of them that caches of chosen tokens keep, where these grow.
    """

    batch: int
    capacity: int
    kept: int
    kv_heads: int
    head_dim: int
    dtype: DTypeLike


class CacheKind(Protocol):
    """How the layers of one attention remember.

    A kind is static: a frozen dataclass. Its `state` is what all those layers share, such as how
    many tokens there are; its `arrays` are a layer's own keys and values. The batch is the first
    axis of every array, and its rows never mix, so a row can be moved or replaced by moving its
    part of every array.
    """

    @property
    def grows(self) -> bool:
        """Whether its memory is that of `Sizes.capacity`, and not constant."""
        ...

    def empty(self, sizes: Sizes) -> tuple[Any, Any]:
        """State and arrays of rows without tokens.

        The state is all zeros, and what the arrays hold is never read, so that a row is emptied by
        clearing its state (`emptied_rows`).
        """
        ...

    def begin(
        self, state: Any, tokens: Int[Array, "batch rows"], count: Int[Array, " batch"]
    ) -> tuple[Any, Any]:
        """What all layers need to take the new tokens in, and the state after them.

        Args:
          count: how many of each row's tokens are real; the others, at the end, are passed over.
        """
        ...

    def attend(
        self, step: Any, arrays: Any, heads: Heads, backend: Backend
    ) -> tuple[Float[Array, "batch rows heads head_dim"], Any]:
        """What a layer's new tokens attend, and its arrays with them.

        The outputs of tokens that are passed over are of no meaning.
        """
        ...

    def settle(self, step: Any, arrays: Sequence[Any]) -> Sequence[Any]:
        """The arrays of all the layers, once all have attended; most kinds have nothing to do."""
        ...

    def read(self, step: Any, rows: int) -> Int[Array, "batch rows"]:
        """How many entries of a layer each new token attends, itself included."""
        ...

    def resident(self, state: Any) -> Int[Array, " batch"]:
        """How many entries a layer holds of each row."""
        ...

    def overflows(self, state: Any, arrays: Any) -> Bool[Array, " batch"] | bool:
        """Whether a row has more to remember than there is room for."""
        ...


@runtime_checkable
class CachedAttention(Protocol):
    """An attention that knows a cache of its own; others keep every token."""

    def cache(self) -> CacheKind: ...
