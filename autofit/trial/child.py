"""What a trial runs in its child process: the costliest step, measured phase by phase."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from autofit.memory.meter import Meter, open_meter
from autofit.step.batch import MicroBatch
from autofit.step.model import checkpointable_layers
from autofit.step.policy import resolve_policy
from autofit.step.rehearsal import Rehearsal
from autofit.step.step import Step, build_step, costliest_batches
from autofit.step.targets import lora_targets_used
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
        try:
            return trial.run().to_json()
        except torch.OutOfMemoryError:
            trial.report_measured()
            raise


class _Trial:
    def __init__(self, request: TrialRequest, report: PhaseReport) -> None:
        self.request = request
        self.report = report
        self.meter: Meter = open_meter(request.device.type, request.cap_bytes)
        self.known: dict[str, Any] = {}
        self.phase = "build"
        self.gradients_at = 0.0
        self.progress: _LayerProgress | None = None

    def run(self) -> TrialResult:
        candidate = self.request.candidate
        step = self._build()
        vocabulary = step.model.get_input_embeddings().num_embeddings
        batches = costliest_batches(candidate, vocabulary)
        self.meter.hold(tensor for batch in batches for tensor in batch.tensors)
        tokens_per_second = self._train(step, batches)
        training = self.meter.peaks()
        evaluation = self._measured("eval", lambda: [step.evaluate(batch) for batch in batches])
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
            message="" if fits else f"ran, but took {largest} bytes with the CUDA context",
        )

    def _build(self) -> Step:
        self._enter("build")
        request = self.request
        policy = resolve_policy(request.candidate, request.device)
        step = build_step(request.candidate, request.source, policy, request.lora_alpha, request.seed)
        self.meter.hold([*step.model.parameters(), *step.model.buffers()])
        self.meter.settle()
        self.known["static_bytes"] = self.meter.live_bytes()
        self.known["trainable_parameters"] = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        self.known["lora_targets_used"] = lora_targets_used(step.model)
        step.report = self._enter
        self.progress = _LayerProgress(step, self.meter)
        return step

    def _train(self, step: Step, batches: list[MicroBatch]) -> float:
        """Two optimizer steps on each micro-batch; returns tokens/s of the first, once warm."""
        rehearsal = Rehearsal(step, self.request.candidate)
        self.meter.reset_peak()
        speeds = [self._steps(rehearsal, batch) for batch in batches]
        return speeds[0]

    def _steps(self, rehearsal: Rehearsal, batch: MicroBatch) -> float:
        """Padded tokens a second of forward and backward in the second step: the first warms allocator and kernels."""
        for count in rehearsal.counts:
            self.meter.synchronize()
            start = time.perf_counter()
            rehearsal.optimizer_step(batch, count)
            seconds = self.gradients_at - start
        return count * batch.tokens / seconds

    def _measured(self, phase: str, what: Callable[[], object]) -> int:
        """Runs a phase; returns its peak as the driver sees it, in bytes."""
        self._enter(phase)
        self.meter.reset_peak()
        what()
        self.meter.synchronize()
        return self.meter.peaks().device_bytes

    def _enter(self, phase: str) -> None:
        self.phase = phase
        if phase == "optimizer":
            self.meter.synchronize()
            self.gradients_at = time.perf_counter()
            self.meter.measure_context()
        if phase == "backward" and self.progress is not None:
            self.progress.remove()
        self.report(phase, **self.known)

    def report_measured(self) -> None:
        """Puts on record what was measured until now."""
        peaks = self.meter.peaks()
        self.known["peak_allocated_bytes"] = peaks.allocated_bytes
        self.known["peak_reserved_bytes"] = peaks.reserved_bytes
        projected = self.progress.projected_bytes if self.progress is not None and self.phase == "forward" else None
        if projected is not None and projected > self.request.cap_bytes:
            self.known["projected_bytes"] = projected
        self.report(self.phase, **self.known)


class _LayerProgress:
    """Notes how far the first forward pass came, so that an OOM says what the whole step would have needed.

    It takes its hooks off when that pass is over: the step that is timed runs without them.
    """

    def __init__(self, step: Step, meter: Meter) -> None:
        self._meter = meter
        layers = checkpointable_layers(step.model)
        self._num_layers = len(layers)
        self._done = 0
        self._start_bytes = 0
        self._live_bytes = 0
        self._handles: list[RemovableHandle] = [layer.register_forward_hook(self._layer_done) for layer in layers]
        self._handles += [layer.register_forward_pre_hook(self._begin) for layer in layers[:1]]

    @property
    def projected_bytes(self) -> int | None:
        """What would be live at the end of the forward pass, with as much for the head as for a layer."""
        if not self._done:
            return None
        per_layer = (self._live_bytes - self._start_bytes) / self._done
        return int(self._start_bytes + per_layer * (self._num_layers + 1))

    def remove(self) -> None:
        """Takes the hooks off the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, *_: object) -> None:
        self._start_bytes = self._meter.live_bytes()

    def _layer_done(self, *_: object) -> None:
        self._done += 1
        self._live_bytes = self._meter.live_bytes()
