"""The public names, and nothing else; importing them costs nothing until they are used."""

import subprocess
import sys

import pytest

import autofit


def test_the_public_names():
    assert autofit.__all__ == ["AutoFitSFTTrainer", "AutoFitTrainer", "OutOfBudget", "__version__", "fit"]
    for name in autofit.__all__:
        assert getattr(autofit, name) is not None
    with pytest.raises(AttributeError, match="no attribute Trainer"):
        autofit.Trainer  # noqa: B018


def test_importing_autofit_imports_nothing_heavy():
    code = "import sys, autofit, autofit.space; print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
