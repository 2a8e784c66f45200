"""Offloading without values: TRL's own class, its streams and copies made void, against the stand-in."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from trl.models import activation_offloading

from autofit.memory.ledger import Ledger
from autofit.step.offload import HostSaved, StashedActivations, host_saved_checkpoint

# How either side makes what comes back, and the copies to the host.
MOVES = ("_to_copy", "empty", "empty_like", "as_strided", "detach", "copy_")


class History(Ledger):
    """Live bytes after every operation but moves; a copy from meta to the host does nothing."""

    def __init__(self):
        super().__init__(device_type="meta")
        self.history = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket.__name__ not in MOVES:
            self.history.append(self.live_bytes)
        return out


class VoidStream:
    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self):
        return None

    def synchronize(self):
        pass


@pytest.fixture
def trl_on_meta(monkeypatch):
    """TRL's class as if meta were an accelerator. A storage is known by its address, which meta storages lack."""
    module = SimpleNamespace(
        Stream=VoidStream,
        current_stream=VoidStream,
        stream=lambda stream: contextlib.nullcontext(),
        empty_cache=lambda: None,
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(
        activation_offloading,
        "_get_unique_tensor_key",
        lambda t: (t.untyped_storage()._cdata, t.storage_offset(), t.dtype),
    )

    def make(model):
        context = activation_offloading.OffloadActivations(use_pin_memory=False)
        stored = {p.untyped_storage()._cdata for p in model.parameters()}
        monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
        context.param_storages = stored
        return context

    return make


class Block(nn.Module):
    """A layer with a residual, a gate, a transposed and a broadcast operand, and an output that is a view."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)
        mixed = torch.matmul(gate.transpose(-1, -2), value)
        spread = mixed.sum(-1, keepdim=True).expand_as(mixed) * mixed
        return x + self.down(torch.sigmoid(value) * gate).view(x.shape) + spread.mean(-1).unsqueeze(-2)


class Net(nn.Module):
    def __init__(self, layers, width, checkpointed):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x.square().sum()


def history(net, context, micro_batches=2):
    ledger = History()
    for parameter in net.parameters():
        parameter.grad = None
    with ledger:
        ledger.hold(net.parameters())
        for _ in range(micro_batches):
            with context:
                x = torch.empty(2, 24, net.blocks[0].norm.normalized_shape[0], device="meta", requires_grad=True)
                net(x).backward()
                del x
    return ledger.history


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("width", [8, 40])  # the smaller has tensors below the least that is offloaded
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_the_stand_in_holds_what_trls_class_holds(trl_on_meta, layers, width, checkpointed):
    with torch.device("meta"):
        net = Net(layers, width, checkpointed)
    plain = history(net, contextlib.nullcontext())
    stand_in = history(net, StashedActivations(net))
    real = history(net, trl_on_meta(net))  # last: it changes what an address is
    assert stand_in == real
    assert stand_in != plain


def test_a_saved_checkpoint_leaves_the_device():
    def live_after_forward(run):
        with torch.device("meta"), History() as ledger:
            blocks = [Block(40) for _ in range(6)]
            x = torch.empty(2, 24, 40, requires_grad=True) * 1  # not a leaf, which nobody can let go of
            for block in blocks:
                x = run(block, x)
            live = ledger.live_bytes
            x.sum().backward()
        return live

    kept = live_after_forward(lambda block, x: checkpoint(block, x, use_reentrant=False))
    assert kept - live_after_forward(host_saved_checkpoint) == 6 * 2 * 24 * 40 * 4


def test_what_comes_back_has_its_shape():
    with HostSaved(), torch.device("meta"):
        x = torch.empty(3, 4, dtype=torch.bfloat16, requires_grad=True)
        y = (x * x).t()
    y.sum().backward()
    assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
