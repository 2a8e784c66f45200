"""`autofit estimate`: what candidates will need, from shapes alone."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autofit.cli import case_files as files
from autofit.errors import AutofitError, UsageError

if TYPE_CHECKING:
    from autofit.cases import Case
    from autofit.memory.calibration import Calibration
    from autofit.memory.estimate import Estimate
    from autofit.memory.settled import Settled
    from autofit.report.explain import Explained
    from autofit.space.facts import DeviceFacts


def estimate(
    cases: files.CasesFile = None,
    output: files.OutputFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="A page: where the memory goes, and what to do.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The candidate of the flags as a line of JSON.")] = False,
    trust_remote_code: files.RemoteCode = False,
    model: files.ModelFlag = None,
    device: files.DeviceFlag = None,
    card: Annotated[str | None, typer.Option(help="rtx-4090, h100, … Default: the GPU here, else the H200.")] = None,
    quantization_bits: files.BitsFlag = None,
    lora_rank: files.RankFlag = None,
    max_seq_length: files.LengthFlag = None,
    micro_batch_size: files.RowsFlag = None,
    checkpointed_layers: files.LayersFlag = None,
    offload_activations: files.OffloadFlag = None,
    optimizer: files.OptimizerFlag = None,
    loss: files.LossFlag = None,
) -> None:
    """Estimates candidates' memory and speed from shapes alone: no GPU, no weights, nothing run."""
    flags = {
        "model": model,
        "device": device,
        "card": card,
        "quantization_bits": quantization_bits,
        "lora_rank": lora_rank,
        "max_seq_length": max_seq_length,
        "micro_batch_size": micro_batch_size,
        "checkpointed_layers": checkpointed_layers,
        "offload_activations": offload_activations,
        "optimizer": optimizer,
        "loss": loss,
    }
    lines = cases is not None or output is not None or as_json
    if explain and lines:
        raise UsageError("--explain is a page for people, of one candidate: without --cases, --output and --json")
    case = files.case_of_flags(cases, flags)
    estimator = Estimator(trust_remote_code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' and torch's, about themselves
            if lines:
                files.answer_all(cases, output, flags, estimator.measure)
            elif case is not None:
                _print(estimator, case, explain)
    except KeyboardInterrupt:
        typer.echo("autofit: interrupted", err=True)
        raise typer.Exit(130) from None


class Estimator:
    """Estimates one case after another in this process."""

    def __init__(self, trust_remote_code: bool = False) -> None:
        import logging

        import transformers

        from autofit.memory.settled import Settler

        # They speak of the step that runs for real; here it would be once a layer.
        transformers.logging.set_verbosity_error()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        self._settler = Settler(trust_remote_code)
        self._calibrations: dict[DeviceFacts, Calibration | None] = {}

    def measure(self, case: Case) -> dict[str, Any]:
        """The case as it was settled and what it is estimated to take.

        Raises:
            AutofitError: the case can never run on this model or device, or its step cannot be traced.
        """
        from autofit.report.explain import value_notes

        settled, found = self.estimate(case)
        candidate = settled.candidate.to_json()
        return {
            **{name: value for name, value in candidate.items() if name != "lora_targets"},
            **{name: value for name, value in found.to_json().items() if name in _ESTIMATED},
            "lora_targets_used": self._settler.targets_used(settled),
            "note": "; ".join([*settled.notes, *value_notes(found)]),
        }

    def settle(self, case: Case) -> Settled:
        """The case as it would run.

        Raises: as `measure` does.
        """
        return self._settler.settle(case.asked, case.model, case.device, case.card)

    def estimate(self, case: Case) -> tuple[Settled, Estimate]:
        """The case as it was settled, and its estimate.

        Raises: as `measure` does.
        """
        from autofit.memory.estimate import estimate

        settled = self.settle(case)
        try:
            return settled, estimate(settled.candidate, settled.source, settled.device, self._calibration(settled))
        except AutofitError:
            raise
        except Exception as error:
            # Architectures fail in ways that nobody can foresee.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise AutofitError(f"model {case.model}: its step cannot be traced: {reason}") from error

    def _calibration(self, settled: Settled) -> Calibration | None:
        """What `autofit calibrate` kept for the device; looked up once for each."""
        from autofit.memory.calibration import load_calibration

        device = settled.device
        if device not in self._calibrations:
            self._calibrations[device] = load_calibration(device, lambda text: typer.echo(f"warning  {text}", err=True))
        return self._calibrations[device]

    def explain(self, case: Case) -> Explained:
        """The case's estimate with all that `autofit.report.explain.print_page` tells.

        Raises: as `measure` does.
        """
        from autofit.memory.advice import advice
        from autofit.memory.settled import unquantized_weights
        from autofit.report.explain import Explained

        settled, found = self.estimate(case)
        return Explained(
            settled=settled,
            estimate=found,
            targets_used=self._settler.targets_used(settled),
            unquantized=unquantized_weights(settled),
            advice=advice(settled, found),
        )


_ESTIMATED = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_bytes",
    "tokens_per_second",
    "breakdown_bytes",
    "bracket",
    "seconds",
)


def _print(estimator: Estimator, case: Case, explain: bool) -> None:
    from rich.console import Console

    from autofit.report.explain import print_page, print_short

    console = Console(highlight=False, soft_wrap=not explain)
    if explain:
        print_page(estimator.explain(case), console)
    else:
        print_short(*estimator.estimate(case), console)
