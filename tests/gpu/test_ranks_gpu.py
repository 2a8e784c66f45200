"""Two cards over NCCL, started by torchrun: stock's result undisturbed, and where one of them is too narrow."""

import subprocess
import sys

import pytest
import torch

from tests.training.recovery.conftest import farthest, same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")]


def trained(folder, name, share=1.0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.gpu.ranks_job", str(folder), name, str(share)]
    subprocess.run(command, check=True, timeout=180)
    return [torch.load(folder / f"{name}-{rank}") for rank in (0, 1)]


def test_two_cards_give_what_the_stock_class_gives(tmp_path):
    stock, ours = trained(tmp_path, "stock"), trained(tmp_path, "ours")
    assert same(ours[0]["weights"], ours[1]["weights"])
    assert farthest(stock[0]["weights"], ours[0]["weights"], stock[0]["start"]) < 1e-3
    assert ours[0]["losses"] == pytest.approx(stock[0]["losses"], rel=1e-4)
    narrow = trained(tmp_path, "ours", 0.6)
    assert narrow[0]["ooms"] == 0
    assert narrow[1]["ooms"] > 0
    assert same(narrow[0]["weights"], narrow[1]["weights"])
    assert farthest(stock[0]["weights"], narrow[0]["weights"], stock[0]["start"]) < 1e-3
    print("bit-equal undisturbed:", same(stock[0]["weights"], ours[0]["weights"]))
    print("stock, ours, narrow:", [run[0]["seconds"] for run in (stock, ours, narrow)])
