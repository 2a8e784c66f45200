"""The one builder: base weights (real or random), quantization, LoRA, checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers import AutoHfQuantizer

from autofit.errors import UsageError
from autofit.space.candidate import Candidate, every_n_layers, is_checkpointed
from autofit.space.source import ModelSource
from autofit.step.configs import load_config
from autofit.step.data_access import first_line, hub_error
from autofit.step.loaded import check_loaded
from autofit.step.loss import supports_chunked_loss
from autofit.step.offload import StashedActivations, save_checkpoints_on_host
from autofit.step.policy import StepPolicy
from autofit.step.targets import target_modules

QUANTIZED_PARAMETERS = ("Params4bit", "Int8Params")


def build_model(
    candidate: Candidate,
    source: ModelSource,
    policy: StepPolicy,
    lora_alpha: int,
    seed: int,
    skeleton: PreTrainedModel | None = None,
) -> PeftModel:
    """The model that trial and training run: base on `policy.device`, LoRA in float32 on it, in train mode.

    Adapters (and random weights) are a function of `seed`. With a `skeleton` (of `skeleton_of`), the base is that one.

    Raises:
        UsageError: the folder is no model, or its linear layers are not where `lora_targets` says.
        torch.OutOfMemoryError: the weights alone do not fit.
    """
    torch.manual_seed(seed)
    if skeleton is not None:
        base = random_base(skeleton, policy)
    elif source.random_weights:
        base = random_base(skeleton_of(source, candidate, policy), policy)
    else:
        base = load_base(load_config(source), candidate, source, policy)
    base.config.use_cache = False
    base.requires_grad_(False)
    if candidate.prepare_kbit:
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    set_checkpointing(base, candidate)
    if candidate.offload_activations == "checkpoints" and policy.device == "meta":
        save_checkpoints_on_host(base)
    torch.manual_seed(seed)
    model = add_lora(base, candidate, lora_alpha)
    if candidate.step == "autofit" and candidate.checkpointed_layers:
        _leave_inputs_alone(base)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else evaluating packs 4-bit weights anew, on some CPUs, and their backward can't take those.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.train()
    return model


def quantization_config(candidate: Candidate, config: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings: a quantized checkpoint's own, else nf4 for 4 bits, LLM.int8 for 8, None for 16."""
    own = getattr(config, "quantization_config", None)
    if own is not None:
        return BitsAndBytesConfig.from_dict(own) if isinstance(own, dict) else own
    if candidate.quantization_bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=candidate.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, candidate.dtype),
        )
    return BitsAndBytesConfig(load_in_8bit=True) if candidate.quantization_bits == 8 else None


def load_base(
    config: PreTrainedConfig, candidate: Candidate, source: ModelSource, policy: StepPolicy
) -> PreTrainedModel:
    """The pretrained base, read and quantized by transformers.

    Raises:
        UsageError: its files are missing or broken, or lack a part of it.
        AccessError: the hub's model is gated, missing or out of reach.
    """
    already = getattr(config, "quantization_config", None)
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            source.model,
            config=config,
            dtype=getattr(torch, policy.weight_dtype),
            attn_implementation=policy.attention,
            quantization_config=None if already else quantization_config(candidate, config),
            device_map={"": policy.device},
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them
        )
    except (OSError, SafetensorError) as error:
        access = hub_error("model", source.model, error)
        raise access or UsageError(f"model {source.model}: {first_line(error)}") from error
    base: PreTrainedModel = read[0]
    check_loaded(source.model, base, read[1])
    return base


def empty_base(config: PreTrainedConfig, dtype: str, attention: str, trust_remote_code: bool = False) -> Any:
    """The base without storage: parameters on meta, buffers with their values."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        return AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )


def skeleton_of(source: ModelSource, candidate: Candidate, policy: StepPolicy) -> PreTrainedModel:
    """The source's base without storage, ready for `random_base`.

    Raises: as `load_config` does.
    """
    base = empty_base(load_config(source), policy.weight_dtype, policy.attention, source.trust_remote_code)
    return with_placeholders(base, candidate, policy)


def with_placeholders(base: PreTrainedModel, candidate: Candidate, policy: StepPolicy) -> PreTrainedModel:
    """The empty base with bitsandbytes' layers where weights are to be quantized, still without storage."""
    settings = quantization_config(candidate, base.config)
    if settings is not None:
        quantizer = AutoHfQuantizer.from_config(settings)
        quantizer.preprocess_model(model=base, device_map={"": policy.device}, dtype=getattr(torch, candidate.dtype))
        base.hf_quantizer = quantizer
    return base


def random_base(base: PreTrainedModel, policy: StepPolicy) -> PreTrainedModel:
    """The empty base (`with_placeholders`) at full size with random weights, made on the device module by module.

    Its memory and speed are those of the pretrained one: neither depends on the values.
    """
    device = torch.device(policy.device)
    dtype = getattr(torch, policy.weight_dtype)
    base.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for owner, module in _with_owners(base):
        _materialize(owner, module, device, dtype, made)
    base.tie_weights()
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.postprocess_model(base)
    return base


def _with_owners(base: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Every module once, with the innermost model that it is part of: that one knows how to initialize it."""
    seen: set[int] = set()
    waiting: list[tuple[PreTrainedModel, nn.Module]] = [(base, base)]
    while waiting:
        owner, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        owner = module if isinstance(module, PreTrainedModel) else owner
        yield owner, module
        waiting += [(owner, child) for child in reversed(list(module.children()))]


def _materialize(
    owner: Any, module: nn.Module, device: torch.device, dtype: torch.dtype, made: dict[int, nn.Parameter]
) -> None:
    """Gives a module's own parameters random values on the device, quantized where its class says so."""
    placeholders = dict(module.named_parameters(recurse=False))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))
    if not placeholders:
        return
    # bitsandbytes' placeholders say float32 (or int8); what is quantized has the base's type.
    replaced = type(placeholders.get("weight")).__name__ in QUANTIZED_PARAMETERS
    for name, empty in placeholders.items():
        known = made.get(id(empty))
        target = dtype if replaced else empty.dtype
        fresh = known if known is not None else nn.Parameter(torch.empty(empty.shape, dtype=target, device=device))
        if not replaced:
            made[id(empty)] = fresh  # tied weights are made once; keeping quantized ones would keep their originals
        fresh.requires_grad = False
        module._parameters[name] = fresh
    with torch.no_grad():
        owner._init_weights(module)
    _quantize(module, placeholders.get("weight"), device)


def _quantize(module: nn.Module, placeholder: nn.Parameter | None, device: torch.device) -> None:
    kind = type(placeholder).__name__
    if placeholder is None or kind not in QUANTIZED_PARAMETERS:
        return
    weight: Any = module._parameters["weight"]
    settings = {k: v for k, v in placeholder.__dict__.items() if not k.startswith("_")}
    if kind == "Params4bit":
        settings.update(quant_state=None, bnb_quantized=False, module=module)
    quantized: Any = type(placeholder)(weight.data, requires_grad=False, **settings)
    module._parameters["weight"] = None  # frees the unquantized weight before the next is made
    del weight
    # Not `.to(device)`: that quantizes only what comes from the host.
    module._parameters["weight"] = quantized._quantize(device)


def set_checkpointing(base: PreTrainedModel, candidate: Candidate) -> None:
    """Lets the candidate's layers recompute; offloads what they keep, if asked."""
    if candidate.checkpointed_layers == 0:
        return
    layers = checkpointable_layers(base)
    flags = checkpointing_flags(candidate, len(layers))
    offload = candidate.offload_activations == "checkpoints"
    if candidate.step != "autofit":
        base.activation_checkpointing_enable(offload=offload)
    else:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False}, offload=offload)
        _leave_inputs_alone(base)
    for layer, flag in zip(layers, flags, strict=True):
        layer.gradient_checkpointing = flag


def checkpointing_flags(candidate: Candidate, num_layers: int) -> list[bool]:
    """Which layers recompute: evenly spread ones; with a stock step every n-th, as `every_n_layers` has it.

    Raises:
        UsageError: more layers than there are, or a number that no `every_n_layers` leaves.
    """
    wanted = candidate.checkpointed_layers
    if wanted == 0:
        return [False] * num_layers
    if wanted > num_layers:
        raise UsageError(f"checkpointed_layers {wanted}: the model has only {num_layers}")
    if candidate.step == "autofit":
        return [is_checkpointed(i, wanted, num_layers) for i in range(num_layers)]
    every = every_n_layers(wanted, num_layers)
    if every is None:
        valid = ", ".join(map(str, sorted({-(-num_layers // n) for n in range(1, num_layers + 1)})))
        raise UsageError(
            f"checkpointed_layers {wanted} with step {candidate.step}: every n-th of {num_layers} layers "
            f"leaves one of {valid}"
        )
    return [i % every == 0 for i in range(num_layers)]


def _leave_inputs_alone(base: PreTrainedModel) -> None:
    """Undoes that inputs require gradients, which transformers and then PEFT see to where a base is checkpointed.

    Only re-entrant checkpointing needs it; here it would cost memory, and fail where embeddings are changed in place.
    """
    base.disable_input_require_grads()


def checkpointable_layers(base: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that transformers checkpoints one by one, in order."""
    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def add_lora(base: PreTrainedModel, candidate: Candidate, lora_alpha: int) -> PeftModel:
    """LoRA on the target layers: in float32, or as TRL has it in bfloat16 on a quantized base."""
    if candidate.step == "autofit" and candidate.loss == "chunked" and not supports_chunked_loss(base):
        raise UsageError(f"loss chunked: {type(base).__name__} does not make its logits in one product; use loss: full")
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=candidate.lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=candidate.lora_dropout,
        target_modules=target_modules(base, candidate.lora_targets),
    )
    try:
        model = get_peft_model(base, settings, autocast_adapter_dtype=True)
    except ValueError as error:
        raise UsageError(f"lora_targets {','.join(candidate.lora_targets)}: {first_line(error)}") from error
    if candidate.loss == "chunked" and isinstance(base.get_output_embeddings(), BaseTunerLayer):
        raise UsageError("lora_targets: the chunked loss would bypass an adapter on the output layer; use loss: full")
    quantized = getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)
    dtype = torch.bfloat16 if candidate.step == "sft" and quantized else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def offload_context(model: PeftModel, candidate: Candidate) -> contextlib.AbstractContextManager[Any]:
    """What a micro-batch runs in: TRL's activation offloading for "all", nothing otherwise."""
    if candidate.offload_activations != "all":
        return contextlib.nullcontext()
    if next(model.parameters()).is_meta:
        return StashedActivations(model)
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    return get_act_offloading_ctx_manager(model, warn_if_no_head=False)
