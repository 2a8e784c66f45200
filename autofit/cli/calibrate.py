"""`autofit calibrate`: a handful of probes on the present device, and what the estimates learn from them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autofit.cli.probe import PRELOAD, Prober
from autofit.errors import AutofitError

if TYPE_CHECKING:
    from autofit.space.candidate import Candidate
    from autofit.space.facts import DeviceFacts
    from autofit.training.calibrating import Figures, Sample
    from autofit.trial.sandbox import Sandbox

# Small enough for a card of 8 GB, and of different kinds: a large vocabulary, and biases with many small heads.
_ON_GPU = ("llama-3.2-1b", "qwen2.5-0.5b")
_GPU_SHAPES: tuple[dict[str, Any], ...] = (
    {"micro_batch_size": 2, "max_seq_length": 1024, "checkpointed_layers": "none"},
    {"micro_batch_size": 4, "max_seq_length": 2048, "checkpointed_layers": "all"},
    {"micro_batch_size": 8, "max_seq_length": 2048, "checkpointed_layers": "all"},
)
# A CPU counts tensors exactly: a moment's work shows that estimates do, too.
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
_ON_CPU = ("llama", "qwen2")
_CPU_SHAPES: tuple[dict[str, Any], ...] = (
    {"micro_batch_size": 4, "max_seq_length": 128, "checkpointed_layers": "none"},
    {"micro_batch_size": 4, "max_seq_length": 128, "checkpointed_layers": "all"},
)
_SECONDS = 600.0


def calibrate(
    model: Annotated[
        str | None, typer.Option(help="Probe this one: a name, folder or hub id. Default: two small ones.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measures a few small candidates with random weights and corrects later estimates for this device."""
    from autofit.memory.calibration import store_calibration
    from autofit.report.calibration import calibration_words, errors_words, sample_words
    from autofit.training.calibrating import calibrate as calibration_of
    from autofit.training.calibrating import errors
    from autofit.trial.sandbox import Sandbox

    samples: list[Sample] = []
    try:
        with Sandbox(preload=(*PRELOAD, "autofit.memory.forecast")) as sandbox, tempfile.TemporaryDirectory() as folder:
            bench = _Bench(sandbox, Path(folder))
            typer.echo(f"calibrating for {bench.device.name}", err=json_output)
            for sample in bench.samples(model):
                samples.append(sample)
                typer.echo(sample_words(sample), err=json_output)
    except KeyboardInterrupt:
        typer.echo("autofit: interrupted", err=True)
        raise typer.Exit(130) from None
    found = calibration_of(samples)
    before, after = errors(samples), errors(samples, found)
    file = store_calibration(bench.device, found)
    if json_output:
        document = {
            "device": bench.device.to_json(),
            "calibration": vars(found),
            "before": vars(before),
            "after": vars(after),
            "samples": [sample.to_json() for sample in samples],
            "file": str(file),
        }
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(f"before   {errors_words(before)}")
    typer.echo(f"after    {errors_words(after)}")
    typer.echo(f"kept     {calibration_words(found)}, in {file}")


class _Bench:
    """Probes and estimates on the present device; `folder` holds the children's records."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self._sandbox, self._folder = sandbox, folder
        self._prober = Prober(sandbox, folder, None, _SECONDS, trust_remote_code=False)
        self.device = self._present_device()

    def samples(self, model: str | None) -> Iterator[Sample]:
        """Those of the probes that fit, as they end.

        Raises:
            AutofitError: the model cannot be probed or estimated at all.
        """
        from autofit.cases import make_case
        from autofit.search.runner import trial_result
        from autofit.space.candidate import Candidate
        from autofit.training.calibrating import Figures, Sample
        from autofit.trial.classify import own_error
        from autofit.trial.result import TrialStatus

        shapes = _CPU_SHAPES if self.device.type == "cpu" else _GPU_SHAPES
        for name, where in self._models(model):
            for shape in shapes:
                outcome = self._prober.run(make_case({"model": where, "device": self.device.type, **shape}))
                error, result = own_error(outcome), trial_result(outcome)
                if error is not None:
                    raise error
                if result.status is not TrialStatus.FIT:
                    typer.echo(f"{name}: left out, {result.status.value}: {result.message}", err=True)
                    continue
                candidate = Candidate.from_json(outcome.phase_record["candidate"])
                yield Sample(
                    model=name,
                    candidate=candidate,
                    measured=Figures.of_trial(result),
                    estimated=self._estimated(where, candidate),
                )

    def _models(self, model: str | None) -> Iterator[tuple[str, str]]:
        """A name for people, and what is probed."""
        if model is not None:
            yield model, model
        elif self.device.type != "cpu":
            yield from zip(_ON_GPU, _ON_GPU, strict=True)
        else:
            for kind in _ON_CPU:
                folder = self._folder / kind
                folder.mkdir()
                (folder / "config.json").write_text(json.dumps({"model_type": kind, **_SMALL}))
                yield f"a small {kind}", str(folder)

    def _estimated(self, model: str, candidate: Candidate) -> Figures:
        from autofit.search.forecast import ENTRY
        from autofit.training.calibrating import Figures

        request = {
            "candidates": [candidate.to_json()],
            "source": {"model": model, "random_weights": True},
            "device": self.device.to_json(),
            "calibration": None,
            "checkpointable_layers": 0,  # none of these candidates has long sequences apart
        }
        (estimate,) = self._ask(ENTRY, request)["estimates"]
        if "error" in estimate:
            raise AutofitError(f"model {model}: no estimate: {estimate['error']}")
        return Figures(**{field.name: estimate[field.name] for field in fields(Figures)})

    def _present_device(self) -> DeviceFacts:
        from autofit.space.facts import DeviceFacts

        return DeviceFacts.from_json(self._ask("autofit.trial.probe:tell_device", {}))

    def _ask(self, entry: str, request: dict[str, Any]) -> dict[str, Any]:
        """Runs a job that must succeed; returns what it returned."""
        from autofit.trial.classify import classify, own_error
        from autofit.trial.environment import child_environment
        from autofit.trial.job import Job

        folder = self._folder / "question"
        outcome = self._sandbox.run(
            Job(entry=entry, request=request, folder=folder, deadline_seconds=_SECONDS, env=child_environment())
        )
        if outcome.result is None:
            status, message = classify(outcome)
            raise own_error(outcome) or AutofitError(f"calibrate: {status.value} in {outcome.phase}: {message}")
        return outcome.result
