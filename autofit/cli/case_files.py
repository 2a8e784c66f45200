"""What `estimate` and `probe` share: a file of cases, or one case by flags; answers as lines of JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from autofit.errors import UsageError

if TYPE_CHECKING:
    from autofit.cases import Case, Measure

CasesFile = Annotated[str | None, typer.Option(metavar="FILE", help="One candidate a line, as JSON.")]
OutputFile = Annotated[str | None, typer.Option(metavar="FILE", help="Where the answers go. Default: stdout.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that a model brings along.")]
ModelFlag = Annotated[str | None, typer.Option(help="Folder (a config.json is enough) or hub id.")]
DeviceFlag = Annotated[str | None, typer.Option(help="cuda (default) or cpu.")]
BitsFlag = Annotated[int | None, typer.Option(help="4, 8 or 16. Default: 4 on a GPU, 16 on a CPU.")]
RankFlag = Annotated[int | None, typer.Option(help="Default: 16.")]
LengthFlag = Annotated[int | None, typer.Option(help="Tokens. Default: 2048, or what the model has positions for.")]
RowsFlag = Annotated[int | None, typer.Option(help="Sequences. Default: 1.")]
LayersFlag = Annotated[str | None, typer.Option(help="all, none (default) or how many.")]
OffloadFlag = Annotated[str | None, typer.Option(help="none (default), checkpoints or all.")]
OptimizerFlag = Annotated[str | None, typer.Option(help="transformers' name. Default: adamw_torch.")]
LossFlag = Annotated[str | None, typer.Option(help="chunked (default) or full.")]


def answer_all(cases: str | None, output: str | None, flags: Mapping[str, Any], measure: Measure) -> bool:
    """Writes an answer for each line of `cases`, or one for the flags, each as soon as it is known.

    Returns:
        Whether the one case of the flags was answered without an error; for a file always True.

    Raises:
        UsageError: as `case_of_flags`, or a file that cannot be read or written.
        AutofitError: what `measure` raises for the case of the flags.
    """
    from autofit.cases import answer, answer_lines

    case = case_of_flags(cases, flags)
    if case is None:
        lines = _read(cases or "")
        with _opened(output) as out:
            _write(answer_lines(lines, measure), out)
        return True
    with _opened(output) as out:
        found = answer(case, measure)
        _write([found], out)
    return "error" not in found


def case_of_flags(cases: str | None, flags: Mapping[str, Any]) -> Case | None:
    """The one case that the flags make; None where there is a file of `cases` instead.

    Raises:
        UsageError: no case, two kinds of them, or flags that make no case.
    """
    from autofit.cases import make_case

    given = {name: value for name, value in flags.items() if value is not None}
    if cases is None and "model" not in given:
        raise UsageError("nothing to do: give --cases FILE, or a candidate by --model and its other flags")
    if cases is not None and given:
        name = next(iter(given)).replace("_", "-")
        raise UsageError(f"--{name} beside --cases: a line of the file says everything about its case")
    if cases is not None:
        return None
    layers = given.get("checkpointed_layers")
    if layers is not None and layers.isdecimal():
        given["checkpointed_layers"] = int(layers)
    return make_case(given)


def _read(file: str) -> list[bytes]:
    try:
        return Path(file).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cases {file}: {error.strerror or error}") from error


@contextlib.contextmanager
def _opened(output: str | None) -> Any:
    if output is None:
        import sys

        yield sys.stdout
        return
    try:
        file = Path(output).expanduser().open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"output {output}: {error.strerror or error}") from error
    with file:
        yield file


def _write(answers: Iterable[Mapping[str, Any]], out: IO[str]) -> None:
    for found in answers:
        out.write(json.dumps(found) + "\n")
        out.flush()
