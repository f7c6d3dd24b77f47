"""`seqeff bench attention`, `decode` and `generate`: rows printed and written as they come."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from seqeff.bench import attention as attention_bench
from seqeff.bench import decode as decode_bench
from seqeff.bench import generate as generate_bench
from seqeff.bench.report import chosen_shapes, prepare_rivals, require_gpu, write_report
from seqeff.checks import UserError
from seqeff_kernels import gpu

if TYPE_CHECKING:
    from seqeff.inference import Sampling
    from seqeff.training import Train


def attention(
    shapes: Sequence[str],
    windows: Sequence[int],
    kinds: Sequence[str],
    backends: Sequence[str],
    density: float | None,
    rivals: bool,
    file: Path | None,
    commit: str | None,
) -> None:
    """Times separator attention; see `benchmark_attention`."""
    names = chosen_shapes(shapes, attention_bench.SHAPES, attention_bench.DEFAULT_SHAPES)
    if rivals:
        prepare_rivals()
    facts = {"device": require_gpu("attention")}
    rows = attention_bench.benchmark_attention(
        names, windows, kinds=kinds, backends=backends, density=density, rivals=rivals
    )
    _tell("attention", rows, attention_bench, facts, file, commit)


def decode(shapes: Sequence[str], rivals: bool, file: Path | None, commit: str | None) -> None:
    """Measures copies, then decoding; see `benchmark_decode`."""
    names = chosen_shapes(shapes, decode_bench.SHAPES, decode_bench.DEFAULT_SHAPES)
    if rivals:
        prepare_rivals()
    facts: dict[str, Any] = {"device": require_gpu("decode")}
    reference = decode_bench.reference_speed(_tell_copies(facts), facts["device"]["kind"])
    facts["reference_bytes_per_second"] = round(reference)
    print(f"shares are of {reference / 1e12:.2f} TB/s", flush=True)
    rows = decode_bench.benchmark_decode(names, reference=reference, rivals=rivals)
    _tell("decode", rows, decode_bench, facts, file, commit)


def generate(
    configs: Sequence[tuple[str, Train]],
    sizes: Mapping[str, int],
    sampling: Sampling,
    overrides: Sequence[str],
    file: Path | None,
    commit: str | None,
) -> None:
    """Times prompts and their continuations; `sizes` and the rest: see `benchmark_generation`.

    Raises:
      UserError: there is no step to time, or a config's table of positions is too short.
    """
    if sizes["tokens"] < 2:
        raise UserError("--tokens 1 leaves no step to time: give at least 2")
    for _, config in configs:
        config.model.require_positions(sizes["prompt"] + sizes["tokens"])
    facts: dict[str, Any] = {"overrides": overrides}

    @functools.cache
    def reference() -> float:
        return decode_bench.reference_speed(_tell_copies(facts), jax.devices()[0].device_kind)

    rows = generate_bench.benchmark_generation(
        configs,
        **sizes,
        sampling=sampling,
        reference=None if gpu.compute_capability() is None else reference,
    )
    _tell("generate", rows, generate_bench, facts, file, commit)


def _tell_copies(facts: dict[str, Any]) -> dict[str, float]:
    """Copies, measured, printed and put among the facts."""
    copies = decode_bench.copy_speeds()
    facts["copy_bytes_per_second"] = {way: round(speed) for way, speed in copies.items()}
    for way, speed in copies.items():
        print(f"copy ({way.replace('_', ' ')}) {speed / 1e12:.2f} TB/s")
    return copies


def _tell(
    benchmark: str,
    rows: Iterable[Mapping[str, Any]],
    table: Any,
    facts: Mapping[str, Any],
    file: Path | None,
    commit: str | None,
) -> None:
    """Prints and writes each row as it comes, so that a run that is cut short is not lost.

    Args:
      table: the module with the HEADER and the `line` of a row.
    """
    results = []
    for row in rows:
        results.append(row)
        write_report(file, benchmark, results, facts, commit)
        if len(results) == 1:
            print(table.HEADER)
        print(table.line(row), flush=True)
