"""Defects that are planted on purpose: the checks that the other tests make see each of them, and healthy code passes.

A check says how far a run that was disturbed ends from the undisturbed one, as a share of the distance travelled.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers.trainer
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from autofit.training import checkpoints
from autofit.training.recovery import cutting, faults, mixin, optimizing, undo
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import FailingAllocations, farthest, newest, weights
from tests.training.recovery.forked import Disk

HEALTHY, SEEN = 1e-5, 1e-4


def mean_over_tokens(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()) / 2


class Checks:
    """Disturbs runs of ours in the ways that the other tests do."""

    def __init__(self, made, with_dropout, run, folder):
        self.made, self.with_dropout, self.run, self.folder = made, with_dropout, run, folder
        self.tries = 0

    def out_of_memory(self, at=((1 / 3, 7 / 12),), dropout=False, **given):
        """Out of memory at these allocations, in shares of the first step's; of several tries the worst."""
        make = partial(self.made, model=self.with_dropout if dropout else None, **given)
        start, expected = trained(make(Trainer))
        with FailingAllocations() as counter:
            make(AutoFitTrainer, max_steps=1).train()
        faults = [{int(share * counter.count) for share in shares} for shares in at]
        try:
            return max(farthest(expected, trained(make(AutoFitTrainer), numbers)[1], start) for numbers in faults)
        except KeyError:  # AdamW, of a state that was only begun
            return float("inf")

    def resumed(self):
        """Stopped after two of an epoch's four steps, and gone on with from there by another trainer."""
        given = {"max_steps": 4, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2}
        make = partial(self.made, model=self.with_dropout, **given)
        start, expected = trained(make(Trainer))
        stopped = make(AutoFitTrainer)
        stopped.add_callback(StopAfter(2))
        stopped.train()
        again = make(AutoFitTrainer)
        again.train(resume_from_checkpoint=f"{stopped.args.output_dir}/checkpoint-2")
        return farthest(expected, weights(again), start)

    def power_lost(self):
        """At operations of the second and third of three saves; 0 where a whole checkpoint was left each time."""
        self.tries += 1
        left = []
        for number in range(50, 120, 15):
            folder = self.folder / f"{self.tries}-{number}"
            self.run(folder, lambda ours, at=number, on=folder: Disk(on, at, True), max_steps=3, save_steps=1)
            left.append(newest(folder))
        return float(min(left) == 0)


def trained(trainer, faults=()):
    start = weights(trainer)
    with FailingAllocations(faults):
        trainer.train()
    return start, weights(trainer)


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def replaced_pieces(monkeypatch, change):
    genuine = mixin.cut
    monkeypatch.setattr(mixin, "cut", lambda *a, **k: change(pieces) if len(pieces := genuine(*a, **k)) > 2 else pieces)


def drop_a_piece(monkeypatch):
    replaced_pieces(monkeypatch, lambda pieces: pieces[:-1])


def double_a_piece(monkeypatch):
    replaced_pieces(monkeypatch, lambda pieces: [*pieces, pieces[-1]])


def weigh_all_pieces_alike(monkeypatch):
    genuine = mixin.cut

    def alike(*asked, **how):
        pieces = genuine(*asked, **how)
        return [cutting.Piece(piece.batch, len(asked[0]) / len(pieces)) for piece in pieces]

    monkeypatch.setattr(mixin, "cut", alike)


def keep_gradients(monkeypatch):
    monkeypatch.setattr(undo.Gradients, "restore", lambda self: None)


def undo_no_step(monkeypatch):
    def undoable(step, moving, did):
        with faults.Watch() as watch:
            step._genuine()
        return watch.fault is None

    monkeypatch.setattr(optimizing._Step, "_undoable", undoable)


def restore_nothing(monkeypatch):
    monkeypatch.setattr(undo.Snapshot, "restore", lambda self: torch.manual_seed(0))


def begin_the_schedule_anew(monkeypatch):
    genuine = undo.Snapshot.restore

    def restore(self):
        genuine(self)
        scheduler = self._trainer.lr_scheduler
        scheduler.last_epoch = 0
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = rate

    monkeypatch.setattr(undo.Snapshot, "restore", restore)


def load_no_schedule(monkeypatch):
    monkeypatch.setattr(LambdaLR, "load_state_dict", lambda self, state: None)


def load_no_random_numbers(monkeypatch):
    monkeypatch.setattr(Trainer, "_load_rng_state", lambda self, checkpoint: None)


def load_no_optimizer_state(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)


def skip(monkeypatch, more):
    genuine = transformers.trainer.skip_first_batches
    skipped = lambda loader, count: genuine(loader, count + more)  # noqa: E731
    monkeypatch.setattr(transformers.trainer, "skip_first_batches", skipped)


def sync_no_files(monkeypatch):
    about = {"bytes": 0, "sha256": ""}
    monkeypatch.setattr(checkpoints, "_synced", lambda path: about)
    monkeypatch.setattr(checkpoints, "_against_manifest", lambda checkpoint, hashes: checkpoints._as_stock(checkpoint))


def sync_no_renames(monkeypatch):
    monkeypatch.setattr(checkpoints, "_sync_folder", lambda folder: None)


@dataclass(frozen=True)
class Planted:
    """A defect, and the check that has to see it."""

    name: str
    plant: object
    check: object


in_the_optimizer = [(share / 20,) for share in range(10, 20)]
LIST = [
    Planted("a sample dropped by a cut", drop_a_piece, Checks.out_of_memory),
    Planted("a sample doubled by a cut", double_a_piece, Checks.out_of_memory),
    Planted("mean of means", weigh_all_pieces_alike, partial(Checks.out_of_memory, compute_loss_func=mean_over_tokens)),
    Planted("partial gradients kept", keep_gradients, Checks.out_of_memory),
    Planted("half a step", undo_no_step, partial(Checks.out_of_memory, at=in_the_optimizer)),
    Planted("random numbers drawn anew", restore_nothing, partial(Checks.out_of_memory, at=[(1 / 3,)], dropout=True)),
    Planted("schedule restarted", begin_the_schedule_anew, partial(Checks.out_of_memory, at=[(4 / 3,)])),
    Planted("schedule restarted by a resume", load_no_schedule, Checks.resumed),
    Planted("random numbers drawn anew by a resume", load_no_random_numbers, Checks.resumed),
    Planted("optimizer begun anew by a resume", load_no_optimizer_state, Checks.resumed),
    Planted("samples dropped by a resume", partial(skip, more=1), Checks.resumed),
    Planted("samples doubled by a resume", partial(skip, more=-1), Checks.resumed),
    Planted("files not synced", sync_no_files, Checks.power_lost),
    Planted("renames not synced", sync_no_renames, Checks.power_lost),
]


@pytest.mark.parametrize("planted", LIST, ids=lambda planted: planted.name)
def test_a_planted_defect_is_seen(made, with_dropout, run, tmp_path, monkeypatch, planted):
    checks = Checks(made, with_dropout, run, tmp_path / "lost")
    assert planted.check(checks) < HEALTHY
    planted.plant(monkeypatch)
    assert planted.check(checks) > SEEN
