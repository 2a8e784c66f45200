"""What a candidate will need, going by what was measured: weights, adapters, and tokens times activations.

    need = base(bits) + adapters(rank) + states(paged or not) + tokens × per-token bytes × kept share

The kept share is what of the activations stays on the device under checkpointing and offloading. Where it was
measured at one level only, priors stand in. Bits that were not measured are not predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

from autofit.search.facts import Facts, measured_need, needs_at_least
from autofit.search.outcome import Trial
from autofit.space.candidate import Candidate
from autofit.trial.result import TrialStatus

# What a checkpointed layer keeps of its activations: 3 to 8 % in the Llamas, more where recomputing one layer shows.
KEPT_PRIOR = 0.1
_KEPT_CHOICES = tuple(0.01 * 1.25**i for i in range(19))
# Shares of the usable bytes, at the wished rank: adapters with their gradients and states; the states alone.
_ADAPTERS_PRIOR = 0.03
_STATES_PRIOR = 0.02
# Trust in a point of the fit: measured, projected after an OOM, weights before the first step, a guess; and in
# what other bits showed, since activations hardly depend on the weights' type.
_MEASURED, _PROJECTED, _STATIC, _GUESS, _OTHER_BITS = 1.0, 0.5, 0.3, 0.01, 0.1
# How much of the way from the nearest measurement is added as caution, and of the usable bytes besides.
_CAUTION, _SLACK = 0.25, 0.02


@dataclass(frozen=True)
class _Fit:
    """`bases` by bits, `per_token` in bytes, `kept` the share that a checkpointed layer keeps."""

    bases: dict[int, float]
    per_token: float
    kept: float


@dataclass(frozen=True)
class _Point:
    candidate: Candidate | None  # None: the weights alone, at no tokens
    need: float
    weight: float


class Predictor:
    """Predictions from the trials in `facts`, refitted when there are more of them.

    Args:
        facts: the trials so far; read again at each call.
        wish: what the priors for rank are relative to.
        layers: checkpointable layers of the model.
    """

    def __init__(self, facts: Facts, wish: Candidate, layers: int) -> None:
        self._facts = facts
        self._wish = wish
        self._layers = max(layers, 1)
        self._fits: dict[int, _Fit | None] = {}
        self._seen = 0

    def need(self, candidate: Candidate) -> int | None:
        """Bytes on the device, within what the trials prove. None: nothing was measured at these bits."""
        modelled = self._modelled(candidate, self._nearest(candidate))
        return None if modelled is None else round(self._clipped(candidate, modelled))

    def cautious_need(self, candidate: Candidate) -> int | None:
        """As `need`, and more the further the candidate is from what was measured."""
        # A projection after an OOM may be too low; what fitted was measured.
        anchors = (self._nearest(candidate), self._nearest(candidate, _MEASURED))
        needs = [need for anchor in anchors if (need := self._cautious_from(candidate, anchor)) is not None]
        return round(self._clipped(candidate, max(needs))) if needs else None

    def _cautious_from(self, candidate: Candidate, anchor: _Point | None) -> float | None:
        modelled = self._modelled(candidate, anchor)
        if modelled is None:
            return None
        away = abs(modelled - anchor.need) if anchor is not None else 0.0
        return modelled + _CAUTION * away + _SLACK * self._facts.usable_bytes

    def activations(self, candidate: Candidate) -> float:
        """Tokens' worth of activations that stay on the device, by the priors alone."""
        return self._kept_tokens(candidate, KEPT_PRIOR)

    def _modelled(self, candidate: Candidate, anchor: _Point | None) -> float | None:
        """Bytes by the model, made to pass through a measurement where there is one."""
        fit = self._fit(candidate.quantization_bits)
        if fit is None:
            return None
        per_token, base = fit.per_token, fit.bases[candidate.quantization_bits]
        if anchor is not None and anchor.candidate is not None:
            above_base = anchor.need - base - self._fixed(anchor.candidate)
            per_token = max(above_base / self._kept_tokens(anchor.candidate, fit.kept), 0.0)
        return base + self._fixed(candidate) + per_token * self._kept_tokens(candidate, fit.kept)

    def _clipped(self, candidate: Candidate, need: float) -> float:
        for trial in self._facts.trials:
            measured = measured_need(trial.result)
            if trial.result.status is TrialStatus.OOM and needs_at_least(candidate, trial.candidate):
                need = max(need, self._facts.usable_bytes + 1)
            elif trial.result.status is TrialStatus.FIT and measured is not None:
                if needs_at_least(trial.candidate, candidate):
                    need = min(need, measured)
                if needs_at_least(candidate, trial.candidate):
                    need = max(need, measured)
        return need

    def _fixed(self, candidate: Candidate) -> float:
        """Adapters and their states: bytes that depend on neither tokens nor bits."""
        rank = candidate.lora_rank / self._wish.lora_rank
        states = 0.0 if candidate.optimizer.startswith("paged_") else _STATES_PRIOR
        return self._fixed_scale() * rank * (_ADAPTERS_PRIOR - _STATES_PRIOR + states)

    def _fixed_scale(self) -> float:
        """The priors are of the usable bytes, but never most of what a step was seen to add to the weights."""
        added = [
            need - trial.result.static_bytes
            for trial in self._facts.trials
            if trial.result.status is TrialStatus.FIT
            and trial.result.static_bytes
            and (need := measured_need(trial.result)) is not None
        ]
        return max(min([self._facts.usable_bytes, *(10 * a for a in added)]), 0)

    def _kept_tokens(self, candidate: Candidate, kept: float) -> float:
        share = candidate.checkpointed_layers / self._layers
        if candidate.offload_activations == "none":
            left = 1 - share * (1 - kept)
        elif candidate.offload_activations == "checkpoints":
            left = 1 - share * (1 - 0.6 * kept)
        else:
            left = 0.4 * (1 - share * (1 - 0.6 * kept))
        return candidate.token_budget * max(left, 1e-3)

    def _points(self, bits: int) -> list[_Point]:
        points = [p for t in self._facts.trials if t.candidate.quantization_bits == bits and (p := self._point(t))]
        if points:
            statics = [t.result.static_bytes for t in self._facts.trials if t.candidate.quantization_bits == bits]
            known = [s for s in statics if s]
            points += [_Point(None, max(known), _STATIC)] if known else []
            points += [_Point(None, min(p.need for p in points) / 2, _GUESS)] if not known else []
        return points

    def _point(self, trial: Trial) -> _Point | None:
        if trial.result.status is TrialStatus.FIT:
            measured = measured_need(trial.result)
            return None if measured is None else _Point(trial.candidate, measured, _MEASURED)
        if trial.result.status is TrialStatus.OOM and trial.result.projected_bytes is not None:
            need = max(trial.result.projected_bytes, self._facts.usable_bytes + 1)
            return _Point(trial.candidate, need, _PROJECTED)
        return None

    def _nearest(self, candidate: Candidate, trust: float = 0.0) -> _Point | None:
        """The point of the same bits, worth that much trust, whose kept tokens are most like the candidate's."""
        fit = self._fit(candidate.quantization_bits)
        kept = fit.kept if fit else KEPT_PRIOR
        here = self._kept_tokens(candidate, kept)

        def distance(point: _Point) -> tuple[float, float]:
            there = self._kept_tokens(point.candidate or candidate, kept)
            return max(here / there, there / here), -point.weight

        points = [p for p in self._points(candidate.quantization_bits) if p.candidate and p.weight >= trust]
        return min(points, key=distance, default=None)

    def _fit(self, bits: int) -> _Fit | None:
        if self._seen != len(self._facts.trials):
            self._fits.clear()
            self._seen = len(self._facts.trials)
        if bits not in self._fits:
            self._fits[bits] = self._refit(bits)
        return self._fits[bits]

    def _refit(self, bits: int) -> _Fit | None:
        own = self._points(bits)
        if not own:
            return None
        others = {t.candidate.quantization_bits for t in self._facts.trials} - {bits}
        groups = {b: (self._points(b), _OTHER_BITS) for b in others} | {bits: (own, 1.0)}
        fits = (self._fit_for(kept, groups) for kept in _KEPT_CHOICES)
        return min(fits, key=lambda scored: scored[0])[1]

    def _fit_for(self, kept: float, groups: dict[int, tuple[list[_Point], float]]) -> tuple[float, _Fit]:
        """Weighted least squares for one kept share: a common slope, one base for each of the bits."""
        scale = float(self._facts.usable_bytes)
        rows: dict[int, list[tuple[float, float, float]]] = {}
        for bits, (points, trust) in groups.items():
            rows[bits] = [self._row(p, kept, scale, trust) for p in points]
        means = {b: _means(r) for b, r in rows.items() if r}
        covariance = sum(w * (x - means[b][0]) * (y - means[b][1]) for b, r in rows.items() for x, y, w in r)
        variance = sum(w * (x - means[b][0]) ** 2 for b, r in rows.items() for x, y, w in r)
        slope = max(covariance / variance, 0.0) if variance > 0 else 0.0
        bases = {b: y - slope * x for b, (x, y) in means.items()}
        error = sum(w * (y - bases[b] - slope * x) ** 2 for b, r in rows.items() for x, y, w in r)
        error += 1e-4 * (_KEPT_CHOICES.index(kept) - 10) ** 2  # choice 10 is the prior
        return error, _Fit({b: base * scale for b, base in bases.items()}, slope * scale, kept)

    def _row(self, point: _Point, kept: float, scale: float, trust: float) -> tuple[float, float, float]:
        """Kept tokens, need in units of `scale` less what is the same for all, weight."""
        if point.candidate is None:
            return 0.0, point.need / scale, point.weight * trust
        y = (point.need - self._fixed(point.candidate)) / scale
        return self._kept_tokens(point.candidate, kept), y, point.weight * trust


def _means(rows: list[tuple[float, float, float]]) -> tuple[float, float]:
    total = sum(w for _, _, w in rows)
    return sum(x * w for x, _, w in rows) / total, sum(y * w for _, y, w in rows) / total
