"""The benchmarks of kernels, without a GPU: what they make of times, print and write."""

import dataclasses
import itertools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import refused, seqeff

from seqeff.bench import attention, data, decode, generate, programs, report, torch_attention
from seqeff_kernels.decode_attention import shapes as decode_shapes
from seqeff_kernels.range_attention import cost, execution, mosaic
from seqeff_kernels.range_attention.shapes import BOUND, SHAPES, kind_sources, packed_lists


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for a GPU: the portable form serves, and times are by what is called."""
    monkeypatch.setattr(report.gpu, "compute_capability", lambda: (9, 0))

    def compile_loop(function, sets, iterations):
        assert iterations > 1
        jax.eval_shape(function, *sets[0])
        # the first warms up
        return getattr(function, "__name__", ""), iter((9.0, 1.5, 1.0, 0.5, 1.2, 0.8))

    def loop_time(loop, *_):
        name, factors = loop
        times = {"forward": 2.0, "both": 8.0, "negate_and_add": 0.9}
        return 1e-3 * times.get(name, 0.6) * next(factors)

    def portable(queries, keys, values, *_):
        return jax.nn.dot_product_attention(queries, keys, values)

    monkeypatch.setattr(programs, "compile_loop", compile_loop)
    monkeypatch.setattr(programs, "loop_time", loop_time)
    monkeypatch.setattr(decode, "device_times", lambda *_: [1e-3])
    monkeypatch.setattr(attention, "_cudnn", portable)
    monkeypatch.setattr(attention, "_ROTATED_BYTES", 1)
    monkeypatch.setattr(decode, "_ROTATED_BYTES", 1)
    monkeypatch.setattr(decode, "_COPIED_BYTES", 1 << 10)
    # quick to compile
    made = decode.inputs
    monkeypatch.setattr(
        decode,
        "inputs",
        lambda *given: jax.tree.map(
            lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(lambda: made(*given))
        ),
    )


@pytest.mark.parametrize("benchmark", ["attention", "decode"])
def test_without_a_gpu_it_is_one_line(benchmark):
    line = refused("bench", benchmark)
    assert f"bench {benchmark} finds no GPU: the default backend is cpu" in line
    assert "pip install 'seqeff[gpu]'" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["attention", "wide-3k"], "no shape is called wide-3k; choose among quickstart, odd"),
        (["decode", "wide-2k"], "no shape is called wide-2k; choose among odd, odd-head"),
        (["attention", "--window", "0"], "argument --window: '0' is not a whole number"),
        (["attention", "--density", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["decode", "--json", "no/x.json"], "argument --json: no/x.json: there is no folder no;"),
        (["attention", "--json", "."], "argument --json: . is a folder; give a file in it"),
        (["data", "--rivals"], "unrecognized arguments: --rivals"),
        (["attention", "--gin.A.b=1"], "seqeff bench attention takes no --gin overrides"),
    ],
)
def test_a_bad_command_is_one_line(arguments, expected, no_devices):
    assert expected in refused("bench", *arguments)


def test_attention_rows(gpu, tmp_path):
    file = tmp_path / "speed.json"
    command = ["bench", "attention", "odd", "--window", 7, 63, "--json", file]
    result = seqeff(*command, "--commit", "abc")
    assert result.status == 0, result.errors
    written = json.loads(file.read_text())
    assert written["benchmark"] == "attention"
    assert written["versions"]["commit"] == "abc"
    assert written["device"] == {"kind": "cpu", "compute_capability": "9.0"}
    rows = written["results"]
    cells = [(row["shape"], row["implementation"], row["window"]) for row in rows]
    assert [cell for cell in cells if cell[1] in ("auto", "cudnn dense")] == [
        (name, label, window)
        for name in ("odd",)
        for label, window in (("cudnn dense", None), ("auto", 7), ("auto", 63))
    ]
    by_cell = dict(zip(cells, rows, strict=True))
    dense, ours = by_cell["odd", "cudnn dense", None], by_cell["odd", "auto", 7]
    assert dense["needed_forward_flops"] == 2 * 4 * 4 * 16 * (1000 * 1001 // 2)
    assert dense["needed_backward_flops"] == 2.5 * dense["needed_forward_flops"]
    assert ours["needed_forward_flops"] < dense["needed_forward_flops"] / 5
    assert (dense["deterministic"], ours["deterministic"]) == (False, True)
    assert (dense["backend"], dense["plan"], dense["executed_forward_flops"]) == ("cudnn", {}, None)
    # on a CPU tiles are 64 by 64: 31 of the window for each of 2 by 4 heads, and the packed ones
    assert (ours["backend"], ours["plan"]) == ("xla", {})
    near = (4 * 16) * (2 * 4) * (64 * 64) * 31
    assert near < ours["executed_forward_flops"] < 3 * near
    assert ours["executed_backward_flops"] == 2.5 * ours["executed_forward_flops"]
    assert dense["forward"] == {
        "milliseconds": 2.0,
        "fastest_milliseconds": 1.0,
        "slowest_milliseconds": 3.0,
        "repeats": 5,
        "speedup": 1.0,
        "speedup_over_flex": None,
        "tflops_per_second": round(dense["needed_forward_flops"] / 2e-3 / 1e12, 1),
    }
    # a twelfth of the indices' 0.6 ms
    assert ours["index_milliseconds"] == ours["gather_milliseconds"] == 0.6
    # negating the tokens' gradients takes 0.6 ms too, and 0.9 with the packed ones added
    assert ours["transpose_milliseconds"] == 0.3
    assert ours["forward"]["milliseconds"] == 2.05
    assert ours["forward"]["speedup"] == round(2 / 2.05, 3)
    assert ours["forward_and_backward"]["milliseconds"] == 8.05
    lines = result.output.splitlines()
    assert len(lines) == 2 + len(rows)
    (line,) = [line for line in lines if line.startswith("odd") and " 7  auto: xla" in line]
    assert "2.050    0.98" in line
    assert line.endswith("yes")


def test_the_needed_flops_are_those_of_the_mask(gpu):
    row = next(row for row in attention.benchmark_attention(["odd"], [63]) if row["window"])
    shape = SHAPES["odd"]
    (_, _, _, _, chosen), *_ = attention._inputs(shape)
    token = np.arange(shape.length)
    near = token[:, None] - token < 63
    mask = (token[:, None] >= token) & (near | np.asarray(chosen)[:, None])
    assert row["needed_forward_flops"] == 4 * 16 * 4 * int(mask.sum())


def test_another_density(gpu):
    rows = attention.benchmark_attention(["odd"], [7], backends=["auto"], density=0.5)
    dense, half = rows
    assert (dense["shape"], half["shape"], half["density"]) == ("odd@0.5", "odd@0.5", 0.5)
    shape = dataclasses.replace(SHAPES["odd"], density=0.5)
    (_, _, _, _, chosen), *_ = attention._inputs(shape)
    token = np.arange(shape.length)
    mask = (token[:, None] >= token) & ((token[:, None] - token < 7) | np.asarray(chosen)[:, None])
    assert half["needed_forward_flops"] == 4 * 16 * 4 * int(mask.sum())


def test_the_needed_flops_of_bounded_separators(gpu):
    rows = attention.benchmark_attention(["odd"], [7], kinds=["bounded", "window"])
    bounded, window = (row for row in rows if row["implementation"] == "auto")
    assert (bounded["kind"], window["kind"]) == ("bounded", "window")
    shape = SHAPES["odd"]
    (_, _, _, _, chosen), *_ = attention._inputs(shape)
    chosen, pairs, near = np.asarray(chosen), 0, 0
    for row in chosen:
        for token in range(shape.length):
            far = np.flatnonzero(row[: max(token - 6, 0)])
            others = far[far >= shape.initial]
            near += min(token + 1, 7)
            pairs += len(far) - len(others) + min(len(others), BOUND) + min(token + 1, 7)
    assert bounded["needed_forward_flops"] == 4 * 16 * 4 * pairs
    assert window["needed_forward_flops"] == 4 * 16 * 4 * near
    assert "gather_milliseconds" in bounded and "gather_milliseconds" not in window
    assert " bounded " in attention.line(bounded)


def test_the_transpose_adds_packed_gradients_to_those_of_the_tokens(gpu):
    shape = SHAPES["odd"]
    inputs = attention._inputs(shape)
    sets, packing = attention._packed(inputs, "separators", shape.initial, 7)
    assert packing is not None
    _, keys, values, *_ = sets[0]
    ((key_gradients, value_gradients),) = packing.negate_and_add.function(*sets[0])
    chosen = np.asarray(inputs[0][-1])
    for tokens, found in ((keys, key_gradients), (values, value_gradients)):
        tokens, expected = np.asarray(tokens, np.float32), -np.asarray(tokens, np.float32)
        for row, mask in enumerate(chosen):
            # the packed gradients are those of the first tokens here
            expected[row, mask] += tokens[row, : mask.sum()]
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=1e-2, atol=1e-2)


def test_an_implementation_that_fails_is_a_row(gpu, monkeypatch):
    def broken(*_):
        raise ValueError("no plan\nfor this")

    monkeypatch.setattr(attention, "_cudnn", broken)
    dense, *ours = attention.benchmark_attention(["odd"])
    assert dense["error"] == "ValueError: no plan"
    assert "ValueError: no plan" in attention.line(dense)
    assert ours
    assert all(row["forward"]["speedup"] is None for row in ours)
    assert all(attention.line(row) for row in ours)


def test_nothing_compiles_while_something_is_timed(gpu, monkeypatch):
    compiled, timed = [], []
    compile_loop, loop_time = programs.compile_loop, programs.loop_time

    def slow(function, *given):
        time.sleep(0.05 if getattr(function, "__name__", "") == "both" else 0)
        compiled.append(function)
        return compile_loop(function, *given)

    def watched(*given):
        timed.append(len(compiled))
        return loop_time(*given)

    monkeypatch.setattr(programs, "compile_loop", slow)
    monkeypatch.setattr(programs, "loop_time", watched)
    monkeypatch.setattr(attention, "explain", lambda *_: {"xla": "available"})
    rows = list(attention.benchmark_attention(["odd"], [7, 63], backends=["auto"]))
    assert not any("error" in row for row in rows)
    # two passes of the three; and of each window, the four parts of packing
    assert timed == [2 * 3 + 2 * 4] * 14 * 6


def test_programs_take_turns(monkeypatch):
    ran = []

    def loop_time(loop, *_):
        ran.append(loop)
        if len(ran) == 8:
            raise RuntimeError("out of memory")
        return float(len(ran))

    monkeypatch.setattr(programs, "compile_loop", lambda function, *_: function)
    monkeypatch.setattr(programs, "loop_time", loop_time)
    one, other = (programs.Program(name, [()], 2) for name in ("one", "other"))
    programs.time_all([one, other, one])
    assert ran == ["one", "other"] * 4 + ["one"] * 2
    assert one.times == [3, 5, 7, 9, 10]
    with pytest.raises(RuntimeError, match="out of memory"):
        assert other.times


def test_plans_are_told(gpu, monkeypatch):
    def on_hopper(queries, sources, backend):
        return mosaic.execution(queries, tuple(sources))

    monkeypatch.setattr(attention, "execution", on_hopper)
    monkeypatch.setitem(SHAPES, "half", dataclasses.replace(SHAPES["odd"], head_dim=64))
    _, ours = attention.benchmark_attention(["half"], [64], backends=["auto"])
    assert ours["backend"] == "mosaic"
    assert ours["plan"]["window_entries"] == 64
    assert "auto: mosaic" in attention.line(ours)
    assert json.dumps(ours["plan"])


@pytest.mark.parametrize("kind", ["separators", "bounded-compact", "window"])
def test_gradients_reach_every_input_of_the_timed_call(monkeypatch, kind):
    """The call under `forward_and_backward` returns what a user's gradient would."""
    shape = dataclasses.replace(SHAPES["odd"], length=40, batch=1)
    monkeypatch.setattr(attention, "_ROTATED_BYTES", 1)
    ((queries, keys, values, cotangent, chosen),) = attention._inputs(shape)
    lists = packed_lists(kind, chosen, shape.initial, 7)
    attend = jax.tree_util.Partial(attention._attend, kind=kind, window=7, backend="reference")
    sets = [(queries, keys, values, cotangent, lists)]
    sources = kind_sources(kind, queries, keys, values, lists, 7)
    served = execution(queries, sources, backend="reference")
    call = attention._Call("", kind, 7, attend, sets, sources, served, cost(queries, sources))
    forward, both = (jax.jit(program.function)(*sets[0]) for program in call.programs)
    output, gradients = both
    assert jnp.array_equal(output, forward)

    def loss(*arrays):
        return jnp.vdot(attend(*arrays, lists).astype(jnp.float32), cotangent)

    for found, expected in zip(
        gradients, jax.jit(jax.grad(loss, (0, 1, 2)))(queries, keys, values), strict=True
    ):
        assert jnp.linalg.norm((found - expected).astype(jnp.float32)) < 0.05 * jnp.linalg.norm(
            expected.astype(jnp.float32)
        )
        assert jnp.any(expected != 0)


def test_pytorch_answers_for_itself(gpu, monkeypatch):
    found = {"milliseconds": 4.0}

    def run(shape, windows):
        assert (shape, windows) == (SHAPES["odd"], [7])
        yield {"implementation": "torch cudnn", "window": None, "deterministic": False} | {
            "forward": found,
            "forward_and_backward": found,
        }
        yield {"implementation": "flex", "window": 7, "deterministic": None} | {
            "forward": {"milliseconds": 8.2},
            "error": "no room",
        }

    monkeypatch.setattr(torch_attention, "run", run)
    dense, *_, ours, torch, flex = attention.benchmark_attention(["odd"], [7], rivals=True)
    assert dense["forward"]["speedup_over_flex"] is None
    assert torch["forward"]["speedup"] == 0.5
    assert torch["forward_and_backward"]["speedup"] == 2.0
    assert (flex["error"], flex["window"]) == ("no room", 7)
    assert ours["forward"]["speedup_over_flex"] == 4.0
    assert ours["forward_and_backward"]["speedup_over_flex"] is None


def test_pytorch_that_is_absent_or_finds_no_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch_attention.importlib.util, "find_spec", lambda name: None)
    (row,) = torch_attention.run(SHAPES["odd"], [7])
    assert row["error"] == "torch is not installed"
    monkeypatch.setattr(torch_attention.importlib.util, "find_spec", lambda name: name)
    # a process of its own, where torch is absent or lacks CUDA
    rows = torch_attention.run(SHAPES["odd"], [7])
    assert [row["implementation"] for row in rows] == ["torch cudnn", "flex"]
    rows.append(torch_attention.run_decode(decode_shapes.SHAPES["grouped"]))
    assert all("rror" in row["error"] for row in rows)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (row,) = torch_attention.run(SHAPES["odd"], [7])
    assert row["error"] == "exit status 1"


def test_decode_rows(gpu, tmp_path):
    file = tmp_path / "decode.json"
    result = seqeff("bench", "decode", "odd", "--json", file)
    assert result.status == 0, result.errors
    written = json.loads(file.read_text())
    assert set(written["copy_bytes_per_second"]) == {"memory_copy", "elementwise"}
    reference = written["reference_bytes_per_second"]
    assert reference == max(written["copy_bytes_per_second"].values())
    rows = {row["implementation"]: row for row in written["results"]}
    # two blocks and new entries, which cuDNN's form cannot take
    assert set(rows) - {"triton", "mosaic"} == {"xla", "auto"}
    assert (rows["auto"]["backend"], rows["auto"]["plan"]) == ("xla", {})
    assert "auto: xla" in result.output
    row = rows["xla"]
    assert row["bytes"] == 2 * 2 * (63 + 1000 + 3) * 2 * 64 * 2
    assert row["microseconds"] == 600.0
    assert row["bytes_per_second"] == round(row["bytes"] / 0.6e-3)
    assert row["share"] == pytest.approx(row["bytes_per_second"] / reference, abs=1e-4)
    # nothing to compare with here
    assert row["speedup"] is None
    flops = 4 * 2 * 3 * 4 * (63 + 1000 + 3) * 64
    assert row["tflops_per_second"] == round(flops / 0.6e-3 / 1e12, 1)
    assert row["needed_flops"] == row["executed_flops"] == flops
    assert "copy (memory copy)" in result.output
    assert "600.0" in result.output


@pytest.mark.parametrize(
    ("backend", "tile", "points", "entries"),
    [("triton", 32, 16, 64 + 1024 + 32), ("mosaic", 64, 64, 64 + 1024 + 64)],
)
def test_decoding_executes_whole_tiles(backend, tile, points, entries):
    shape = decode_shapes.SHAPES["odd"]
    found = decode.executed_flops(shape, backend, {"tile_entries": tile})
    # six points on each of two KV heads; blocks of 63 and 1,000, and three new entries
    assert found == 4 * 2 * 2 * points * entries * 64
    assert decode.executed_flops(shape, "cudnn", {}) is None


def test_cudnn_is_measured_where_one_full_block_is_all(gpu, monkeypatch):
    small = decode_shapes.Shape(batch=1, capacities=(16,), heads=2, kv_heads=1, head_dim=8)
    monkeypatch.setitem(decode.SHAPES, "small", small)
    rows = list(decode.benchmark_decode(["small"], reference=1e12))
    assert [row["implementation"] for row in rows if row["implementation"] != "triton"] == [
        "xla",
        "auto",
        "cudnn",
    ]
    assert "error" in rows[-1]  # no cuDNN here, and the benchmark went on


def test_decoding_is_compared_with_cudnn(gpu, monkeypatch):
    small = decode_shapes.Shape(batch=1, capacities=(16,), heads=2, kv_heads=1, head_dim=8)
    monkeypatch.setitem(decode.SHAPES, "small", small)

    def both(queries, *_):  # takes 8 ms here, others 0.6
        return queries

    monkeypatch.setattr(decode, "_cudnn", both)
    monkeypatch.setattr(torch_attention, "run_decode", lambda _: {"times": [3e-3, 1e-3, 2e-3]})
    rows = {
        row["implementation"]: row
        for row in decode.benchmark_decode(["small"], reference=1e12, rivals=True)
    }
    assert (rows["cudnn"]["speedup"], rows["xla"]["speedup"]) == (1, round(8 / 0.6, 3))
    assert " 13.33 " in decode.line(rows["xla"])
    flex = rows["flex"]
    assert (flex["microseconds"], flex["speedup"], flex["speedup_over_flex"]) == (2000, 4, 1)
    assert rows["xla"]["speedup_over_flex"] == round(2 / 0.6, 3)
    assert flex["executed_flops"] is None
    monkeypatch.setattr(torch_attention, "run_decode", lambda _: {"error": "no room"})
    *_, flex = decode.benchmark_decode(["small"], reference=1e12, rivals=True)
    assert (flex["implementation"], flex["error"]) == ("flex", "no room")


def test_shares_are_of_the_fastest_copy():
    copies = {"memory_copy": 4.0e12, "elementwise": 3.3e12}
    assert decode.reference_speed(copies, "NVIDIA H200") == 4.30e12
    assert decode.reference_speed(copies, "NVIDIA A100") == 4.0e12
    assert decode.reference_speed({"elementwise": 5e12}, "NVIDIA H200") == 5e12


def test_training_with_separators_keeps_the_commit_that_is_given(tiny, tmp_path):
    file = tmp_path / "speed.json"
    options = ["--steps", 1, "--json", file, "--commit", "abc"]
    method = "--gin.TransformerConfig.attention=@SeparatorAttention()"
    result = seqeff("bench", "train", tiny.config, *options, method)
    assert result.status == 0, result.errors
    report = json.loads(file.read_text())
    assert report["versions"]["commit"] == "abc"
    assert "jax-cuda13-plugin" in report["versions"]["packages"]
    assert report["results"][0]["tokens_per_second"] > 0


@pytest.fixture
def second_a_token(monkeypatch):
    """Streams take a second, and one more for every token that decoding takes in."""
    stream = generate._stream

    def timed(engine, parameters, requests):
        found = stream(engine, parameters, requests)
        prompts = sum(len(request.prompt) for request in requests)
        return found._replace(seconds=1 + found.use.tokens - prompts)

    monkeypatch.setattr(generate, "_stream", timed)


def test_prompts_and_their_continuations(tiny, tmp_path, second_a_token):
    file = tmp_path / "speed.json"
    options = ["--batch", 2, "--prompt", 20, "--chunk", 8, "--tokens", 3, "--json", file]
    bounded = [
        "--gin.TransformerConfig.attention=@SeparatorAttention()",
        "--gin.SeparatorAttention.window=5",
        "--gin.SeparatorAttention.separators=2",
    ]
    result = seqeff("bench", "generate", tiny.config, *options, *bounded)
    assert result.status == 0, result.errors
    assert result.output.splitlines()[0].split()[:3] == ["config", "batch", "prompt"]
    report = json.loads(file.read_text())
    (row,) = report["results"]
    assert (row["batch"], row["prompt"], row["tokens"]) == (2, 20, 3)
    assert report["overrides"] == [override.removeprefix("--gin.") for override in bounded]
    # each of two rows takes 2 of its tokens in
    assert (row["prompt_seconds"], row["seconds"], row["milliseconds"]) == (1, 5, 2000)
    assert (row["prompt_tokens_per_second"], row["tokens_per_second"]) == (40, 1)
    assert (row["whole_tokens_per_second"], row["share"]) == (round(6 / 5), None)
    # 3 initial tokens, 5 of the window and up to 2 separators
    assert 8 <= row["entries_read"] <= row["entries_resident"] <= 10
    assert row["sampling"]["temperature"] == 0
    dense = seqeff("bench", "generate", tiny.config, *options, "--temperature", 0.7, "--top-p", 0.9)
    assert dense.status == 0, dense.errors
    (row,) = json.loads(file.read_text())["results"]
    drawn = row["sampling"]
    assert (drawn["temperature"], drawn["top_k"], drawn["top_p"]) == (0.7, None, 0.9)
    # a token reads itself too, and the last is not taken in
    assert row["entries_read"] == (21 + 22) / 2
    assert row["entries_resident"] == 20 + 2
    # float32 matrices, and two layers of 2 heads of 16
    entries = 2 * row["entries_read"] * 2 * 2 * 32 * 4
    assert row["bytes_a_step"] == pytest.approx(row["parameter_bytes"] + entries)
    learned = [
        "--gin.TransformerConfig.positions=@LearnedPositions()",
        "--gin.LearnedPositions.length=32",
    ]
    options[3] = 30
    assert "33" in refused("bench", "generate", tiny.config, *options, *learned)
    options[7] = 1
    assert "at least 2" in refused("bench", "generate", tiny.config, *options)


def test_steps_that_drown_in_the_noise_are_told(tiny, monkeypatch):
    # one warms up, and then prompts and continuations are timed in turn
    seconds = itertools.chain([9.0], itertools.cycle((3.0, 2.0)))
    stream = generate._stream
    monkeypatch.setattr(
        generate, "_stream", lambda *given: stream(*given)._replace(seconds=next(seconds))
    )
    options = ["--batch", 1, "--prompt", 8, "--tokens", 2]
    result = seqeff("bench", "generate", tiny.config, *options)
    assert "2 tokens after the prompts took no longer than one" in result.output


def test_batches_keep_the_commit_that_is_given(monkeypatch, tmp_path):
    row = data.BatchSpeed(30, "split", 1, 0.5, 2e6, 1e6)
    monkeypatch.setattr(data, "benchmark_batches", lambda: [row])
    file = tmp_path / "speed.json"
    result = seqeff("bench", "data", "--json", file, "--commit", "abc")
    assert result.status == 0, result.errors
    report = json.loads(file.read_text())
    assert report["versions"]["commit"] == "abc"
    assert report["results"] == [row._asdict()]
