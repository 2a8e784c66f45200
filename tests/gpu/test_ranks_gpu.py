"""Several cards over NCCL, started by torchrun: stock's result undisturbed, and where one of them is too narrow."""

import subprocess
import sys

import pytest
import torch

from tests.training.recovery.conftest import farthest, same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")]
CARDS = min(torch.cuda.device_count(), 4)


def trained(folder, name, share=1.0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(CARDS)]
    command += ["-m", "tests.gpu.ranks_job", str(folder), name, str(share)]
    subprocess.run(command, check=True, timeout=180)
    return [torch.load(folder / f"{name}-{rank}") for rank in range(CARDS)]


def test_cards_give_what_the_stock_class_gives(tmp_path):
    """As near as the stock class is to itself, where its sums are taken in no fixed order."""
    stock, again = trained(tmp_path, "stock")[0], trained(tmp_path, "stock")[0]
    ours, narrow = trained(tmp_path, "ours"), trained(tmp_path, "ours", 0.6)
    assert [rank["ooms"] > 0 for rank in narrow] == [rank == 1 for rank in range(CARDS)]
    for run in (ours, narrow):
        assert all(same(rank["weights"], run[0]["weights"]) for rank in run)
        assert farthest(stock["weights"], run[0]["weights"], stock["start"]) < 1e-3
    assert ours[0]["losses"] == pytest.approx(stock["losses"], rel=1e-4)
    print(CARDS, "cards; to stock, of the distance travelled:")
    for name, run in (("stock again", again), ("ours", ours[0]), ("ours, one card narrow", narrow[0])):
        far = farthest(stock["weights"], run["weights"], stock["start"])
        print(f"{name}: {far:.2e}, bit-equal {same(stock['weights'], run['weights'])}, {run['seconds']:.2f} s")
