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
from seqeff.inference import Engine, Request, Sampling, generation_context, most_kept_by
from seqeff.models import TransformerConfig

if TYPE_CHECKING:
    from seqeff.training import Train

# further tokens whose time is one of those of which the slowest is told
_GROUP = 1000
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
    end_of_text: int = -1

    def token_bytes(self, token: int) -> bytes:
        return b""


def benchmark_generation(
    configs: Sequence[tuple[str, Train]],
    *,
    batch: int,
    prompt: int,
    tokens: int,
    chunk: int,
    repeats: int = 1,
    reference: Callable[[], float] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields each config's times, of random parameters, after compilation.

    A row has `prompt_seconds` until all continuations have begun, then `milliseconds` a step of
    all rows and its `tokens_per_second`, and `whole_tokens_per_second` of the continuations over
    the whole time; `bytes_a_step` are those of the matrices, once, and of the entries read, and
    `share` what they take of `reference`. All is as users of the engine get it, the host included,
    of the repeat whose `seconds` are the median; `all_seconds` are of every one, in their order.

    Args:
      batch: requests, each with a prompt of its own, all at a time.
      prompt: tokens of a prompt, which the caches take a chunk at a time.
      tokens: of a continuation, the likeliest ones; at least two.
      repeats: of all requests, timed one after another.
      reference: gives a copy's bytes a second; called after the measurements, whose most memory in
        use is told.
    """
    for name, config in configs:
        model = config.model.for_vocabulary(random_vocabulary(config.model.vocabulary_size))
        facts = {"config": name, "batch": batch, "prompt": prompt, "chunk": chunk}
        yield facts | attempt(_measure, model, batch, prompt, tokens, chunk, repeats, reference)


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
    tokens: int,
    chunk: int,
    repeats: int,
    reference: Callable[[], float] | None,
) -> dict[str, Any]:
    parameters = jax.jit(lambda: nnx.to_pure_dict(nnx.split(config.make(nnx.Rngs(0)))[1]))()
    drawn = np.random.default_rng(0).integers(0, config.vocabulary_size, (batch, prompt), np.int32)
    greedy = Sampling(temperature=0.0)
    requests = [Request(prompt=row, tokens=tokens, sampling=greedy) for row in drawn]
    engine = Engine(
        config,
        RandomVocabulary(config.vocabulary_size),
        slots=batch,
        context=generation_context(config, prompt + tokens),
        kept=most_kept_by(config, requests),
        chunks=sorted({min(chunk, prompt), prompt % chunk or chunk}),
    )
    # the same programs: a whole chunk if there is one, and the last
    given = engine.prepare(parameters)
    short = drawn[:, : prompt if prompt < chunk else chunk + prompt % chunk]
    some = min(tokens, _WARM_UP)
    _stream(engine, given, [Request(prompt=x, tokens=some, sampling=greedy) for x in short])
    timed = [_stream(engine, given, requests) for _ in range(repeats)]
    times = sorted(timed, key=lambda times: times.ended)[(repeats - 1) // 2]
    seconds = times.ended - times.began
    step = seconds / (tokens - 1)
    matrices = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given))
    if not config.tie_embeddings:
        # of the embedding, rows alone are read
        matrices -= given["embedding"].size * given["embedding"].dtype.itemsize
    cache = jax.eval_shape(lambda: engine.empty(count=engine.rows)).cache
    entry = 2 * config.projections.groups() * config.projections.size(config.width)
    entry *= np.dtype(given["embedding"].dtype).itemsize * config.layers
    moved = matrices + batch * times.read * entry
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "dtype": config.dtype,
        "seconds": round(times.ended, 4),
        "all_seconds": [round(times.ended, 4) for times in timed],
        "prompt_seconds": round(times.began, 4),
        "prompt_tokens_per_second": round(batch * prompt / times.began),
        "tokens": tokens,
        "milliseconds": round(1e3 * step, 5),
        "slowest_milliseconds": round(1e3 * times.slowest, 5),
        "tokens_per_second": round(batch / step),
        "whole_tokens_per_second": round(batch * tokens / times.ended),
        "bytes_a_step": round(moved),
        "share": None if reference is None else round(moved / step / reference(), 4),
        "cache_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
        "parameter_bytes": matrices,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "entries_read": round(times.read, 1),
        "entries_resident": engine.use.resident,
    }


class _Times(NamedTuple):
    """Seconds since the start: until all continuations had begun, and until all had ended.

    Attributes:
      slowest: seconds a step, of the groups of steps in between.
      read: entries that a token of the continuations reads, in the mean.
    """

    began: float
    ended: float
    slowest: float
    read: float


def _stream(engine: Engine, parameters: Any, requests: Sequence[Request]) -> _Times:
    waiting, marks = set(range(len(requests))), []
    before = after = dataclasses.replace(engine.use)
    start = time.perf_counter()
    for piece in engine.stream(parameters, requests):
        now = time.perf_counter() - start
        if waiting:
            waiting.discard(piece.request)
            if not waiting:
                before, drawn = dataclasses.replace(engine.use), len(piece.tokens)
                marks.append((now, drawn))
        elif piece.request == len(requests) - 1:
            drawn += len(piece.tokens)
            marks.append((now, drawn))
    after = engine.use
    began, ended = marks[0][0], marks[-1][0]
    slowest = 0.0
    first = marks[0]
    for mark in marks[1:]:
        if mark[1] - first[1] >= _GROUP or mark is marks[-1]:
            slowest = max(slowest, (mark[0] - first[0]) / (mark[1] - first[1]))
            first = mark
    read = (after.read - before.read) / max(after.tokens - before.tokens, 1)
    return _Times(began, ended, slowest, read)
