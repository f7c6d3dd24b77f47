"""Time that a prompt and its continuation take through a model's caches, on random tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from seqeff.bench.report import attempt, random_vocabulary
from seqeff.models import (
    Cache,
    CachedTransformer,
    TransformerConfig,
    cached_parameters,
    empty_cache,
    most_kept,
)
from seqeff.models.flops import entries_of_cache

if TYPE_CHECKING:
    from seqeff.training import Train

# tokens that one compiled loop generates: the host's part of a step is a thousandth
_LOOP = 1000

HEADER = (
    f"{'config':34}{'batch':>6}{'prompt':>11}{'chunk':>6}{'prompt s':>10}{'tokens/s':>11}"
    f"{'tokens':>8}{'ms/step':>9}{'tokens/s':>10}{'cache GiB':>11}{'read':>10}{'at most':>10}"
)


def benchmark_generation(
    configs: Sequence[tuple[str, Train]], *, batch: int, prompt: int, tokens: int, chunk: int
) -> Iterator[dict[str, Any]]:
    """Yields each config's times, of random parameters, after compilation.

    Args:
      batch: rows, each with a prompt of its own.
      prompt: tokens of a row's prompt, which the caches take a chunk at a time.
      tokens: of a row's continuation, the likeliest ones; they are sampled on the device.
    """
    for name, config in configs:
        model = config.model.for_vocabulary(random_vocabulary(config.model.vocabulary_size))
        facts = {"config": name, "batch": batch, "prompt": prompt, "chunk": chunk}
        yield facts | attempt(_measure, model, batch, prompt, tokens, chunk)


def line(row: dict[str, Any]) -> str:
    """A row under `HEADER`."""
    begin = f"{row['config'][-33:]:34}{row['batch']:6}{row['prompt']:11,}{row['chunk']:6}"
    if "error" in row:
        return f"{begin}  {row['error']}"
    return begin + (
        f"{row['prompt_seconds']:10.3f}{row['prompt_tokens_per_second']:11,}{row['tokens']:8,}"
        f"{row['milliseconds']:9.4f}{row['tokens_per_second']:10,}"
        f"{row['cache_bytes'] / 2**30:11.3f}{row['entries_read']:10,.1f}"
        f"{row['entries_resident']:10,}"
    )


def capacity(prompt: int, tokens: int) -> int:
    """Tokens of a row in all; the first loop of a continuation warms up, and is not counted."""
    length, loops = _loops(tokens)
    return prompt + (loops + 1) * length


def _loops(tokens: int) -> tuple[int, int]:
    """Tokens of a loop, and how many loops give at least so many tokens."""
    length = min(tokens, _LOOP)
    return length, math.ceil(tokens / length)


def _measure(
    config: TransformerConfig, batch: int, prompt: int, tokens: int, chunk: int
) -> dict[str, Any]:
    length, loops = _loops(tokens)

    # two programs: XLA takes over a minute where random numbers are cut by layer
    parameters = jax.jit(lambda: nnx.to_pure_dict(nnx.split(config.make(nnx.Rngs(0)))[1]))()
    parameters = jax.jit(functools.partial(cached_parameters, config))(parameters)
    all_tokens = capacity(prompt, tokens)
    kept = most_kept(config, _tokens(config, batch, 0, prompt), all_tokens - prompt)
    empty = jax.jit(functools.partial(empty_cache, config, batch, all_tokens, kept))
    cache = empty()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    sizes = {min(chunk, prompt), prompt % chunk} - {0}
    take = {
        rows: jax.jit(functools.partial(_take, config, rows), donate_argnums=1)
        .lower(parameters, cache, jnp.int32(0))
        .compile()
        for rows in sizes
    }
    given = jnp.zeros(batch, jnp.int32)
    go_on = (
        jax.jit(functools.partial(_go_on, config, length), donate_argnums=1)
        .lower(parameters, cache, given)
        .compile()
    )

    # a program's first run is slower
    for warm_up in take.values():
        cache = warm_up(parameters, cache, jnp.int32(0))
    jax.block_until_ready(cache)
    del cache
    cache = jax.block_until_ready(empty())
    begin = time.perf_counter()
    for first in range(0, prompt, chunk):
        cache = take[min(chunk, prompt - first)](parameters, cache, jnp.int32(first))
    jax.block_until_ready(cache)
    prompt_seconds = time.perf_counter() - begin

    count_entries = jax.jit(functools.partial(entries_of_cache, config))
    times, reads, residents = [], [], []
    for _ in range(loops + 1):
        before = _states(cache)
        begin = time.perf_counter()
        given, taken, cache = go_on(parameters, cache, given)
        jax.block_until_ready(given)
        times.append((time.perf_counter() - begin) / length)
        read, resident = count_entries(before, taken, jnp.full(batch, length, jnp.int32))
        reads.append(float(read.mean()))
        residents.append(int(resident.max()))
    # the first was slower to begin
    times, reads = times[1:], reads[1:]
    seconds = sum(times) / loops
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "dtype": config.dtype,
        "prompt_seconds": round(prompt_seconds, 4),
        "prompt_tokens_per_second": round(batch * prompt / prompt_seconds),
        "tokens": loops * length,
        "milliseconds": round(1e3 * seconds, 5),
        "slowest_milliseconds": round(1e3 * max(times), 5),
        "tokens_per_second": round(batch / seconds),
        "cache_bytes": cache_bytes,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(parameters)),
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "entries_read": round(sum(reads) / loops, 1),
        "entries_resident": max(residents),
    }


def _states(cache: Cache) -> Cache:
    """A copy of what says which entries there are, without keys and values."""
    layers = tuple(dataclasses.replace(run, arrays=()) for run in cache.layers)
    return jax.tree.map(jnp.copy, cache._replace(layers=layers))


def _take(
    config: TransformerConfig, rows: int, parameters: Any, cache: Cache, first: Int[Array, ""]
) -> Cache:
    """Takes random tokens in."""
    tokens = _tokens(config, cache.length.shape[0], first, rows)
    return CachedTransformer.of(config, parameters).extend(tokens, cache)[1]


def _tokens(
    config: TransformerConfig, batch: int, first: Int[Array, ""] | int, rows: int
) -> Int[Array, "batch rows"]:
    """Tokens of the prompts from the given one on, as random as a hash of their places."""
    key, places = jax.random.key(1), first + jnp.arange(rows)

    def draw(row: Array, place: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, row), place)
        return jax.random.randint(own, (), 0, config.vocabulary_size)

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(jnp.arange(batch), places)


def _go_on(
    config: TransformerConfig, length: int, parameters: Any, cache: Cache, given: Array
) -> tuple[Array, Int[Array, "batch length"], Cache]:
    """Generates so many tokens after the given ones; gives the last, and those taken in."""
    model = CachedTransformer.of(config, parameters)

    def step(carry: tuple[Array, Cache], _: None) -> tuple[tuple[Array, Cache], Array]:
        given, cache = carry
        hidden, cache = model.extend(given[:, None], cache)
        drawn = jnp.argmax(model.logits(hidden)[:, 0], axis=-1).astype(jnp.int32)
        return (drawn, cache), given

    (given, cache), taken = jax.lax.scan(step, (given, cache), length=length)
    return given, taken.T, cache
