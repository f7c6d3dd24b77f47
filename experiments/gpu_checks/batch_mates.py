"""Requests alone and among others, in bfloat16: every log-probability has the same bits.

    python experiments/gpu_checks/batch_mates.py --json batch_mates_RESULT.json

An engine of 16 slots takes 48 requests of mixed lengths and ways of drawing together, then in the
opposite order, then each alone. Exits with status 1 if a token or a log-probability differs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from models import ATTENTIONS, config, parser, report

from seqeff.bench.generate import RandomVocabulary
from seqeff.inference import Engine, Request, Sampling, generation_context, most_kept_by

_SLOTS, _REQUESTS, _LONGEST, _MOST_TOKENS = 16, 48, 900, 24
_WAYS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, seed=5),
    Sampling(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=6),
)


def check(name: str) -> dict[str, Any]:
    """Of one attention: requests whose tokens, and whose log-probabilities, differ."""
    model = config(ATTENTIONS[name], "auto", "bfloat16")
    drawn = np.random.default_rng(0)
    requests = [
        Request(
            prompt=drawn.integers(0, model.vocabulary_size, drawn.integers(1, _LONGEST)).tolist(),
            tokens=int(drawn.integers(1, _MOST_TOKENS + 1)),
            sampling=dataclasses.replace(_WAYS[number % len(_WAYS)], seed=number),
        )
        for number in range(_REQUESTS)
    ]
    engine = Engine(
        model,
        RandomVocabulary(model.vocabulary_size),
        slots=_SLOTS,
        context=generation_context(model, 1024),
        kept=most_kept_by(model, requests),
    )
    parameters = jax.jit(lambda: nnx.to_pure_dict(nnx.split(model.make(nnx.Rngs(0)))[1]))()
    given = engine.prepare(parameters)

    def stream(some: Sequence[Request]) -> list[tuple[list[int], list[float]]]:
        found: list[tuple[list[int], list[float]]] = [([], []) for _ in some]
        for piece in engine.stream(given, some):
            found[piece.request][0].extend(piece.tokens)
            found[piece.request][1].extend(piece.log_probabilities)
        return found

    together, backwards = stream(requests), stream(requests[::-1])[::-1]
    alone = [stream([request])[0] for request in requests]
    differing = {
        part: sum(
            not one[index] == other[index] == third[index]
            for one, other, third in zip(together, backwards, alone, strict=True)
        )
        for index, part in enumerate(("tokens", "log_probabilities"))
    }
    row = {"attention": name, "requests": len(requests), "differing": differing}
    row["passed"] = not any(differing.values())
    print(json.dumps(row), flush=True)
    return row


def main() -> int:
    """Checks every attention."""
    options = parser(__doc__).parse_args()
    return report(options, [check(name) for name in options.attention])


if __name__ == "__main__":
    sys.exit(main())
