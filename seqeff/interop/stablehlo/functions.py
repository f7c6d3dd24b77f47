"""Prefill and decode step of a model as `jax.export` takes them: of dicts of arrays, by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int

from seqeff.checks import UserError
from seqeff.interop.tensors import by_name
from seqeff.models import CachedTransformer, TransformerConfig
from seqeff.models.cached import cache_of_sizes
from seqeff_kernels.range_attention.xla import tile_side

PORTABLE = "xla"
"""The backend that needs nothing but XLA."""

ARGUMENTS = {
    "prefill": ("weights", "cache", "tokens", "count"),
    "decode": ("weights", "cache", "token"),
}
"""What each function takes; both give `("logits", "cache")`."""

_PLATFORMS = ("cpu", "cuda")
# of the GPU kernels; jax does not vouch that its later versions know all of them
_CUSTOM_CALLS = ("triton_kernel_call_ffi", "mosaic_gpu_v2")


class Spec(NamedTuple):
    """An array: the size of each axis, or its name where a caller chooses it; its type."""

    shape: tuple[int | str, ...]
    dtype: str


class Functions:
    """The functions of a model.

    `prefill` takes the first `count` of each row's tokens in, and `decode` one token of each row.
    Both give the logits of the token that follows, and the cache with what they took. A cache of
    zeros has no tokens. A row with more of them than there is room for gives NaN.

    Attributes:
      sizes: the model's: rows of the batch, tokens of the longest prompt and, where caches grow,
        tokens of a row (`context`) or those of them that are kept. None: a caller chooses.
      constraints: of sizes that a caller of `prefill` chooses, as `jax.export` writes them.
      arrays: the `Spec` of every argument and result by its name; of weights and cache, by name.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocabulary_size: int,
        weights: Any,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
          vocabulary_size: logits that there are; the model may have more, which stand for nothing.
          weights: `cached_parameters`, or their shapes.
          sizes: fixed ones, all of the model's; None: none.

        Raises:
          UserError: a size is missing or is none of the model's, or is too small.
        """
        self._config, self._vocabulary_size = config, vocabulary_size
        free: Any = export.symbolic_shape("batch, context, kept")
        cache = jax.eval_shape(lambda: cache_of_sizes(config, *free))
        self._weights_tree, self._cache_tree = map(jax.tree.structure, (weights, cache))
        found = {str(size) for leaf in jax.tree.leaves(cache) for size in leaf.shape}
        names = ("batch", "length", *(name for name in ("context", "kept") if name in found))
        self.sizes: dict[str, int | None] = dict.fromkeys(names)
        self.constraints: list[str] = []
        if sizes is not None:
            _check_sizes(names, sizes)
            self.sizes |= sizes
        elif "context" in names:
            side = tile_side()
            self.constraints = [f"context >= {side}*floordiv(length + {side - 1}, {side})"]
        self.arrays = {
            "weights": self._specs(weights),
            "cache": self._specs(cache),
            "tokens": self._spec(("batch", "length"), "int32"),
            "count": self._spec(("batch",), "int32"),
            "token": self._spec(("batch",), "int32"),
            "logits": self._spec(("batch", vocabulary_size), "float32"),
        }

    def exported(self, name: str, weights: Mapping[str, Any] | None = None) -> export.Exported:
        """A function in StableHLO: of the portable backend for every platform, else for this one.

        Args:
          name: of `ARGUMENTS`.
          weights: held inside the function; None: it takes them.

        Raises:
          UserError: the model's attention cannot be compiled for any size.
        """
        scope = export.SymbolicScope(self.constraints if name == "prefill" else ())
        names, function = list(ARGUMENTS[name]), getattr(self, f"_{name}")
        if weights is not None:
            names.remove("weights")
            function = functools.partial(function, weights)
        arguments = jax.tree.map(
            lambda spec: jax.ShapeDtypeStruct(
                export.symbolic_shape(", ".join(map(str, spec.shape)), scope=scope), spec.dtype
            ),
            [self.arrays[argument] for argument in names],
            is_leaf=lambda node: isinstance(node, Spec),
        )
        portable = self._config.attention_backend == PORTABLE
        calls = () if portable else _CUSTOM_CALLS
        make = export.export(
            jax.jit(function),
            platforms=_PLATFORMS if portable else None,
            disabled_checks=[export.DisabledSafetyCheck.custom_call(call) for call in calls],
        )
        try:
            with _no_source_files():
                return make(*arguments)
        except jax.errors.InconclusiveDimensionOperation as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(
                f"the model does not compile for sizes that are not known: {reason}; give --sizes "
                + _wanted(self.sizes)
            ) from error

    def _prefill(
        self,
        weights: Mapping[str, Array],
        cache: Mapping[str, Array],
        tokens: Int[Array, "batch length"],
        count: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch vocabulary"], dict[str, Array]]:
        missing = _whole_tiles(tokens.shape[1]) - tokens.shape[1]
        return self._extend(weights, cache, jnp.pad(tokens, ((0, 0), (0, missing))), count)

    def _decode(
        self, weights: Mapping[str, Array], cache: Mapping[str, Array], token: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch vocabulary"], dict[str, Array]]:
        return self._extend(weights, cache, token[:, None], jnp.ones_like(token))

    def _extend(
        self,
        weights: Mapping[str, Array],
        cache: Mapping[str, Array],
        tokens: Int[Array, "batch rows"],
        count: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch vocabulary"], dict[str, Array]]:
        parameters = self._weights_tree.unflatten(weights[x] for x in self.arrays["weights"])
        before = self._cache_tree.unflatten(cache[x] for x in self.arrays["cache"])
        model = CachedTransformer.of(self._config, parameters)
        hidden, after = model.extend(tokens, before, count)
        last = jnp.maximum(count - 1, 0)[:, None, None]
        logits = model.logits(jnp.take_along_axis(hidden, last, axis=1))
        return logits[:, 0, : self._vocabulary_size], by_name(after)

    def _specs(self, tree: Any) -> dict[str, Spec]:
        return {
            name: self._spec(leaf.shape, jnp.dtype(leaf.dtype).name)
            for name, leaf in by_name(tree).items()
        }

    def _spec(self, shape: Sequence[Any], dtype: str) -> Spec:
        sizes = (size if isinstance(size, int) else str(size) for size in shape)
        return Spec(tuple(self.sizes.get(str(size)) or size for size in sizes), dtype)


@contextlib.contextmanager
def _no_source_files() -> Iterator[None]:
    """Compiles without the names of source files, which are those of this machine."""
    limit = "jax_traceback_in_locations_limit"
    before = jax.config.values[limit]
    jax.config.update(limit, 0)
    try:
        yield
    finally:
        jax.config.update(limit, before)


def _whole_tiles(length: Any) -> Any:
    """A length, which may be symbolic, rounded up to tiles of the portable backend."""
    side = tile_side()
    return (length + side - 1) // side * side


def _check_sizes(names: Sequence[str], sizes: Mapping[str, int]) -> None:
    if set(sizes) != set(names):
        given = " ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"--sizes {given} are not this model's: give --sizes {_wanted(names)}")
    least = _whole_tiles(sizes["length"])
    if sizes.get("context", least) < least:
        raise UserError(
            f"--sizes context={sizes['context']} has no room for a prompt of length="
            f"{sizes['length']}, in whole tiles {least}: give at least context={least}"
        )


def _wanted(names: Iterable[str]) -> str:
    return " ".join(f"{name}=N" for name in names)
