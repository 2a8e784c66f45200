"""`autofit probe`: what one candidate needs, measured in a child process on the present device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autofit.cli import case_files as files
from autofit.errors import AutofitError

if TYPE_CHECKING:
    from autofit.cases import Case
    from autofit.trial.job import Outcome
    from autofit.trial.sandbox import Sandbox

ENTRY = "autofit.trial.probe:run_probe"
PRELOAD = ("autofit.trial.probe", "transformers.models.llama.modeling_llama")


def probe(
    cases: files.CasesFile = None,
    output: files.OutputFile = None,
    gpu_mem: Annotated[str | None, typer.Option(help="A cap: 24GB, 24GiB, a card. Default: none.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one candidate may take.")] = 600.0,
    trust_remote_code: files.RemoteCode = False,
    model: files.ModelFlag = None,
    device: files.DeviceFlag = None,
    quantization_bits: files.BitsFlag = None,
    lora_rank: files.RankFlag = None,
    max_seq_length: files.LengthFlag = None,
    micro_batch_size: files.RowsFlag = None,
    checkpointed_layers: files.LayersFlag = None,
    offload_activations: files.OffloadFlag = None,
    optimizer: files.OptimizerFlag = None,
    loss: files.LossFlag = None,
) -> None:
    """Measures candidates on the present device, with the weights on disk or random ones; downloads none."""
    import tempfile

    from autofit.space.budget import check_budget_text
    from autofit.trial.sandbox import Sandbox

    flags = {
        "model": model,
        "device": device,
        "quantization_bits": quantization_bits,
        "lora_rank": lora_rank,
        "max_seq_length": max_seq_length,
        "micro_batch_size": micro_batch_size,
        "checkpointed_layers": checkpointed_layers,
        "offload_activations": offload_activations,
        "optimizer": optimizer,
        "loss": loss,
    }
    budget = None if gpu_mem is None else check_budget_text(gpu_mem)
    try:
        with Sandbox(preload=PRELOAD) as sandbox, tempfile.TemporaryDirectory() as folder:
            prober = Prober(sandbox, Path(folder), budget, timeout, trust_remote_code)
            good = files.answer_all(cases, output, flags, prober.measure)
    except KeyboardInterrupt:
        typer.echo("autofit: interrupted", err=True)
        raise typer.Exit(130) from None
    if not good:
        raise typer.Exit(1)


@dataclass
class Prober:
    """Measures one case after another, each in a child of one fork server; `folder` holds their records."""

    sandbox: Sandbox
    folder: Path
    gpu_mem: str | None
    timeout_seconds: float
    trust_remote_code: bool

    def measure(self, case: Case) -> dict[str, Any]:
        """The case as it was settled and what was measured; `error` where the trial did not end as FIT.

        Raises:
            AutofitError: the case can never run on this model or device.
        """
        from autofit.search.runner import trial_result
        from autofit.trial.classify import own_error
        from autofit.trial.result import TrialStatus

        outcome = self.run(case)
        error = own_error(outcome)
        result = trial_result(outcome)
        settled = _settled(outcome.phase_record)
        if error is not None and not settled:
            raise error
        measured = {name: getattr(result, name) for name in _MEASURED}
        if result.status is TrialStatus.FIT:
            return {**settled, **measured}
        reason = str(error) if isinstance(error, AutofitError) else f"{result.status}: {result.message}"
        return {**settled, **measured, "error": reason}

    def run(self, case: Case) -> Outcome:
        """The case's child, run to its end; the candidate as settled stands in the phase record."""
        from autofit.trial.job import Job

        return self.sandbox.run(
            Job(
                entry=ENTRY,
                request=self._request(case),
                folder=self.folder / "trial",
                deadline_seconds=self.timeout_seconds,
                env=_environment(case),
            )
        )

    def _request(self, case: Case) -> dict[str, Any]:
        return {
            "asked": case.asked,
            "model": case.model,
            "trust_remote_code": self.trust_remote_code,
            "device": case.device,
            "gpu_mem": self.gpu_mem,
            "seed": 0,
        }


_MEASURED = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "tokens_per_second", "seconds")


def _settled(record: dict[str, Any]) -> dict[str, Any]:
    """What the child said of the case before it was tried; empty where it did not get that far."""
    if "candidate" not in record:
        return {}
    candidate = {name: value for name, value in record["candidate"].items() if name != "lora_targets"}
    return {
        **candidate,
        "lora_targets_used": record.get("lora_targets_used"),
        "note": "; ".join(record["notes"]),
    }


def _environment(case: Case) -> dict[str, str]:
    from autofit.trial.environment import child_environment

    # What runs on the CPU must not find the GPU.
    return {**child_environment(case.step), **({"CUDA_VISIBLE_DEVICES": ""} if case.device == "cpu" else {})}
