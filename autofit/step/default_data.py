"""The embedded data set: the Python standard library's own signatures, each with the docstring that explains it."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from autofit.errors import DataError

# Byte tokens of a pair, the end token included.
LONGEST_PAIR = 1600

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def default_pairs() -> list[dict[str, str]]:
    """At least 1,500 `prompt`/`completion` pairs of at most `LONGEST_PAIR` bytes each, end token included.

    Sources are parsed, not imported, so nothing runs. The order is the same for one Python version.

    Raises:
        DataError: this Python comes without the sources of its standard library.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    pairs = [pair for file in _public_modules(folder) for pair in _pairs_of_module(file)]
    if not pairs:
        raise DataError(f"the embedded data set needs the standard library's sources, and {folder} has none; give data")
    return pairs


def _public_modules(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))


def _pairs_of_module(file: Path) -> Iterator[dict[str, str]]:
    tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    for name, node in _documented(tree, file.stem):
        prompt = _signature(name, node) + "\n"
        room = LONGEST_PAIR - 1 - len(prompt.encode())
        completion = _first_bytes(ast.get_docstring(node) or "", room)
        if completion:
            yield {"prompt": prompt, "completion": completion}


def _documented(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Public functions, classes and methods under a node, by qualified name, in the order of the source."""
    for node in parent.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, name)


def _signature(name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({ast.unparse(node.args)}){returns}"


def _first_bytes(text: str, size: int) -> str:
    """The longest start of a text that takes at most `size` bytes as UTF-8."""
    return text.encode()[: max(size, 0)].decode(errors="ignore").strip()
