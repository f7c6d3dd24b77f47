"""Tables of tuned plans, and the search that fills them; no GPU is needed."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import re
import sys
import textwrap
from time import sleep
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from seqeff_kernels import PackedIndices, RangeSource, TokenSource, measuring, tune, tuning
from seqeff_kernels.decode_attention import mosaic as decode_mosaic
from seqeff_kernels.decode_attention.plan import Plan
from seqeff_kernels.range_attention import mosaic, triton


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Where the table of the default device is looked for."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    return tuning.table_path(jax.devices()[0].device_kind)


def key(rows, window=64, dtype=jnp.bfloat16):
    entries = jax.ShapeDtypeStruct((1, 256, 2, 64), dtype)
    bounds = jax.ShapeDtypeStruct((1, rows), jnp.int32)
    packed = PackedIndices(bounds, bounds)
    sources = (
        RangeSource(entries, entries, bounds, bounds, packed=packed),
        TokenSource(entries, entries, window=window),
    )
    queries = jax.ShapeDtypeStruct((1, rows, 4, 64), dtype)
    return tuning.attention_key(queries, sources)


def entry(plan, **milliseconds):
    return {"plan": plan, "milliseconds": milliseconds}


def test_keys_hold_what_plans_depend_on():
    assert key(1000) == "bfloat16 head_dim=64 group=2 packed+window64 rows=1024"
    assert key(1025, 63) == "bfloat16 head_dim=64 group=2 packed+window64 rows=2048"
    entries = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.float16)
    bounds = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    own = (RangeSource(entries, entries, bounds, bounds, entries), TokenSource(entries, entries))
    queries = jax.ShapeDtypeStruct((1, 1, 2, 64), jnp.float16)
    found = tuning.attention_key(queries, own)
    assert found == "float16 head_dim=64 group=1 range(own queries)+causal rows=1"
    assert (
        tuning.decode_key(
            dtype="bfloat16", head_dim=128, kv_heads=8, points=4, batch=3, entries=4097
        )
        == "bfloat16 head_dim=128 kv_heads=8 points=4 lists=32 entries=8192"
    )


def test_what_is_recorded_is_chosen(table):
    assert tuning.choose("attention", "mosaic", key(1024)) is None
    best = mosaic.Tiles(workers=3, stages=4)
    found = entry(dataclasses.asdict(best), forward=1.0)
    tuning.record(table, "attention", "mosaic", key(1024), found)
    assert mosaic.Tiles(**tuning.choose("attention", "mosaic", key(1024))) == best
    for other in (("attention", "triton", key(1024)), ("decode", "mosaic", key(1024))):
        assert tuning.choose(*other) is None
    assert tuning.choose("attention", "mosaic", key(1024, window=512)) is None
    # a caller may change what it is given
    tuning.choose("attention", "mosaic", key(1024)).clear()
    assert tuning.choose("attention", "mosaic", key(1024))


def test_the_nearest_number_of_rows_serves(table):
    for rows in (512, 2048, 65536):
        tuning.record(table, "attention", "triton", key(rows), entry({"rows": rows}))
    for asked, expected in (
        (1, 512),
        (512, 512),
        (1000, 512),
        (3000, 2048),
        (8192, 2048),
        (16384, 65536),
        (1 << 20, 65536),
    ):
        assert tuning.choose("attention", "triton", key(asked)) == {"rows": expected}


def test_the_nearest_window_and_group_serve(table):
    """As the whole distance goes: a window of 64 with groups of 2, and one of 256 with 16."""
    listed = key(1024), key(1024, window=256).replace("group=2", "group=16")
    for name, other in zip(("narrow", "wide"), listed, strict=True):
        tuning.record(table, "attention", "triton", other, entry({"name": name}))
    for window, group, expected in (
        (128, 2, "narrow"),
        (128, 8, "wide"),
        (64, 1, "narrow"),
        (64, 16, "wide"),
        (16, 2, "narrow"),
        (8, 2, None),
        (1024, 32, "wide"),
        (2048, 16, None),
    ):
        asked = key(1024, window=window).replace("group=2", f"group={group}")
        found = tuning.choose("attention", "triton", asked)
        assert found == (None if expected is None else {"name": expected}), (window, group)
    for change in (("head_dim=64", "head_dim=128"), ("packed", "range")):
        assert tuning.choose("attention", "triton", key(1024).replace(*change)) is None


def test_decoding_takes_the_plan_of_as_many_lists_that_are_no_longer(table):
    sizes = {"dtype": "bfloat16", "head_dim": 64, "kv_heads": 2, "points": 1, "batch": 2}
    near = tuning.decode_key(entries=1000, **sizes)
    tuning.record(table, "decode", "triton", near, entry({"splits": 3}))
    assert tuning.choose("decode", "triton", tuning.decode_key(entries=513, **sizes))
    assert tuning.choose("decode", "triton", tuning.decode_key(entries=512, **sizes)) is None
    assert tuning.choose("decode", "triton", tuning.decode_key(entries=9999, **sizes))
    other = tuning.decode_key(entries=1000, **sizes | {"batch": 8})
    assert tuning.choose("decode", "triton", other) is None
    # which is fastest is ranked as at the nearest sizes of the same heads
    tuning.record(table, "decode", "mosaic", near, entry({}, call=1.0))
    tuning.record(table, "decode", "triton", near, entry({"splits": 3}, call=2.0))
    assert tuning.fastest("decode", other, ("triton", "mosaic")) == "mosaic"
    heads = tuning.decode_key(entries=1000, **sizes | {"points": 2})
    assert tuning.fastest("decode", heads, ("triton", "mosaic")) is None


def test_the_other_16_bit_type_serves(table):
    half = functools.partial(key, dtype=jnp.float16)
    for rows in (512, 2048):
        tuning.record(table, "attention", "triton", key(rows), entry({"rows": rows}, forward=2.0))
        tuning.record(table, "attention", "mosaic", key(rows), entry({}, forward=1.0))
    assert tuning.choose("attention", "triton", half(2048)) == {"rows": 2048}
    assert tuning.choose("attention", "triton", half(1)) == {"rows": 512}
    assert tuning.fastest("attention", half(512), ("triton", "mosaic")) == "mosaic"
    assert tuning.choose("attention", "triton", key(512, dtype=jnp.float32)) is None
    # a type's own entries come first, of other rows too
    tuning.record(table, "attention", "triton", half(512), entry({"rows": "half"}))
    assert tuning.choose("attention", "triton", half(2048)) == {"rows": "half"}
    assert tuning.choose("attention", "triton", key(2048)) == {"rows": 2048}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"worker": 3}, "unexpected keyword argument 'worker'"),
        ({"take_turns": True, "buffers": 1}, "take_turns with 2 workers needs 2 buffers"),
    ],
)
def test_fields_that_are_no_plan_are_named(plan, message, table):
    tuning.record(table, "attention", "mosaic", key(512), entry(plan))
    with pytest.raises(ValueError, match=message) as refused:
        tuning.planned("attention", "mosaic", key(1024), mosaic.Tiles, mosaic.Tiles)
    assert str(table) in str(refused.value)
    assert f"attention mosaic {key(512)!r}" in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}x", '{"attention": {"triton": {"key": {}}}}', "3"])
def test_a_damaged_table_is_named(text, table):
    table.parent.mkdir()
    table.write_text(text)
    with pytest.raises(ValueError, match=r"tuned plans .*\.json is damaged"):
        tuning.choose("attention", "triton", key(1024))
    with pytest.raises(ValueError, match="damaged"):
        tuning.record(table, "attention", "triton", key(1024), entry({}))
    assert table.read_text() == text


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ({}, "has no plan"),
        ({"plan": {}}, "has no milliseconds; give a number for each pass"),
        ({"plan": {}, "milliseconds": {"call": "1"}}, "has no milliseconds"),
        (7, "is 7; give its plan and milliseconds"),
    ],
)
def test_an_entry_that_lacks_something_is_named(damaged, message, table):
    with pytest.raises(ValueError, match=f"the entry of decode triton 'k' {message}"):
        tuning.record(table, "decode", "triton", "k", damaged)
    assert not table.exists()
    table.parent.mkdir()
    table.write_text(json.dumps({"decode": {"triton": {"k": damaged}}}))
    with pytest.raises(ValueError, match=rf"\.json is damaged: .*decode triton 'k' {message}"):
        tuning.choose("decode", "triton", "k")


def test_the_tables_of_the_package_can_be_read():
    for path in tuning.FOLDER.glob("*.json"):
        for operation, kinds in tuning.read(path).items():
            for backend, entries in kinds.items():
                for entry in entries.values():
                    if operation == "decode":
                        (Plan if backend == "triton" else decode_mosaic.Plan)(**entry["plan"])
                    elif backend == "cudnn":
                        assert entry["plan"] == {}
                    elif backend == "mosaic":
                        mosaic.Tiles(**entry["plan"])
                    else:
                        triton.Plan(
                            **{name: triton.Tiles(**it) for name, it in entry["plan"].items()}
                        )


def test_the_search_skips_what_fails_and_keeps_the_best(capsys):
    asked = []

    def timer(plan, timed):
        asked.append((plan, timed))
        if plan.stages == 5:
            raise RuntimeError("RESOURCE_EXHAUSTED: shared memory\nand more")
        forward = 2.0 - (plan.workers == 3)
        return forward if timed == "forward" else forward + plan.backward_stages

    steps = (
        tune.Step("forward", ({"workers": 3}, {"stages": 5}, {"workers": 2})),
        tune.Step("training", ({"backward_stages": 1}, {"workers": 2, "backward_stages": 3})),
    )
    plan, times = measuring.search(mosaic.Tiles(), steps, timer)
    assert plan == mosaic.Tiles(workers=3, backward_stages=1)
    assert times == {"forward": 1.0, "training": 2.0}
    # the start is a candidate of each step, and none is timed twice
    assert asked[0] == (mosaic.Tiles(), "forward")
    assert (mosaic.Tiles(workers=3), "training") in asked
    assert len(asked) == len(set(asked)) == 6
    printed = capsys.readouterr().out
    assert "skipped  Tiles(" in printed
    assert "RESOURCE_EXHAUSTED: shared memory\n" in printed
    assert "and more" not in printed


def test_a_search_without_a_working_candidate_writes_nothing(tmp_path, capsys):
    def timer(plan, timed):
        raise NotImplementedError("no")

    assert measuring.search(mosaic.Tiles(), tune.MOSAIC_STEPS, timer) is None
    written = measuring.Journal(tmp_path / "journal")
    assert not tune._record(tmp_path / "x.json", "attention", "mosaic", "key", None, written)
    assert not list(tmp_path.iterdir())
    assert "no candidate works" in capsys.readouterr().out


def test_a_step_without_a_working_candidate_keeps_the_plan_of_earlier_ones():
    def timer(plan, timed):
        if timed == "training":
            raise NotImplementedError("no")
        return 1.0 / plan.workers

    steps = (tune.Step("forward", ({"workers": 3},)), tune.Step("training", ({"buffers": 1},)))
    start = mosaic.Tiles(take_turns=False)
    found = measuring.search(start, steps, timer)
    assert found == (dataclasses.replace(start, workers=3), {"forward": 1 / 3})


def test_the_journal_keeps_times_and_reasons(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    path.touch()
    called = []

    def timer(plan, timed):
        called.append(plan)
        if plan == "bad":
            raise RuntimeError("no room\nand more")
        return 2.0

    for _ in range(2):
        timed = measuring.Journal(path).timed("triton key", timer)
        assert timed("good", "forward") == 2.0
        with pytest.raises(measuring.Skipped, match=r"^RuntimeError: no room$"):
            timed("bad", "forward")
    assert called == ["good", "bad"]
    # another pass, another backend
    again = measuring.Journal(path).timed("mosaic", timer)
    assert timed("good", "training") == again("good", "forward")
    assert len(called) == 4
    monkeypatch.setattr(measuring.Journal, "_device_works", lambda _: False)
    with pytest.raises(SystemExit, match="the device is unusable: RuntimeError: no room"):
        timed("bad", "training")
    assert measuring.Journal(path).begun() == "triton key training bad"


def test_the_journal_tells_who_waits(tmp_path):
    path, lock = tmp_path / "journal", tmp_path / "lock"
    for file in (path, lock):
        file.touch()
    first, second = measuring.Journal(path, lock), measuring.Journal(tmp_path / "other", lock)
    (tmp_path / "other").touch()

    def use():
        with second.alone():
            pass

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with first.alone():
            assert not first.waits()
            held = pool.submit(use)
            while not second.waits():
                sleep(0.01)
        held.result()
    assert not second.waits()


def test_every_candidate_is_a_plan():
    for start, steps in (
        (mosaic.Tiles(), tune.MOSAIC_STEPS),
        (triton.plan(128, "bfloat16"), tune.TRITON_STEPS),
        *(
            (start, tune.decode_steps(start))
            for splits in (1, 7, 256)
            for start in [Plan(tile_entries=64, splits=splits, num_warps=4, num_stages=3)]
        ),
        *(
            (start, tune.mosaic_decode_steps(start))
            for splits in (1, 2, 132)
            for start in [decode_mosaic.Plan(splits=splits, stages=3)]
        ),
    ):
        counted = []
        found = measuring.search(
            start, steps, lambda plan, timed, seen=counted: seen.append(plan) or 1.0
        )
        assert found[0] == start
        assert len(counted) > len(steps)
        if hasattr(start, "splits"):
            assert {1, start.splits} < {plan.splits for plan in counted} <= set(range(1, 257))


def test_every_choice_of_candidates_is_a_plan():
    for changes in itertools.product(*(({}, *step.changes) for step in tune.MOSAIC_STEPS)):
        plan = mosaic.Tiles()
        for change in changes:
            plan = dataclasses.replace(plan, **change)


QUICKSTART = ("attention", "quickstart", "--window", "64", "--kind", "separators")


@pytest.fixture
def journal(tmp_path):
    """The arguments of a task's process."""
    path = tmp_path / "journal"
    path.touch()
    return ("--journal", str(path))


def fake_timing(monkeypatch):
    """Times by the plan alone, without running anything."""

    def time(function, sets, seconds, journal):
        assert seconds > 0
        with journal.alone():
            pass
        jax.eval_shape(function, *sets[0])
        return 1.0

    monkeypatch.setattr(tune, "_time", time)
    monkeypatch.setattr(tune.gpu, "compute_capability", lambda: (9, 0))
    # quick to compile
    for module, name in ((tune.attention_shapes, "tokens"), (tune.decode_shapes, "inputs")):
        monkeypatch.setattr(module, name, functools.partial(ones, getattr(module, name)))


def ones(make, *given):
    made = jax.eval_shape(lambda: make(*given))
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), made)


def test_tuning_attention_writes_the_best_plan_of_each_backend(
    table, monkeypatch, tmp_path, journal
):
    fake_timing(monkeypatch)
    timed = []

    def attend(queries, sources, scale, plan):
        assert scale == 64**-0.5
        timed.append(plan)
        output = sum((source.values[:, :1, :1] for source in sources), queries)
        return output, None

    for backend in (mosaic, triton):
        monkeypatch.setattr(backend, "attend", attend)
    unserved = {"mosaic": "it needs a GPU", "cudnn": "it serves one TokenSource"}
    answers = unserved | {"triton": "available"}
    monkeypatch.setattr(tune, "explain", lambda *_: answers)
    monkeypatch.setattr(tune, "_ROTATED_BYTES", 1)
    path = tmp_path / "made/here.json"
    assert tune.main([*QUICKSTART, *journal, "--table", str(path)]) == 0
    written = json.loads(path.read_text())
    expected = "bfloat16 head_dim=64 group=1 packed+window64 rows=256"
    assert list(written) == ["attention"]
    assert list(written["attention"]) == ["triton"]
    entry = written["attention"]["triton"][expected]
    assert entry["milliseconds"] == {"forward": 1000.0, "training": 1000.0}
    assert entry["plan"] == dataclasses.asdict(triton.plan(64, "bfloat16"))
    assert len(timed) > 10
    assert list(path.parent.iterdir()) == [path]


def test_what_is_listed_is_not_tuned_again(table, monkeypatch, journal):
    fake_timing(monkeypatch)
    monkeypatch.setattr(tune, "_ROTATED_BYTES", 1)
    listed = "bfloat16 head_dim=64 group=1 packed+window64 rows=256"
    for backend in tune.BACKENDS:
        tuning.record(table, "attention", backend, listed, entry({}))
    before = table.read_text()
    monkeypatch.setattr(tune, "search", None)
    assert tune.main([*QUICKSTART, *journal, "--missing"]) == 0
    assert table.read_text() == before
    monkeypatch.setattr(tune, "explain", lambda *_: dict.fromkeys(tune.BACKENDS, "available"))
    with pytest.raises(TypeError):
        tune.main([*QUICKSTART, *journal, "--backend", "triton"])
    # one that can serve has no plan
    monkeypatch.setattr(tune, "search", lambda *_: None)
    assert tune.main([*QUICKSTART, *journal, "--backend", "triton"]) == 1


def test_tuning_decoding(table, monkeypatch, capsys, journal):
    fake_timing(monkeypatch)
    backend = SimpleNamespace(
        obstacle=lambda *_: None, attend=lambda queries, blocks, new, scale, plan: (queries, None)
    )
    monkeypatch.setattr(tune, "decode_triton", backend)
    monkeypatch.setattr(tune, "_ROTATED_BYTES", 1)
    assert tune.main(["decode", "odd", *journal]) == 0
    key = tuning.decode_key(
        dtype="bfloat16", head_dim=64, kv_heads=2, points=6, batch=2, entries=1066
    )
    assert Plan(**tuning.choose("decode", "triton", key))
    # the other backend says why it has no plan
    reason = "it needs jax 0.11" if jax.__version_info__ < (0, 11) else "is not a multiple of 8"
    assert reason in capsys.readouterr().out
    assert tuning.choose("decode", "mosaic", key) is None


def test_several_tasks_run_in_processes_of_their_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune.gpu, "compute_capability", lambda: (9, 0))
    called = []

    def run(call, journal, timeout):
        called.append(call)
        assert timeout == 7 and not journal.waits()
        failed = "128" in call
        return int(failed), "  best\n", "out of memory"

    monkeypatch.setattr(measuring, "_run_process", run)
    arguments = ["attention", "wide-2k", "--window", "64", "128", "--missing", "--timeout", "7"]
    arguments += ["--kind", "separators", "window", "causal"]
    assert tune.main([*arguments, "--table", str(tmp_path / "x.json"), "--processes", "2"]) == 1
    assert sorted(call[3:9] for call in called) == [
        ["attention", "wide-2k", "--kind", "causal", "--table", str(tmp_path / "x.json")],
        *(
            ["attention", "wide-2k", "--kind", kind, "--window", window]
            for kind in ("separators", "window")
            for window in ("128", "64")
        ),
    ]
    assert all("--missing" in call and "--lock" in call for call in called)
    assert len({call[call.index("--journal") + 1] for call in called}) == 5
    printed = capsys.readouterr().out
    assert printed.count("best") == 5 and printed.count("out of memory") == 2


# a task's process whose second candidate fails, and whose first and third do not
PROCESS = """
    import os, sys, time
    from pathlib import Path
    from types import SimpleNamespace
    from seqeff_kernels import measuring, tune
    from seqeff_kernels.decode_attention.plan import Plan

    def timer(plan, timed):
        with open({timed!r}, "a") as file:
            file.write(f"{{plan.splits}} ")
        if plan.splits == 2:
            {failure}
        return 1.0 / plan.splits

    def tune_decode(task, path, journal, missing):
        steps = [tune.Step("call", [{{"splits": 2}}, {{"splits": 3}}])]
        start = Plan(tile_entries=64, splits=1, num_warps=4, num_stages=3)
        with journal.alone():
            pass
        found = measuring.search(start, steps, journal.timed("triton key", timer))
        return tune._record(path, "decode", "triton", "key", found, journal)

    tune.gpu.compute_capability = lambda: (9, 0)
    tune.tune_decode = tune_decode
    sys.exit(tune.main())
"""
STICKY = (
    "measuring.Journal._device_works = lambda _: False; "
    "raise RuntimeError('CUDA_ERROR_ILLEGAL_ADDRESS')"
)


@pytest.mark.parametrize(
    ("failure", "reason", "seconds"),
    [
        ("os.abort()", "its process ended with signal 6", 600),
        ("time.sleep(1000)", "no progress in 20 s", 20),
        (STICKY, "its process ended with status 1: the device is unusable: .*ILLEGAL_ADDRESS", 600),
        ("raise RuntimeError('refused')", "RuntimeError: refused", 600),
    ],
    ids=["aborts", "hangs", "sticky", "refused"],
)
def test_a_candidate_that_ends_its_process_is_skipped(
    failure, reason, seconds, monkeypatch, tmp_path, capsys
):
    timed, table, script = (tmp_path / name for name in ("timed", "table.json", "process.py"))
    script.write_text(textwrap.dedent(PROCESS).format(timed=str(timed), failure=failure))
    monkeypatch.setattr(tune, "_PROGRAM", (sys.executable, str(script)))
    monkeypatch.setattr(tune.gpu, "compute_capability", lambda: (9, 0))
    arguments = ["decode", "odd", "--table", str(table), "--timeout", str(seconds)]
    assert tune.main([*arguments, "--processes", "1"]) == 0
    # none is timed twice
    assert timed.read_text() == "1 2 3 "
    assert tuning.read(table)["decode"]["triton"]["key"]["plan"]["splits"] == 3
    printed = capsys.readouterr().out
    assert re.search(rf"skipped  Plan\(.*splits=2.*\): {reason}", printed)
    assert printed.count(" ms ") == 2


@pytest.mark.parametrize(
    ("script", "reason"),
    [("raise SystemExit('no memory')", "status 1\nno memory"), ("while True: pass", "no progress")],
)
def test_a_process_that_ends_without_a_candidate_is_a_failure(script, reason, tmp_path, capsys):
    path = tmp_path / "journal"
    path.touch()
    assert not measuring.run_task([sys.executable, "-c", script], measuring.Journal(path), 1.0)
    assert reason in capsys.readouterr().out


def test_a_process_that_waits_for_the_device_is_not_ended(tmp_path):
    path = tmp_path / "journal"
    path.write_text('{"waits": true}\n')
    call = [sys.executable, "-c", "import time; time.sleep(1)"]
    assert measuring._run_process(call, measuring.Journal(path), 0.1) == (0, "", "")


@pytest.mark.parametrize("kind", tune.attention_shapes.KINDS)
def test_the_kinds_of_attention(kind, monkeypatch):
    monkeypatch.setattr(tune, "_ROTATED_BYTES", 1)
    shape = tune.attention_shapes.SHAPES["multi-query"]
    sets, sources = tune._attention_inputs(
        shape, tune.Task("attention", "", kind, None if kind == "causal" else 7)
    )
    queries, keys, values, cotangent, lists = sets[0]
    assert cotangent.shape == queries.shape
    own = "packed(own queries)"
    expected = {
        "separators": "packed+window8",
        "bounded": "packed+packed+window8",
        "compact": f"{own}+window8",
        "bounded-compact": f"{own}+{own}+window8",
        "window": "window8",
        "causal": "causal",
    }
    key = tuning.attention_key(queries, sources(queries, keys, values, lists))
    assert f" {expected[kind]} " in key


def test_the_fastest_that_is_listed(table):
    listed = {"mosaic": 2.0, "cudnn": 3.0, "triton": 1.0}
    for backend, time in listed.items():
        found = entry({}, forward=0.1, training=time)
        tuning.record(table, "attention", backend, key(1024), found)
    assert tuning.fastest("attention", key(1024), ("cudnn", "mosaic")) == "mosaic"
    assert tuning.fastest("attention", key(900), tuple(listed)) == "triton"
    # of one alone nothing is known, nor without the one that is preferred
    assert tuning.fastest("attention", key(1024), ("cudnn", "xla")) is None
    assert tuning.fastest("attention", key(1024), ("xla", "mosaic", "triton")) is None
    assert tuning.fastest("attention", key(1024, window=512), tuple(listed)) is None


def test_the_fastest_is_told_by_passes_that_all_have(table):
    tuning.record(table, "attention", "mosaic", key(64), entry({}, forward=1.0, training=9.0))
    tuning.record(table, "attention", "triton", key(64), entry({}, forward=2.0))
    assert tuning.fastest("attention", key(64), ("mosaic", "triton")) == "mosaic"
    tuning.record(table, "attention", "triton", key(64), entry({}, call=2.0))
    assert tuning.fastest("attention", key(64), ("mosaic", "triton")) is None


def test_the_fastest_is_told_by_rows_that_all_have(table):
    for backend, rows, time in (
        ("mosaic", 1024, 2.0),
        ("triton", 1024, 3.0),
        # longer rows take more time
        ("mosaic", 8192, 20.0),
        ("triton", 64, 0.2),
    ):
        tuning.record(table, "attention", backend, key(rows), entry({}, training=time))
    for rows in (64, 1024, 8192):
        assert tuning.fastest("attention", key(rows), ("mosaic", "triton")) == "mosaic"
    tuning.record(table, "attention", "cudnn", key(64), entry({}, training=0.1))
    assert tuning.fastest("attention", key(64), ("mosaic", "cudnn")) is None


def test_a_device_without_a_table_takes_its_relatives(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.record(tmp_path / "NVIDIA_H100_80GB_HBM3.json", "decode", "triton", "k", entry({"a": 1}))

    def on(kind):
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
        return tuning.choose("decode", "triton", "k")

    assert on("NVIDIA H200") == on("NVIDIA H100 80GB HBM3") == {"a": 1}
    assert on("NVIDIA A100-SXM4-80GB") is None
    tuning.record(tuning.table_path("NVIDIA H200"), "decode", "triton", "k", entry({"a": 2}))
    assert on("NVIDIA H200") == {"a": 2}
    assert on("NVIDIA H100 80GB HBM3") == {"a": 1}


def test_entries_of_a_key_are_all_of_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H200")])
    relative, own = (tuning.table_path(f"NVIDIA {name}") for name in ("H100", "H200"))
    for key in ("k", "l"):
        for backend, time in (("triton", 1.0), ("mosaic", 2.0)):
            tuning.record(relative, "decode", backend, key, entry({"a": 1}, call=time))
    tuning.record(own, "decode", "mosaic", "k", entry({"a": 2}, call=3.0))
    assert tuning.choose("decode", "mosaic", "k") == {"a": 2}
    assert tuning.choose("decode", "triton", "k") is None
    assert tuning.fastest("decode", "k", ("mosaic", "triton")) is None
    assert tuning.fastest("decode", "l", ("mosaic", "triton")) == "triton"
    with pytest.raises(ValueError, match=r"NVIDIA_H100\.json has no plan in its entry of decode"):
        tuning.planned("decode", "triton", "l", lambda **_: int("x"), lambda: 0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["attention", "wide-3k"], "no shape of attention is called wide-3k: quickstart, "),
        (["decode", "wide-2k"], "no shape of decode is called wide-2k"),
        (["decode"], "tuning needs an NVIDIA GPU; JAX's backend is cpu"),
        ([], "tuning needs an NVIDIA GPU; JAX's backend is cpu"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments, expected, capsys):
    assert tune.main(arguments) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
