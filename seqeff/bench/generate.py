"""Time that prompts and their continuations take through the engine, on random tokens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from seqeff.bench.report import attempt, random_vocabulary
from seqeff.checks import UserError
from seqeff.inference import (
    PROMPT_ROWS,
    CacheUse,
    Engine,
    Request,
    Sampling,
    generation_context,
    most_kept_by,
)
from seqeff.models import TransformerConfig

if TYPE_CHECKING:
    from seqeff.training import Train

# further tokens whose time is one of those of which the slowest is told
_GROUP = 1000
_GREEDY = Sampling(temperature=0.0)
# tokens of the continuations that warm up
_WARM_UP = 32

HEADER = (
    f"{'config':34}{'batch':>6}{'prompt':>11}{'chunk':>6}{'prompt s':>10}{'tokens':>8}"
    f"{'ms/step':>9}{'tokens/s':>10}{'in all':>10}{'GB/step':>9}{'share':>7}{'cache GiB':>11}"
    f"{'read':>10}{'at most':>10}"
)


class RandomVocabulary(NamedTuple):
    """Ids without texts, none of which ends one."""

    vocabulary_size: int
    ends_of_text: tuple[int, ...] = ()

    def token_bytes(self, token: int) -> bytes:
        return b""


def benchmark_generation(
    configs: Sequence[tuple[str, Train]],
    *,
    batch: int,
    prompt: int,
    tokens: int,
    chunk: int,
    prompt_rows: int = PROMPT_ROWS,
    repeats: int = 1,
    sampling: Sampling = _GREEDY,
    reference: Callable[[], float] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields each config's times, of random parameters, after compilation.

    A row has `prompt_seconds`, of the prompts with one token each; `milliseconds` a step of all
    rows, for what further tokens take beyond that; its `tokens_per_second`; and
    `whole_tokens_per_second` of the continuations over the whole time. `bytes_a_step` are those of
    the matrices, once, and of the entries read, and `share` what they take of `reference`. All is
    as users of the engine get it, the host included, of the repeat whose `seconds` are the median;
    `all_seconds` are of every one, in their order.

    Args:
      batch: requests, each with a prompt of its own, all at a time.
      prompt: tokens of a prompt, which the caches take a chunk at a time.
      prompt_rows: prompts that are read at a time.
      tokens: of a continuation; at least two.
      repeats: of all requests, timed one after another.
      sampling: how tokens are drawn.
      reference: gives a copy's bytes a second; called after the measurements, whose most memory in
        use is told.
    """
    for name, config in configs:
        model = config.model.for_vocabulary(random_vocabulary(config.model.vocabulary_size))
        sizes = {"batch": batch, "prompt": prompt, "chunk": chunk, "prompt_rows": prompt_rows}
        facts = {"config": name, **sizes, "sampling": dataclasses.asdict(sampling)}
        given = (*sizes.values(), tokens, repeats, sampling, reference)
        yield facts | attempt(_measure, model, *given)


def line(row: dict[str, Any]) -> str:
    """A row under `HEADER`."""
    begin = f"{row['config'][-33:]:34}{row['batch']:6}{row['prompt']:11,}{row['chunk']:6}"
    if "error" in row:
        return f"{begin}  {row['error']}"
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    return begin + (
        f"{row['prompt_seconds']:10.3f}{row['tokens']:8,}{row['milliseconds']:9.4f}"
        f"{row['tokens_per_second']:10,}{row['whole_tokens_per_second']:10,}"
        f"{row['bytes_a_step'] / 1e9:9.3f}{share:>7}"
        f"{row['cache_bytes'] / 2**30:11.3f}{row['entries_read']:10,.1f}"
        f"{row['entries_resident']:10,}"
    )


def _measure(
    config: TransformerConfig,
    batch: int,
    prompt: int,
    chunk: int,
    prompt_rows: int,
    tokens: int,
    repeats: int,
    sampling: Sampling,
    reference: Callable[[], float] | None,
) -> dict[str, Any]:
    parameters = jax.jit(lambda: nnx.to_pure_dict(nnx.split(config.make(nnx.Rngs(0)))[1]))()
    drawn = np.random.default_rng(0).integers(0, config.vocabulary_size, (batch, prompt), np.int32)
    requests = [Request(prompt=row, tokens=tokens, sampling=sampling) for row in drawn]
    engine = Engine(
        config,
        RandomVocabulary(config.vocabulary_size),
        slots=batch,
        context=generation_context(config, prompt + tokens),
        kept=most_kept_by(config, requests),
        chunks=sorted({min(chunk, prompt), prompt % chunk or chunk}),
        prompt_rows=prompt_rows,
    )
    # the same programs: a whole chunk if there is one, and the last
    given = engine.prepare(parameters)
    short = drawn[:, : prompt if prompt < chunk else chunk + prompt % chunk]
    some = min(tokens, _WARM_UP)
    _stream(engine, given, [Request(prompt=x, tokens=some, sampling=sampling) for x in short])
    prompts = [dataclasses.replace(request, tokens=1) for request in requests]
    timed_prompts, timed = [], []
    for _ in range(repeats):
        timed_prompts.append(_stream(engine, given, prompts))
        timed.append(_stream(engine, given, requests))
    middle = (repeats - 1) // 2
    first = sorted(timed_prompts, key=lambda times: times.seconds)[middle]
    times = sorted(timed, key=lambda times: times.seconds)[middle]
    step = (times.seconds - first.seconds) / (tokens - 1)
    if step <= 0:
        raise UserError(
            f"{tokens} tokens after the prompts took no longer than one: give more --tokens, or "
            "more --repeats"
        )
    decoded = times.use.tokens - first.use.tokens
    read = (times.use.read - first.use.read) / max(decoded, 1)
    matrices = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given))
    if not config.tie_embeddings:
        # of the embedding, rows alone are read
        matrices -= given["embedding"].size * given["embedding"].dtype.itemsize
    cache = jax.eval_shape(lambda: engine.empty(count=engine.rows)).cache
    entry = 2 * config.projections.groups() * config.projections.size(config.width)
    entry *= np.dtype(given["embedding"].dtype).itemsize * config.layers
    moved = matrices + batch * read * entry
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "dtype": config.dtype,
        "seconds": round(times.seconds, 4),
        "all_seconds": [round(times.seconds, 4) for times in timed],
        "prompt_seconds": round(first.seconds, 4),
        "prompt_tokens_per_second": round(batch * prompt / first.seconds),
        "tokens": tokens,
        "milliseconds": round(1e3 * step, 5),
        "slowest_milliseconds": round(1e3 * times.slowest, 5),
        "tokens_per_second": round(batch / step),
        "whole_tokens_per_second": round(batch * tokens / times.seconds),
        "bytes_a_step": round(moved),
        "share": None if reference is None else round(moved / step / reference(), 4),
        "cache_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
        "parameter_bytes": matrices,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "entries_read": round(read, 1),
        "entries_resident": engine.use.resident,
    }


class _Times(NamedTuple):
    """Of a stream of requests.

    Attributes:
      slowest: seconds a step, of groups of the last request's steps.
      use: of the caches.
    """

    seconds: float
    slowest: float
    use: CacheUse


def _stream(engine: Engine, parameters: Any, requests: Sequence[Request]) -> _Times:
    marks: list[tuple[float, int]] = []
    start = time.perf_counter()
    for piece in engine.stream(parameters, requests):
        if piece.request == len(requests) - 1:
            drawn = marks[-1][1] if marks else 0
            marks.append((time.perf_counter() - start, drawn + len(piece.tokens)))
    seconds, slowest, first = time.perf_counter() - start, 0.0, marks[0]
    for mark in marks[1:]:
        if mark[1] - first[1] >= _GROUP or mark is marks[-1]:
            slowest = max(slowest, (mark[0] - first[0]) / (mark[1] - first[1]))
            first = mark
    return _Times(seconds, slowest, dataclasses.replace(engine.use))
