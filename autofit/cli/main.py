"""The command `autofit`. Importing this imports nothing heavy: `--help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from autofit import __version__
from autofit.cli.calibrate import calibrate
from autofit.cli.estimate import estimate
from autofit.cli.plan import plan
from autofit.cli.probe import probe
from autofit.cli.run import run
from autofit.errors import AutofitError

app = typer.Typer(
    name="autofit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(plan)
app.command()(estimate)
app.command()(probe)
app.command()(calibrate)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"autofit {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """The auto-tuning QLoRA trainer: finds the config that fits your GPU, then trains with it."""


def main() -> None:
    """The entry point. Exit codes: 0 done, 1 failed, 2 usage or config, 3 nothing fits, 4 data or access, 130
    interrupted."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    try:
        app()
    except AutofitError as error:
        print(f"autofit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read our output is gone; Python would complain once more while flushing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            where = f": {error.filename}" if error.filename else ""
            print(f"autofit: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(1)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
