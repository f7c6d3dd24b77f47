"""The one loop that every training run goes through."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import FrameType

import jax

from seqeff.checks import UserError, flatten
from seqeff.data import Loader
from seqeff.evaluation import Perplexity
from seqeff.runs import Origin, RunDirectory
from seqeff.training.checkpoints import CheckpointStore
from seqeff.training.config import Train
from seqeff.training.metrics import MetricsFile, Throughput
from seqeff.training.profiler import Profiler
from seqeff.training.program import (
    Program,
    keep_data,
    prepare_backend,
    prepare_for,
    unlikely_epochs,
)
from seqeff.training.progress import Progress
from seqeff.training.report import Report
from seqeff.training.step import State
from seqeff.training.trackers import NoTracker


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: the last step, whether all steps are done, the last validation, a sample."""

    step: int
    complete: bool
    validation: Perplexity | None = None
    sample: str | None = None


def train(
    config: Train, run: RunDirectory, origin: Origin, *, checkpoint: int | None = None
) -> Outcome:
    """Trains to `config.steps`, going on from the run directory's last checkpoint if it has one.

    Args:
      run: begun here unless it exists; the caller holds its lock.
      origin: kept in the run directory.
      checkpoint: go on from this step, and drop the ones after it.

    Raises:
      UserError: bad data, a disk that cannot be written, too many skipped steps, a run that has
        more steps than the config asks for.
    """
    with ExitStack() as stack:
        prepare_backend(config)
        if config.tracker is not None:
            config.tracker.check()
        prepared = prepare_for(config, run)
        program = Program(config, prepared.tokenizer.vocabulary())
        stack.enter_context(jax.set_mesh(program.mesh))
        terminated = stack.enter_context(_termination())
        store = stack.enter_context(CheckpointStore(run.checkpoints, config.checkpoints))
        if store.latest() is not None and not run.exists():
            raise UserError(
                f"{run.path} has checkpoints but no {run.operative_config.name}; restore that "
                "file, or choose another --run-dir"
            )
        state, first = _begin(program, config, store, checkpoint)
        if first > config.steps:
            raise UserError(
                f"{run.path} is at step {first:,}, past Train.steps = {config.steps:,}; give more "
                f"steps (--gin.Train.steps={2 * first}), or an earlier --checkpoint"
            )
        if jax.process_index() == 0:
            if not run.exists():
                keep_data(prepared, run)
            run.begin(origin)
        metrics_file = stack.enter_context(contextlib.closing(MetricsFile(run.metrics)))
        metrics_file.truncate_after(first)
        tracker = NoTracker()
        if config.tracker is not None:
            tracker = config.tracker.start(run.path, flatten(config))
        stack.callback(tracker.finish)
        progress = stack.enter_context(Progress(config.steps, done=first))
        report = Report(config, run, prepared, program, progress, metrics_file, tracker)
        progress.write(f"run directory: {run.path}\n{report.size()}")
        if warning := unlikely_epochs(config, prepared):
            progress.write(warning)
        if first >= config.steps:
            validation = report.validation(first, state, record=False)
            return Outcome(first, True, validation, report.sample(first, state, record=False))

        loader = stack.enter_context(
            Loader(
                prepared.train,
                first,
                config.steps,
                sharding=program.batch_sharding,
                prefetch=config.data.prefetch,
            )
        )
        profiler = stack.enter_context(Profiler(config.profile, run.profile))
        throughput = Throughput()
        outcome = Outcome(first, False)
        waiting: tuple[int, dict[str, jax.Array]] | None = None
        for step, batch in enumerate(loader, start=first + 1):
            profiler.before(step, state)
            state, metrics = program.step(state, batch)
            if step == first + 1:
                # compiling is no part of the speed
                throughput = Throughput()
            # the device computes this step while the host reports the one before
            if waiting is not None:
                report.step(*waiting, throughput)
            waiting = step, metrics
            stop = terminated(step)
            evaluates = config.due(step, config.evaluate_every)
            samples = config.due(step, config.sample_every)
            saves = stop or config.checkpoints.due(step, config.steps)
            if not (evaluates or samples or saves):
                continue
            # what is reported up to here must be on the disk before the checkpoint is
            report.step(*waiting, throughput)
            waiting = None
            with throughput.pause():
                outcome = Outcome(
                    step,
                    complete=step == config.steps,
                    validation=report.validation(step, state) if evaluates else None,
                    sample=report.sample(step, state) if samples else None,
                )
                if saves:
                    store.save(step, state, {"tokens": step * config.tokens_per_step})
            if stop:
                break
    return outcome


def _begin(
    program: Program, config: Train, store: CheckpointStore, checkpoint: int | None
) -> tuple[State, int]:
    """The state to start from and its step."""
    if checkpoint is None and store.latest() is None:
        state = program.initialise(jax.random.key(config.seed))
        if config.parent is not None:
            wanted = {"parameters": program.abstract_state["parameters"]}
            with CheckpointStore(RunDirectory(config.parent).checkpoints) as parent:
                found, _ = parent.restore(config.parent_step, wanted, partial=True)
            state = {**state, **found}
        return state, 0
    state, _ = store.restore(checkpoint, program.abstract_state)
    step = int(state["step"])
    store.discard_after(step)
    return state, step


@contextlib.contextmanager
def _termination() -> Iterator[Callable[[int], bool]]:
    """A function of the step that tells whether the run was asked to end, on every host at once.

    SIGTERM and SIGINT ask; a second SIGINT no longer waits for the step.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # JAX itself catches SIGTERM there
        yield multihost_utils.reached_preemption_sync_point
        return
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    def terminated(step: int) -> bool:
        return bool(asked)

    signals = (signal.SIGTERM, signal.SIGINT)
    try:
        before = [signal.signal(number, note) for number in signals]
    except ValueError:
        # not the main thread, where signals cannot be caught
        yield terminated
        return
    try:
        yield terminated
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
