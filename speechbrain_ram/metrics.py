"""Error rates and costs of a detector: scores in, numbers out.

Conventions, the same in every function:

- A *score* is higher for "same speaker". A *label* is 1 for a target trial
  (same speaker) and 0 for a non-target trial.
- A trial is accepted when its score is **at least** the threshold. The only
  thresholds are the distinct scores and +inf (accept nothing), because trials
  of equal score cannot be told apart by any threshold. Methods that step
  through tied scores one by one report costs that nobody can reach.
- FNR (miss rate) and FPR (false-alarm rate) are shares in [0, 1]; the EER
  alone is in **percent**, as the field prints it.
- The EER is the linear interpolation at FNR = FPR on the ROC over distinct
  scores (not the crossing of its convex hull, which is never larger).
- The detection cost is normalised, as in NIST SRE 2016, eq. 2-4:
  ``(c_miss p FNR + c_fa (1-p) FPR) / min(c_miss p, c_fa (1-p))``, so that 1
  is the cost of always giving the cheaper answer.

Everything reads one :class:`ErrorCurve`, which one sort builds. Functions
accept arrays or CPU tensors, keep float32 and float64 scores as they are and
refuse NaN, infinite scores and lists that lack one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

#: Prior probabilities of a target that results are reported at.
P_TARGETS = (0.01, 0.001, 0.05)

_CHUNK = 1 << 20  # curve points per step of a scan: temporaries stay small


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """Counts of errors at every threshold that can make a difference.

    Arguments
    ---------
    thresholds : np.ndarray
        Shape [K + 1], ascending: the K distinct scores, then +inf.
    misses : np.ndarray
        Shape [K + 1], targets below each threshold, from 0 to `n_target`.
    false_alarms : np.ndarray
        Shape [K + 1], non-targets at or above each threshold, from
        `n_nontarget` to 0.
    n_target, n_nontarget : number
        How many trials of each class (or their total weight).

    Example
    -------
    >>> curve = error_curve([0.9, 0.4, 0.4, 0.1], [1, 1, 0, 0])
    >>> curve.thresholds
    array([0.1, 0.4, 0.9, inf])
    >>> curve.misses.tolist(), curve.false_alarms.tolist()
    ([0, 0, 1, 2], [2, 1, 0, 0])
    """

    thresholds: np.ndarray
    misses: np.ndarray
    false_alarms: np.ndarray
    n_target: int
    n_nontarget: int

    @property
    def fnr(self) -> np.ndarray:
        """Miss rate at each threshold, shape [K + 1]."""
        return self.misses / self.n_target

    @property
    def fpr(self) -> np.ndarray:
        """False-alarm rate at each threshold, shape [K + 1]."""
        return self.false_alarms / self.n_nontarget


def error_curve(scores: ArrayLike, labels: ArrayLike) -> ErrorCurve:
    """Count the errors at every distinct score, in O(N log N).

    Arguments
    ---------
    scores : array
        Shape [N], higher means "same speaker".
    labels : array
        Shape [N], 1 for a target trial, 0 for a non-target trial.

    Returns
    -------
    ErrorCurve

    Raises
    ------
    ValueError
        Shapes that differ, NaN or infinite scores, labels other than 0 and
        1, or a list without a target or without a non-target.
    """
    targets, nontargets = _split(scores, labels)
    return _curve_of_sorted(np.sort(targets), np.sort(nontargets))


def eer(scores: ArrayLike, labels: ArrayLike) -> float:
    """Equal error rate in percent: where FNR and FPR are the same.

    Linear interpolation on the ROC over distinct scores, see the module.

    Arguments
    ---------
    scores, labels : array
        As for :func:`error_curve`.

    Returns
    -------
    float
        In percent, 0 for perfect and 100 for inverted separation.

    Raises
    ------
    ValueError
        As for :func:`error_curve`.

    Example
    -------
    >>> eer([0.9, 0.8, 0.4, 0.6, 0.2, 0.1], [1, 1, 1, 0, 0, 0])
    33.33333333333333
    """
    return curve_eer(error_curve(scores, labels))[0]


def curve_eer(curve: ErrorCurve) -> tuple[float, float]:
    """The EER in percent and the threshold nearest to it.

    Arguments
    ---------
    curve : ErrorCurve
        From :func:`error_curve`.

    Returns
    -------
    tuple
        EER in percent; the distinct score at which FNR and FPR are closest.
    """
    n_target, n_nontarget = curve.n_target, curve.n_nontarget

    def gap(k: int) -> float:
        # FNR - FPR, never decreasing in k, from -1 to 1
        miss = float(curve.misses[k]) / float(n_target)
        return miss - float(curve.false_alarms[k]) / float(n_nontarget)

    low, high = 0, len(curve.thresholds) - 1  # gap(low) < 0 <= gap(high)
    while high - low > 1:
        middle = (low + high) // 2
        if gap(middle) < 0:
            low = middle
        else:
            high = middle
    before, after = gap(low), gap(high)
    share = -before / (after - before)
    fnr_low = float(curve.misses[low]) / float(n_target)
    fnr_high = float(curve.misses[high]) / float(n_target)
    rate = fnr_low + share * (fnr_high - fnr_low)
    nearest = low if -before < after else high
    if np.isinf(curve.thresholds[nearest]):
        nearest = low
    return 100 * rate, float(curve.thresholds[nearest])


def min_dcf(
    scores: ArrayLike,
    labels: ArrayLike,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> float:
    """Smallest normalised detection cost that any threshold reaches.

    Arguments
    ---------
    scores, labels : array
        As for :func:`error_curve`.
    p_target : float
        Prior probability of a target trial, in (0, 1).
    c_miss, c_fa : float
        Costs of a miss and of a false alarm, positive.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        As for :func:`error_curve`, or a prior or cost out of range.

    Example
    -------
    >>> scores, labels = [0.9, 0.8, 0.4, 0.6, 0.2, 0.1], [1, 1, 1, 0, 0, 0]
    >>> round(min_dcf(scores, labels, p_target=0.5), 4)
    0.3333
    """
    curve = error_curve(scores, labels)
    return curve_min_dcf(curve, p_target, c_miss, c_fa)[0]


def curve_min_dcf(
    curve: ErrorCurve,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> tuple[float, float]:
    """minDCF and the lowest threshold that reaches it; see :func:`min_dcf`.

    Arguments
    ---------
    curve : ErrorCurve
        From :func:`error_curve`.
    p_target, c_miss, c_fa : float
        As for :func:`min_dcf`.

    Returns
    -------
    tuple
        The cost in [0, 1] and its threshold, +inf where rejecting every
        trial is cheapest.
    """
    miss_weight, fa_weight = _cost_weights(p_target, c_miss, c_fa)
    miss_weight /= float(curve.n_target)
    fa_weight /= float(curve.n_nontarget)
    best, best_k = np.inf, 0
    for start in range(0, len(curve.thresholds), _CHUNK):
        part = slice(start, start + _CHUNK)
        cost = miss_weight * curve.misses[part]
        cost += fa_weight * curve.false_alarms[part]
        k = int(cost.argmin())
        if cost[k] < best:
            best, best_k = float(cost[k]), start + k
    return best, float(curve.thresholds[best_k])


@dataclass(frozen=True)
class Metrics:
    """What one list of scored trials says about a system.

    Arguments
    ---------
    n_target, n_nontarget : int
        Trials of each class.
    eer : float
        In percent.
    eer_threshold : float
        The distinct score where FNR and FPR are closest.
    min_dcf : dict
        Normalised minimum cost by prior, `{0.01: 0.123, ...}`.
    min_dcf_threshold : dict
        The threshold of each of these.
    """

    n_target: int
    n_nontarget: int
    eer: float
    eer_threshold: float
    min_dcf: dict[float, float]
    min_dcf_threshold: dict[float, float]


def evaluate(
    scores: ArrayLike,
    labels: ArrayLike,
    p_targets: Sequence[float] = P_TARGETS,
) -> Metrics:
    """All metrics of one list of trials, from one sort.

    Arguments
    ---------
    scores, labels : array
        As for :func:`error_curve`.
    p_targets : sequence of float
        Priors for minDCF.

    Returns
    -------
    Metrics

    Raises
    ------
    ValueError
        As for :func:`min_dcf`.

    Example
    -------
    >>> result = evaluate([0.9, 0.8, 0.3, 0.1], [1, 1, 0, 0])
    >>> result.eer, result.min_dcf[0.01]
    (0.0, 0.0)
    """
    curve = error_curve(scores, labels)
    rate, threshold = curve_eer(curve)
    costs = {p: curve_min_dcf(curve, p) for p in p_targets}
    return Metrics(
        n_target=curve.n_target,
        n_nontarget=curve.n_nontarget,
        eer=rate,
        eer_threshold=threshold,
        min_dcf={p: cost for p, (cost, _) in costs.items()},
        min_dcf_threshold={p: t for p, (_, t) in costs.items()},
    )


def _split(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Check the input and return target scores, non-target scores."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            "scores and labels must be one-dimensional and of one length, "
            f"got shapes {scores.shape} and {labels.shape}. Were they read "
            "from two different lists?"
        )
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    bad = len(scores) - int(np.isfinite(scores).sum())
    if bad:
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(
            f"{bad} of {len(scores)} scores are NaN or infinite, the first "
            f"at index {first} ({scores[first]}). Did the encoder see a "
            "silent or broken file?"
        )
    is_target, is_nontarget = labels == 1, labels == 0
    if not (is_target | is_nontarget).all():
        other = labels[~(is_target | is_nontarget)][0]
        raise ValueError(
            f"labels must be 1 (target) or 0 (non-target), got {other!r}. "
            "Were scores and labels swapped?"
        )
    n_target = int(is_target.sum())
    if n_target in (0, len(labels)):
        raise ValueError(
            f"both target and non-target trials are needed, got {n_target} "
            f"targets and {len(labels) - n_target} non-targets."
        )
    return scores[is_target], scores[is_nontarget]


def _curve_of_sorted(targets: np.ndarray, nontargets: np.ndarray) -> ErrorCurve:
    """The curve of two ascending arrays."""
    distinct = np.concatenate([targets, nontargets])
    distinct.sort()
    keep = np.empty(len(distinct), dtype=bool)
    keep[0] = True
    np.not_equal(distinct[1:], distinct[:-1], out=keep[1:])
    distinct = distinct[keep]
    n_target, n_nontarget = len(targets), len(nontargets)
    dtype = np.int32 if n_target + n_nontarget < 2**31 else np.int64
    misses = np.empty(len(distinct) + 1, dtype=dtype)
    false_alarms = np.empty(len(distinct) + 1, dtype=dtype)
    # in steps, since searchsorted itself answers in int64
    for start in range(0, len(distinct), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(distinct)))
        misses[part] = np.searchsorted(targets, distinct[part])
        false_alarms[part] = n_nontarget - np.searchsorted(
            nontargets, distinct[part]
        )
    misses[-1], false_alarms[-1] = n_target, 0
    thresholds = np.append(distinct, distinct.dtype.type(np.inf))
    return ErrorCurve(thresholds, misses, false_alarms, n_target, n_nontarget)


def _cost_weights(
    p_target: float, c_miss: float, c_fa: float
) -> tuple[float, float]:
    """Normalised weights of FNR and FPR; one of the two is 1."""
    if not 0 < p_target < 1:
        raise ValueError(
            f"p_target must lie strictly between 0 and 1, got {p_target}. "
            "Was it given in percent?"
        )
    if c_miss <= 0 or c_fa <= 0:
        raise ValueError(
            f"costs must be positive, got c_miss={c_miss}, c_fa={c_fa}."
        )
    miss, false_alarm = c_miss * p_target, c_fa * (1 - p_target)
    default = min(miss, false_alarm)
    return miss / default, false_alarm / default
