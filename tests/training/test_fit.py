"""The search from a script: the arguments that it returns train within the budget, and keep what the script set."""

import contextlib

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

import autofit
from autofit.errors import NothingFits, UsageError
from autofit.space.candidate import Candidate
from autofit.space.ladder import Limits, knob_values
from autofit.training import fit as fitting
from autofit.training.fit import fit
from autofit.training.model_settings import ModelSettings, model_settings
from autofit.training.recovery import trainers
from autofit.training.recovery.trainers import AutoFitSFTTrainer

LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
BUDGET = "20500KB"
TEXTS = Dataset.from_list([{"text": "hello world " * 10}] * 24)


@pytest.fixture
def shared(sandbox, monkeypatch):
    """The tests' sandbox in the place of one of its own."""
    monkeypatch.setattr(fitting, "Sandbox", lambda preload: contextlib.nullcontext(sandbox))


def arguments(folder, kind=SFTConfig, **more):
    values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "report_to": "none"}
    values |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    values |= {"max_length": 96} if kind is SFTConfig else {}
    return kind(output_dir=str(folder), **{**values, **more})


@pytest.fixture(scope="module")
def found(sandbox, tiny_model, tmp_path_factory):
    args = arguments(tmp_path_factory.mktemp("fit"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "Sandbox", lambda preload: contextlib.nullcontext(sandbox))
        made = fit(str(tiny_model), train_dataset=TEXTS, args=args, peft_config=LORA, gpu_mem=BUDGET)
    assert args.per_device_train_batch_size == 2  # the script's are left alone
    return made


def test_what_it_returns_keeps_the_script_s_batch_and_trains_within_the_budget(found):
    assert found.args.per_device_train_batch_size * found.args.gradient_accumulation_steps == 4
    assert found.args.per_device_train_batch_size < 4
    assert found.args.max_length == 96
    assert found.peft_config.r == 8
    assert found.candidate.step == "sft"
    trainer = AutoFitSFTTrainer(
        model=found.load_model(),
        args=found.args,
        peft_config=found.peft_config,
        train_dataset=TEXTS,
        gpu_mem=BUDGET,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.recovery.events == []


def test_a_model_by_name_with_a_budget_is_fitted_in_the_constructor(found, monkeypatch, tiny_model, tmp_path):
    asked = {}
    monkeypatch.setattr(trainers, "fit", lambda model, **given: asked.update(model=model, **given) or found)
    args = arguments(tmp_path)
    trainer = AutoFitSFTTrainer(str(tiny_model), args, peft_config=LORA, train_dataset=TEXTS, gpu_mem=BUDGET)
    assert asked == {
        "model": str(tiny_model),
        "train_dataset": TEXTS,
        "args": args,
        "peft_config": LORA,
        "gpu_mem": BUDGET,
    }
    assert trainer.args.per_device_train_batch_size == found.args.per_device_train_batch_size
    with pytest.raises(UsageError, match="needs peft_config and train_dataset"):
        AutoFitSFTTrainer(str(tiny_model), args, train_dataset=TEXTS, gpu_mem=BUDGET)


@pytest.mark.parametrize(
    ("args", "more", "message"),
    [
        ({"auto_find_batch_size": True}, {}, "does not cover auto_find_batch_size"),
        ({"optim": "lomo"}, {}, "does not cover optim lomo"),
        ({}, {"max_seq_length": 64}, r"max_seq_length is an argument of SFTConfig now: SFTConfig\(max_length=…\)"),
    ],
)
def test_what_the_trainer_refuses_is_refused_before_the_search(monkeypatch, tmp_path, args, more, message):
    monkeypatch.setattr(trainers, "fit", lambda *_, **__: pytest.fail("it searched"))
    with pytest.raises(UsageError, match=message):
        AutoFitSFTTrainer(
            "m", arguments(tmp_path, **args), peft_config=LORA, train_dataset=TEXTS, gpu_mem=BUDGET, **more
        )


def test_what_changes_the_result_moves_only_where_it_is_released(shared, tiny_model, tmp_path):
    tokens = Dataset.from_list([{"input_ids": list(range(1, 200))}] * 4)
    args = arguments(tmp_path, max_length=192, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    with pytest.raises(NothingFits, match=r"nothing fits 20\.0 MB") as raised:
        fit(str(tiny_model), train_dataset=tokens, args=args, peft_config=LORA, gpu_mem="20MB")
    said = str(raised.value)  # in a script's words; micro-batch and checkpointing were free
    assert 'release more by autofit.fit(…, search=["bits", "seq", "rank"]), or use gpu_mem ' in said
    assert "free" not in said
    found = fit(str(tiny_model), train_dataset=tokens, args=args, peft_config=LORA, gpu_mem="20MB", search=("seq",))
    assert found.args.max_length == found.candidate.max_seq_length < 192


def test_stock_trainers_have_equal_micro_batches_and_every_n_th_layer_checkpointed():
    wish = Candidate(micro_batch_size=12, max_seq_length=64)
    limits = Limits(global_batch_size=12, checkpointable_layers=32, can_page=True, stock=True)
    assert knob_values("micro_batch_size", wish, limits) == [12, 6, 4, 3, 2, 1]
    assert knob_values("checkpointed_layers", wish, limits) == [0, 4, 8, 11, 16, 32]


@pytest.mark.parametrize(
    ("args", "lora", "more", "message"),
    [
        ({}, LORA, {"search": ("batch",)}, "search micro_batch_size: it moves anyway"),
        ({}, LORA, {"search": ("bots",)}, "'bots' is not a knob"),
        ({"optim": "adafactor"}, LORA, {}, "optim adafactor cannot be estimated; valid: adamw_torch_fused"),
        ({}, LoraConfig(r=8), {}, "peft_config names no target_modules"),
        ({"max_length": None}, LORA, {}, "set max_length, or give a tokenized dataset"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, args, lora, more, message):
    with pytest.raises(UsageError, match=message):
        fit("m", train_dataset=TEXTS, args=arguments(tmp_path, **args), peft_config=lora, **more)


def test_plain_arguments_are_the_trainer_s(tmp_path):
    with pytest.raises(UsageError, match="set max_length, or give a tokenized dataset"):
        autofit.fit("m", train_dataset=TEXTS, args=arguments(tmp_path, TrainingArguments), peft_config=LORA)


def test_a_process_that_holds_the_card_is_told_so(monkeypatch, tmp_path):
    for name in ("is_available", "is_initialized", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1)
    with pytest.raises(UsageError, match="call fit before loading the model"):
        fit("m", train_dataset=TEXTS, args=arguments(tmp_path), peft_config=LORA)


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def test_what_the_script_sets_of_the_model_is_tried_and_loaded(shared, tiny_model, tmp_path, monkeypatch):
    """Also without a stand-in for `fit`: a model by name and a budget, to the end of training."""
    searched = []

    def spied(*given, **more):
        searched.append(fit(*given, **more))
        return searched[-1]

    monkeypatch.setattr(trainers, "fit", spied)
    settings = {"attn_implementation": "eager", "dtype": "bfloat16", "device_map": "auto", "low_cpu_mem_usage": True}
    args = arguments(tmp_path, model_init_kwargs=settings)
    trainer = AutoFitSFTTrainer(str(tiny_model), args, peft_config=LORA, train_dataset=TEXTS, gpu_mem="17MB")
    base = trainer.model.get_base_model()
    assert (base.config._attn_implementation, base.dtype) == ("eager", torch.bfloat16)
    tried = [trial.candidate for trial in searched[0].outcome.trials]
    assert tried
    assert {(one.attention, one.dtype, one.quantization_bits) for one in tried} == {("eager", "bfloat16", 16)}
    assert trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps == 4
    assert args.model_init_kwargs == settings
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.recovery.events == []


def test_bits_that_the_script_sets_are_loaded_as_it_sets_them(shared, tiny_model, tmp_path):
    def trained(**more):
        args = arguments(tmp_path, max_steps=1, **more.pop("args", {}))
        given = {"peft_config": LORA, "train_dataset": TEXTS, "gpu_mem": "100MB", **more}
        return AutoFitSFTTrainer(str(tiny_model), args, **given)

    settings = BitsAndBytesConfig(**FOUR_BITS)
    trainer = trained(quantization_config=settings)
    weights = [p for p in trainer.model.parameters() if hasattr(p, "quant_state")]
    assert weights
    assert {(w.quant_type, w.quant_state.nested) for w in weights} == {("nf4", False)}
    with pytest.raises(UsageError, match=r"quantization_config is also in args\.model_init_kwargs"):
        trained(quantization_config=settings, args={"model_init_kwargs": {"quantization_config": settings}})


REFUSED = [
    ({"rope_scaling": {}}, "rope_scaling is not covered; valid: attn_implementation, dtype, .*; or load the model"),
    ({"revision": "v2"}, "revision is not covered"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation flash_attention_2 .*; valid: sdpa, eager"),
    ({"dtype": "float64"}, "dtype float64 cannot be estimated; valid: bfloat16, float16, float32"),
    ({"dtype": torch.float32, "bf16": True}, "dtype float32 with bfloat16 products cannot be estimated"),
    ({"device_map": {"model": 0, "lm_head": 1}}, r"device_map \{.*cannot be estimated; valid: one device"),
    ({"device_map": "balanced"}, "device_map balanced"),
    ({"quantization_config": {"bits": 4}}, "quantization_config of dict .*; valid: BitsAndBytesConfig"),
    ({"load_in_4bit": True}, "bnb_4bit_quant_type=fp4 cannot be estimated; valid: bnb_4bit_quant_type='nf4'"),
    ({**FOUR_BITS, "bf16": True}, "compute_dtype=float32 cannot be estimated; valid: bnb_4bit_compute_dtype=torch.bf"),
    ({**FOUR_BITS, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage=bfloat16"),
    ({**FOUR_BITS, "llm_int8_skip_modules": ["lm_head"]}, "llm_int8_skip_modules"),
    ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, "llm_int8_threshold=0.0 .*; valid: llm_int8_threshold=6.0"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_of_the_model_what_cannot_be_honoured_is_refused_by_name(tmp_path, given, says):
    more = {"bf16": given.pop("bf16")} if "bf16" in given else {}
    if any(name.startswith("load_in") for name in given):
        given = {"quantization_config": BitsAndBytesConfig(**given)}
    args = arguments(tmp_path, model_init_kwargs=given, **more)
    with pytest.raises(UsageError, match=f"^fit: model_init_kwargs .*{says}"):
        fit("m", train_dataset=TEXTS, args=args, peft_config=LORA)


def test_of_the_model_what_is_said_twice_or_does_not_matter_is_taken(tiny_model, tmp_path):
    def settings(**given):
        more = {"bf16": True} if given.pop("bf16", False) else {}
        return model_settings(str(tiny_model), arguments(tmp_path, model_init_kwargs=given or None, **more))

    plain = settings()
    assert plain == ModelSettings(
        attention=None, dtype="float32", bits=None, double_quant=True, trust_remote_code=False
    )
    for same in ({"revision": "main"}, {"use_cache": False}, {"device_map": {"": 0}}, {"dtype": "auto"}):
        assert settings(**same) == plain
    assert settings(bf16=True, dtype=torch.bfloat16).dtype == "bfloat16"
    assert settings(trust_remote_code=True).trust_remote_code
    eight = settings(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert eight.bits == 8
    assert settings(quantization_config=BitsAndBytesConfig()).bits == 16


def test_a_model_by_name_without_a_budget_trains_as_in_the_stock_class(tiny_model, tmp_path):
    def trained(cls):
        set_seed(0)
        args = arguments(tmp_path / cls.__name__, model_init_kwargs={"dtype": "float32"}, logging_steps=1)
        trainer = cls(model=str(tiny_model), args=args, peft_config=LORA, train_dataset=TEXTS)
        trainer.train()
        figures = [{k: v for k, v in line.items() if "loss" in k} for line in trainer.state.log_history]
        return trainer.model.state_dict(), figures

    expected, figures = trained(SFTTrainer)
    found, logged = trained(AutoFitSFTTrainer)
    assert logged == figures
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
