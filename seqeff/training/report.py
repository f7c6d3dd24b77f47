"""What a run tells while it trains: to the metrics file, the tracker and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from seqeff.data import PreparedData, place
from seqeff.evaluation import Perplexity, make_evaluate
from seqeff.inference import Engine, Request
from seqeff.models.flops import parameter_count
from seqeff.runs import RunDirectory
from seqeff.training.config import Train
from seqeff.training.metrics import (
    MetricsFile,
    Throughput,
    device_memory,
    model_flops_utilisation,
)
from seqeff.training.program import Program, flops_per_token
from seqeff.training.progress import Progress
from seqeff.training.step import State
from seqeff.training.trackers import Tracker


class Report:
    """Everything a run tells: the metrics file, the tracker, the terminal."""

    def __init__(
        self,
        config: Train,
        run: RunDirectory,
        prepared: PreparedData,
        program: Program,
        progress: Progress,
        metrics_file: MetricsFile,
        tracker: Tracker,
    ) -> None:
        self._config, self._run, self._prepared, self._program = config, run, prepared, program
        self._progress, self._metrics_file, self._tracker = progress, metrics_file, tracker
        self._flops = flops_per_token(program.model, prepared)
        self._evaluate = make_evaluate(program.graph, prepared.tokenizer.byte_lengths())
        self._engine: Engine | None = None

    def size(self) -> str:
        """The run's size, in words."""
        parameters, flops = parameter_count(self._program.model), self._flops
        devices = self._program.mesh.devices
        return (
            f"{parameters / 1e6:.1f} million parameters, {flops / 1e6:.0f} MFLOP a token, "
            f"{self._config.tokens_per_step:,} tokens a step on {devices.size} "
            f"{devices.flat[0].device_kind} device{'s' if devices.size > 1 else ''}"
        )

    def step(self, step: int, metrics: Mapping[str, jax.Array], throughput: Throughput) -> None:
        """Waits for a step and reports it."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        throughput.update(self._config.tokens_per_step)
        speed = throughput.tokens_per_second()
        self._progress.update(step, values["loss"], speed)
        if self._config.due(step, self._config.log_every):
            devices = self._program.mesh.devices
            utilisation = model_flops_utilisation(speed, self._flops, devices.size, devices.flat[0])
            self._write(
                step,
                {
                    **values,
                    "tokens": step * self._config.tokens_per_step,
                    "tokens_per_second": speed,
                    **({} if utilisation is None else {"mfu": utilisation}),
                    **device_memory(jax.local_devices()[0]),
                },
            )
        self._config.guard.check(values, step)

    def validation(self, step: int, state: State, record: bool = True) -> Perplexity | None:
        """Scores the held-out documents and reports it."""
        batches = self._prepared.validation
        if batches is None:
            return None
        count = min(len(batches), self._config.evaluation_batches or len(batches))
        (result,) = self._evaluate(
            state["parameters"],
            (place(batches, index, self._program.batch_sharding) for index in range(count)),
        )
        if record:
            metrics = result.as_metrics()
            self._write(step, {f"validation/{name}": value for name, value in metrics.items()})
            self._progress.write(
                f"step {step}: validation loss {result.loss:.4f}, "
                f"{result.bits_per_byte:.3f} bits per byte"
            )
        return result

    def sample(self, step: int, state: State, record: bool = True) -> str | None:
        """Continues the config's prompt and reports it, unless no tokens are asked for."""
        if self._config.sample_tokens == 0:
            return None
        tokenizer, config = self._prepared.tokenizer, self._config
        if self._engine is None:
            context = config.data.sequence_length
            self._engine = Engine(self._program.model, tokenizer, context=context)
        prompt = [tokenizer.begin_of_text, *tokenizer.encode(config.sample_prompt)]
        prompt = prompt[: config.data.sequence_length // 2]
        request = Request(prompt=prompt, tokens=config.sample_tokens, sampling=config.sampling)
        pieces = self._engine.stream(self._engine.prepare(state["parameters"]), [request])
        # what the model saw: a long prompt is cut
        text = tokenizer.decode(prompt) + "".join(piece.text for piece in pieces)
        if record:
            if jax.process_index() == 0:
                self._run.add_sample(step, text)
            if step < config.steps:
                self._progress.write(f"step {step}: {text}")
        return text

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        self._metrics_file.write(step, values)
        self._tracker.log(values, step=step)
