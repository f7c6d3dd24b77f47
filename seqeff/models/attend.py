"""Attending over a mesh: every device does its rows of the batch and its heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqeff.checks import require
from seqeff.models.parameters import batch_axes, head_axis
from seqeff_kernels.decode_attention import Backend as BlocksBackend
from seqeff_kernels.decode_attention import CacheBlock, decode_attention
from seqeff_kernels.decode_attention import obstacle as obstacle_of_blocks
from seqeff_kernels.range_attention import Backend, Source, obstacle, range_attention


def attend(
    queries: Float[Array, "batch rows heads head_dim"],
    sources: Sequence[Source],
    backend: Backend,
) -> Float[Array, "batch rows heads head_dim"]:
    """The output of `range_attention`.

    Raises:
      ConfigError: the backend asked for cannot serve; says why.
    """

    def local(queries: Array, sources: Sequence[Source]) -> Array:
        if backend != "auto":
            _require_available(backend, obstacle(queries, sources, backend))
        return range_attention(queries, sources, backend=backend)[0]

    return _over_mesh(local, queries, sources)


def attend_blocks(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: Sequence[CacheBlock],
    backend: Backend,
) -> Float[Array, "batch rows heads head_dim"]:
    """The output of `decode_attention`, by the backend of that name if it has one.

    Raises:
      ConfigError: the backend asked for cannot serve; says why.
    """

    def local(queries: Array, blocks: Sequence[CacheBlock]) -> Array:
        if backend == "auto" or backend not in get_args(BlocksBackend):
            return decode_attention(queries, blocks)[0]
        _require_available(backend, obstacle_of_blocks(queries, blocks, backend))
        return decode_attention(queries, blocks, backend=backend)[0]  # pyright: ignore[reportArgumentType]

    return _over_mesh(local, queries, blocks)


def _over_mesh(
    attend: Callable[[Array, Any], Array],
    queries: Float[Array, "batch rows heads head_dim"],
    lists: Sequence[Source] | Sequence[CacheBlock],
) -> Float[Array, "batch rows heads head_dim"]:
    """Calls `attend` with each device's part of the batch and of the heads.

    Its kernels are whole programs to the compiler, which could only gather their operands on every
    device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(queries, lists)
    batch = batch_axes(mesh, queries.shape[0])
    heads = head_axis(mesh, lists[0].keys.shape[2])
    leaves, structure = jax.tree.flatten(lists)
    # lists that share an array keep sharing it, and what is known while tracing stays so
    arrays = {id(leaf): leaf for leaf in leaves if isinstance(leaf, jax.Array)}

    def local(queries: Array, *parts: Array) -> Array:
        local_of = dict(zip(arrays, parts, strict=True))
        mine = jax.tree.unflatten(structure, [local_of.get(id(leaf), leaf) for leaf in leaves])
        return attend(queries, mine)

    by_rank = {
        4: PartitionSpec(batch, None, heads),  # queries, keys, values
        3: PartitionSpec(batch, heads),  # bounds of each KV head
        2: PartitionSpec(batch),
        1: PartitionSpec(batch),
        0: PartitionSpec(),
    }
    return jax.shard_map(
        local,
        in_specs=(by_rank[4], *(by_rank[array.ndim] for array in arrays.values())),
        out_specs=by_rank[4],
        check_vma=False,
    )(queries, *arrays.values())


def _require_available(backend: Backend, obstacle: str | None) -> None:
    require(
        obstacle is None,
        f"TransformerConfig.attention_backend = {backend!r} cannot serve this attention: "
        f"{obstacle}; give 'auto'",
    )
