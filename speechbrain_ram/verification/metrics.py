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

Everything reads one :class:`ErrorCurve`, which one sort builds; the functions
of the same names are its methods in one call. They accept arrays and CPU
tensors, compute in the float type of the scores, and refuse NaN, infinite
scores and lists that lack one class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

#: Prior probabilities of a target that results are reported at.
P_TARGETS = (0.01, 0.001, 0.05)

_CHUNK = 1 << 20  # values per step of a scan: temporaries stay small


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """Counts of errors at every threshold that can make a difference.

    A bootstrap replicate has total weights in place of counts.
    """

    thresholds: np.ndarray  # [K + 1], the K distinct scores, then +inf
    misses: np.ndarray  # [K + 1], targets below: 0 to `n_target`
    false_alarms: np.ndarray  # [K + 1], not below: `n_nontarget` to 0
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

    def eer(self) -> tuple[float, float]:
        """EER in percent, and the finite threshold nearest to it."""

        def rates(k: int) -> tuple[float, float]:
            fnr = float(self.misses[k]) / float(self.n_target)
            return fnr, float(self.false_alarms[k]) / float(self.n_nontarget)

        # FNR - FPR never decreases: it is < 0 at `low` and >= 0 at `high`
        low, high = 0, len(self.thresholds) - 1
        while high - low > 1:
            middle = (low + high) // 2
            fnr, fpr = rates(middle)
            low, high = (middle, high) if fnr < fpr else (low, middle)
        fnr_low, fpr_low = rates(low)
        fnr_high, fpr_high = rates(high)
        before, after = fpr_low - fnr_low, fnr_high - fpr_high
        rate = fnr_low + before / (before + after) * (fnr_high - fnr_low)
        nearest = high if after <= before else low
        if np.isinf(self.thresholds[nearest]):
            nearest = low
        return 100 * rate, float(self.thresholds[nearest])

    def at_far(self, far: float) -> tuple[float, float]:
        """The lowest threshold with at most this false-alarm rate, maybe
        +inf, and the miss rate there.
        """
        # 1e-9: 0.29 of 100 trials is 28.999999999999996 of them
        allowed = int(far * self.n_nontarget + 1e-9)
        k = int(np.searchsorted(-self.false_alarms, -allowed))
        return float(self.thresholds[k]), float(self.misses[k] / self.n_target)

    def min_dcf(
        self, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
    ) -> tuple[float, float]:
        """minDCF, and the lowest threshold that reaches it (maybe +inf)."""
        miss_weight, fa_weight = _cost_weights(p_target, c_miss, c_fa)
        miss_weight /= float(self.n_target)
        fa_weight /= float(self.n_nontarget)
        best, best_k = np.inf, 0
        for start in range(0, len(self.thresholds), _CHUNK):
            part = slice(start, start + _CHUNK)
            cost = miss_weight * self.misses[part]
            cost += fa_weight * self.false_alarms[part]
            k = int(cost.argmin())
            if cost[k] < best:
                best, best_k = float(cost[k]), start + k
        return best, float(self.thresholds[best_k])

    def min_cllr(self) -> float:
        """Minimum Cllr in bits."""
        # SciPy takes half a second to import, and only this number needs it.
        from scipy.optimize import isotonic_regression

        # PAV on the corners alone is exact: the points left out lie on
        # straight pieces of the ROC, where its convex hull cannot bend.
        curve = self.corners()
        targets = np.diff(curve.misses) / curve.n_target
        nontargets = -np.diff(curve.false_alarms) / curve.n_nontarget
        weights = targets + nontargets
        share = isotonic_regression(targets / weights, weights=weights).x
        # share / (1 - share) is the likelihood ratio of a score
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = -targets * np.log2(share)
            bits_nontarget = -nontargets * np.log2(1 - share)
        bits[targets == 0] = 0  # 0 log 0
        bits_nontarget[nontargets == 0] = 0
        return float(bits.sum() + bits_nontarget.sum()) / 2

    def corners(self) -> ErrorCurve:
        """The same ROC without the points inside its straight runs.

        Along a run of scores of one class only one of the two counts moves, so
        its inner points lie on a horizontal or vertical line. EER, minDCF, PAV
        and plots are the same without them, at a fraction of the size.
        """
        miss_moves = np.diff(self.misses) != 0
        fa_moves = np.diff(self.false_alarms) != 0
        keep = np.ones(len(self.thresholds), dtype=bool)
        # inner point k lies between steps k - 1 and k
        keep[1:-1] = miss_moves[:-1] != miss_moves[1:]
        keep[1:-1] |= fa_moves[:-1] != fa_moves[1:]
        keep[1:-1] |= miss_moves[1:] & fa_moves[1:]
        return replace(
            self,
            thresholds=self.thresholds[keep],
            misses=self.misses[keep],
            false_alarms=self.false_alarms[keep],
        )


def error_curve(scores: ArrayLike, labels: ArrayLike) -> ErrorCurve:
    """Count the errors at every distinct score, in O(N log N).

    Scores that are NaN or infinite, labels other than 0 and 1, and lists that
    lack one class are a ValueError.
    """
    targets, nontargets = _split(scores, labels)
    targets.sort()
    nontargets.sort()
    n_target, n_nontarget = len(targets), len(nontargets)
    distinct = np.concatenate([targets, nontargets])
    distinct.sort()
    keep = np.empty(len(distinct), dtype=bool)
    keep[0] = True
    np.not_equal(distinct[1:], distinct[:-1], out=keep[1:])
    distinct = distinct[keep]
    dtype = np.int32 if n_target + n_nontarget < 2**31 else np.int64
    misses = np.full(len(distinct) + 1, n_target, dtype=dtype)
    false_alarms = np.zeros(len(distinct) + 1, dtype=dtype)
    # in steps, since searchsorted answers in int64
    for start in range(0, len(distinct), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(distinct)))
        misses[part] = np.searchsorted(targets, distinct[part])
        below = np.searchsorted(nontargets, distinct[part])
        false_alarms[part] = n_nontarget - below
    thresholds = np.append(distinct, distinct.dtype.type(np.inf))
    return ErrorCurve(thresholds, misses, false_alarms, n_target, n_nontarget)


def eer(scores: ArrayLike, labels: ArrayLike) -> float:
    """Equal error rate in percent: where FNR and FPR are the same."""
    return error_curve(scores, labels).eer()[0]


def min_dcf(
    scores: ArrayLike,
    labels: ArrayLike,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> float:
    """Smallest normalised detection cost of any threshold, in [0, 1]."""
    return error_curve(scores, labels).min_dcf(p_target, c_miss, c_fa)[0]


def act_dcf(
    llrs: ArrayLike,
    labels: ArrayLike,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> float:
    """Normalised cost at the threshold that Bayes' rule asks for.

    The threshold is ``ln(c_fa (1 - p_target) / (c_miss p_target))``, for
    natural log-likelihood ratios. What it loses against :func:`min_dcf` is
    calibration.
    """
    targets, nontargets = _split(llrs, labels)
    miss_weight, fa_weight = _cost_weights(p_target, c_miss, c_fa)
    threshold = np.log(c_fa * (1 - p_target) / (c_miss * p_target))
    fnr, fpr = (targets < threshold).mean(), (nontargets >= threshold).mean()
    return float(miss_weight * fnr + fa_weight * fpr)


def cllr(llrs: ArrayLike, labels: ArrayLike) -> float:
    """Cost of natural log-likelihood ratios, in bits (Brummer & du Preez,
    2006).

    ``Cllr = (mean_target log2(1 + e^-l) + mean_nontarget log2(1 + e^l)) / 2``.
    0 is perfect, 1 is what ratios of 1 cost, which say nothing; miscalibrated
    scores can cost any amount.
    """
    targets, nontargets = _split(llrs, labels)
    nats = _mean_softplus(-targets) + _mean_softplus(nontargets)
    return float(nats / (2 * np.log(2)))


def min_cllr(scores: ArrayLike, labels: ArrayLike) -> float:
    """Cllr in bits after the best non-decreasing calibration, in [0, 1].

    That calibration is isotonic regression of the labels (PAV, pool adjacent
    violators), so this measures discrimination alone. Tied scores get one
    ratio.
    """
    return error_curve(scores, labels).min_cllr()


def threshold_at_far(
    scores: ArrayLike, labels: ArrayLike, far: float
) -> tuple[float, float]:
    """The lowest threshold that keeps false alarms at or below a rate.

    Arguments
    ---------
    scores, labels : array
        Shape [N] each: higher means "same speaker"; 1 for a target trial, 0 for
        a non-target trial.
    far : float
        Highest accepted false-alarm rate, in [0, 1].

    Returns
    -------
    tuple of float
        The threshold, a distinct score or +inf, and the miss rate there.

    Raises
    ------
    ValueError
        As for :func:`evaluate`, or `far` out of range.

    Example
    -------
    >>> threshold_at_far([0.9, 0.7, 0.8, 0.2], [1, 1, 0, 0], far=0.0)
    (0.9, 0.5)
    """
    if not 0 <= far <= 1:
        raise ValueError(
            f"far must lie in [0, 1], got {far}. Was it given in percent?"
        )
    return error_curve(scores, labels).at_far(far)


def far_name(far: float) -> str:
    """What the threshold at a false-alarm rate is called: "FAR=1%"."""
    return f"FAR={100 * far:g}%"


def far_of(name: str) -> float | None:
    """The rate that :func:`far_name` named, or None."""
    percent = re.fullmatch(r"FAR=(\d{1,3}(?:\.\d{1,9})?)%", name, re.ASCII)
    return float(percent[1]) / 100 if percent else None


@dataclass(frozen=True)
class Metrics:
    """What one list of scored trials says about a system.

    `min_dcf`, `min_dcf_threshold` and `act_dcf` are by prior, `{0.01: 0.123}`.
    """

    n_target: int
    n_nontarget: int
    eer: float  # in percent
    eer_threshold: float  # the distinct score where FNR and FPR are closest
    min_dcf: dict[float, float]
    min_dcf_threshold: dict[float, float]
    min_cllr: float  # in bits
    cllr: float | None = None  # this and the next for calibrated scores only
    act_dcf: dict[float, float] | None = None


def evaluate(
    scores: ArrayLike,
    labels: ArrayLike,
    p_targets: Sequence[float] = P_TARGETS,
    llr: bool = False,
) -> Metrics:
    """All metrics of one list of trials, from one sort.

    Arguments
    ---------
    scores, labels : array
        Shape [N] each: higher means "same speaker"; 1 for a target trial, 0 for
        a non-target trial.
    p_targets : sequence of float
        Priors for minDCF.
    llr : bool
        Whether the scores are calibrated, that is natural logarithms of
        likelihood ratios: adds Cllr and the actual DCF.

    Returns
    -------
    Metrics

    Raises
    ------
    ValueError
        Shapes that differ, NaN or infinite scores, labels other than 0 and 1, a
        list without a target or without a non-target, or a prior out of (0, 1).

    Example
    -------
    >>> result = evaluate([0.9, 0.8, 0.3, 0.1], [1, 1, 0, 0])
    >>> result.eer, result.min_dcf[0.01], result.min_cllr
    (0.0, 0.0, 0.0)
    """
    curve = error_curve(scores, labels)
    rate, threshold = curve.eer()
    costs = {p: curve.min_dcf(p) for p in p_targets}
    result = Metrics(
        n_target=curve.n_target,
        n_nontarget=curve.n_nontarget,
        eer=rate,
        eer_threshold=threshold,
        min_dcf={p: cost for p, (cost, _) in costs.items()},
        min_dcf_threshold={p: t for p, (_, t) in costs.items()},
        min_cllr=curve.min_cllr(),
    )
    if not llr:
        return result
    actual = {p: act_dcf(scores, labels, p) for p in p_targets}
    return replace(result, cllr=cllr(scores, labels), act_dcf=actual)


def _split(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Check the input; copies of the target and the non-target scores."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            "scores and labels must be one-dimensional and of one length, "
            f"got shapes {scores.shape} and {labels.shape}. Were they read "
            "from two different lists?"
        )
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    finite = np.isfinite(scores)
    if not finite.all():
        first = int(finite.argmin())
        raise ValueError(
            f"{int((~finite).sum())} of {len(scores)} scores are NaN or "
            f"infinite, the first at index {first} ({scores[first]}). Did "
            "the encoder see a silent or broken file?"
        )
    is_target, is_nontarget = labels == 1, labels == 0
    if not (is_target | is_nontarget).all():
        other = labels[~(is_target | is_nontarget)][0]
        raise ValueError(
            f"labels must be 1 (target) or 0 (non-target), got {other}. "
            "Were scores and labels swapped?"
        )
    n_target = int(is_target.sum())
    if n_target in (0, len(labels)):
        raise ValueError(
            f"both target and non-target trials are needed, got {n_target} "
            f"targets and {len(labels) - n_target} non-targets."
        )
    return scores[is_target], scores[is_nontarget]


def _cost_weights(
    p_target: float, c_miss: float, c_fa: float
) -> tuple[float, float]:
    """Normalised weights of FNR and FPR; the smaller one is 1."""
    if not 0 < p_target < 1:
        raise ValueError(
            f"p_target must lie strictly between 0 and 1, got {p_target}. "
            "Was it given in percent?"
        )
    if not (c_miss > 0 and c_fa > 0):
        raise ValueError(
            f"costs must be positive, got c_miss={c_miss}, c_fa={c_fa}."
        )
    miss, false_alarm = c_miss * p_target, c_fa * (1 - p_target)
    default = min(miss, false_alarm)
    return miss / default, false_alarm / default


def _mean_softplus(values: np.ndarray) -> float:
    """Mean of log(1 + e^v) in float64, without overflow."""
    total = 0.0
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK].astype(np.float64)
        total += np.logaddexp(0, part).sum()
    return total / len(values)
