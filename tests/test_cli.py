"""The command line: what it prints, what it refuses, and what it leaves behind."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_run import STEPS, environment, files_of, refused, seqeff, steps_of, write_json_lines

from seqeff import __version__
from seqeff.cli import main

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = '''
    """Attends as dense attention does; for tests of what a run keeps of outside modules."""

    import dataclasses
    from seqeff.models import DenseAttention

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Outside(DenseAttention):
        strength: int = 1
'''


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where relative paths lead, so that nothing is written beside the tests."""
    monkeypatch.chdir(tmp_path)


BAD_CONFIGS = {
    "Trian.steps=3": "no config class is called Trian; did you mean Train?",
    "Train.stepz=3": "Train has no field stepz; did you mean steps?",
    "WIDHT=3": "macro WIDHT is never used",
    "Train.steps=%STEPS": "no macro is called STEPS",
    "Train.steps='3'": "Train.steps = '3' is of type str; give int",
    "Train.steps=0": "Train.steps = 0 must be at least 1",
    "Train.seed=-1": "Train.seed = -1 must be at least 0",
    "Train.optimizer=@Adam()": "no config class is called Adam",
    "Train.accumulate=3": "Train.accumulate = 3 must divide Data.batch_size = 4",
    "Train.profile=(0, 2)": "Train.profile = (0, 2) must be",
    "HeadProjections.heads=3": "TransformerConfig.width = 32",
    "SeparatorAttention.window=3": "no SeparatorAttention is built",
    "MeshConfig.data=-2": "MeshConfig.data = -2 must be -1 or at least 1",
    "Train.schedule=@Cosine(); Cosine.warmup=25": "Cosine.warmup = 25 steps exceeds the run's 24",
    "FeedForward.up=@LowRankLinear(); LowRankLinear.rank=33": "LowRankLinear.rank = 33 exceeds",
    "AdamW.learning_rate=1e999": "AdamW.learning_rate = inf is not finite",
    "Train.sample_tokens=-1": "Train.sample_tokens = -1 must not be negative",
    "Train.expected_bits_per_byte=(2.0, 1.0)": "= (2.0, 1.0) must be a lower and an upper bound",
}


@pytest.mark.parametrize("override", BAD_CONFIGS)
def test_a_bad_config_is_refused_before_any_device_is_touched(override, tiny, no_devices, tmp_path):
    overrides = [f"--gin.{binding}" for binding in override.split("; ")]
    line = refused("train", tiny.config, "--run-dir", "run", *overrides)
    assert BAD_CONFIGS[override] in line
    assert not list(tmp_path.iterdir())


def test_a_config_that_is_not_there(tiny, no_devices):
    line = refused("train", tiny.folder / "tiney.gin")
    assert "no file" in line
    assert line.endswith("/tiny.gin?")
    missing = tiny.folder / "includes.gin"
    missing.write_text("include 'tyni.gin'\n")
    assert "includes.gin:1" in refused("train", missing)


def test_no_devices_notices_them(no_devices):
    for use in (jax.devices, jax.process_index, jax.device_count, lambda: jax.random.key(0)):
        with pytest.raises(AssertionError, match="a device was touched"):
            use()


def test_bad_data_is_refused_and_nothing_is_left(tiny, no_devices, tmp_path):
    write_json_lines(tiny.folder / "rows.jsonl", [{"body": "some text"}, {"body": "more text"}])
    source = f"""
        Data.source = @JsonlFiles()
        JsonlFiles.paths = ('{tiny.folder}/rows.jsonl',)
    """
    column = tiny.write("column.gin", source)
    line = refused("train", column, "--run-dir", "run")
    assert "has no column 'text'; its columns are 'body'" in line
    (tiny.folder / "empty.txt").write_text("")
    empty = f"--gin.TextFiles.paths=('{tiny.folder}/empty.txt',)"
    assert "TextFiles is empty" in refused("train", tiny.config, "--run-dir", "run", empty)
    absent = f"--gin.TextFiles.paths=('{tiny.folder}/corpse/*.txt',)"
    assert "matches no file" in refused("train", tiny.config, "--run-dir", "run", absent)
    (tmp_path / "file").write_text("")
    cache = "--gin.Data.cache='file/cache'"
    line = refused("train", tiny.config, "--run-dir", "run", cache)
    assert f"cannot write to {tmp_path}/file/cache" in line
    (tmp_path / "file").unlink()
    assert not list(tmp_path.iterdir())
    assert "has no column" in refused("train", column)
    assert not list((tmp_path / "runs").iterdir())
    assert "has no column" in refused("train", column, "--dry-run")


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(tiny, no_devices, tmp_path):
    small = "--gin.TransformerConfig.vocabulary_size=280"
    line = refused("train", tiny.config, "--run-dir", "run", small)
    assert "= 280 is below the tokenizer's" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["MeshConfig.data=8"], "Data.batch_size = 4 does not divide among the 8 devices"),
        (["MeshConfig.data=16"], "needs 16 devices; there are 8"),
    ],
)
def test_sizes_that_do_not_fit_what_is_here(overrides, expected, tiny, tmp_path):
    options = [f"--gin.{override}" for override in overrides]
    assert expected in refused("train", tiny.config, "--run-dir", "run", *options)
    assert not list(tmp_path.iterdir())


def test_a_backend_that_cannot_serve_is_refused(tiny, copied, tmp_path):
    expected = "TransformerConfig.attention_backend = 'cudnn' cannot serve this attention: it needs"
    override = "--gin.TransformerConfig.attention_backend=cudnn"
    assert expected in refused("train", tiny.config, "--run-dir", "run", override)
    assert not (tmp_path / "run").exists()
    assert expected in refused("train", tiny.config, "--dry-run", override)
    assert expected in refused("bench", "train", tiny.config, override)
    operative = copied / "operative_config.gin"
    operative.write_text(operative.read_text().replace("'reference'", "'cudnn'"))
    assert expected in refused("eval", copied)
    assert expected in refused("generate", copied, "--prompt", "a")


def test_a_tracker_that_cannot_start_is_refused_first(tiny, no_devices, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    override = "--gin.Train.tracker=@Wandb()"
    absent = f"--gin.TextFiles.paths=('{tiny.folder}/corpse/*.txt',)"
    assert "WANDB_MODE = ofline" in refused("train", tiny.config, override, absent, "--dry-run")
    line = refused("train", tiny.config, "--run-dir", "run", override, absent)
    assert "WANDB_MODE = ofline" in line
    assert not list(tmp_path.iterdir())


def test_a_platform_that_is_not_here_is_one_line(tiny, finished, tmp_path):
    variables = environment() | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    for command in (
        ("train", tiny.config, "--run-dir", tmp_path / "run"),
        ("generate", finished, "--prompt", "a"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "seqeff.cli", *map(str, command)],
            env=variables,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 2, ended.stderr
        assert "seqeff: no device is found (JAX_PLATFORMS = cuda)" in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "count"), [("generate", 1), ("eval", 2), ("bench data", 1), ("bench attention", 1)]
)
def test_help_says_what_becomes_of_a_file_that_is_there(command, count, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("one that is there is replaced once there is something to write") == count


def test_another_run_is_not_overwritten(copied, tiny):
    before = files_of(copied)
    line = refused(
        *("train", tiny.config, "--run-dir", copied, "--gin.TransformerConfig.width=64"),
        *("--gin.AdamW.b2=0.99", "--gin.Data.seed=1", "--gin.Train.log_every=2"),
        *("--gin.TransformerConfig.attention=@SeparatorAttention()",),
    )
    assert "holds another run" in line
    assert "TransformerConfig.width = 64 (there 32)" in line
    assert "AdamW.b2 = 0.99 (there 0.95)" in line
    assert "Data.seed = 1 (there 0)" in line
    assert "TransformerConfig.attention = 'SeparatorAttention' (there 'DenseAttention')" in line
    assert "log_every" not in line
    assert "SeparatorAttention." not in line and " more" not in line
    layers = "--gin.TransformerConfig.layer_attention={0: @DenseAttention()}"
    line = refused("train", tiny.config, "--run-dir", copied, layers)
    assert "TransformerConfig.layer_attention[0] = 'DenseAttention' (there None)" in line
    many = {"width": 64, "layers": 3, "vocabulary_size": 330, "dtype": "'bfloat16'"}
    many |= {"tie_embeddings": True, "residual": "'parallel'", "rematerialise": "'everything'"}
    changes = [f"--gin.TransformerConfig.{name}={value}" for name, value in many.items()]
    line = refused("train", tiny.config, "--run-dir", copied, *changes, "--gin.Data.seed=1")
    assert line.count("(there ") == 5
    assert line.endswith(" and 3 more")
    assert files_of(copied) == before


def test_documents_or_a_tokenizer_that_differ_are_refused(copied, tiny, finished, no_devices):
    data = json.loads((copied / "data.json").read_text())
    resume = ["train", tiny.config, "--run-dir"]
    for part, name, commands in (
        ("train", "training", [resume]),
        ("validation", "validation", [resume, ["eval"]]),
    ):
        (copied / "data.json").write_text(json.dumps(data | {part: ["0" * 64]}))
        for command in commands:
            line = refused(*command, copied)
            assert f"the {name} documents differ from those that the run was started with" in line
    for damage in ("{", None):
        (copied / "data.json").unlink()
        if damage:
            (copied / "data.json").write_text(damage)
        for command in (resume, ["eval"]):
            assert "data.json" in refused(*command, copied)
    shutil.copy(finished / "data.json", copied)
    path = copied / "tokenizer/tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["merges"].pop()
    path.write_text(json.dumps(settings))
    for command in (resume, ["eval"]):
        assert "the tokenizer differs" in refused(*command, copied)


def test_relative_paths_mean_the_same_files_from_everywhere(tiny, tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(tiny.folder / "corpus", project / "corpus")
    (project / "relative.gin").write_text(
        f"include '{tiny.config}'\nTextFiles.paths = ('corpus/*.txt',)\n"
        "Data.cache = 'cache'\nTrain.steps = 2\n"
    )
    monkeypatch.chdir(project)
    result = seqeff("train", "relative.gin", "--run-dir", "run")
    assert result.status == 0, result.errors
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_dir = "../project/run"
    assert seqeff("eval", run_dir).status == 0
    assert seqeff("generate", run_dir, "--prompt", "a", "--tokens", 2).status == 0
    longer = "--gin.Train.steps=3"
    again = seqeff("train", "../project/relative.gin", "--run-dir", run_dir, longer)
    assert again.status == 0, again.errors
    other = "--gin.TextFiles.paths=('corpus/*.txt',)"
    line = refused("train", "../project/relative.gin", "--run-dir", run_dir, other)
    assert f"TextFiles.paths = ('{tmp_path}/elsewhere/corpus/*.txt',)" in line
    assert not list(Path.cwd().iterdir())


def test_a_run_goes_on_with_the_overrides_that_it_has(tiny, tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(tiny.folder / "corpus", project / "corpus")
    monkeypatch.chdir(project)
    given = ("Train.steps=2", "AdamW.b2=0.99", "TextFiles.paths=(corpus/*.txt,)")
    given += ("Train.sample_prompt=the\ncat",)
    first = seqeff(
        "train", tiny.config, "--run-dir", tmp_path / "run", *(f"--gin.{one}" for one in given)
    )
    assert first.status == 0, first.errors
    assert "with the run's own overrides" not in first.errors
    # the last line of the hints, as it is printed, but from elsewhere
    monkeypatch.chdir(tmp_path)
    command = shlex.split(first.output.splitlines()[-1])
    assert command[0] == "seqeff"
    assert command[-1] == "--gin.Train.steps=4"
    second = seqeff(*command[1:])
    assert second.status == 0, second.errors
    assert "with the run's own overrides: --gin.AdamW.b2=0.99 " in second.errors
    assert (tmp_path / "run/overrides.txt").read_text().splitlines() == [
        "AdamW.b2=0.99",
        f"TextFiles.paths=('{project}/corpus/*.txt',)",
        "Train.sample_prompt='the\\ncat'",
        "Train.steps=4",
    ]
    kept = (tmp_path / "run/operative_config.gin").read_text()
    for config in (tiny.config, "run/operative_config.gin"):
        again = seqeff("train", config, "--run-dir", "run")
        assert again.status == 0, again.errors
        assert (tmp_path / "run/operative_config.gin").read_text() == kept


def test_an_error_names_the_macro_of_its_field(tiny, tmp_path):
    path = tiny.write("macro.gin", "BOOKS = ('corpus/*.txt',)\nTextFiles.paths = %BOOKS")
    line = refused("train", path, "--dry-run", "--gin.BOOKS=('absent/*',)")
    assert line == (
        f"TextFiles.paths = '{tmp_path}/absent/*' matches no file; it is %BOOKS: give "
        "--gin.BOOKS=VALUE"
    )


def test_what_a_run_directory_holds_is_no_config(finished):
    line = refused("train", finished)
    assert f"is a run directory; to go on with it: seqeff train CONFIG --run-dir {finished}" in line
    line = refused("train", finished / "config.gin")
    assert "record of several files" in line
    assert "operative_config.gin" in line


def test_far_too_many_epochs_are_warned_of(tiny):
    dry_run = seqeff("train", tiny.config, "--dry-run", "--gin.Train.steps=100000")
    *_, line = dry_run.output.splitlines()
    assert re.match(r"warning: these are 7,\d\d\d epochs of 1,\d\d\d training tokens; give", line)


def test_the_separators_of_a_run(finished):
    result = seqeff("info", "--separators", finished)
    assert result.status == 0, result.errors
    assert result.output.startswith(f"{finished / 'tokenizer'}: ")
    line = refused("info", "--separators", finished / "tokenizer.json")
    assert line.endswith("no such file or directory; the run's is " + str(finished / "tokenizer"))
    assert "did you mean" in refused("info", "--separators", finished / "tokenizer/tokeniser.json")


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"seqeff {__version__}\n"


def test_a_directory_that_cannot_be_written(tiny, no_devices, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused("train", tiny.config, "--run-dir", "file/run")
    assert "cannot write the run directory" in line
    assert "Not a directory" in line
    (tmp_path / "runs").write_text("")
    assert "cannot make a run directory" in refused("train", tiny.config)


def test_a_full_disk(tiny, finished, tmp_path):
    """No file may grow past some kilobytes, as on a disk that is full."""
    limited = (
        "import resource, signal, sys; from seqeff.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, "train", tiny.config, "--run-dir", "run"]
    ended = subprocess.run(
        [*map(str, command)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    *_, line = ended.stderr.splitlines()
    assert line.startswith("seqeff: cannot write checkpoint ")
    assert "File too large" in line
    assert "Traceback" not in ended.stderr
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: COMMAND; see seqeff --help"),
        (["trian"], "'bench'); did you mean train?; see seqeff --help"),
        (["train"], "the following arguments are required: config; see seqeff train --help"),
        (["train", "a.gin", "--dryrun"], "arguments: --dryrun; did you mean --dry-run?; see"),
        (["train", "a.gin", "--A.b=1"], "arguments: --A.b=1; did you mean --gin.A.b=1?; see"),
        (["train", "."], ". is a directory; give a gin file"),
        (["eval", "--streaming", "book.txt", "run"], "RUN_DIR (before --streaming BOOK..., --"),
        (["eval", "run", "--batches", "x"], "argument --batches: 'x' is not a whole number of"),
        (["train", "a.gin", "--gin.Train.steps"], "--gin.Train.steps has no value"),
        (["info", "--gin.Train.steps=3"], "seqeff info takes no --gin overrides"),
        (["eval", "."], "is not a run directory: it has no operative_config.gin"),
        (["eval", "absent"], "absent is not a run directory: it is not there"),
        (["generate", "absent", "--prompt", "a"], "is not a run directory"),
        (["generate", ".", "--prompt", "a"], "is not a run directory"),
        (["bench"], "the following arguments are required: BENCHMARK; see seqeff bench --help"),
        (["bench", "train"], "are required: configs; see seqeff bench train --help"),
        (["bench", "data", "a.gin"], "unrecognized arguments: a.gin"),
        (["train", "a.gin", "--steps", "5"], "--steps 5; a field of the config is given as --gin."),
        (["bench", "data", "--gin.A.b=1"], "seqeff bench data takes no --gin overrides"),
    ],
)
def test_a_bad_command_is_one_line(arguments, expected, no_devices):
    assert expected in refused(*arguments)


def test_a_checkpoint_that_does_not_exist(finished, tiny, tmp_path):
    for command in (["eval"], ["train", tiny.config, "--run-dir"]):
        assert "no checkpoint of step 3; it has 20, 24" in refused(
            *command, finished, "--checkpoint", 3
        )
    line = refused("train", tiny.config, "--run-dir", "run", "--checkpoint", 3)
    assert "no checkpoint" in line
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named_and_not_used(copied, tiny):
    victim = max((copied / f"checkpoints/{STEPS}").rglob("*"), key=lambda p: p.stat().st_size)
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    for command in (["eval"], ["train", tiny.config, "--run-dir"]):
        line = refused(*command, copied)
        assert "is damaged" in line
        assert "--checkpoint 20" in line
    assert seqeff("eval", copied, "--checkpoint", 20).status == 0


def test_a_dry_run_tells_the_costs_and_writes_nothing(tiny, tmp_path):
    result = seqeff("train", tiny.config, "--run-dir", "run", "--dry-run")
    assert result.status == 0, result.errors
    for word in ("model: ", "MFLOP a token", "epochs", "devices: 1", "memory a device: parameters"):
        assert word in result.output
    parameters = 320 * 32 * 2 + 2 * (4 * 32 * 32 + 2 * 32 * 64)
    printed = int(result.output.split("model: ")[1].split(" ")[0].replace(",", ""))
    assert parameters < printed < parameters * 1.1
    assert not list(tmp_path.iterdir())
    refused("train", tiny.config, "--dry-run", "--gin.MeshConfig.data=8")


@pytest.mark.parametrize("options_first", [True, False])
def test_bench_times_each_config(options_first, tiny, tmp_path):
    configs, options = [tiny.config, tiny.config], ["--steps", 1, "--json", "speed.json"]
    ordered = [*options, *configs] if options_first else [*configs, *options]
    result = seqeff("bench", "train", *ordered, "--gin.Train.seed=1")
    assert result.status == 0, result.errors
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["benchmark"] == "train"
    assert [row["config"] for row in report["results"]] == [str(tiny.config)] * 2
    assert all(row["tokens_per_second"] > 0 for row in report["results"])
    (tmp_path / "file").write_text("")
    if options_first:
        line = refused("bench", "train", "--steps", 1, "--json", "file/x.json", tiny.config)
        assert "argument --json: file/x.json: there is no folder file; make it" in line


def test_info_tells_what_is_here():
    result = seqeff("info")
    assert result.status == 0
    for text in (
        "devices: 8 of kind cpu",
        "Attention: DenseAttention, SeparatorAttention",
        "Optimizer: AdamW, Muon",
        "xla: available",
        "cudnn: it needs a CUDA device",
        "triton",
    ):
        assert text in result.output


def test_info_does_without_a_device(monkeypatch):
    def none(*_):
        raise RuntimeError("no accelerator answers\nand more")

    monkeypatch.setattr(jax, "devices", none)
    result = seqeff("info")
    assert result.status == 0
    assert "devices: none; no accelerator answers" in result.output


def test_an_outside_attention_is_kept_with_the_run(tiny, tmp_path, finished):
    source = tmp_path / "project/outside.py"
    source.parent.mkdir()
    source.write_text("\n".join(line[4:] for line in OUTSIDE.splitlines()))
    given = source.with_name("outside.gin")
    given.write_text(
        f"include '{tiny.config}'\nimport outside\n"
        "TransformerConfig.attention = @Outside()\nOutside.strength = 2\n"
    )
    run_dir = tmp_path / "run"
    result = seqeff("train", given, "--run-dir", run_dir)
    assert result.status == 0, result.errors
    assert (run_dir / "modules/outside.py").read_text() == source.read_text()
    assert "Outside.strength = 2" in (run_dir / "operative_config.gin").read_text()
    expected = steps_of(run_dir)

    before = files_of(run_dir)
    source.write_text(source.read_text() + "\n# changed\n")
    line = refused("train", given, "--run-dir", run_dir, "--checkpoint", "20")
    assert line.startswith(f"{source} is not the code that this run began with, {run_dir}/modules/")
    assert files_of(run_dir) == before
    # the way out that it offers
    subprocess.run(re.search(r"there: (cp .*); or", line)[1], shell=True, check=True)
    assert (run_dir / "modules/outside.py").read_text() == source.read_text()
    result = seqeff("train", given, "--run-dir", run_dir, "--checkpoint", "20")
    assert result.status == 0, result.errors

    source.unlink()
    in_a_new_process(["train", given, "--run-dir", run_dir, "--checkpoint", "20"])
    assert steps_of(run_dir) == expected
    shutil.rmtree(source.parent)
    in_a_new_process(["eval", run_dir], ["generate", run_dir, "--prompt", "a", "--tokens", "2"])


def in_a_new_process(*commands):
    code = "import sys; from seqeff.cli import main; sys.exit(any(map(main, {})))"
    code = code.format([[str(argument) for argument in command] for command in commands])
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_a_reader_that_goes_away_is_no_error(finished):
    command = [sys.executable, "-m", "seqeff.cli", "info"]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_loading_a_config_starts_no_backend():
    code = (
        "from seqeff.config import load; load('configs/quickstart.gin');"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), check=True)
