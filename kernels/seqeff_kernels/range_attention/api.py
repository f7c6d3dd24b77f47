"""The public operation and the choice of its backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jax import Array
from jaxtyping import Float

from seqeff_kernels import gpu, tuning
from seqeff_kernels.range_attention import cudnn, mosaic, reference, triton, xla
from seqeff_kernels.range_attention.execution import Execution
from seqeff_kernels.range_attention.sources import Source

Backend = Literal["auto", "reference", "xla", "cudnn", "mosaic", "triton"]

_BACKENDS = {
    "reference": reference,
    "xla": xla,
    "cudnn": cudnn,
    "mosaic": mosaic,
    "triton": triton,
}
# those of GPUs, the first where the table says nothing
_KERNELS = ("cudnn", "mosaic", "triton")


def range_attention(
    queries: Float[Array, "batch rows heads head_dim"],
    sources: Sequence[Source],
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """Attends, in one softmax, the union of each row's ranges in the sources.

    With `S_i` the entries that row i attends, over all sources, `q` its query (the source's own
    where it brings one) and `s_e = scale * q . k_e`:

        logsumexp_i = log sum_{e in S_i} exp(s_e)
        output_i = sum_{e in S_i} exp(s_e - logsumexp_i) v_e

    A row that attends nothing gives output 0, logsumexp -inf and no gradient. Scores, softmax and
    logsumexp are float32; the weights are cast to the values' dtype for the second product.
    Gradients reach the queries, the sources' own queries, keys and values; a row's result does
    not depend on the other rows of the batch, bit for bit.

    Args:
      queries: heads are a multiple of the sources' KV heads; heads of one KV head are adjacent.
      sources: one or more, all of the queries' head_dim and of one number of KV heads.
      scale: of the scores, positive; None: `head_dim ** -0.5`.
      backend: `auto` takes a GPU kernel only for what it is tested on, else the portable form.

    Returns:
      output, of the queries' dtype, and logsumexp, float32.

    Raises:
      ValueError: a shape does not fit, or the backend asked for cannot serve; says why.
    """
    sources = _tuple_of(sources)
    _check(queries, sources)
    factor = queries.shape[-1] ** -0.5 if scale is None else float(scale)
    if not factor > 0:
        raise ValueError(f"scale is {scale}; give a positive number, or None")
    return _BACKENDS[_serving(backend, queries, sources)].attend(queries, sources, factor)


def automatic(queries: Float[Array, "batch rows heads head_dim"], sources: Sequence[Source]) -> str:
    """The backend that `auto` takes here; reads shapes and dtypes only, as `explain` does."""
    sources = _tuple_of(sources)
    _check(queries, sources)
    serving = [
        name
        for name in _KERNELS
        if gpu.covered(_BACKENDS[name], queries) and not _BACKENDS[name].obstacle(queries, sources)
    ]
    if not serving:
        return "xla"
    key = tuning.attention_key(queries, sources)
    return tuning.fastest("attention", key, serving) or serving[0]


def execution(
    queries: Float[Array, "batch rows heads head_dim"],
    sources: Sequence[Source],
    *,
    backend: Backend = "auto",
) -> Execution:
    """How a call is served by a backend, or by the one that `auto` takes.

    Reads shapes and dtypes only, as `explain` does.

    Raises:
      ValueError: as in `range_attention`.
    """
    sources = _tuple_of(sources)
    _check(queries, sources)
    return _BACKENDS[_serving(backend, queries, sources)].execution(queries, sources)


def explain(
    queries: Float[Array, "batch rows heads head_dim"], sources: Sequence[Source]
) -> dict[str, str]:
    """For every backend, 'available' or why it cannot serve this attention here.

    Under 'auto' is what it takes and, where that is the portable form, why no kernel is taken.
    Only shapes and dtypes are read, so arrays may be `jax.ShapeDtypeStruct`s.
    """
    sources = _tuple_of(sources)
    taken = automatic(queries, sources)
    answers = {name: obstacle(queries, sources, name) or "available" for name in _BACKENDS}
    passed_over = [name for name in _KERNELS if answers[name] == "available"]
    said = gpu.say_taken(taken, passed_over, queries)
    if taken == "xla" and not passed_over:
        reasons = ", ".join(f"{name} ({answers[name]})" for name in _KERNELS)
        said += f": no kernel can serve: {reasons}"
    return {"auto": said, **answers}


def obstacle(
    queries: Float[Array, "batch rows heads head_dim"], sources: Sequence[Source], backend: str
) -> str | None:
    """Why a backend cannot serve this attention here, or None; reads shapes and dtypes only.

    Raises:
      ValueError: there is no backend of that name.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; give auto or one of {list(_BACKENDS)}")
    return _BACKENDS[backend].obstacle(queries, _tuple_of(sources))


def _tuple_of(sources: Sequence[Source]) -> tuple[Source, ...]:
    if isinstance(sources, Source):
        raise ValueError(f"sources is a {type(sources).__name__}; give a list, if of one")
    return tuple(sources)


def _serving(backend: str, queries: Array, sources: tuple[Source, ...]) -> str:
    """The backend asked for, or what `auto` takes; raises ValueError where it cannot serve."""
    if backend == "auto":
        return automatic(queries, sources)
    found = obstacle(queries, sources, backend)
    if found:
        raise ValueError(f"backend {backend!r} cannot serve this attention: {found}")
    return backend


def _check(queries: Array, sources: tuple[Source, ...]) -> None:
    if queries.ndim != 4:
        raise ValueError(f"queries has shape {queries.shape}; give (batch, rows, heads, head_dim)")
    if not sources:
        raise ValueError("range_attention needs at least one source")
    for index, source in enumerate(sources):
        source.check(queries, f"sources[{index}]")
    kv_heads = {source.keys.shape[2] for source in sources}
    if len(kv_heads) > 1:
        raise ValueError(f"the sources have different numbers of KV heads: {sorted(kv_heads)}")
