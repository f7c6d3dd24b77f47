"""Whole runs of the training loop, uninterrupted."""

import json

import numpy as np
import pytest
from tiny_run import (
    EVALUATE_EVERY,
    SAVE_EVERY,
    STEPS,
    files_of,
    losses_of,
    quick_compilation,
    refused,
    steps_of,
    validations_of,
    write_json_lines,
)

from seqeff.data import Tokenizer
from seqeff.runs import RunDirectory

pytestmark = pytest.mark.usefixtures("quick_compilation")

POISON = """
    import dataclasses
    import jax.numpy as jnp
    from seqeff.training.objectives import NextToken

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Poisoned(NextToken):
        first: int
        last: int

        def sums(self, model, batch):
            total, parts = super().sums(model, batch)
            bad = (batch.tokens[0, 1] >= self.first) & (batch.tokens[0, 1] <= self.last)
            return jnp.where(bad, jnp.nan, total), {"loss": jnp.where(bad, jnp.nan, parts["loss"])}
"""

POISONED = """
    import poison
    Train.objective = @Poisoned()
    Poisoned.first = 0
    Poisoned.last = 75
    Train.sample_tokens = 1
"""


def test_every_step_is_a_line_and_the_loss_falls(finished):
    lines = [line for line in steps_of(finished) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, STEPS + 1)]
    losses = losses_of(finished)
    assert losses[0] == pytest.approx(np.log(320), abs=0.3)
    assert np.mean(losses[-4:]) < losses[0] - 1
    assert all(line["skipped"] == 0 and line["gradient_norm"] > 0 for line in lines)
    rates = [line["learning_rate"] for line in lines]
    assert max(rates) == pytest.approx(1e-2) and rates[-1] < rates[-2]


def test_validations_samples_and_checkpoints_come_on_schedule(finished):
    validations = validations_of(finished)
    assert [line["step"] for line in validations] == [8, 16, 24]
    assert EVALUATE_EVERY == 8
    bits = [line["validation/bits_per_byte"] for line in validations]
    assert bits[-1] < bits[0]
    for line in validations:
        nats = line["validation/loss"] * line["validation/tokens"]
        expected = nats / np.log(2) / line["validation/bytes"]
        assert line["validation/bits_per_byte"] == pytest.approx(expected)
    assert list(files_of(finished / "samples")) == [f"{STEPS}.txt"]
    assert (finished / f"samples/{STEPS}.txt").read_text().startswith("The ")
    kept = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert kept == [STEPS - SAVE_EVERY, STEPS]


def test_the_run_directory_explains_itself(finished, tiny):
    run = RunDirectory(finished)
    assert tiny.config.read_text() in run.config.read_text()
    assert "Train.seed = 0" in run.operative_config.read_text()
    versions = json.loads(run.versions.read_text())
    assert versions["packages"]["jax"]
    assert (run.tokenizer / "tokenizer.json").exists()


def test_a_finished_run_that_is_started_again_changes_nothing(copied, tiny):
    before = files_of(copied)
    result = tiny.train(copied)
    assert result.status == 0
    assert "validation: loss" in result.output
    after = files_of(copied)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {
        "versions.json"
    }


def test_a_run_past_the_steps_asked_for_is_left_as_it_is(copied, tiny):
    before = files_of(copied)
    result = tiny.train(copied, f"--gin.Train.steps={STEPS - 1}")
    assert result.status == 2
    said = f"is at step {STEPS}, past Train.steps = {STEPS - 1}; give more steps"
    assert said in result.errors
    assert files_of(copied) == before


def test_a_run_goes_on_with_more_steps_and_another_cadence(copied, tiny):
    result = tiny.train(
        copied,
        f"--gin.Train.steps={STEPS + 4}",
        "--gin.Train.sample_every=2",
        "--gin.Checkpoints.every=2",
        "--gin.Train.profile=(26, 2)",
        "--gin.Train.expected_bits_per_byte=(0.1, 7)",
        "--gin.Data.prefetch=1",
    )
    assert result.status == 0, result.errors
    assert "expected" not in result.output  # the range is that of the config's own steps
    assert len(losses_of(copied)) == STEPS + 4
    assert {"26.txt", "28.txt"} <= files_of(copied / "samples").keys()
    assert any(name.endswith(".xplane.pb") for name in files_of(copied / "profile"))
    assert "Train.steps = 28" in (copied / "operative_config.gin").read_text()


def test_an_earlier_checkpoint_gives_the_same_losses_again(copied, finished, tiny):
    result = tiny.train(copied, "--checkpoint", STEPS - SAVE_EVERY)
    assert result.status == 0, result.errors
    assert steps_of(copied) == steps_of(finished)


@pytest.mark.parametrize(
    ("bounds", "verdict"), [("(0.1, 7)", "as expected (0.1 to 7)"), ("(7, 8)", "NOT as expected")]
)
def test_the_terminal_says_how_it_went_and_what_to_type_next(bounds, verdict, tiny, copied):
    result = tiny.train(copied, f"--gin.Train.expected_bits_per_byte={bounds}")
    assert f"bits per byte, {verdict}" in result.output
    assert f"seqeff eval {copied}" in result.output
    assert "parameters" in result.errors


def test_no_sample_is_drawn_of_no_tokens(tiny, copied):
    result = tiny.train(copied, "--gin.Train.sample_tokens=0")
    assert result.status == 0, result.errors
    assert result.output.lstrip().startswith("validation:")
    assert "next:" in result.output


def test_a_long_sample_prompt_is_shown_as_the_model_saw_it(tiny, copied):
    prompt = "the cat sat on a mat and the dog ran to the big red house. " * 4
    result = tiny.train(copied, f"--gin.Train.sample_prompt={prompt!r}")
    assert result.status == 0, result.errors
    tokenizer = Tokenizer.load(copied / "tokenizer")
    seen = tokenizer.decode(tokenizer.encode(prompt)[:15])
    assert 0 < len(seen) < len(prompt) / 2
    shown = result.output.lstrip("\n").split("\n\n")[0]
    assert shown.startswith(seen)
    assert len(tokenizer.encode(shown)) <= 15 + 8


@pytest.fixture(scope="module")
def poisoned(tiny):
    lines = POISON.splitlines()
    (tiny.folder / "poison.py").write_text("\n".join(line[4:] for line in lines))
    return tiny.write("poisoned.gin", POISONED)


@pytest.fixture(scope="module")
def skipping(tiny, poisoned, compilation_cache):
    """A run some of whose steps are not finite: those whose batch begins with certain ids."""
    run_dir = tiny.folder / "skipping"
    with quick_compilation(compilation_cache):
        result = tiny.train(run_dir, config=poisoned)
    assert result.status == 0, result.errors
    return run_dir


def test_a_step_that_is_not_finite_is_skipped_and_counted(skipping):
    lines = [line for line in steps_of(skipping) if "loss" in line]
    bad = [bool(np.isnan(line["loss"])) for line in lines]
    assert 0 < sum(bad) < STEPS / 2
    assert [line["skipped"] for line in lines] == np.cumsum(bad).tolist()
    assert np.isfinite(validations_of(skipping)[-1]["validation/loss"])
    # the schedule stands still meanwhile
    rates = [line["learning_rate"] for line in lines]
    for step in np.flatnonzero(bad[:-1]):
        assert rates[step + 1] == rates[step]


def test_too_many_skipped_steps_end_the_run(skipping, tiny, poisoned, tmp_path):
    lines = [line for line in steps_of(skipping) if "loss" in line]
    longest = max(line["skipped_in_a_row"] for line in lines)
    end = next(line["step"] for line in lines if line["skipped_in_a_row"] == longest)
    line = refused(
        *("train", poisoned, "--run-dir", tmp_path / "run"),
        *("--gin.Train.guard=@Guard()", f"--gin.Guard.limit={longest - 1}"),
    )
    assert f"{longest} steps in a row up to step {end} were skipped" in line
    assert f"Guard.limit = {longest - 1}" in line
    written = steps_of(tmp_path / "run")
    assert written == steps_of(skipping)[: len(written)]
    assert written[-1]["step"] == end


def test_too_large_a_share_of_skipped_steps_ends_the_run_also_a_resumed_one(
    skipping, tiny, poisoned, tmp_path
):
    ends = [line["step"] for line in steps_of(skipping) if np.isnan(line.get("loss", 0))]
    arguments = (
        *("train", poisoned, "--run-dir", tmp_path / "run"),
        *("--gin.Train.guard=@Guard()", f"--gin.Guard.share={(len(ends) - 1) / 128}"),
    )
    # it goes on from a checkpoint after some of the skipped steps
    assert ends[0] < ends[-1] // SAVE_EVERY * SAVE_EVERY
    for _ in range(2):
        line = refused(*arguments)
        assert f"{len(ends)} of the last 128 steps up to step {ends[-1]} were skipped" in line
        assert steps_of(tmp_path / "run")[-1]["step"] == ends[-1]


MUON = """
    Train.schedule = @WarmupStableDecay()
    Train.optimizer = @Muon()
    Train.objective = @NextToken()
    NextToken.z_loss = 1e-4
    Muon.learning_rate = 1e-2
    WarmupStableDecay.warmup = 2
    HeadProjections.query = @LowRankLinear()
    HeadProjections.output = @LowRankLinear()
    FeedForward.up = @LowRankLinear()
    FeedForward.down = @LowRankLinear()
    LowRankLinear.rank = 8
    DenseAttention.window = 8
"""
SEPARATOR = """
    TransformerConfig.attention = @SeparatorAttention()
    TransformerConfig.attention_backend = 'auto'
    SeparatorAttention.window = 8
    Train.accumulate = 2
"""
FINE_TUNING = """
    Data.source = @JsonlFiles()
    JsonlFiles.paths = ('{folder}/pairs.jsonl',)
    JsonlFiles.prompt = 'question'
    JsonlFiles.completion = 'answer'
    Data.packing = 'whole'
"""
MIXTURE = """
    Data.source = @Mixture()
    Mixture.sources = (@TextFiles(), @lines/JsonlFiles())
    Mixture.weights = (3, 1)
    lines/JsonlFiles.paths = ('{folder}/lines.jsonl',)
"""


@pytest.fixture(scope="module")
def rows(tiny):
    texts = [path.read_text() for path in sorted((tiny.folder / "corpus").iterdir())]
    pairs = [{"question": text[:20], "answer": text[20:60]} for text in texts]
    write_json_lines(tiny.folder / "pairs.jsonl", pairs)
    write_json_lines(tiny.folder / "lines.jsonl", [{"text": text} for text in texts])


@pytest.mark.parametrize(
    "text",
    [MUON, SEPARATOR, FINE_TUNING, MIXTURE],
    ids=["muon-factored-window", "separator", "fine-tuning", "mixture"],
)
def test_methods_learn(text, tiny, rows, tmp_path):
    config = tiny.write("method.gin", text.format(folder=tiny.folder))
    result = tiny.train(
        tmp_path / "run",
        "--gin.Train.steps=12",
        "--gin.Train.evaluate_every=null",
        "--gin.Train.sample_tokens=1",
        config=config,
    )
    assert result.status == 0, result.errors
    losses = losses_of(tmp_path / "run")
    assert np.mean(losses[-3:]) < losses[0] - 0.4
    assert len(validations_of(tmp_path / "run")) == 1


@pytest.mark.slow
def test_wandb_offline_records_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        result = tiny.train(tmp_path / "run", "--gin.Train.tracker=@Wandb()")
        assert result.status == 0, result.errors
    offline = list((tmp_path / "run/wandb").glob("offline-run-*"))
    identifier = (tmp_path / "run/wandb_id").read_text().strip()
    assert offline and all(path.name.endswith(identifier) for path in offline)
