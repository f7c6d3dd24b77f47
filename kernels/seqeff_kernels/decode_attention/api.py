"""The public operation and the choice of its backend."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jax import Array, custom_jvp
from jaxtyping import Float

from seqeff_kernels import gpu, tuning
from seqeff_kernels.decode_attention import mosaic, reference, triton, xla
from seqeff_kernels.decode_attention.blocks import CacheBlock, NewEntries, check
from seqeff_kernels.decode_attention.plan import Sizes

Backend = Literal["auto", "reference", "xla", "triton", "mosaic"]

_BACKENDS = {"reference": reference, "xla": xla, "triton": triton, "mosaic": mosaic}
# those of GPUs, the first where the table says nothing
_KERNELS = ("triton", "mosaic")


class Execution(NamedTuple):
    """How a call is served.

    Attributes:
      backend: its name.
      plan: the fields of its plan; none where it has nothing to plan.
    """

    backend: str
    plan: dict[str, Any]


def decode_attention(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: Sequence[CacheBlock],
    *,
    new: NewEntries | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """Attends, in one softmax, the filled entries of the blocks and the rows' own entries.

    With `S_i` what row i attends: the entries `[0, filled)` of every block and the new entries
    `[0, i]`, `q` its query (the block's own where it brings one) and `s_e = scale * q . k_e`:

        logsumexp_i = log sum_{e in S_i} exp(s_e)
        output_i = sum_{e in S_i} exp(s_e - logsumexp_i) v_e

    A row that attends nothing gives output 0 and logsumexp -inf. Scores, softmax and logsumexp
    are float32; the weights are cast to the values' dtype for the second product. The batch's
    results do not depend on each other, bit for bit. There is no gradient.

    Args:
      queries: of the newest tokens; heads are a multiple of the blocks' KV heads, and heads of
        one KV head are adjacent.
      blocks: one or more, all of the queries' head_dim and of one number of KV heads.
      new: keys and values of the query rows themselves, causal among each other; None where the
        blocks hold them already.
      scale: of the scores, positive; None: `head_dim ** -0.5`.
      backend: `auto` takes the GPU kernel only for what it is tested on, else the portable form.

    Returns:
      output, of the queries' dtype, and logsumexp, float32.

    Raises:
      ValueError: a shape does not fit, or the backend asked for cannot serve; says why.
      NotImplementedError: a gradient is taken.
    """
    blocks = _tuple_of(blocks)
    check(queries, blocks, new)
    factor = queries.shape[-1] ** -0.5 if scale is None else float(scale)
    if not factor > 0:
        raise ValueError(f"scale is {scale}; give a positive number, or None")
    chosen = _BACKENDS[_serving(backend, queries, blocks, new)]
    return _attend(chosen.attend, factor, queries, blocks, new)


def automatic(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: Sequence[CacheBlock],
    *,
    new: NewEntries | None = None,
) -> str:
    """The backend that `auto` takes here; reads shapes and dtypes only, as `explain` does."""
    blocks = _tuple_of(blocks)
    check(queries, blocks, new)
    serving = [
        name
        for name in _KERNELS
        if gpu.covered(_BACKENDS[name], queries)
        and not _BACKENDS[name].obstacle(queries, blocks, new)
    ]
    if not serving:
        return "xla"
    key = Sizes.of(queries, blocks, new).key(str(queries.dtype))
    return tuning.fastest("decode", key, serving) or serving[0]


def execution(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: Sequence[CacheBlock],
    *,
    new: NewEntries | None = None,
    backend: Backend = "auto",
) -> Execution:
    """How a call is served by a backend, or by the one that `auto` takes.

    Reads shapes and dtypes only, as `explain` does.

    Raises:
      ValueError: as in `decode_attention`.
    """
    blocks = _tuple_of(blocks)
    check(queries, blocks, new)
    name = _serving(backend, queries, blocks, new)
    if name not in _KERNELS:
        return Execution(name, {})
    plan = _BACKENDS[name].chosen_plan(queries, blocks, new)
    return Execution(name, dataclasses.asdict(plan))


def explain(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: Sequence[CacheBlock],
    *,
    new: NewEntries | None = None,
) -> dict[str, str]:
    """For every backend, 'available' or why it cannot serve this attention here.

    Under 'auto' is what it takes and, where that is the portable form, why no kernel is taken.
    Only shapes and dtypes are read, so arrays may be `jax.ShapeDtypeStruct`s.
    """
    blocks = _tuple_of(blocks)
    taken = automatic(queries, blocks, new=new)
    answers = {name: obstacle(queries, blocks, name, new=new) or "available" for name in _BACKENDS}
    passed_over = [name for name in _KERNELS if answers[name] == "available"]
    said = gpu.say_taken(taken, passed_over, queries)
    if taken == "xla" and not passed_over:
        reasons = ", ".join(f"{name} ({answers[name]})" for name in _KERNELS)
        said += f": no kernel can serve: {reasons}"
    return {"auto": said, **answers}


def obstacle(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: Sequence[CacheBlock],
    backend: str,
    *,
    new: NewEntries | None = None,
) -> str | None:
    """Why a backend cannot serve this attention here, or None; reads shapes and dtypes only.

    Raises:
      ValueError: there is no backend of that name.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; give auto or one of {list(_BACKENDS)}")
    return _BACKENDS[backend].obstacle(queries, _tuple_of(blocks), new)


def _tuple_of(blocks: Sequence[CacheBlock]) -> tuple[CacheBlock, ...]:
    if isinstance(blocks, CacheBlock):
        raise ValueError("blocks is a CacheBlock; give a list, if of one")
    return tuple(blocks)


def _serving(
    backend: str, queries: Array, blocks: tuple[CacheBlock, ...], new: NewEntries | None
) -> str:
    """The backend asked for, or what `auto` takes; raises ValueError where it cannot serve."""
    if backend == "auto":
        return automatic(queries, blocks, new=new)
    found = obstacle(queries, blocks, backend, new=new)
    if found:
        raise ValueError(f"backend {backend!r} cannot serve this attention: {found}")
    return backend


@functools.partial(custom_jvp, nondiff_argnums=(0, 1))
def _attend(attend, scale, queries, blocks, new):
    return attend(queries, blocks, new, scale)


@_attend.defjvp
def _no_gradient(attend, scale, primals, tangents):
    del attend, scale, primals, tangents
    raise NotImplementedError("decode_attention has no gradient; range_attention has one")
