"""Models on a GPU, bfloat16 and its kernels, against float32 and the portable form.

    python experiments/gpu_checks/models.py --json experiments/gpu_checks/models_RESULT.json

Each attention takes the same tokens as whole rows with gradients, in chunks through its cache, and
one token at a time. Kernels may not be further from float32 than the portable form in bfloat16 is
by more than a half of that. On a GPU the compiled programs must call kernels; without one both are
the portable form. Exits with status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from attention import kernels_hash
from flax import nnx
from jax import Array

from seqeff.models import (
    CachedTransformer,
    DenseAttention,
    FeedForward,
    HeadProjections,
    LayerNorm,
    NormalInitialisation,
    Rotary,
    SeparatorAttention,
    TransformerConfig,
    cached_parameters,
    empty_cache,
    token_losses,
)
from seqeff.models.flops import abstract_model
from seqeff.runs import versions

_VOCABULARY, _LAYERS, _BATCH = 512, 3, 2
_SEPARATORS = tuple(range(0, _VOCABULARY, 9))
_MARGIN, _LEAST = 1.5, 2e-3
_KERNELS = "triton|mosaic|cudnn"

ATTENTIONS = {
    "dense": DenseAttention(),
    "window": SeparatorAttention(window=128, initial_tokens=4, characters="", separator_ids=()),
    **{
        f"{positions}, separators {kept or 'all'}": SeparatorAttention(
            window=64,
            initial_tokens=3,
            separators=kept,
            separator_ids=_SEPARATORS,
            positions=positions,
        )
        for positions in ("absolute", "compact")
        for kept in (None, 64)
    },
}


def config(attention: Any, backend: str, dtype: str) -> TransformerConfig:
    """A small model whose heads have 64 dimensions."""
    return TransformerConfig(
        vocabulary_size=_VOCABULARY,
        width=256,
        layers=_LAYERS,
        attention=attention,
        projections=HeadProjections(heads=4),
        feed_forward=FeedForward(hidden=512),
        norm=LayerNorm(),
        positions=Rotary(fraction=0.5),
        # large enough that scores differ
        initialisation=NormalInitialisation(std=0.1),
        attention_backend=backend,  # pyright: ignore[reportArgumentType]
        dtype=dtype,  # pyright: ignore[reportArgumentType]
    )


class Result(NamedTuple):
    """Arrays by what they are, and the kernels that the program calls."""

    arrays: dict[str, Any]
    kernels: Sequence[str]


def kernels_of(program: jax.stages.Compiled) -> list[str]:
    """Names of the attention kernels that a program calls."""
    targets = re.findall(r'custom_call_target="([^"]+)"', program.as_text() or "")
    return sorted({target for target in targets if re.search(_KERNELS, target)})


def whole(model: TransformerConfig, parameters: Any, tokens: Array) -> Result:
    """States of whole rows, and gradients of the loss."""
    graph, _ = nnx.split(abstract_model(model))

    @jax.jit
    def run(parameters: Any) -> tuple[Array, Any]:
        def loss(parameters: Any) -> tuple[Array, Array]:
            merged = nnx.merge(graph, parameters)
            states = merged(tokens)
            losses = token_losses(states[:, :-1], merged.head(), tokens[:, 1:])
            return losses.mean(), states

        gradients, states = jax.grad(loss, has_aux=True)(parameters)
        return states, gradients

    program = run.lower(parameters).compile()
    states, gradients = program(parameters)
    return Result({"states": states, "gradients": gradients}, kernels_of(program))


def cached(
    model: TransformerConfig, parameters: Any, tokens: Array, chunk: int, count: int
) -> Result:
    """States of the first `count` tokens, so many at a time; the last chunk is filled up."""

    @jax.jit
    def take(parameters: Any, cache: Any, tokens: Array, real: Array) -> tuple[Array, Any]:
        return CachedTransformer.of(model, parameters).extend(tokens, cache, real)

    parameters = jax.jit(lambda x: cached_parameters(model, x))(parameters)
    cache, found = empty_cache(model, tokens.shape[0], count), []
    shapes = jax.ShapeDtypeStruct((tokens.shape[0], chunk), jnp.int32), tokens[:, 0]
    program = take.lower(parameters, cache, *shapes).compile()
    for first in range(0, count, chunk):
        part = tokens[:, first : min(first + chunk, count)]
        real = part.shape[1]
        part = jnp.pad(part, ((0, 0), (0, chunk - real)))
        states, cache = program(parameters, cache, part, jnp.full(len(part), real, jnp.int32))
        found.append(states[:, :real])
    return Result({"states": jnp.concatenate(found, axis=1)}, kernels_of(program))


def error(found: Any, exact: Any) -> float:
    """Relative, in the Euclidean norm over all leaves."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    parts = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    away = sum(float(np.square(a - b).sum()) for a, b in parts)
    return float(np.sqrt(away / sum(float(np.square(b).sum()) for _, b in parts)))


def check(name: str, length: int, chunks: tuple[int, ...], steps: int) -> list[dict[str, Any]]:
    """Errors of one attention, by the way that the tokens are taken."""
    tokens = jax.random.randint(jax.random.key(1), (_BATCH, length), 0, _VOCABULARY)
    exact, portable, kernels = (
        config(ATTENTIONS[name], backend, dtype)
        for backend, dtype in (("xla", "float32"), ("xla", "bfloat16"), ("auto", "bfloat16"))
    )
    parameters = jax.jit(lambda: nnx.to_pure_dict(nnx.split(exact.make(nnx.Rngs(0)))[1]))()
    reference = whole(exact, parameters, tokens)
    rows = []
    ways = {"whole rows": lambda model: whole(model, parameters, tokens)}
    for chunk, count in (*((chunk, length) for chunk in chunks), (1, steps)):
        ways[f"{chunk} at a time"] = lambda model, chunk=chunk, count=count: cached(
            model, parameters, tokens, chunk, count
        )
    for way, run in ways.items():
        found, usual = run(kernels), run(portable)
        served = bool(found.kernels) or jax.default_backend() != "gpu"
        for part, value in found.arrays.items():
            truth = reference.arrays[part]
            if part == "states":
                truth = truth[:, : value.shape[1]]
            errors = error(value, truth), error(usual.arrays[part], truth)
            rows.append(
                {
                    "attention": name,
                    "way": way,
                    "part": part,
                    "kernels": found.kernels,
                    "relative_error": float(f"{errors[0]:.4g}"),
                    "portable_error": float(f"{errors[1]:.4g}"),
                    "passed": served and errors[0] <= _MARGIN * errors[1] + _LEAST,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that checks of attentions share."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("--json", type=Path)
    found.add_argument("--commit", help="kept in the report (default: what git says)")
    found.add_argument("--attention", choices=ATTENTIONS, nargs="+", default=list(ATTENTIONS))
    return found


def report(options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> int:
    """Writes the report, if it has a place, and tells how many passed; the exit status."""
    found = {
        "device": jax.devices()[0].device_kind,
        "versions": versions() | ({"commit": options.commit} if options.commit else {}),
        "kernels_sha256": kernels_hash(),
        "results": results,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    failed = sum(not row["passed"] for row in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


def main() -> int:
    """Checks every attention."""
    arguments = parser(__doc__)
    arguments.add_argument("--length", type=int, default=2048, help="of the rows")
    arguments.add_argument("--chunk", type=int, nargs="+", default=[500, 4096])
    arguments.add_argument("--steps", type=int, default=300, help="of one token")
    options = arguments.parse_args()
    results = [
        row
        for name in options.attention
        for row in check(name, options.length, tuple(options.chunk), options.steps)
    ]
    return report(options, results)


if __name__ == "__main__":
    sys.exit(main())
