"""PyTorch's attention on the same shapes: cuDNN dense, FlexAttention with SepLLM's mask, decoding.

It runs as a process of its own, one a shape: two frameworks in one process share the device badly.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from seqeff_kernels.decode_attention.shapes import Shape as DecodeShape
from seqeff_kernels.range_attention.shapes import Shape

_SECONDS_LIMIT = 300
_LOOP_SECONDS = 0.1
_REPEATS = 5
_ROTATED_BYTES = 1 << 28
_ROTATED_CACHE_BYTES = 1 << 30


def run(shape: Shape, windows: Sequence[int]) -> list[dict[str, Any]]:
    """Rows with `implementation`, `window`, `deterministic`, and times or `error`."""
    return _answers({"shape": dataclasses.asdict(shape), "windows": list(windows)})


def run_decode(shape: DecodeShape) -> dict[str, Any]:
    """FlexAttention's decoding over one full block: `times` in seconds, or `error`."""
    return _answers({"decode": dataclasses.asdict(shape)})[0]


def _answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    def failed(why: str) -> list[dict[str, Any]]:
        row = {"implementation": "torch", "window": None, "deterministic": None, "error": why}
        return [row]

    if importlib.util.find_spec("torch") is None:
        return failed("torch is not installed")
    command = [sys.executable, "-m", __name__]
    try:
        answer = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_SECONDS_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return failed(f"it took more than {_SECONDS_LIMIT} s")
    lines = [line for line in answer.stdout.splitlines() if line.startswith('{"implementation"')]
    if not lines:
        said = answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"]
        return failed(said[-1][:300])
    return [json.loads(line) for line in lines]


def main() -> None:
    """Reads a shape and windows from standard input; prints a JSON line for each measurement."""
    request = json.load(sys.stdin)
    if "decode" in request:
        row = {"implementation": "flex"}
        try:
            row["times"] = _decode(DecodeShape(**request["decode"]))
        except Exception as error:
            row["error"] = _said(error)
        print(json.dumps(row), flush=True)
        return
    shape = Shape(**request["shape"])
    for label, window, deterministic, attend in _implementations(shape, request["windows"]):
        row: dict[str, Any] = {
            "implementation": label,
            "window": window,
            "deterministic": deterministic,
        }
        try:
            row |= _measure(shape, attend())
        except Exception as error:
            row["error"] = _said(error)
        print(json.dumps(row), flush=True)


def _said(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:300]


def _implementations(
    shape: Shape, windows: Sequence[int]
) -> Iterator[tuple[str, int | None, bool | None, Callable[[], Callable]]]:
    yield "torch cudnn", None, False, lambda: _cudnn(shape)
    for window in windows:
        yield "flex", window, None, lambda window=window: _flex(shape, window)


def _cudnn(shape: Shape) -> Callable[..., Any]:
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    def attend(queries: Any, keys: Any, values: Any) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, enable_gqa=shape.heads != shape.kv_heads
            )

    return attend


def _flex(shape: Shape, window: int) -> Callable[..., Any]:
    """FlexAttention, compiled; its block mask is made beforehand and not counted."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # pyright: ignore[reportMissingImports]

    generator = torch.Generator("cuda").manual_seed(0)
    drawn = torch.rand((shape.batch, shape.length), device="cuda", generator=generator)
    chosen = drawn < shape.density
    chosen[:, : shape.initial] = True

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        near = query - key < window
        return (query >= key) & (near | chosen[batch, key])

    size = (shape.batch, None, shape.length, shape.length)
    block_mask = create_block_mask(mask, *size, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(queries: Any, keys: Any, values: Any) -> Any:
        grouped = shape.heads != shape.kv_heads
        return compiled(queries, keys, values, block_mask=block_mask, enable_gqa=grouped)

    return attend


def _measure(shape: Shape, attend: Callable[..., Any]) -> dict[str, Any]:
    import torch  # pyright: ignore[reportMissingImports]

    generator = torch.Generator("cuda").manual_seed(0)

    def array(heads: int) -> Any:
        size = (shape.batch, heads, shape.length, shape.head_dim)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)

    entries = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    size = shape.batch * shape.length * entries * 2
    sets = []
    for _ in range(-(-_ROTATED_BYTES // size)):
        arrays = [array(heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        sets.append((*(x.requires_grad_() for x in arrays), array(shape.heads)))

    def forward(queries: Any, keys: Any, values: Any, cotangent: Any) -> None:
        with torch.no_grad():
            attend(queries, keys, values)

    def both(queries: Any, keys: Any, values: Any, cotangent: Any) -> None:
        output = attend(queries, keys, values)
        torch.autograd.grad(output, (queries, keys, values), cotangent)

    return {"forward": _time(forward, sets), "forward_and_backward": _time(both, sets)}


def _decode(shape: DecodeShape) -> list[float]:
    """Seconds of a call, of several repeats: calls on sets of caches in one CUDA graph."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # pyright: ignore[reportMissingImports]

    def everything(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key >= 0

    # without it, all of a cache is one block, which FlexAttention does not split
    size = (None, None, shape.rows, shape.entries)
    block_mask = create_block_mask(everything, *size, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    generator = torch.Generator("cuda").manual_seed(0)

    def array(heads: int, length: int) -> Any:
        size = (shape.batch, heads, length, shape.head_dim)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)

    count = max(2, -(-_ROTATED_CACHE_BYTES // shape.entry_bytes()))
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    lengths = (shape.rows, shape.entries, shape.entries)
    sets = [tuple(map(array, heads, lengths)) for _ in range(count)]
    grouped = shape.heads != shape.kv_heads

    def calls() -> None:
        for arrays in sets:
            compiled(*arrays, block_mask=block_mask, enable_gqa=grouped)

    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()

    def seconds(rounds: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(rounds):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * begin.elapsed_time(end) / (rounds * len(sets))

    seconds(3)
    rounds = max(2, round(_LOOP_SECONDS / (seconds(2) * len(sets))))
    return [seconds(rounds) for _ in range(_REPEATS)]


def _time(function: Callable[..., None], sets: list[tuple[Any, ...]]) -> dict[str, Any]:
    import torch  # pyright: ignore[reportMissingImports]

    def seconds(rounds: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(rounds):
            for arrays in sets:
                function(*arrays)
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * begin.elapsed_time(end) / (rounds * len(sets))

    seconds(3)
    rounds = max(2, round(_LOOP_SECONDS / (seconds(2) * len(sets))))
    times = [seconds(rounds) for _ in range(_REPEATS)]
    return {
        "milliseconds": round(1e3 * statistics.median(times), 4),
        "fastest_milliseconds": round(1e3 * min(times), 4),
        "slowest_milliseconds": round(1e3 * max(times), 4),
        "repeats": _REPEATS,
    }


if __name__ == "__main__":
    main()
