"""An optimizer's step happens or does not; the one that is done again is the same, or it is not done."""

import numpy as np
import pytest
import torch
from torch import nn

from autofit.errors import OutOfBudget
from autofit.training.recovery.faults import Record
from autofit.training.recovery.optimizing import all_or_nothing
from tests.training.recovery.conftest import FailingAllocations, same


def optimizer_and_model(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    record = Record(None)
    return model, optimizer, record


def gradients(model, seed):
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def stepped(fail=(), steps=3, wrap=True, **options):
    model, optimizer, record = optimizer_and_model(**options)
    if wrap:
        all_or_nothing(optimizer, record)
    counter = FailingAllocations(fail)
    for step in range(steps):
        gradients(model, step)
        with counter:
            optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, record, counter.count


@pytest.mark.parametrize(("options", "at_least"), [({}, 30), ({"fused": True}, 6)], ids=["plain", "fused"])
def test_an_optimizer_s_step_is_all_or_nothing_at_each_allocation(options, at_least):
    expected, _, _ = stepped(wrap=False, **options)
    _, record, count = stepped(**options)
    assert record.events == []
    assert count >= at_least
    for number in range(count):
        found, record, _ = stepped({number}, **options)
        assert same(expected, found), number
        assert len(record.events) == 1


def test_a_fused_step_needs_no_copies_once_it_has_states():
    assert stepped(fail=(), steps=3, fused=True)[2] == stepped(fail=(), steps=1, fused=True)[2]


def test_an_optimizer_s_step_goes_parameter_by_parameter_where_there_is_no_room():
    expected, _, _ = stepped(wrap=False, steps=1)
    for fails in ({0, 1}, {2, 5}, {9, 15}):
        found, record, _ = stepped(fails, steps=1)
        assert all(torch.allclose(expected[n], found[n], rtol=1e-6) for n in expected)
        assert len(record.events) == 2
    with pytest.raises(OutOfBudget, match=r"optimizer\.step does not fit"):
        stepped(range(10_000), steps=1)


class Own(torch.optim.Optimizer):
    """Somebody's own: plain descent, which the others do something besides to.

    Attributes:
        room: steps of gradients of more values run out of memory, after they have done all.
    """

    room = None

    def __init__(self, params, lr=0.1, **common):
        super().__init__(params, {"lr": lr, **common})

    @torch.no_grad()
    def step(self, closure=None):
        taken = 0
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            self.begin(group, moving)
            for p in moving:
                taken += p.numel()
                self.move(group, p, self.state[p])
            self.end(group)
        if self.room is not None and taken > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def begin(self, group, moving): ...

    def move(self, group, p, state):
        p.sub_(p.grad * group["lr"])

    def end(self, group): ...


class ScheduleFree(Own):
    """The bookkeeping of schedulefree's optimizers: counters and a tensor of the group."""

    def __init__(self, params):
        super().__init__(params, k=0, weight_sum=0.0, norms=torch.zeros(()))

    def begin(self, group, moving):
        group["weight_sum"] += group["k"] + 1.0
        group["norms"] += 1
        self.ck = (group["k"] + 1.0) / group["weight_sum"]

    def move(self, group, p, state):
        z = state.setdefault("z", p.clone())
        z.sub_(p.grad * group["lr"] / group["norms"])
        p.lerp_(z, self.ck)

    def end(self, group):
        group["k"] += 1


class Counts(Own):
    """Attributes of its own: a number, what a list holds, an array."""

    def __init__(self, params):
        super().__init__(params)
        self.steps, self.rates, self.twice = 0, [], np.zeros(2)

    def begin(self, group, moving):
        if group is self.param_groups[0]:
            self.steps += 1
            self.rates.append(1 / self.steps)
            self.twice += 1

    def move(self, group, p, state):
        p.sub_(p.grad * self.rates[-1] * len(self.rates) * float(self.twice[1]))


class CountsInStates(Own):
    """A state of no parameter."""

    def begin(self, group, moving):
        if group is self.param_groups[0]:
            self.state["steps"] = self.state.get("steps", 0) + 1

    def move(self, group, p, state):
        p.sub_(p.grad / self.state["steps"])


class Noisy(Own):
    def move(self, group, p, state):
        p.sub_((p.grad + torch.randn(p.shape)) * group["lr"])


class NoisyByItself(Own):
    def __init__(self, params):
        super().__init__(params)
        self.draw = torch.Generator().manual_seed(5)

    def move(self, group, p, state):
        p.sub_((p.grad + torch.randn(p.shape, generator=self.draw)) * group["lr"])


class GlobalNorm(Own):
    """Takes the norm of all gradients, as LAMB and GrokAdamW do."""

    def begin(self, group, moving):
        self.scale = 1 / max(1.0, float(torch.stack([p.grad.norm() for p in moving]).norm())) if moving else 1.0

    def move(self, group, p, state):
        p.sub_(p.grad * self.scale)

    def end(self, group):
        del self.scale


class Adapts(Own):
    """A rate that comes of all gradients, kept in the group, as Prodigy's."""

    def __init__(self, params):
        super().__init__(params, d=0.0)

    def begin(self, group, moving):
        group["d"] += sum(float(p.grad.abs().sum()) for p in moving)


class DecaysAll(Own):
    """Also the weights that have no gradient."""

    def end(self, group):
        torch._foreach_mul_(group["params"], 0.99)


class ChangesGradients(Own):
    def move(self, group, p, state):
        p.grad.mul_(0.5)
        p.sub_(p.grad)


def own_steps(cls, room=None, fail=(), groups=1, wrap=True, hook=False):
    """Three steps of a model of four parameters; what it comes to, what was met, how often it allocated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    parts = [list(model.parameters())] if groups == 1 else [list(layer.parameters()) for layer in model]
    optimizer = cls([{"params": part} for part in parts])
    record, moved = Record(None), []
    if wrap:
        all_or_nothing(optimizer, record, lambda: moved.append(1))
    if hook:
        optimizer.register_step_post_hook(lambda *_: None)
    counter = FailingAllocations(fail)
    for number in range(3):
        gradients(model, number)
        optimizer.room = room if number == 1 else None
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        moved.clear()
        with counter:
            try:
                optimizer.step()
            except OutOfBudget as error:
                after = dict(model.named_parameters())
                assert all(torch.equal(before[n], after[n]) for n in before), "it moved weights, and gave up"
                assert not moved
                raise error from None
        assert bool(moved) is wrap
    common = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {n: p.detach().clone() for n, p in model.named_parameters()}, common, record, counter.count


SEPARATE = [Own, ScheduleFree, Counts, CountsInStates, Noisy, NoisyByItself]


@pytest.mark.parametrize("cls", SEPARATE)
def test_a_step_done_again_finds_all_as_it_was(cls):
    """At each allocation: counters of groups, attributes, random numbers, states."""
    expected, common, _, _ = own_steps(cls, wrap=False, groups=2)
    count = own_steps(cls, groups=2)[3]
    for number in range(count):
        found, values, record, _ = own_steps(cls, fail={number}, groups=2)
        assert same(found, expected), number
        assert values == common
        assert len(record.events) == 1


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", SEPARATE)
def test_one_parameter_after_the_other_comes_to_the_same(cls, groups):
    expected, common, _, _ = own_steps(cls, wrap=False, groups=groups)
    found, values, record, _ = own_steps(cls, room=2000, groups=groups)
    assert same(found, expected)
    assert values == common
    assert [event["did"] for event in record.events] == ["did it again"] * 2


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (GlobalNorm, "GlobalNorm takes parameters together"),
        (Adapts, "Adapts keeps for all what depends on each"),
        (DecaysAll, "DecaysAll takes parameters together"),
        (ChangesGradients, "after it had changed gradients"),
    ],
)
def test_a_step_that_would_not_be_the_same_is_not_done(cls, why):
    """And moves nothing. One failed attempt is done again all the same, where it can be."""
    expected = own_steps(cls, wrap=False)[0]
    with pytest.raises(OutOfBudget, match=why):
        own_steps(cls, room=2000)
    if cls is not ChangesGradients:
        assert same(own_steps(cls, fail={3})[0], expected)


def test_hooks_do_not_run_twice_unnoticed():
    expected = own_steps(Own, wrap=False)[0]
    assert same(own_steps(Own, hook=True)[0], expected)
    with pytest.raises(OutOfBudget, match="after hooks may have run"):
        own_steps(Own, hook=True, room=2000)
    assert same(own_steps(Own, hook=True, fail={0})[0], expected)  # nothing had been done
    with pytest.raises(OutOfBudget, match="hooks would run for each"):
        own_steps(Own, hook=True, fail={0, 1})


def test_what_cannot_be_tried_out_is_not_done():
    class Picky(Own):
        def begin(self, group, moving):
            if moving and moving[0].numel() < 100 and len(moving[0]) == 8:
                raise ValueError("too small")

    with pytest.raises(OutOfBudget, match="Picky could not be tried out: ValueError: too small"):
        own_steps(Picky, room=2000)


def test_trying_out_leaves_no_trace():
    """Where it says no, the optimizer has the values and draws the numbers that it would have."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = type("Mixed", (Noisy, Adapts), {})(model.parameters())
    all_or_nothing(optimizer, Record(None))
    gradients(model, 0)
    optimizer.room = 2000
    before = torch.get_rng_state()
    with pytest.raises(OutOfBudget, match="depends on each"):
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert optimizer.param_groups[0]["d"] == 0.0
    assert not optimizer.state
