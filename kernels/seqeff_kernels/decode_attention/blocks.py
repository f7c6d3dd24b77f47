"""Blocks of a cache, each filled from its first entry on, to a length of its own a row."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from seqeff_kernels.range_attention.sources import check_integers

NewEntries = tuple[
    Float[Array, "batch rows kv_heads head_dim"], Float[Array, "batch rows kv_heads head_dim"]
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheBlock:
    """Cached entries, of which every query row attends `[0, filled)`.

    Entries at or beyond `filled` may hold anything, NaN included. `queries` replaces the call's
    queries for this block, such as queries rotated by ranks in a packed list.
    """

    keys: Float[Array, "batch capacity kv_heads head_dim"]
    values: Float[Array, "batch capacity kv_heads head_dim"]
    filled: Int[Array, " batch"]
    queries: Float[Array, "batch rows heads head_dim"] | None = None

    def lengths(self) -> Int[Array, " batch"]:
        """How many entries each row of the batch attends, within `[0, capacity]`."""
        return jnp.clip(self.filled, 0, self.keys.shape[1]).astype(jnp.int32)

    def mask(self) -> Bool[Array, "batch capacity"]:
        """Which entries are attended."""
        return jnp.arange(self.keys.shape[1]) < self.lengths()[:, None]


def distinct_queries(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: tuple[CacheBlock, ...],
    new: NewEntries | None,
) -> list[Float[Array, "batch rows heads head_dim"]]:
    """The call's queries, where a block or the new entries take them, and the blocks' own."""
    own = [block.queries for block in blocks if block.queries is not None]
    return own if new is None and len(own) == len(blocks) else [queries, *own]


def check(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: tuple[CacheBlock, ...],
    new: NewEntries | None,
) -> None:
    """Raises ValueError, naming the argument, if a shape does not fit `queries`."""
    if queries.ndim != 4:
        raise ValueError(f"queries has shape {queries.shape}; give (batch, rows, heads, head_dim)")
    if not blocks:
        raise ValueError("decode_attention needs at least one block")
    batch, rows = queries.shape[:2]
    for index, block in enumerate(blocks):
        name = f"blocks[{index}]"
        _check_entries(queries, block.keys, block.values, name)
        check_integers(block.filled, ((batch,),), f"{name}.filled")
        if block.queries is not None and block.queries.shape != queries.shape:
            raise ValueError(
                f"{name}.queries has shape {block.queries.shape}; the call's has {queries.shape}"
            )
    kv_heads = {block.keys.shape[2] for block in blocks}
    if new is not None:
        keys, values = new
        _check_entries(queries, keys, values, "new")
        if keys.shape[1] != rows:
            raise ValueError(f"new has {keys.shape[1]} entries for {rows} rows; give one a row")
        kv_heads.add(keys.shape[2])
    if len(kv_heads) > 1:
        raise ValueError(f"the entries have different numbers of KV heads: {sorted(kv_heads)}")


def _check_entries(queries: Array, keys: Array, values: Array, name: str) -> None:
    batch, _, heads, head_dim = queries.shape
    if keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(
            f"{name} has keys and values of shapes {keys.shape} and {values.shape}; "
            "give both as (batch, entries, kv_heads, head_dim)"
        )
    if keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(
            f"{name} has keys of shape {keys.shape}; the queries' batch is {batch} and their "
            f"head_dim {head_dim}"
        )
    if keys.shape[1] == 0:
        raise ValueError(f"{name} has no room for an entry; leave it out")
    if heads % keys.shape[2]:
        raise ValueError(f"{name}: {heads} heads do not divide into {keys.shape[2]} KV heads")
