"""`autofit plan`: what would fit and how fast it would be, before anything is downloaded or run."""

from __future__ import annotations

from typing import Annotated

import typer

from autofit.cli.knob_flags import knob_pairs


def plan(
    config: Annotated[str | None, typer.Argument(help="A YAML file; flags win over it.")] = None,
    gpu_mem: Annotated[str | None, typer.Option(help="24GB, 24GiB, a card (rtx-4090), or auto.")] = None,
    model: Annotated[str | None, typer.Option(help="Name (llama-3-8b), hub id, or folder with a config.json.")] = None,
    data: Annotated[str | None, typer.Option(help="As in run. Default: sequences of 2,048 tokens.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens of the longest sequence.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: the device's.")] = None,
    order: Annotated[
        str | None, typer.Option(help="What is given up first: batch,checkpointing,paging,bits,offloading,seq,rank.")
    ] = None,
    pin: Annotated[list[str] | None, typer.Option(metavar="KNOB=VALUE", help="Never touched. Repeatable.")] = None,
    minimum: Annotated[list[str] | None, typer.Option("--min", metavar="KNOB=VALUE", help="Lowest value.")] = None,
    allow: Annotated[str | None, typer.Option(help="Lossy knobs that may move, or none. Default: all.")] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Let the model run code of its own.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Estimates every config that makes sense and shows the fastest that fit, on a card that need not be there."""
    import tempfile
    from pathlib import Path

    from autofit.config import load_run_config
    from autofit.errors import NothingFits
    from autofit.report.plan import PlanTerminal
    from autofit.search.plan import why_nothing_fits
    from autofit.training.planner import PRELOAD, plan_run
    from autofit.trial.sandbox import Sandbox

    flags = {
        "gpu_mem": gpu_mem,
        "model": model,
        "data": data,
        "max_seq_length": max_seq_length,
        "dtype": dtype,
        "order": order,
        "pin": knob_pairs(pin, "--pin"),
        "min": knob_pairs(minimum, "--min"),
        "allow": allow,
        "trust_remote_code": trust_remote_code,
    }
    resolved = load_run_config(config, flags)
    terminal = PlanTerminal(quiet_stdout=json_output)
    try:
        with terminal, Sandbox(preload=PRELOAD) as sandbox, tempfile.TemporaryDirectory() as folder:
            planned = plan_run(resolved, sandbox, Path(folder), terminal.busy)
    except KeyboardInterrupt:
        typer.echo("autofit: interrupted", err=True)
        raise typer.Exit(130) from None
    if json_output:
        import json

        typer.echo(json.dumps(planned.to_json(), indent=2))
    else:
        terminal.show(planned)
    if planned.plan.best is None:
        raise NothingFits(why_nothing_fits(planned.plan, planned.space))
