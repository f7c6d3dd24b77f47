"""Runs that begin with another's parameters, and masks put on a run that had none."""

import pytest
from tiny_run import refused, seqeff, steps_of

from seqeff.runs import RunDirectory
from seqeff.training.checkpoints import CheckpointStore

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def forked(tiny, finished):
    """A separator run that goes on from a dense one."""
    config = tiny.write(
        "forked.gin",
        f"""
        Train.parent = '{finished}'
        Train.steps = 6
        TransformerConfig.attention = @SeparatorAttention()
        SeparatorAttention.window = 5
        SeparatorAttention.separators = 3
        AdamW.learning_rate = 1e-3
        """,
    )
    return config


def losses_of(run):
    return [line["loss"] for line in steps_of(run) if "loss" in line]


def loss_of(result):
    assert result.status == 0, result.errors
    return float(result.output.split()[1])


def test_it_begins_with_the_parents_parameters(forked, tiny, finished, tmp_path):
    run = tmp_path / "run"
    result = tiny.train(run, config=forked)
    assert result.status == 0, result.errors
    (first, *_), (scratch, *_, final) = losses_of(run), losses_of(finished)
    assert abs(first - final) < abs(first - scratch)
    # its tokenizer is the parent's, to the byte
    theirs, ours = (RunDirectory(path).tokenizer / "tokenizer.json" for path in (finished, run))
    assert theirs.read_bytes() == ours.read_bytes()
    assert f"Train.parent = '{finished}'" in RunDirectory(run).operative_config.read_text()
    # and it goes on alone
    assert seqeff("eval", run).status == 0
    assert tiny.train(run, "--gin.Train.steps=7", config=forked).status == 0


def test_an_earlier_checkpoint_of_the_parent(forked, tiny, finished, tmp_path):
    step = CheckpointStore(RunDirectory(finished).checkpoints).steps()[0]
    run = tmp_path / "run"
    result = tiny.train(run, f"--gin.Train.parent_step={step}", config=forked)
    assert result.status == 0, result.errors
    later = tmp_path / "later"
    assert tiny.train(later, config=forked).status == 0
    assert losses_of(run)[0] > losses_of(later)[0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("Train.parent=/nowhere", "/nowhere is not a run directory"),
        ("Train.parent_step=3", "has no checkpoint of step 3"),
        ("TransformerConfig.width=64", "checkpoint"),
    ],
)
def test_what_cannot_be_begun_with(option, message, forked, tmp_path):
    run = tmp_path / "run"
    assert message in refused("train", forked, "--run-dir", run, f"--gin.{option}")
    assert not run.exists()


def test_a_step_without_a_parent(tiny):
    line = refused("train", tiny.config, "--gin.Train.parent_step=3", "--dry-run")
    assert "Train.parent_step = 3 needs Train.parent" in line


def test_a_mask_without_training(finished):
    """The separators' mask on a dense run: another loss, and the run is left as it is."""
    before = RunDirectory(finished).operative_config.read_text()
    dense = loss_of(seqeff("eval", finished, "--batches", 2))
    bindings = ["--gin.TransformerConfig.attention=@SeparatorAttention()"]
    whole = [*bindings, "--gin.SeparatorAttention.window=1000"]
    assert loss_of(seqeff("eval", finished, "--batches", 2, *whole)) == pytest.approx(dense)
    sparse = [*bindings, "--gin.SeparatorAttention.window=2"]
    assert loss_of(seqeff("eval", finished, "--batches", 2, *sparse)) != dense
    result = seqeff("generate", finished, "--prompt", "the", "--tokens", 5, *sparse)
    assert result.status == 0, result.errors
    assert RunDirectory(finished).operative_config.read_text() == before
    assert "SeparatorAttention.windw" in refused(
        "eval", finished, *bindings, "--gin.SeparatorAttention.windw=2"
    )
