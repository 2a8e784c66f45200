"""What trials say of the estimates: a constant in bytes and a ratio in speed, for all candidates alike."""

from __future__ import annotations

from statistics import median

from autofit.search.facts import measured_need
from autofit.search.forecast import Prediction
from autofit.search.outcome import Trial
from autofit.trial.result import TrialStatus

# How far beyond the least possible an estimate is thought to have missed after an OOM, as a share of the usable bytes;
# less where the trial projected less. Twice that after each further OOM.
_MISS = 0.05


class Correction:
    """Learns from each trial that had a prediction.

    Args:
        usable_bytes: what an OOM is known to exceed.
    """

    def __init__(self, usable_bytes: int) -> None:
        self._usable_bytes = usable_bytes
        self._measured: list[int] = []  # measured less estimated, of what fitted
        self._least: list[int] = []  # of an OOM, what the estimate missed at least
        self._missed: list[int] = []  # and what it is thought to have missed
        self._ratios: list[float] = []

    def add(self, trial: Trial, prediction: Prediction | None) -> None:
        """Takes a trial in; without a prediction it says nothing here."""
        if prediction is None:
            return
        if trial.result.status is TrialStatus.FIT:
            measured = measured_need(trial.result)
            if measured is not None:
                self._measured.append(measured - prediction.device_bytes)
            if trial.result.tokens_per_second and prediction.tokens_per_second:
                self._ratios.append(trial.result.tokens_per_second / prediction.tokens_per_second)
        elif trial.result.status is TrialStatus.OOM:
            self._add_miss(self._usable_bytes + 1 - prediction.device_bytes, trial.result.projected_bytes, prediction)

    def _add_miss(self, least: int, projected_bytes: int | None, prediction: Prediction) -> None:
        if least <= 0:
            return  # as predicted
        missed = least + int(_MISS * 2 ** len(self._missed) * self._usable_bytes)
        if projected_bytes is not None and projected_bytes > self._usable_bytes:
            # It goes by part of a forward pass, so it is believed only so far.
            missed = min(missed, projected_bytes - prediction.device_bytes)
        self._least.append(least)
        self._missed.append(missed)

    def need(self, prediction: Prediction) -> int:
        """Corrected bytes on the device. What was measured outweighs what an OOM lets guess."""
        if self._measured:
            return prediction.device_bytes + max([self._measured[-1], *self._least])
        return prediction.device_bytes + max(self._missed, default=0)

    def speed(self, prediction: Prediction) -> float:
        """Corrected tokens a second; 0 where there is no estimate."""
        return (prediction.tokens_per_second or 0.0) * (median(self._ratios) if self._ratios else 1.0)
