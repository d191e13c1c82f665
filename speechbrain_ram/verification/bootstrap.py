"""How sure is a number? Confidence intervals by resampling speakers.

Trials that share a speaker are not independent: one unusual voice moves
thousands of them. Resampling trials therefore gives intervals that are far
too narrow. Here **speakers** are drawn with replacement (the vertex bootstrap
of Snijders & Borgatti, 1999; for verification see Bolle et al., 2004). If
speaker i was drawn w_i times, a target trial of i counts w_i times and a
non-target trial of i and j counts w_i w_j times: what the list would hold if
these had been its speakers.

Intervals are basic bootstrap intervals (Davison & Hinkley, 1997, eq. 5.6),
``2 value - percentiles``: a replicate repeats speakers, which makes minima
such as minDCF look better than they are, and plain percentiles of minDCF miss
the truth far too often (see the coverage test). They are widened, if need be,
to hold the value, and cut off where the metric ends. They say how the number
would vary over other speakers of this population, not over other trainings.
Few speakers do not show their population: below `LEAST_SPEAKERS` there are no
intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from speechbrain_ram.verification.metrics import (
    P_TARGETS,
    ErrorCurve,
    error_curve,
    far_name,
)

#: Speakers that must have trials of either kind, else there are no intervals.
#: Of simulated lists an interval of 95 % held the true EER in 87 % at ten
#: speakers, 76 % at five and 50 % at three (300 lists of 1,500 trials each, as
#: the slow test draws them). Two speakers have one draw only, the list itself.
LEAST_SPEAKERS = 10


@dataclass(frozen=True)
class Interval:
    """A value on the list as it is, and the ends of the interval around it."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        low, high = format(self.low, spec), format(self.high, spec)
        return f"{format(self.value, spec)} [{low}, {high}]"


@dataclass(frozen=True)
class Difference(Interval):
    """First system minus second: negative where the first is better.

    The two-sided p value is 1 - the level at which the interval would touch
    zero.
    """

    p_value: float


def bootstrap(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speakers: ArrayLike,
    test_speakers: ArrayLike,
    p_targets: Sequence[float] = P_TARGETS,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Interval]:
    """Confidence intervals by metric of EER (in percent) and minDCF over
    speakers.

    Each trial has a speaker (a name or number) on each side; a target trial of
    two speakers, or a non-target trial of one, is a ValueError. `level` is the
    share of the replicates inside the interval. There are none where
    :func:`too_few_speakers` says so.
    """
    system = _Resampled(scores, labels, enrol_speakers, test_speakers)
    if system.few:
        return {}
    names, value, draws = _replicate(
        [system], _error_rates(p_targets), replicates, seed, progress
    )
    low, high = _ends(value[0], draws[:, 0], level)
    worst = np.where(np.array(names) == "EER", 100, 1)
    low, high = np.clip(low, 0, worst), np.clip(high, 0, worst)
    return {
        name: Interval(float(value[0, i]), float(low[i]), float(high[i]))
        for i, name in enumerate(names)
    }


def paired_bootstrap(
    scores: ArrayLike,
    other_scores: ArrayLike,
    labels: ArrayLike,
    enrol_speakers: ArrayLike,
    test_speakers: ArrayLike,
    p_targets: Sequence[float] = P_TARGETS,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Difference]:
    """Is one system better than another on the same trials?

    Both systems see the same draws of speakers, so that what makes a speaker
    hard for both cancels. Differences are `scores` minus `other_scores`; there
    are none where there are no intervals.
    """
    systems = [
        _Resampled(each, labels, enrol_speakers, test_speakers)
        for each in (scores, other_scores)
    ]
    if systems[0].few:
        return {}
    names, value, draws = _replicate(
        systems, _error_rates(p_targets), replicates, seed, progress
    )
    value, draws = value[0] - value[1], draws[:, 0] - draws[:, 1]
    low, high = _ends(value, draws, level)
    # A level at which the interval would end at 0. + 1: the list as it is
    # counts as one replicate, so that p is never 0.
    below = ((draws <= 2 * value).sum(axis=0) + 1) / (replicates + 1)
    above = ((draws >= 2 * value).sum(axis=0) + 1) / (replicates + 1)
    p_values = np.minimum(1, 2 * np.minimum(below, above))
    return {
        name: Difference(
            float(value[i]), float(low[i]), float(high[i]), float(p_values[i])
        )
        for i, name in enumerate(names)
    }


def bootstrap_draws(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speakers: ArrayLike,
    test_speakers: ArrayLike,
    p_targets: Sequence[float] = P_TARGETS,
    replicates: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """EER (in percent) and minDCF of each replicate, shape [replicates] each.

    Calls with one seed, on trials of the same speakers, see the same draws of
    speakers: replicate k of one belongs to replicate k of the other.
    """
    system = _Resampled(scores, labels, enrol_speakers, test_speakers)
    names, _, draws = _replicate(
        [system], _error_rates(p_targets), replicates, seed, progress
    )
    return {name: draws[:, 0, i] for i, name in enumerate(names)}


def bootstrap_thresholds(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speakers: ArrayLike,
    test_speakers: ArrayLike,
    fars: Sequence[float] = (),
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Interval]:
    """As :func:`bootstrap`, for the thresholds of cosines at the EER and at
    false-alarm rates; an infinite one counts as 1. Their names are "EER" and
    those of :func:`far_name`.
    """
    measures: _Measures = {"EER": lambda curve: curve.eer()[1]}
    for far in fars:
        measures[far_name(far)] = lambda curve, far=far: min(
            curve.at_far(far)[0], 1.0
        )
    system = _Resampled(
        scores, labels, enrol_speakers, test_speakers, whole=True
    )
    if system.few:
        return {}
    names, value, draws = _replicate(
        [system], measures, replicates, seed, progress
    )
    low, high = np.clip(_ends(value[0], draws[:, 0], level), -1, 1)
    return {
        name: Interval(float(value[0, i]), float(low[i]), float(high[i]))
        for i, name in enumerate(names)
    }


def too_few_speakers(
    labels: ArrayLike, enrol_speakers: ArrayLike, test_speakers: ArrayLike
) -> str:
    """Why a list of these speakers has no intervals, "" where it has some."""
    labels = np.asarray(labels)
    enrol, test = np.asarray(enrol_speakers), np.asarray(test_speakers)
    apart = labels == 0
    counts = {
        "same-speaker": np.unique(enrol[labels == 1]).size,
        "different-speaker": np.unique([enrol[apart], test[apart]]).size,
    }
    kind = min(counts, key=counts.__getitem__)
    if counts[kind] >= LEAST_SPEAKERS:
        return ""
    return (
        f"No intervals over speakers: {counts[kind]} speakers have {kind} "
        f"trials, {LEAST_SPEAKERS} are needed."
    )


class _Resampled:
    """One system's sorted trials; weights of speakers in, a curve out.

    EER and minDCF of every replicate are reached at the curve's corners too;
    thresholds are between them, at the points of the `whole` curve.
    """

    def __init__(
        self,
        scores: ArrayLike,
        labels: ArrayLike,
        enrol_speakers: ArrayLike,
        test_speakers: ArrayLike,
        whole: bool = False,
    ):
        self.curve = error_curve(scores, labels)
        self.points = self.curve if whole else self.curve.corners()
        scores, labels = np.asarray(scores), np.asarray(labels)
        enrol, test = np.asarray(enrol_speakers), np.asarray(test_speakers)
        if not enrol.shape == test.shape == scores.shape:
            raise ValueError(
                "one speaker a side of each trial is needed, got "
                f"{enrol.shape} and {test.shape} for {scores.shape} scores."
            )
        names, codes = np.unique([enrol, test], return_inverse=True)
        enrol, test = codes.reshape(2, -1)
        self.speakers = len(names)
        if self.speakers < 2:
            raise ValueError("at least two speakers are needed.")
        wrong = np.flatnonzero((enrol == test) != (labels == 1))
        if wrong.size:
            first = wrong[0]
            raise ValueError(
                f"{wrong.size} trials contradict their speakers, the first "
                f"at index {first}: label {labels[first]}, speakers "
                f"'{names[enrol[first]]}' and '{names[test[first]]}'. Is the "
                "speaker another part of the utterance's name?"
            )
        self.few = too_few_speakers(labels, enrol, test)
        target = np.flatnonzero(labels == 1)
        nontarget = np.flatnonzero(labels == 0)
        target = target[np.argsort(scores[target])]
        nontarget = nontarget[np.argsort(scores[nontarget])]
        self.target = enrol[target]
        self.nontarget = enrol[nontarget], test[nontarget]

    def replicate(self, weights: np.ndarray) -> ErrorCurve | None:
        """The curve under these weights, None if a class is left empty."""
        left, right = self.nontarget
        target = np.cumsum(weights[self.target])
        nontarget = np.cumsum(weights[left] * weights[right])
        n_target, n_nontarget = int(target[-1]), int(nontarget[-1])
        if not (n_target and n_nontarget):
            return None
        points = self.points
        below = points.n_nontarget - points.false_alarms
        return replace(
            points,
            misses=np.append(0, target)[points.misses],
            false_alarms=n_nontarget - np.append(0, nontarget)[below],
            n_target=n_target,
            n_nontarget=n_nontarget,
        )


_Measures = dict[str, Callable[[ErrorCurve], float]]


def _error_rates(p_targets: Sequence[float]) -> _Measures:
    """EER in percent, and minDCF at these priors."""
    measures: _Measures = {"EER": lambda curve: curve.eer()[0]}
    for p in p_targets:
        measures[f"minDCF({p:g})"] = lambda curve, p=p: curve.min_dcf(p)[0]
    return measures


def _replicate(
    systems: Sequence[_Resampled],
    measures: _Measures,
    replicates: int,
    seed: int,
    progress: bool,
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names [M], values [systems, M] and draws [replicates, systems, M]."""

    def measure(curves: Sequence[ErrorCurve]) -> list[list[float]]:
        return [[m(curve) for m in measures.values()] for curve in curves]

    rng = np.random.default_rng(seed)
    n = systems[0].speakers
    draws = np.empty((replicates, len(systems), len(measures)))
    for row in tqdm(draws, desc="bootstrap", disable=not progress):
        curves: list[ErrorCurve | None] = [None]
        while None in curves:  # only lists of very few speakers draw again
            weights = rng.multinomial(n, np.full(n, 1 / n))
            curves = [system.replicate(weights) for system in systems]
        row[:] = measure(curves)
    value = np.array(measure([system.curve for system in systems]))
    return list(measures), value, draws


def _ends(
    value: np.ndarray, draws: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the basic interval, widened to hold the value."""
    if not 0 < level < 1:
        raise ValueError(
            f"level must lie strictly between 0 and 1, got {level}. Was it "
            "given in percent?"
        )
    tail = 50 * (1 - level)
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    return (
        np.minimum(2 * value - high, value),
        np.maximum(2 * value - low, value),
    )
