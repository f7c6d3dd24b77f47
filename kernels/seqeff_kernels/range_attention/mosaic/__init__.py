"""Mosaic GPU kernels for Hopper: tensor cores fed by the bulk copy engine.

A program has compute workers (warpgroups), each with its own block of rows (or of entries, for
the gradients of keys and values), and one worker that copies the tiles they share into a ring of
stages in shared memory. Which tiles a block of rows visits, and which of them need a mask, follows
from its first and last rows' bounds; for blocks of entries XLA counts it, four numbers each. Every
sum is taken in one order: results are deterministic.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from seqeff_kernels import gpu, tuning
from seqeff_kernels.range_attention.execution import Execution, Walk
from seqeff_kernels.range_attention.mosaic.tiles import BLOCK, Plan, Tiles
from seqeff_kernels.range_attention.operands import (
    Operand,
    Static,
    gathered,
    operands,
    token_gradients,
)
from seqeff_kernels.range_attention.sources import ListedSource, Source, TokenSource

HEAD_DIMS = (64, 128)
_OLDEST_JAX = (0, 11)
_MOST_SOURCES = 3
# head sizes with their dtypes, and devices, on which experiments/gpu_checks/attention.py has passed
TESTED = frozenset(itertools.product((64, 128), ("bfloat16", "float16")))
TESTED_CAPABILITIES = ((9, 0),)
# of which the copy engine's tiles are made
LINES = 8


def obstacle(queries: Array, sources: tuple[Source, ...]) -> str | None:
    """Why this backend cannot serve, or None."""
    arrays = [queries, *(x for s in sources for x in (s.keys, s.values, s.queries))]
    return kernel_obstacle([x for x in arrays if x is not None], HEAD_DIMS, len(sources), "sources")


def kernel_obstacle(
    arrays: Sequence[Array], head_dims: Sequence[int], lists: int, listed: str
) -> str | None:
    """Why the kernels cannot serve arrays of [batch, entries, heads, head_dim] here, or None.

    Args:
      lists: how many lists of entries there are.
      listed: what they are called.
    """
    if jax.__version_info__ < _OLDEST_JAX:
        return f"it needs jax 0.11 or newer, not {jax.__version__}"
    dtypes = {jnp.dtype(x.dtype).name for x in arrays}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        return f"it needs bfloat16 or float16 throughout, not {' and '.join(sorted(dtypes))}"
    head_dim = arrays[0].shape[-1]
    if head_dim not in head_dims:
        return f"head_dim {head_dim} is not one of {tuple(head_dims)}"
    if lists > _MOST_SOURCES:
        return f"it serves up to {_MOST_SOURCES} {listed}, not {lists}"
    capability = gpu.compute_capability()
    if capability != (9, 0):
        found = jax.default_backend() if capability is None else f"{capability[0]}.{capability[1]}"
        return f"it needs an NVIDIA GPU of compute capability 9.0, not {found}"
    return gpu.partition_obstacle()


def attend(
    queries: Float[Array, "batch rows heads head_dim"],
    sources: tuple[Source, ...],
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """See `range_attention`; `tiles` replaces those of `chosen_plan`, for tuning."""
    rows = queries.shape[1]
    distinct, which = _distinct_queries(queries, sources)
    made, static = operands(queries, sources)
    plan = Plan(tuple(which), static, scale, tiles or chosen_plan(queries, sources))
    output, logsumexp = cast(
        tuple[Array, Array],
        _attend(
            tuple(pad_lines(own) for own in distinct),
            tuple(operand._replace(queries=None) for operand in made),
            plan,
        ),
    )
    return output[:, :rows], logsumexp[:, :rows]


def chosen_plan(queries: Array, sources: tuple[Source, ...]) -> Tiles:
    """The tiles that the table lists, or the default ones, cut to what fits."""
    key = tuning.attention_key(queries, sources)
    tiles = tuning.planned("attention", "mosaic", key, Tiles, Tiles)
    distinct, _ = _distinct_queries(queries, sources)
    return tiles.fitted(queries.shape[-1], len(distinct), len(sources))


def execution(queries: Array, sources: tuple[Source, ...]) -> Execution:
    """How this backend serves a call."""
    tiles = chosen_plan(queries, sources)
    forward, backward = [], []
    for index, source in enumerate(sources):
        window = source.window if isinstance(source, TokenSource) else None
        forward.append(Walk(index, tiles.block_rows, tiles.entries(window), 2))
        # scores and the weights' gradient are in both kernels of the backward pass
        backward.append(Walk(index, tiles.block_rows, tiles.backward_tile, 3))
        backward.append(Walk(index, tiles.backward_tile, BLOCK, 4))
    return Execution(
        backend="mosaic",
        plan=dataclasses.asdict(tiles),
        deterministic=True,
        forward=forward,
        backward=backward,
    )


def _distinct_queries(queries: Array, sources: tuple[Source, ...]) -> tuple[list[Array], list[int]]:
    """The different arrays of queries, and which of them each source takes."""
    distinct: list[Array] = []
    which = []
    for source in sources:
        own = queries if source.queries is None else source.queries
        same = [index for index, other in enumerate(distinct) if other is own]
        which.append(same[0] if same else len(distinct))
        if not same:
            distinct.append(own)
    return distinct, which


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(queries: tuple[Array, ...], made: tuple[Operand, ...], plan: Plan):
    return _forward(plan, queries, made)


def _attend_forward(queries, made, plan):
    # named so that a rematerialisation policy can keep them, and the backward alone runs again
    outputs = checkpoint_name(_attend(queries, made, plan), "range_attention")
    return outputs, (queries, made, outputs)


def _attend_backward(plan, saved, gradients):
    return _backward(plan, saved, gradients)


_attend.defvjp(_attend_forward, _attend_backward)


# kernels take a second to lower: layers that attend alike share what is lowered
@functools.partial(jax.jit, static_argnums=0)
def _forward(plan, queries, made):
    # importing Pallas takes a while, and it is needed on Hopper alone
    from seqeff_kernels.range_attention.mosaic.forward import forward

    output, logsumexp = forward(queries, _sources(made, plan.static), plan)
    return output, jnp.swapaxes(logsumexp[..., : output.shape[1]], 1, 2)


@functools.partial(jax.jit, static_argnums=0)
def _backward(plan, saved, gradients):
    from seqeff_kernels.range_attention.mosaic.gradients import (
        entries_gradient,
        queries_gradient,
        row_statistics,
    )

    queries, made, outputs = saved
    plan = plan.for_gradients()
    sources = _sources(made, plan.static)
    statistics = row_statistics(outputs, gradients, plan)
    entries_gradients = []
    for source, operand, known, own in zip(sources, made, plan.static, plan.queries, strict=True):
        keys, values = entries_gradient(
            queries[own], source, statistics, plan, _last_read(operand, known)
        )
        entries_gradients.append((keys[:, : known.entries], values[:, : known.entries]))
    return (
        tuple(
            queries_gradient(
                own,
                [s for s, q in zip(sources, plan.queries, strict=True) if q == i],
                statistics,
                plan,
            )
            for i, own in enumerate(queries)
        ),
        tuple(
            # None: integers have no gradient
            operand._replace(keys=keys, values=values, start=None, end=None, packed=None)
            for operand, (keys, values) in zip(
                made, token_gradients(made, plan.static, entries_gradients), strict=True
            )
        ),
    )


def _sources(made: tuple[Operand, ...], static: tuple[Static, ...]) -> list[ListedSource]:
    """The sources as the copy engine takes them."""
    return [
        ListedSource(
            None,
            pad_lines(source.keys),
            pad_lines(source.values),
            source.start,
            source.end,
        )
        for source in gathered(made, static, finite=True)
    ]


def _last_read(operand: Operand, known: Static) -> Array | None:
    """After which no entry's gradient reaches a token, or None where each entry is one."""
    if operand.packed is None:
        return None
    # of all chosen tokens, those that no row attends among them
    return jnp.minimum(operand.packed.count[:, -1].max(), known.entries)


def pad_lines(array: Array) -> Array:
    """An array of [batch, entries, ...] with as many entries as the copy engine can take."""
    missing = -array.shape[1] % LINES
    if not missing:
        return array
    return jnp.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])
