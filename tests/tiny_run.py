"""A very small run: its corpus, its config, and ways to start it."""

import contextlib
import dataclasses
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from seqeff import cli, config
from seqeff.runs import RunDirectory
from seqeff.training.metrics import read_metrics

STEPS, SAVE_EVERY, EVALUATE_EVERY = 24, 4, 8
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "big", "red", "house"]
GIN = f"""
    Train.model = @TransformerConfig()
    Train.data = @Data()
    Train.optimizer = @AdamW()
    Train.checkpoints = @Checkpoints()
    Train.mesh = @MeshConfig()
    Train.steps = {STEPS}
    Train.log_every = 1
    Train.evaluate_every = {EVALUATE_EVERY}
    Train.sample_tokens = 8
    Checkpoints.every = {SAVE_EVERY}
    AdamW.learning_rate = 1e-2
    MeshConfig.data = 1

    TransformerConfig.vocabulary_size = 320
    TransformerConfig.width = 32
    TransformerConfig.layers = 2
    TransformerConfig.projections = @HeadProjections()
    TransformerConfig.feed_forward = @FeedForward()
    TransformerConfig.attention = @DenseAttention()
    TransformerConfig.dtype = 'float32'
    TransformerConfig.rematerialise = 'nothing'
    TransformerConfig.attention_backend = 'reference'
    HeadProjections.heads = 2
    FeedForward.hidden = 64

    Data.source = @TextFiles()
    Data.tokenizer = @TrainBPE()
    Data.sequence_length = 32
    Data.batch_size = 4
    Data.holdout = 0.1
    Data.cache = '{{folder}}/cache'
    TextFiles.paths = ('{{folder}}/corpus/*.txt',)
    TrainBPE.vocabulary_size = 300
"""


class Result(NamedTuple):
    status: int
    output: str
    errors: str


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A folder with `tiny.gin`, its corpus and its cache."""

    folder: Path

    @classmethod
    def make(cls, folder):
        (folder / "corpus").mkdir()
        choose = random.Random(0)
        for number in range(40):
            text = " ".join(sentence(choose) for _ in range(choose.randint(3, 12)))
            (folder / f"corpus/{number:02d}.txt").write_text(text + "\n")
        lines = (GIN.format(folder=folder)).splitlines()
        (folder / "tiny.gin").write_text("\n".join(line.strip() for line in lines))
        return cls(folder)

    @property
    def config(self):
        return self.folder / "tiny.gin"

    def write(self, name, text):
        """A gin file that includes `tiny.gin`."""
        lines = [line.strip() for line in text.splitlines()]
        path = self.folder / name
        path.write_text("\n".join(["include 'tiny.gin'", *lines]))
        return path

    def load(self, *overrides):
        return config.load(self.config, overrides).root

    def train(self, run_dir, *options, config=None):
        return seqeff("train", config or self.config, "--run-dir", run_dir, *options)

    def start(self, run_dir, *options):
        """Training in a process of its own."""
        command = [sys.executable, "-m", "seqeff.cli", "train", self.config, "--run-dir", run_dir]
        with open(self.folder / f"{run_dir.name}.log", "a") as log:
            return subprocess.Popen(
                [*map(str, command), *options], env=environment(), stdout=log, stderr=log
            )


def sentence(choose):
    return " ".join(choose.choice(WORDS) for _ in range(choose.randint(3, 9))) + "."


def environment():
    """This process's environment, with what it keeps in `jax.config`."""
    return os.environ | {
        name.upper(): str(jax.config.values[name]) for name in _compilation(folder=None)
    }


def seqeff(*arguments):
    """Runs a command in this process."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = cli.main([str(argument) for argument in arguments])
    return Result(status, output.getvalue(), errors.getvalue())


def refused(*arguments):
    """The one line with which a command is refused."""
    status, _, errors = seqeff(*arguments)
    assert status == 2, errors
    *progress, line = errors.splitlines()
    assert not any(line.startswith("seqeff: ") for line in progress)
    return line.removeprefix("seqeff: ")


def steps_of(run_dir):
    """What each step's line of the metrics says that does not depend on the clock."""
    unsteady = {"tokens_per_second", "memory_gib", "peak_memory_gib"}
    return [
        {name: value for name, value in line.items() if name not in unsteady}
        for line in read_metrics(RunDirectory(run_dir).metrics)
    ]


def losses_of(run_dir):
    return [line["loss"] for line in steps_of(run_dir) if "loss" in line]


def validations_of(run_dir):
    return [line for line in steps_of(run_dir) if "validation/loss" in line]


def files_of(folder):
    """Contents of every file, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _compilation(folder):
    return {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@contextlib.contextmanager
def quick_compilation(folder):
    """Compiles with less optimisation, and each program once for all that run it."""
    settings = _compilation(folder)
    before = {name: jax.config.values[name] for name in settings}
    _apply(settings)
    try:
        yield
    finally:
        _apply(before)


def _apply(settings):
    from jax.experimental.compilation_cache import compilation_cache

    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
