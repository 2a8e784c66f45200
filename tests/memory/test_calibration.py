"""Calibrations on disk: one entry for each kind of device and versions; what cannot be read is left aside, aloud."""

import json

import pytest

from autofit.memory.calibration import Calibration, calibration_file, load_calibration, store_calibration
from autofit.space.facts import DeviceFacts
from tests.conftest import CPU

GPU = DeviceFacts(type="cuda", name="NVIDIA H200", total_bytes=143771 * 2**20, compute_capability=(9, 0))
SAME_BY_NAME = DeviceFacts(type="cuda", name="h200", total_bytes=143771 * 2**20, compute_capability=(9, 0))
OTHER = DeviceFacts(type="cuda", name="NVIDIA GeForce RTX 4090 Laptop GPU", total_bytes=16 * 2**30)
FOUND = Calibration(context_bytes=500_000_000, allocated_bytes=-4096, speed=1.25)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_each_kind_of_device_has_its_own(cache):
    assert load_calibration(GPU) is None
    assert store_calibration(GPU, FOUND) == cache / "autofit" / "calibration.json"
    store_calibration(OTHER, Calibration(context_bytes=7))
    assert load_calibration(GPU) == load_calibration(SAME_BY_NAME) == FOUND
    assert load_calibration(OTHER) == Calibration(context_bytes=7)
    assert load_calibration(CPU) is None
    store_calibration(GPU, Calibration())
    assert load_calibration(GPU) == Calibration()
    assert [p.name for p in calibration_file().parent.iterdir()] == ["calibration.json"]


def test_other_versions_have_none(monkeypatch):
    store_calibration(GPU, FOUND)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    assert load_calibration(GPU) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:20],
        lambda _: "[1, 2]",
        lambda text: text.replace("1.25", "-1.25"),
        lambda text: text.replace('"speed"', '"spede"'),
        lambda text: text.replace("500000000", '"many"'),
    ],
)
def test_what_cannot_be_read_is_left_aside_with_a_warning(spoil):
    file = store_calibration(GPU, FOUND)
    file.write_text(spoil(file.read_text()))
    warnings = []
    assert load_calibration(GPU, warnings.append) is None
    (warning,) = warnings
    assert str(file) in warning
    assert "autofit calibrate" in warning
    store_calibration(GPU, FOUND)
    assert load_calibration(GPU) == FOUND
    json.loads(file.read_text())


def test_by_default_it_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibration_file() == tmp_path / ".cache" / "autofit" / "calibration.json"
