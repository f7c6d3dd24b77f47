"""The config of a training run, from which everything else is chosen."""

from __future__ import annotations

import dataclasses

from seqeff.checks import check_types, require
from seqeff.data import Data
from seqeff.inference import Sampling
from seqeff.models import TransformerConfig
from seqeff.paths import LocalPath
from seqeff.training.checkpoints import Checkpoints
from seqeff.training.guard import Guard
from seqeff.training.mesh import MeshConfig
from seqeff.training.objectives import NextToken, Objective
from seqeff.training.optimizers import AdamW, Optimizer
from seqeff.training.schedules import Cosine, Schedule
from seqeff.training.trackers import TrackerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """A training run.

    Attributes:
      steps: optimizer steps of the whole run.
      parent: a run directory whose parameters this run begins with, and whose tokenizer it takes,
        in place of new ones; steps, schedule and optimizer are this run's own.
      parent_step: of the parent's checkpoint; null: its last.
      seed: of the initial parameters; `Data.seed` is that of the data's order.
      accumulate: parts that a batch is computed in, one after the other; divides the batch size.
      deterministic: the same bits every time on GPU too, at some cost in speed.
      log_every: steps between lines of metrics.
      evaluate_every: steps between validations; null: only after the last step.
      evaluation_batches: validation batches at most; null: all.
      sample_every: steps between printed samples; null: only after the last step.
      sample_prompt, sample_tokens, sampling: of the printed samples, of which there are none
        with 0 tokens; a prompt is cut at half of `Data.sequence_length`.
      profile: first step and number of steps that the profiler records.
      expected_bits_per_byte: range that the last validation should fall into.
    """

    model: TransformerConfig
    data: Data
    steps: int
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Cosine()
    objective: Objective = NextToken()
    guard: Guard = Guard()
    mesh: MeshConfig = MeshConfig()
    checkpoints: Checkpoints = Checkpoints()
    tracker: TrackerConfig | None = None
    parent: LocalPath | None = None
    parent_step: int | None = None
    seed: int = 0
    accumulate: int = 1
    deterministic: bool = False
    log_every: int = 10
    evaluate_every: int | None = None
    evaluation_batches: int | None = None
    sample_every: int | None = None
    sample_prompt: str = "The "
    sample_tokens: int = 100
    sampling: Sampling = Sampling()
    profile: tuple[int, int] | None = None
    expected_bits_per_byte: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "accumulate", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"Train.{name} = {value} must be at least 1")
        require(0 <= self.seed < 2**32, f"Train.seed = {self.seed} must be at least 0, below 2**32")
        require(
            self.parent_step is None or self.parent is not None,
            f"Train.parent_step = {self.parent_step} needs Train.parent, the run that has it",
        )
        for name in ("evaluate_every", "evaluation_batches", "sample_every"):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"Train.{name} = {value} must be at least 1, or null",
            )
        require(
            self.profile is None or min(self.profile) >= 1,
            f"Train.profile = {self.profile} must be a first step and a number of steps, both at "
            "least 1, or null",
        )
        require(
            self.sample_tokens >= 0,
            f"Train.sample_tokens = {self.sample_tokens} must not be negative",
        )
        expected = self.expected_bits_per_byte
        require(
            expected is None or expected[0] <= expected[1],
            f"Train.expected_bits_per_byte = {expected} must be a lower and an upper bound, or "
            "null",
        )
        require(
            self.data.batch_size % self.accumulate == 0,
            f"Train.accumulate = {self.accumulate} must divide Data.batch_size = "
            f"{self.data.batch_size}",
        )
        name, limit = type(self.model.positions).__name__, self.model.positions.limit
        require(
            limit is None or limit >= self.data.sequence_length,
            f"{name}.length = {limit} is below Data.sequence_length = {self.data.sequence_length}",
        )
        # a schedule that does not fit the steps says so
        self.schedule.make(1.0, self.steps)

    @property
    def tokens_per_step(self) -> int:
        """Positions of a batch, over all devices."""
        return self.data.batch_size * self.data.sequence_length

    def due(self, step: int, every: int | None) -> bool:
        """Whether something that happens every so many steps, and after the last, happens now."""
        return step == self.steps or (every is not None and step % every == 0)


MAY_CHANGE = frozenset(
    """checkpoints data.cache data.prefetch evaluate_every evaluation_batches
    expected_bits_per_byte guard.limit guard.share guard.spike_factor log_every mesh profile
    sample_every sample_prompt sample_tokens sampling steps tracker""".split()  # noqa: SIM905
)
"""Paths of the values of `Train` that a resumed run may set anew."""
