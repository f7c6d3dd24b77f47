"""`seqeff bench`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from seqeff.cli.parser import Commands, add_output_file, positive, share
from seqeff.cli.runs import load

_SIZES = {
    "batch": (1, "rows"),
    "prompt": (2048, "tokens of a row's prompt"),
    "tokens": (1000, "tokens that a row is continued by"),
    "chunk": (512, "tokens of a prompt taken at a time"),
    "prompt_rows": (8, "prompts that are read at a time"),
    "repeats": (3, "of all that, of which the median is told"),
}


def add(commands: Commands) -> None:
    """The command and its arguments."""
    text = "Measure speed on this machine."
    benchmarks = commands.group("bench", text, "BENCHMARK")
    text = "Training steps of configs, on random tokens."
    steps = benchmarks.add("train", _bench_train, text, True)
    steps.add_argument("configs", nargs="+", type=Path, help="gin files, one row each")
    steps.add_argument("--steps", type=positive, default=20, help="timed steps (default: 20)")
    text = "Prompts and their continuations, of random tokens, through the caches of configs."
    continuing = benchmarks.add("generate", _bench_generate, text, True)
    continuing.add_argument("configs", nargs="+", type=Path, help="gin files, one row each")
    for name, (default, text) in _SIZES.items():
        option, text = f"--{name.replace('_', '-')}", f"{text} (default: {default})"
        continuing.add_argument(option, type=positive, default=default, help=text)
    text = "of the tokens drawn (default: 0, the likeliest)"
    continuing.add_argument("--temperature", type=float, default=0.0, help=text)
    text = "draw among the likeliest (default: all)"
    continuing.add_argument("--top-k", type=positive, help=text)
    text = "draw among the likeliest that together have this probability (default: all)"
    continuing.add_argument("--top-p", type=float, metavar="P", help=text)
    batches = benchmarks.add("data", _bench_data, "Batches of synthetic text.")
    text = "Separator attention against cuDNN's dense causal one, on a GPU."
    attention = benchmarks.add("attention", _bench_attention, text)
    attention.add_argument(
        "--window", nargs="+", type=positive, default=[64], help="tokens (default: 64)"
    )
    attended = ("separators", "bounded", "compact", "bounded-compact", "window")
    text = "what is attended (default: separators)"
    attention.add_argument("--kind", nargs="+", choices=attended, default=["separators"], help=text)
    backends = ("mosaic", "triton", "auto")
    attention.add_argument(
        "--backend", nargs="+", choices=backends, default=backends, help="(default: all)"
    )
    text = "of separators among the tokens (default: each shape's)"
    attention.add_argument("--density", type=share, metavar="SHARE", help=text)
    text = "Decoding attention against the bandwidth of a GPU's memory."
    decode = benchmarks.add("decode", _bench_decode, text)
    for benchmark in (attention, decode):
        text = "by name (default: those of experiments/attention_speed)"
        benchmark.add_argument("shapes", nargs="*", metavar="SHAPE", help=text)
        text = "PyTorch too, where it is here"
        benchmark.add_argument("--rivals", action="store_true", help=text)
    for benchmark in (steps, continuing, batches, attention, decode):
        add_output_file(benchmark, "--json", "write the results to this file")
        benchmark.add_argument("--commit", help="kept in the file (default: what git says)")


def _bench_train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from seqeff.bench.train import benchmark_training

    loaded = [(str(path), load(path, overrides, None).root) for path in options.configs]
    results = benchmark_training(loaded, options.steps)
    return _tell_speed("train", results, options, {"overrides": overrides})


def _bench_generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from seqeff.bench.commands import generate
    from seqeff.inference import Sampling

    generate(
        [(str(path), load(path, overrides, None).root) for path in options.configs],
        {name: getattr(options, name) for name in _SIZES},
        Sampling(**{name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}),
        overrides,
        options.json,
        options.commit,
    )
    return 0


def _bench_data(options: argparse.Namespace, _: Sequence[str]) -> int:
    from seqeff.bench.data import benchmark_batches

    results = [row._asdict() for row in benchmark_batches()]
    return _tell_speed("data", results, options)


def _bench_attention(options: argparse.Namespace, _: Sequence[str]) -> int:
    from seqeff.bench.commands import attention

    attention(
        options.shapes,
        options.window,
        options.kind,
        options.backend,
        options.density,
        options.rivals,
        options.json,
        options.commit,
    )
    return 0


def _bench_decode(options: argparse.Namespace, _: Sequence[str]) -> int:
    from seqeff.bench.commands import decode

    decode(options.shapes, options.rivals, options.json, options.commit)
    return 0


def _tell_speed(
    benchmark: str,
    results: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    from seqeff.bench.report import write_report

    write_report(options.json, benchmark, results, facts, options.commit)
    for row in results:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    return 0
