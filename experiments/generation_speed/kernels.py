"""The kernels that prompts and steps of a model take on a GPU, from the profiler.

    python experiments/generation_speed/kernels.py [--batch 64] [--config CONFIG]

Random weights and prompts of 1,024 tokens. XLA's command buffers are off while it profiles. Steps
are those of 128 new tokens, of whose kernels the later half in time are counted; prompts are read
by a stream that draws one token.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from seqeff.bench.generate import RandomVocabulary
from seqeff.bench.report import random_vocabulary
from seqeff.config import load
from seqeff.inference import Engine, Request, Sampling

_PROMPT, _TOKENS, _SHOWN = 1024, 128, 30


class Event(NamedTuple):
    """A kernel's run, in nanoseconds."""

    start: float
    duration: float
    name: str


def events(folder: str) -> Iterator[Event]:
    """Of all streams of a GPU that a trace holds."""
    for file in Path(folder).glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        yield from (Event(x.start_ns, x.duration_ns, x.name) for x in line.events)


def tell(title: str, found: list[Event]) -> None:
    """Prints how long the kernels took, by name."""
    busy: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event in found:
        busy[event.name] += round(event.duration)
        count[event.name] += 1
    last = max(event.start + event.duration for event in found)
    span = last - min(event.start for event in found)
    print(f"{title}: {len(found)} kernels, {busy.total() / 1e6:.2f} of {span / 1e6:.2f} ms")
    for name, total in busy.most_common(_SHOWN):
        mean = total / count[name] / 1e3
        print(f"{total / 1e3:10,.0f} us {count[name]:6} x {mean:8.2f}  {name[:90]}")


def main() -> None:
    """Profiles a config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1, help="requests at a time (default: 1)")
    default = Path("configs/bench/pythia_160m_2k.gin")
    parser.add_argument("--config", type=Path, default=default, help="(default: %(default)s)")
    options = parser.parse_args()
    model = load(options.config).root.model
    model = model.for_vocabulary(random_vocabulary(model.vocabulary_size))
    engine = Engine(
        model,
        RandomVocabulary(model.vocabulary_size),
        slots=options.batch,
        context=_PROMPT + _TOKENS,
        chunks=(_PROMPT,),
        prompt_rows=options.batch,
    )
    made = jax.jit(lambda: nnx.to_pure_dict(nnx.split(model.make(nnx.Rngs(0)))[1]))()
    parameters: Any = engine.prepare(made)
    prompts = np.random.default_rng(0).integers(
        0, model.vocabulary_size, (options.batch, _PROMPT), np.int32
    )

    def run(tokens: int) -> None:
        greedy = Sampling(temperature=0.0)
        requests = [Request(prompt=row, tokens=tokens, sampling=greedy) for row in prompts]
        collections.deque(engine.stream(parameters, requests), maxlen=0)

    for title, tokens in (("prompts", 1), ("steps", _TOKENS)):
        run(tokens)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                run(tokens)
            found = sorted(events(folder))
        if not found:
            raise SystemExit("the trace holds no GPU: this needs one that jax finds")
        if title == "steps":
            middle = (found[0].start + found[-1].start) / 2
            found = [event for event in found if event.start >= middle]
        tell(title, found)


if __name__ == "__main__":
    main()
