"""Saves that happen or do not, and going on only from a checkpoint that is whole and of the same run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from autofit.errors import AutofitError, UsageError
from autofit.space.units import format_bytes
from autofit.training import checkpoints
from autofit.training.recovery.faults import TIMES, Record, retried
from autofit.training.recovery.giving_up import SavesLastStep
from autofit.training.recovery.identity import first_difference, identity, samples_done
from autofit.training.recovery.ranks import Ranks

logger = logging.get_logger(__name__)

# What a checkpoint has besides tensors: tokenizer, state, configs.
_SMALL_FILES_BYTES = 64 * 2**20
# Without these the stock class goes on all the same: with a fresh optimizer, and other random numbers.
_TO_GO_ON = ("optimizer.pt", "scheduler.pt")


class WholeCheckpoints(SavesLastStep):
    """Mixed into a trainer class, before it.

    The stock save writes into a folder beside the checkpoints, which becomes one by being renamed. At least two are
    kept, whatever `save_total_limit` says. Of several ranks the first writes and renames, the others add their random
    states and wait until it has its name.
    """

    recovery: Record
    _ranks: Ranks | None = None
    _staging: Path | None = None
    _to_push: bool = False
    _unsaved: Exception | None = None
    _identity: dict[str, dict[str, Any]] | None = None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, force_resume: bool = False, **kwargs: Any
    ) -> Any:
        """Trains as the stock class does, from a checkpoint that was verified; nothing in it is unpickled.

        Args:
            resume_from_checkpoint: True takes the newest whole one and sets broken ones aside.
            force_resume: go on although data, arguments or base are not those of the checkpoint.

        Raises:
            UsageError: the checkpoint is broken, or of another run; there is none.
            AutofitError: a checkpoint could not be written. Those before it are intact.
        """
        self._identity = None
        found: str | None = None
        if resume_from_checkpoint:
            if self._writes:
                found = str(self._checkpoint_to_resume(resume_from_checkpoint, force_resume))
            if self._ranks is not None:
                found = self._ranks.of_first("the checkpoint to go on from", found)
        return super().train(found, *args, **kwargs)

    def _checkpoint_to_resume(self, asked: str | bool, forced: bool) -> Path:
        trainer: Any = self
        if asked is True:
            folder = Path(trainer.args.output_dir)
            newest = checkpoints.recover(folder, self._warn_of_checkpoint)
            if newest is None:
                raise UsageError(f"resume_from_checkpoint=True: {folder} holds no whole checkpoint")
            checkpoint = newest
        else:
            checkpoint = Path(str(asked))
            wrong = checkpoints.verify(checkpoint)
            if wrong:
                raise UsageError(f"checkpoint {checkpoint} is broken: {'; '.join(wrong)}; name another")
        facts = checkpoints.facts_of(checkpoint)
        if facts is not None:
            self._take_states_of(facts["run"].get("arguments", {}).get("optim", ""))
        if not forced:
            self._check_same_run(checkpoint)
        return checkpoint

    def _check_same_run(self, checkpoint: Path) -> None:
        instead = "go on with the same, or force it by train(..., force_resume=True)"
        expected, found = self._random_states(), sorted(path.name for path in checkpoint.glob("rng_state*.pth"))
        missing = [name for name in (*_TO_GO_ON, *expected) if not (checkpoint / name).is_file()]
        if found and found != sorted(expected):
            raise UsageError(f"checkpoint {checkpoint} is of {len(found)} processes, not {len(expected)}; {instead}")
        if missing:
            raise UsageError(f"checkpoint {checkpoint} has no {missing[0]}: it is weights alone; {instead}")
        facts = checkpoints.facts_of(checkpoint)
        difference = first_difference(facts["run"], self._run_identity()) if facts is not None else None
        if difference is not None:
            raise UsageError(f"checkpoint {checkpoint} is of another run: {difference}; {instead}")

    def _take_states_of(self, optimizer: str) -> None:
        """For a class that may train with more than one optimizer: that of a checkpoint, see `resume.states_of`."""

    def _run_identity(self) -> dict[str, dict[str, Any]]:
        if self._identity is None:
            self._identity = identity(self)
        return self._identity

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The stock epoch; none where a checkpoint of the last step is gone on from: it would take one step more."""
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    # Writing

    @property
    def _writes(self) -> bool:
        return self._ranks is None or self._ranks.first

    def _meet(self, at: str) -> None:
        if self._ranks is not None:
            self._ranks.agree(at)

    def _random_states(self) -> list[str]:
        """The names of the files with the random states that a checkpoint has."""
        return ["rng_state.pth"] if self._ranks is None else [f"rng_state_{i}.pth" for i in range(self._ranks.count)]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock save, again after an out-of-memory.

        What it raises on one of several ranks in a checkpoint waits until those have met, or they would wait.

        Raises:
            OutOfBudget: it does not fit.
        """
        stock = super().save_model  # type: ignore[misc]
        # Within a checkpoint of one process all of that is done again.
        times = 1 if self._ranks is None and self._staging is not None else TIMES
        if times == 1:
            stock(output_dir, _internal_call=_internal_call)
            return
        try:
            retried(self.recovery, "save", lambda: stock(output_dir, _internal_call=_internal_call), times)
        except Exception as error:
            if self._staging is None:
                raise
            self._unsaved = error

    def _get_output_dir(self, trial: Any) -> str:
        if self._staging is not None:
            return str(self._staging)
        output_dir: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return output_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
        else:
            self._to_push = True  # once it has its name

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint of the stock files, whole or not at all.

        Raises:
            AutofitError: the disk is full, or fails.
        """
        trainer: Any = self
        folder, step = Path(self._get_output_dir(trial)), trainer.state.global_step
        final = folder / f"checkpoint-{step}"
        needed = self._checkpoint_bytes()
        try:
            if self._writes:
                folder.mkdir(parents=True, exist_ok=True)
                checkpoints.clear(folder)
                checkpoints.require_space(folder, needed)
                checkpoints.stage(folder)
            self._meet("a checkpoint's begin")
            times = TIMES if self._ranks is None else 1  # the stock save gathers from all ranks
            retried(self.recovery, "save", lambda: self._stage_checkpoint(model, trial, final), times)
            self._meet("a checkpoint's files")
            if self._writes:
                self._publish(folder / checkpoints.STAGING / final.name, final)
            self._meet("a checkpoint's name")
        except Exception as error:
            if not _is_of_disk(error):
                raise
            shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)
            free = format_bytes(shutil.disk_usage(folder).free)
            raise AutofitError(
                f"{final} could not be written: {error}; it needs about {format_bytes(needed)}, {free} are free; "
                "earlier checkpoints are intact: free some and go on with resume_from_checkpoint=True"
            ) from error
        best = trainer.state.best_model_checkpoint
        if trainer.args.save_total_limit and self._writes:
            checkpoints.prune(folder, trainer.args.save_total_limit, [final, *([Path(best)] if best else [])])
        if self._to_push:
            self._to_push = False
            self._push_from_checkpoint(str(final))

    def _stage_checkpoint(self, model: nn.Module, trial: Any, final: Path) -> None:
        trainer: Any = self
        staging = final.parent / checkpoints.STAGING
        if self._ranks is None:
            checkpoints.stage(final.parent)
        self._staging, self._unsaved = staging, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._staging = None
        if self._unsaved is not None:
            raise self._unsaved
        if trainer.state.best_model_checkpoint == str(staging / final.name):
            trainer.state.best_model_checkpoint = str(final)
            if self._writes:
                trainer.state.save_to_json(str(staging / final.name / checkpoints.STATE))

    def _publish(self, staged: Path, final: Path) -> None:
        trainer: Any = self
        missing = [name for name in self._random_states() if not (staged / name).is_file()]
        if missing and not trainer.args.save_only_model:
            raise AutofitError(f"{final} has no {missing[0]}: all processes must share {final.parent}")
        checkpoints.publish(staged, final, self._checkpoint_facts())
        checkpoints.clear(final.parent)

    def _checkpoint_facts(self) -> dict[str, Any]:
        trainer: Any = self
        return {"step": trainer.state.global_step, "samples": samples_done(self), "run": self._run_identity()}

    def _checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: what is saved of the model, and the optimizer's state."""
        trainer: Any = self
        adapters = hasattr(trainer.model, "peft_config")
        weights = [p for p in trainer.model.parameters() if p.requires_grad or not adapters]
        states = [] if trainer.args.save_only_model else list(_tensors(trainer.optimizer.state_dict()["state"]))
        return sum(tensor.nbytes for tensor in (*weights, *states)) + _SMALL_FILES_BYTES

    def _warn_of_checkpoint(self, message: str) -> None:
        logger.warning(message)
        self.recovery.add("checkpoint", message=message)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def _is_of_disk(error: Exception) -> bool:
    """torch's writer, safetensors' and Python's each say it in their own way."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in ("PytorchStreamWriter", "file write failed", "unexpected pos"))
    return isinstance(error, (OSError, SafetensorError))
