"""What kind a loss is, is found out on the model as it trains: terms of all rows are seen wherever they are."""

import copy

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, set_seed

from autofit.training.recovery import measuring
from autofit.training.recovery.cutting import LossKind
from autofit.training.recovery.redoing import Thrift
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import farthest, weights


class OwnNorm(nn.Module):
    """Of the statistics of a batch, as batch norm, and not derived from it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        found = self.inner(states)
        return found - found.mean((0, 1)) if self.training else found


class Spread(Trainer):
    """A term of all rows that is there in training only."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss
        if model.training:
            loss = loss + outputs.logits.mean((1, 2)).var()
        return (loss, outputs) if return_outputs else loss


def planned(made, *classes, model=None, **given):
    trainer = made(type("Ours", (*classes, AutoFitTrainer), {}), model, **given)
    trainer._plan(40, Thrift.NONE)
    return trainer


@pytest.mark.parametrize("what", ["a term", "a norm", "experts", "experts, bf16"])
def test_what_takes_rows_together_in_training_is_not_cut(made, tiny_llama, what):
    model, classes, given = copy.deepcopy(tiny_llama), (), {"bf16": what == "experts, bf16"}
    if what == "a term":
        classes = (Spread,)
    elif what == "a norm":
        model.model.layers[0].mlp.down_proj = OwnNorm(model.model.layers[0].mlp.down_proj)
    else:
        set_seed(3)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MixtralConfig(**sizes, num_key_value_heads=1, vocab_size=64, num_local_experts=4)
        config.output_router_logits, config.router_aux_loss_coef = True, 0.001
        model = MixtralForCausalLM(config)
    stock = made(type("Stock", (*classes, Trainer), {}), model, **given)
    stock.train()
    ours = planned(made, *classes, model=model, **given)
    ours.train()
    assert ours._kind is LossKind.WHOLE
    assert farthest(weights(stock), weights(ours), weights(made(Trainer, model))) < 1e-6


@pytest.mark.parametrize("where", ["attention", "module", "function"])
def test_dropout_does_not_hide_what_a_loss_is(made, tiny_llama, where):
    class Dropping(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.dropout = inner, nn.Dropout(0.5)

        def forward(self, states):
            if where == "module":
                return self.dropout(self.inner(states))
            return nn.functional.dropout(self.inner(states), p=0.5, training=self.training)

    model = copy.deepcopy(tiny_llama)
    if where == "attention":
        model.model.layers[0].self_attn.attention_dropout = 0.5
    else:
        model.model.layers[0].mlp.down_proj = Dropping(model.model.layers[0].mlp.down_proj)
    ours = planned(made, model=model)
    ours.train()
    assert ours._kind is LossKind.SUM
    # And it is there in the steps.
    stock = made(Trainer, tiny_llama)
    stock.train()
    assert farthest(weights(stock), weights(ours), weights(made(Trainer))) > 1e-2 if where == "attention" else True


def test_noise_that_stays_is_measured_as_it_evaluates(made, tiny_llama):
    class Noisy(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            found = self.inner(states)
            return found + torch.randn_like(found) if self.training else found

    model = copy.deepcopy(tiny_llama)
    model.model.layers[0].mlp.down_proj = Noisy(model.model.layers[0].mlp.down_proj)
    ours = planned(made, model=model)
    ours.train()
    assert ours._kind is LossKind.SUM


def test_a_model_is_left_as_it_was(made, tiny_llama):
    ours = planned(made, neftune_noise_alpha=5.0)
    seen = []
    genuine = measuring.measure_kind

    def spy(*args):
        seen.append([m.training for m in ours.model.modules()])
        return genuine(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "measure_kind", spy)
        embeddings = ours.model.get_input_embeddings()
        strengths = []
        embeddings.register_forward_hook(lambda module, *_: strengths.append(float(module.neftune_noise_alpha)))
        ours.train()
    assert all(map(all, seen))
    assert strengths.count(0.0) == 2 + 1 + 4  # twice the same, four rows, each alone
    assert set(strengths) == {0.0, 5.0}
