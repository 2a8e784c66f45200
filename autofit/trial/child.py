"""What a trial runs in its child process: the costliest step, measured phase by phase."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

from autofit.memory.meter import Meter, open_meter
from autofit.step.batch import MicroBatch, collate, worst_examples
from autofit.step.model import checkpointable_layers
from autofit.step.optimizer import build_optimizer
from autofit.step.policy import resolve_policy
from autofit.step.step import Step, build_step
from autofit.trial.phases import PhaseReport
from autofit.trial.request import TrialRequest
from autofit.trial.result import TrialResult, TrialStatus


def run_trial(request: dict[str, Any], report: PhaseReport) -> dict[str, Any]:
    """Runs the trial of a `TrialRequest`; returns a `TrialResult` as JSON (FIT, or OOM seen by the driver only).

    Two optimizer steps on the costliest micro-batch, the second of two where training accumulates (gradients that
    are kept raise the peak), then evaluation of one and a save of the adapter.

    Raises:
        torch.OutOfMemoryError: the cap was crossed; what was measured until then stands in the phase record.
    """
    asked = TrialRequest.from_json(request)
    trial = _Trial(asked, report)
    with trial.meter:
        return trial.run().to_json()


class _Trial:
    def __init__(self, request: TrialRequest, report: PhaseReport) -> None:
        self.request = request
        self.report = report
        self.meter: Meter = open_meter(request.device.type, request.cap_bytes)
        self.known: dict[str, int] = {}
        self.phase = "build"

    def run(self) -> TrialResult:
        candidate = self.request.candidate
        step = self._build()
        batch = self._batch(step)
        tokens_per_second = self._train(step, batch)
        training = self.meter.peaks()
        evaluation = self._measured("eval", lambda: step.evaluate(batch))
        with tempfile.TemporaryDirectory() as folder:
            saving = self._measured("save", lambda: step.model.save_pretrained(folder))
        largest = max(training.device_bytes, evaluation, saving)
        fits = largest <= self.request.budget_bytes
        return TrialResult(
            status=TrialStatus.FIT if fits else TrialStatus.OOM,
            phase="done",
            static_bytes=self.known["static_bytes"],
            trainable_parameters=self.known["trainable_parameters"],
            peak_allocated_bytes=training.allocated_bytes,
            peak_reserved_bytes=training.reserved_bytes,
            eval_peak_bytes=evaluation,
            save_peak_bytes=saving,
            device_bytes=largest,
            projected_bytes=None if fits else largest,
            tokens_per_second=tokens_per_second,
            message="" if fits else f"ran, but {candidate.layout} steps take {largest} bytes as the driver sees it",
        )

    def _build(self) -> Step:
        self._enter("build")
        request = self.request
        policy = resolve_policy(request.candidate, request.device)
        step = build_step(request.candidate, request.source, policy, request.lora_alpha, request.seed)
        self.meter.hold([*step.model.parameters(), *step.model.buffers()])
        self.known["static_bytes"] = self.meter.live_bytes()
        self.known["trainable_parameters"] = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        step.report = self._enter
        _LayerProgress(step, self)
        return step

    def _batch(self, step: Step) -> MicroBatch:
        candidate = self.request.candidate
        vocabulary = step.model.get_input_embeddings().num_embeddings
        examples = worst_examples(candidate.token_budget, candidate.max_seq_length, vocabulary)
        return collate(examples, pad_token_id=0)

    def _train(self, step: Step, batch: MicroBatch) -> float:
        optimizer = build_optimizer(step.model, self.request.candidate, step.policy, learning_rate=1e-5)
        normalizer = max(1, batch.targets.numel())
        self.meter.reset_peak()
        seconds, tokens = 0.0, 0
        for count in (1, 2 if self.request.candidate.accumulates else 1):
            self.meter.synchronize()
            start = time.perf_counter()
            step.accumulate([batch] * count, normalizer * count)
            self.meter.measure_context()
            step.unscale(optimizer)
            self._enter("optimizer")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.meter.synchronize()
            seconds, tokens = time.perf_counter() - start, batch.padded_tokens * count
        return tokens / seconds

    def _measured(self, phase: str, what: Callable[[], object]) -> int:
        """Runs a phase; returns its peak as the driver sees it, in bytes."""
        self._enter(phase)
        self.meter.reset_peak()
        what()
        self.meter.synchronize()
        return self.meter.peaks().device_bytes

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.report(phase, **self.known)


class _LayerProgress:
    """Keeps on record how far a forward pass came, so that an OOM says what the whole step would have needed."""

    def __init__(self, step: Step, trial: _Trial) -> None:
        self.trial = trial
        layers = checkpointable_layers(step.model)
        self.num_layers = len(layers)
        self.done = 0
        self.start_bytes = 0
        for layer in layers[:1]:
            layer.register_forward_pre_hook(self._begin)
        for layer in layers:
            layer.register_forward_hook(self._layer_done)

    def _begin(self, *_: object) -> None:
        if self.trial.phase == "forward":
            self.done, self.start_bytes = 0, self.trial.meter.live_bytes()

    def _layer_done(self, *_: object) -> None:
        if self.trial.phase != "forward":
            return
        self.done += 1
        live = self.trial.meter.live_bytes()
        per_layer = (live - self.start_bytes) / self.done
        self.trial.known["projected_bytes"] = int(self.start_bytes + per_layer * (self.num_layers + 1))
        self.trial.known["peak_allocated_bytes"] = self.trial.meter.peaks().allocated_bytes
        self.trial.report("forward", **self.trial.known)
