import json
import shutil

import pytest

from autofit.config import RunConfig
from autofit.errors import AutofitError, UsageError
from autofit.space.candidate import Candidate
from autofit.space.facts import DataFacts, DeviceFacts, ModelFacts
from autofit.training import workspace
from autofit.training.checkpoints import publish, stage
from autofit.training.duration import estimated_seconds, optimizer_steps, spoken
from autofit.training.resources import check_resources, checkpoint_bytes, hub_cache
from autofit.training.resume import (
    check_same_config,
    check_same_data,
    check_same_result,
    furthest_step,
    goes_on_with,
    last_step,
    note_trained,
)
from autofit.training.workspace import Staging, Workspace, choose_folder, other_autofit

MODEL = ModelFacts(
    architecture="A", num_parameters=10**6, weight_bytes_16bit=2 * 10**6, checkpointable_layers=2, max_positions=None
)
CANDIDATE = Candidate(micro_batch_size=4, max_seq_length=100)


def test_what_is_staged_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "run"
    with pytest.raises(KeyError), Staging(target) as staging:
        (staging.folder / "work").mkdir()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with Staging(target) as staging:
        (staging.folder / "work" / "data").mkdir(parents=True)
        (staging.folder / "work" / "data" / "new").touch()
        staging.publish()
    assert [p.name for p in target.parent.iterdir()] == ["run"]
    (target / "work" / "trials").mkdir()
    (target / "work" / "data" / "old").touch()
    with Staging(target) as staging:
        (staging.folder / "work" / "data").mkdir(parents=True)
        staging.publish()
    assert sorted(p.name for p in (target / "work").iterdir()) == ["data", "trials"]
    assert list((target / "work" / "data").iterdir()) == []


def test_folders_that_are_no_place_for_a_run(tmp_path):
    assert choose_folder(str(tmp_path / "new")) == tmp_path / "new"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        choose_folder(str(tmp_path / "file"))
    with pytest.raises(UsageError, match="not empty"):
        choose_folder(str(tmp_path))
    (tmp_path / "resolved.yaml").touch()
    assert choose_folder(str(tmp_path)) == tmp_path
    (tmp_path / "README.md").touch()
    with pytest.raises(UsageError, match="finished run"):
        choose_folder(str(tmp_path))


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with Workspace(tmp_path).alone(), pytest.raises(UsageError, match="another autofit"), Workspace(tmp_path).alone():
        pass
    with Workspace(tmp_path).alone():
        assert (tmp_path / "work" / "lock").is_file()


def test_the_other_project_of_that_name_is_noticed(tmp_path, monkeypatch):
    assert not other_autofit()
    info = tmp_path / "autofit-2024.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: autofit\nVersion: 2024.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert other_autofit()


def test_how_long_it_takes_and_how_that_is_said():
    assert optimizer_steps(33, 16, 1.0, None) == 3
    assert optimizer_steps(33, 16, 2.0, None) == 6
    assert optimizer_steps(33, 16, 1.0, 5) == 5
    assert estimated_seconds([100] * 40, CANDIDATE, 4, steps=10, tokens_per_second=400) == pytest.approx(10)
    assert estimated_seconds([9999] * 40, CANDIDATE, 4, steps=10, tokens_per_second=400) == pytest.approx(10)
    assert [spoken(s) for s in (0.2, 40, 600, 11_400)] == [
        "about 1 s",
        "about 40 s",
        "about 10 min",
        "about 3 h 10 min",
    ]


def test_too_little_disk_or_host_memory_is_refused_before_training(tmp_path, monkeypatch):
    cpu = DeviceFacts(type="cpu", name="cpu", total_bytes=2**33)
    check_resources(tmp_path, MODEL, CANDIDATE, cpu, 10**5)
    assert checkpoint_bytes(10**5) == 3 * 12 * 10**5 + 4 * 10**5
    with pytest.raises(AutofitError, match=r"checkpoints need .* of disk"):
        check_resources(tmp_path, MODEL, CANDIDATE, cpu, 10**15)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert hub_cache() == tmp_path / "cache" / "hub"
    far = ModelFacts.from_json({**MODEL.to_json(), "download_bytes": 10**16})
    with pytest.raises(AutofitError, match=r"cache/hub: the model's download need .* of disk"):
        check_resources(tmp_path, far, CANDIDATE, cpu, 10**5)
    huge = ModelFacts.from_json({**MODEL.to_json(), "weight_bytes_16bit": 10**15})
    with pytest.raises(AutofitError, match="host memory"):
        check_resources(tmp_path, huge, CANDIDATE, cpu, 10**5)


@pytest.fixture
def interrupted(tmp_path):
    """A run's folder with a checkpoint at step 7."""
    space = Workspace(tmp_path)
    space.write_yaml("resolved.yaml", json.loads(RunConfig().model_dump_json(exclude={"output_dir"})))
    space.write_json("plan.json", {"chosen": CANDIDATE.to_json(), "data_fingerprint": "a"})
    for name in ("checkpoint-9", "checkpoint-nonsense"):
        (tmp_path / name).mkdir()
    staged = stage(tmp_path) / "checkpoint-7"
    shutil.copytree(tmp_path / "checkpoint-9", staged)
    (staged / "trainer_state.json").write_text("{}")
    publish(staged, tmp_path / "checkpoint-7", {})
    return tmp_path


def test_only_the_same_run_goes_on(interrupted):
    data = DataFacts(num_examples=1, longest=1, lengths=(1,), trained_tokens=(1,), fingerprint="a")
    assert last_step(interrupted) == 7
    check_same_config(interrupted, RunConfig(gpu_mem="1GB", micro_batch_size=2))
    check_same_data(interrupted, data)
    check_same_result(interrupted, CANDIDATE.replace(micro_batch_size=1, checkpointed_layers=2))
    with pytest.raises(UsageError, match=r"step 7 .* seed was 42 and is 1"):
        check_same_config(interrupted, RunConfig(seed=1))
    with pytest.raises(UsageError, match="data has changed"):
        check_same_data(interrupted, DataFacts.from_json({**data.to_json(), "fingerprint": "b"}))
    with pytest.raises(UsageError, match="lora_rank was 16 and would be 8"):
        check_same_result(interrupted, CANDIDATE.replace(lora_rank=8))


def test_an_optimizer_that_cannot_load_the_states_is_refused(interrupted):
    check_same_result(interrupted, CANDIDATE)
    with pytest.raises(UsageError, match="optimizer was adamw_torch and would be paged_adamw_32bit"):
        check_same_result(interrupted, CANDIDATE.replace(optimizer="paged_adamw_32bit"))
    Workspace(interrupted).write_json("plan.json", {"chosen": CANDIDATE.replace(optimizer="adamw_8bit").to_json()})
    check_same_result(interrupted, CANDIDATE.replace(optimizer="paged_adamw_8bit"))


def test_a_mended_run_goes_on_as_it_was_mended(interrupted):
    mended = CANDIDATE.replace(lora_rank=8)
    assert goes_on_with(interrupted, CANDIDATE) == CANDIDATE
    note_trained(Workspace(interrupted), mended)
    assert goes_on_with(interrupted, CANDIDATE) == mended
    check_same_result(interrupted, mended)
    # Chosen anew, with another budget say, the choice stands, but not one of another result.
    other = CANDIDATE.replace(micro_batch_size=1)
    assert goes_on_with(interrupted, other) == other
    with pytest.raises(UsageError, match="lora_rank was 8 and would be 16"):
        check_same_result(interrupted, other)
    note_trained(Workspace(interrupted), CANDIDATE)
    assert goes_on_with(interrupted, CANDIDATE) == CANDIDATE
    (interrupted / "metrics.jsonl").write_text('{"step": 8}\n{"step": 9, "loss": 1}\n{"st')
    assert furthest_step(interrupted) == 9


def test_before_the_first_checkpoint_everything_may_change(interrupted):
    (interrupted / "checkpoint-7" / "trainer_state.json").unlink()
    check_same_config(interrupted, RunConfig(seed=1))
    check_same_result(interrupted, CANDIDATE.replace(lora_rank=8))


def test_versions_are_on_record():
    found = workspace.environment()
    assert found["libraries"]["torch"].startswith("2.")
    assert found["autofit"]
