"""Put together from a few layers, a trace is that of all layers: peak, breakdown and what the allocator reserves."""

from dataclasses import replace

import pytest
from transformers import Gemma3TextConfig, JambaConfig, LlamaConfig, Qwen3MoeConfig

from autofit.memory.breakdown import find_peak
from autofit.memory.estimate import replay, spliced, whole_trace
from autofit.memory.roofline import step_seconds
from autofit.memory.splice import Unspliceable, splice
from autofit.memory.trace import FREED, OPTIMIZER
from autofit.memory.tracing import trace_candidate
from autofit.space.candidate import Candidate
from autofit.space.cards import CARDS
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from tests.conftest import CPU

H200 = DeviceFacts(type="cuda", name="NVIDIA H200", total_bytes=150_754_820_096, compute_capability=(9, 0))
LAYERS = 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "num_hidden_layers": LAYERS,
}
PERIOD = ["sliding_attention", "sliding_attention", "full_attention"]
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 12}, head_dim=16, sliding_window=16, layer_types=PERIOD * 4
    ),
    "experts": Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "hybrid": JambaConfig(
        **SIZES, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=2
    ),
}
PLAIN = Candidate(
    micro_batch_size=2, max_seq_length=40, lora_rank=4, lora_targets=("q_proj", "down_proj"), checkpointed_layers=0
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        config.save_pretrained(folder / name)
    return {name: ModelSource(model=str(folder / name), random_weights=True) for name in MODELS}


def both(candidate, source, device=H200):
    """(put together from a few layers, of all layers, layers that were traced)"""
    few = trace_candidate(candidate, source, device)
    return (
        spliced(few, candidate.checkpointed_layers),
        trace_candidate(candidate, source, device, whole=True).trace,
        len(set(few.layers[candidate.checkpointed_layers])),
    )


def told(trace):
    peak = find_peak(trace)
    reserved = [replay(trace, expandable_segments=expandable) for expandable in (False, True)]
    return peak.live_bytes, str(peak.section), peak.parts, reserved


CASES = [
    ("llama", {}),
    ("llama", {"checkpointed_layers": 8, "offload_activations": "checkpoints", "quantization_bits": 4}),
    ("llama", {"checkpointed_layers": 4, "step": "sft"}),
    ("llama", {"checkpointed_layers": 4, "accumulates": True}),
    ("llama", {"checkpointed_layers": 3, "step": "trainer", "accumulates": True}),
    ("llama", {"checkpointed_layers": 3, "offload_activations": "checkpoints", "step": "sft"}),
    ("llama", {"optimizer": "paged_adamw_8bit", "lora_dropout": 0.1}),
    ("gemma3", {}),
    ("gemma3", {"checkpointed_layers": 12, "step": "sft"}),
    ("gemma3", {"checkpointed_layers": 4, "offload_activations": "checkpoints"}),
    ("experts", {"checkpointed_layers": 8}),
    ("experts", {"checkpointed_layers": 3, "step": "trainer"}),
    ("hybrid", {"checkpointed_layers": 8}),
    ("hybrid", {"step": "trainer"}),
]


@pytest.mark.parametrize(("model", "fields"), CASES, ids=str)
def test_a_few_layers_tell_all(sources, model, fields):
    found, whole, traced = both(PLAIN.replace(**fields), sources[model])
    assert traced < MODELS[model].num_hidden_layers
    assert told(found) == told(whole)
    assert step_seconds(found, CARDS["h200"]) == pytest.approx(step_seconds(whole, CARDS["h200"]), rel=0.01)


@pytest.mark.parametrize(
    ("step", "optimizer"),
    [("sft", "adamw_torch"), ("trainer", "adamw_torch"), ("autofit", "adamw_torch"), ("sft", "adamw_8bit")],
)
def test_where_the_optimizer_takes_most(sources, step, optimizer):
    """Temporaries and norms of all layers' gradients, with adapters larger than the activations."""
    small = PLAIN.replace(lora_rank=256, max_seq_length=2, micro_batch_size=1, checkpointed_layers=8)
    found, whole, _ = both(small.replace(step=step, optimizer=optimizer), sources["llama"])
    assert told(found) == told(whole)
    if step != "autofit" and optimizer == "adamw_torch":  # foreach
        assert find_peak(found).section.kind == OPTIMIZER


@pytest.mark.parametrize(("model", "fields"), [("llama", {}), ("gemma3", {"checkpointed_layers": 12})])
def test_on_a_cpu_too(sources, model, fields):
    found, whole, traced = both(PLAIN.replace(dtype="float32", **fields), sources[model], CPU)
    assert traced < MODELS[model].num_hidden_layers
    assert told(found)[:3] == told(whole)[:3]


def live_bytes(trace):
    """After each allocation."""
    sizes, live, curve = {}, 0, []
    for key, size in zip(trace.keys, trace.sizes, strict=True):
        if size == FREED:
            live -= sizes.pop(key)
        else:
            sizes[key] = size
            live += size
            curve.append(live)
    return curve


@pytest.mark.parametrize("fields", [{}, {"checkpointed_layers": 3}], ids=str)
def test_not_only_the_peak_is_right(sources, fields):
    found, whole, _ = both(PLAIN.replace(**fields), sources["llama"])
    assert live_bytes(found) == live_bytes(whole)


def test_what_is_let_go_was_there(sources):
    found, _, _ = both(PLAIN.replace(step="sft", checkpointed_layers=3), sources["llama"])
    alive = set()
    for key, size in zip(found.keys, found.sizes, strict=True):
        if size == FREED:
            alive.remove(key)
        else:
            assert key not in alive
            alive.add(key)


def test_a_loss_of_all_layers_routers_is_traced_whole(sources):
    candidate = PLAIN.replace(step="sft")
    few = trace_candidate(candidate, sources["experts"], H200)
    with pytest.raises(Unspliceable, match="takes something from each of the layers"):
        spliced(few, 0)
    _, found = whole_trace(candidate, sources["experts"], H200)
    assert told(found) == told(trace_candidate(candidate, sources["experts"], H200, whole=True).trace)


def test_trls_offloading_reaches_further_and_is_right(sources, tmp_path):
    """What it stashes is let go five tensors later, layers away."""
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 16})
    config.save_pretrained(tmp_path)
    candidate = PLAIN.replace(step="sft", offload_activations="all", checkpointed_layers=16)
    source = ModelSource(model=str(tmp_path), random_weights=True)
    _, found = whole_trace(candidate, source, H200)
    whole = trace_candidate(candidate, source, H200, whole=True).trace
    assert told(found)[0] == told(whole)[0]


def test_a_release_from_too_far_away_is_refused(sources):
    """Layer 1 letting go of what layer 2's neighbour made: no splice, no wrong answer."""
    few = trace_candidate(PLAIN, sources["llama"], H200)
    trace = few.trace
    begins = {section: event for event, _, section in trace.sections}
    forward = next(s for s in begins if s.step == 1 and s.kind == 2 and s.layer == 0)
    victim = next(
        k for k, s in zip(trace.keys[begins[forward] :], trace.sizes[begins[forward] :], strict=True) if s > 0
    )
    freed = next(i for i, (k, s) in enumerate(zip(trace.keys, trace.sizes, strict=True)) if k == victim and s == FREED)
    last = next(event for event, _, s in trace.sections if s.step == 1 and s.kind == 2 and s.layer == 2)
    keys, sizes = [*trace.keys], [*trace.sizes]
    del keys[freed], sizes[freed]
    keys.insert(last, victim)
    sizes.insert(last, FREED)
    sections = [(e + (last <= e < freed), o, s) for e, o, s in trace.sections]
    moved = replace(trace, keys=keys, sizes=sizes, sections=sections)
    with pytest.raises(Unspliceable):
        splice(moved, next(iter(few.layers.values())), few.reach)


def test_a_trace_of_all_layers_stays_as_it_is(sources):
    whole = trace_candidate(PLAIN, sources["llama"], H200, whole=True)
    assert splice(whole.trace, whole.layers[0]) is whole.trace
