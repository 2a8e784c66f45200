"""A row that does not fit alone: what it takes is learned once, is spent on such rows only, and changes nothing."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import LlamaForCausalLM, Trainer

from autofit.errors import OutOfBudget
from autofit.step import recomputing as recomputing_module
from autofit.step.recomputing import keeps_some, recomputing
from autofit.training.recovery import redoing
from autofit.training.recovery.cutting import LossKind
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import examples, farthest, same, weights

TOO_LONG = 29


@pytest.fixture
def two_layers(tiny_llama):
    config = copy.deepcopy(tiny_llama.config)
    config.num_hidden_layers = 2
    torch.manual_seed(5)
    return LlamaForCausalLM(config)


def is_on_host(layer):
    return vars(layer).get("_gradient_checkpointing_func") is recomputing_module._on_host


class Narrow:
    """Runs out of memory where a long row is met by a layer that keeps too much; notes how each row was met."""

    def __init__(self, model, enough):
        self.met = []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(functools.partial(self.look, enough), with_kwargs=True)

    def look(self, enough, layer, args, kwargs):
        tokens = args[0].shape[0] * args[0].shape[1]
        how = "host" if is_on_host(layer) else "recomputes" if layer.gradient_checkpointing else "keeps"
        if torch.is_grad_enabled():
            self.met.append((tokens, how))
        if tokens >= TOO_LONG and how not in enough:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("enough", [("recomputes", "host"), ("host",)])
def test_a_long_row_alone_is_recomputed_and_then_kept_on_the_host(made, two_layers, monkeypatch, enough):
    monkeypatch.setattr(redoing, "_has_host", lambda model: True)
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 8}
    stock = made(Trainer, two_layers, **given)
    start = weights(stock)
    stock.train()
    ours = made(AutoFitTrainer, two_layers, **given)
    narrow = Narrow(ours.model, enough)
    ours.train()
    assert farthest(weights(stock), weights(ours), start) < 1e-6
    did = [event["did"] for event in ours.recovery.events]
    assert [words[:5] for words in did] == ["freed", "recom", "recom"][: 4 - len(enough)]
    assert ("on the host" in did[-1]) is (len(enough) == 1)
    # Learned once: the other long rows run so at once, and no short one does.
    assert sum(length >= TOO_LONG for length in map(len, rows())) * 2 > len(did)
    assert {how for tokens, how in narrow.met if tokens < TOO_LONG} == {"keeps"}


def rows():
    return [row["input_ids"] for row in examples()]


def test_it_is_forgotten_after_enough_quiet_steps(made, two_layers, monkeypatch):
    monkeypatch.setattr(redoing, "QUIET_STEPS", 2)
    ours = made(AutoFitTrainer, two_layers, per_device_train_batch_size=1, gradient_accumulation_steps=16, max_steps=6)
    Narrow(ours.model, ("recomputes",))
    ours.train()
    kinds = [event["event"] for event in ours.recovery.events]
    assert kinds[:3] == ["oom", "oom", "grow"]
    assert "oom" in kinds[3:]


def test_nothing_more_to_spend_is_out_of_budget(made, two_layers, monkeypatch):
    monkeypatch.setattr(redoing, "_has_host", lambda model: True)
    ours = made(AutoFitTrainer, two_layers, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    Narrow(ours.model, ())
    with pytest.raises(OutOfBudget, match="a single row of 30 tokens is too much"):
        ours.train()
    assert ours.recovery.events[-1]["did"] == "gave up"


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("before", ["none", "every", "every second"])
def test_recomputing_for_a_while_leaves_a_model_as_it_was(two_layers, offload, before):
    ids = torch.arange(24).view(2, 12)

    def gradients():
        two_layers.zero_grad()
        two_layers.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in two_layers.named_parameters()}

    expected = gradients()
    if before != "none":
        two_layers.activation_checkpointing_enable(every_n_layers=1 if before == "every" else 2)
    layers = two_layers.model.layers
    flags = [layer.gradient_checkpointing for layer in layers]
    functions = [vars(layer).get("_gradient_checkpointing_func") for layer in layers]
    assert keeps_some(two_layers) is not all(flags)
    with recomputing(two_layers, offload=offload):
        assert all(layer.gradient_checkpointing for layer in layers)
        assert all(map(is_on_host, layers)) is offload
        assert same(gradients(), expected)
    assert [layer.gradient_checkpointing for layer in layers] == flags
    assert [vars(layer).get("_gradient_checkpointing_func") for layer in layers] == functions
    assert same(gradients(), expected)


def test_giving_up_leaves_a_checkpoint_of_the_last_completed_step(made, two_layers):
    """As far as it came, and with the random numbers of then: what goes on from it ends as undisturbed."""
    for layer in two_layers.model.layers:
        layer.self_attn.attention_dropout = 0.3
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 12}
    saves = {"save_strategy": "steps", "save_steps": 100}
    expected = made(Trainer, two_layers, **given)
    expected.train()
    ours = made(AutoFitTrainer, two_layers, **given, **saves)
    gone = GoneFrom(ours, step=5)
    with pytest.raises(OutOfBudget):
        ours.train()
    assert gone.seen
    assert [path.name for path in sorted(Path(ours.args.output_dir).glob("checkpoint-*"))] == ["checkpoint-5"]
    again = made(AutoFitTrainer, two_layers, **given, **saves)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again), weights(expected))


@pytest.mark.parametrize(("step", "strategy"), [(0, "steps"), (8, "steps"), (5, "no")])
def test_no_checkpoint_where_none_is_wanted_or_none_would_go_on_as_undisturbed(made, two_layers, step, strategy):
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 12}
    ours = made(AutoFitTrainer, two_layers, **given, save_strategy=strategy, save_steps=100)
    GoneFrom(ours, step)
    with pytest.raises(OutOfBudget):
        ours.train()
    assert list(Path(ours.args.output_dir).glob("checkpoint-*")) == []


class GoneFrom:
    """There is no memory at all from a step on."""

    def __init__(self, trainer, step):
        self.trainer, self.step, self.seen = trainer, step, False
        trainer.model.model.layers[0].register_forward_pre_hook(self.look)

    def look(self, *_):
        if self.trainer.state.global_step >= self.step:
            self.seen = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_re_entrant_function_left_behind_takes_no_gradients_away(two_layers):
    ids = torch.arange(24).view(2, 12)
    base = prepare_model_for_kbit_training(two_layers, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]))
    base.activation_checkpointing_disable()  # as it also takes back that inputs require gradients

    def gradients():
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with recomputing(model):
        assert same(gradients(), expected)


def test_layers_with_batch_norm_are_not_run_twice(two_layers):
    two_layers.model.layers[0].norm_of_batches = nn.BatchNorm1d(4)
    with recomputing(two_layers):
        assert [layer.gradient_checkpointing for layer in two_layers.model.layers] == [False, True]
    two_layers.model.layers[1].norm_of_batches = nn.BatchNorm1d(4)
    assert not keeps_some(two_layers)


def needs_pairs(outputs, labels, num_items_in_batch=None):
    if len(labels) < 2:
        raise ValueError("needs pairs")
    states = outputs.logits.float().mean(1)
    return (states @ states.T).logsumexp(1).mean()


def test_a_loss_that_refuses_single_rows_is_not_cut_where_that_was_planned(made):
    stock, ours = (made(cls, compute_loss_func=needs_pairs) for cls in (Trainer, AutoFitTrainer))
    ours._plan(60, redoing.Thrift.NONE)
    stock.train()
    ours.train()
    assert same(weights(stock), weights(ours))
    assert ours._kind is LossKind.WHOLE
