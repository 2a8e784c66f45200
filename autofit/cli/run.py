"""`autofit run`: search for the config that fits, then train with it."""

from __future__ import annotations

from typing import Annotated

import typer

from autofit.cli.knob_flags import knob_pairs


def run(
    config: Annotated[str | None, typer.Argument(help="A YAML file; flags win over it.")] = None,
    gpu_mem: Annotated[str | None, typer.Option(help="24GB, 24GiB, a card (rtx-4090), or auto.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id. Default: a small one made on the spot.")] = None,
    data: Annotated[str | None, typer.Option(help="File (jsonl, json, csv, parquet), folder or hub id.")] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="New, or a run to go on with. Default: autofit-runs/TIME.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: one epoch; demo: 20.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of adapters, order and dropout.")] = None,
    search: Annotated[
        str | None, typer.Option(help="plan (default): estimates, confirmed by trial steps. measure: trials only.")
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="What is given up first: batch,checkpointing,paging,bits,offloading,seq,rank.")
    ] = None,
    pin: Annotated[list[str] | None, typer.Option(metavar="KNOB=VALUE", help="Never touched. Repeatable.")] = None,
    minimum: Annotated[list[str] | None, typer.Option("--min", metavar="KNOB=VALUE", help="Lowest value.")] = None,
    allow: Annotated[str | None, typer.Option(help="Lossy knobs that may move, or none. Default: all.")] = None,
    random_weights: Annotated[
        bool | None, typer.Option("--random-weights", help="Make the weights up: for a config.json alone.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Let the model run code of its own.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Finds the fastest config that fits the memory, announces what it gave up, and trains with it."""
    from autofit.config import load_run_config
    from autofit.report.files import write_reports
    from autofit.report.terminal import Terminal
    from autofit.training.supervisor import PRELOAD, execute
    from autofit.training.workspace import other_autofit
    from autofit.trial.sandbox import Sandbox

    flags = {
        "gpu_mem": gpu_mem,
        "model": model,
        "data": data,
        "output_dir": output_dir,
        "max_steps": max_steps,
        "seed": seed,
        "search": search,
        "order": order,
        "pin": knob_pairs(pin, "--pin"),
        "min": knob_pairs(minimum, "--min"),
        "allow": allow,
        "random_weights": random_weights,
        "trust_remote_code": trust_remote_code,
    }
    resolved = load_run_config(config, flags)
    try:
        with Terminal(quiet_stdout=json_output) as terminal, Sandbox(preload=PRELOAD) as sandbox:
            if other_autofit():
                terminal.warn("another project's package `autofit` is installed beside autofit-qlora: remove it")
            summary = execute(resolved, terminal, sandbox)
            write_reports(summary)
            terminal.finished(summary)
    except KeyboardInterrupt:
        typer.echo("autofit: interrupted", err=True)
        raise typer.Exit(130) from None
    if json_output:
        import json

        typer.echo(json.dumps(summary.to_json(), indent=2))
