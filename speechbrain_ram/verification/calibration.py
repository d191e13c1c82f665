"""Calibration: scores and quality measures -> log-likelihood ratios.

A weighted logistic regression fitted on one list (dev) and applied to another
(eval): ``llr = w . x + b`` with x the score and, where given, quality measures
of the two recordings. The weights make the classes count as if targets had
the prior `p_target`; the log odds of that prior are taken off again, so that
the result is a likelihood ratio (Brummer et al., "Fusion of heterogeneous
speaker recognition systems", 2007).

Quality measures (Thienpondt et al., "The IDLab VoxSRC-20 submission", ICASSP
2021) are symmetric: the smaller and the larger value of the two sides.
Usual ones are the log of the duration, the length of the embedding before it
is scaled, and the mean score against a cohort.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit

from speechbrain_ram.data.plain import read_json
from speechbrain_ram.utils import atomic_writer, is_number
from speechbrain_ram.verification.metrics import (
    error_curve,
    far_name,
    far_of,
)


@dataclass(frozen=True)
class Calibration:
    """A fitted map from score and qualities to log-likelihood ratio."""

    features: tuple[str, ...]  # "score" and the names of quality measures
    weights: tuple[float, ...]  # one a feature
    bias: float
    p_target: float  # the prior that the fit was weighted for

    def __post_init__(self) -> None:
        names, weights = self.features, self.weights
        if not (all(isinstance(n, str) for n in names) and names[:1]):
            raise ValueError(f"features must be names, got {names!r:.200}")
        if len(weights) != len(names):
            raise ValueError(f"{len(weights)} weights, {len(names)} features")
        for value in (*weights, self.bias, self.p_target):
            _finite(value)
        if not 0 < self.p_target < 1:
            raise ValueError(f"p_target must lie in (0, 1): {self.p_target}")

    def apply(
        self,
        scores: ArrayLike,
        qualities: Mapping[str, ArrayLike] | None = None,
    ) -> np.ndarray:
        """Natural log-likelihood ratios, shape [N] float64."""
        names = ("score", *(qualities or {}))
        if names != self.features:
            raise ValueError(
                f"this calibration was fitted with {self.features}, got "
                f"{names}. Were other quality measures asked for?"
            )
        columns = _columns(scores, qualities)
        if len({column.shape for column in columns}) > 1:
            raise ValueError(
                "scores and qualities must have one length, got "
                f"{[column.shape for column in columns]}."
            )
        llrs = np.full(len(columns[0]), self.bias, np.float64)
        for weight, column in zip(self.weights, columns, strict=True):
            llrs += weight * column
        return llrs

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON."""
        with atomic_writer(path) as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read what :meth:`save` wrote; ValueError if it is anything else."""
        try:
            return cls.from_dict(read_json(path))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{path}' is not a calibration: {error!r}. Was it written by "
                "Calibration.save?"
            ) from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """From plain data; a ValueError, KeyError or TypeError if it is not."""
        return cls(
            tuple(data["features"]),
            tuple(data["weights"]),
            data["bias"],
            data["p_target"],
        )


def _finite(value: Any) -> None:
    """Raise a ValueError unless a value of JSON is a finite number."""
    if not is_number(value):
        raise ValueError(f"{reprlib.repr(value)} is not a finite number")


def fit_calibration(
    scores: ArrayLike,
    labels: ArrayLike,
    qualities: Mapping[str, ArrayLike] | None = None,
    p_target: float = 0.01,
) -> Calibration:
    """Fit on a development list, weighted for the prior `p_target`.

    `qualities` are measures by name, shape [N] each, see :func:`pair_quality`.
    """
    if not 0 < p_target < 1:
        raise ValueError(
            f"p_target must lie strictly between 0 and 1, got {p_target}."
        )
    labels = np.asarray(labels)
    columns = _columns(scores, qualities)
    if any(len(column) != len(labels) for column in columns):
        raise ValueError(
            "scores, qualities and labels must have one length, got "
            f"{[len(column) for column in columns]} and {len(labels)}."
        )
    target = labels == 1
    if not (target | (labels == 0)).all():
        raise ValueError("labels must be 1 (target) or 0 (non-target).")
    n_target, n = int(target.sum()), len(labels)
    if n_target in (0, n):
        raise ValueError(
            "both target and non-target trials are needed, got "
            f"{n_target} and {n - n_target}."
        )
    table = np.stack(columns, axis=1)
    if not np.isfinite(table).all():
        raise ValueError("scores and qualities must be finite.")
    centre, scale = table.mean(axis=0), table.std(axis=0)
    scale[scale == 0] = 1
    weights = np.where(
        target, p_target / n_target, (1 - p_target) / (n - n_target)
    )
    *slopes, bias = _logistic_fit((table - centre) / scale, target, weights)
    slopes = np.array(slopes) / scale
    bias -= slopes @ centre + np.log(p_target / (1 - p_target))
    return Calibration(
        ("score", *(qualities or {})),
        tuple(float(slope) for slope in slopes),
        float(bias),
        float(p_target),
    )


def _logistic_fit(
    table: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Slopes and intercept of a weighted logistic regression.

    Columns have variance 1; weights add up to 1. The penalty on the slopes
    only matters where the classes do not overlap and the likelihood has no
    maximum.
    """
    table = np.column_stack([table, np.ones(len(table))])
    penalty = np.full(table.shape[1], 1e-4 / len(table))
    penalty[-1] = 0  # of the intercept
    sign = np.where(target, 1.0, -1.0)

    def cost(x):
        margin = sign * (table @ x)
        loss = weights @ np.logaddexp(0, -margin) + penalty @ x**2 / 2
        slope = -weights * sign * expit(-margin)
        return loss, table.T @ slope + penalty * x

    def curvature(x):
        share = expit(table @ x)
        bend = weights * share * (1 - share)
        return (table.T * bend) @ table + np.diag(penalty)

    found = minimize(
        cost,
        np.zeros(table.shape[1]),
        jac=True,
        hess=curvature,
        method="trust-exact",
        options={"gtol": 1e-12, "maxiter": 200},
    )
    return found.x


def pair_quality(
    name: str, values: ArrayLike, enrol: ArrayLike, test: ArrayLike
) -> dict[str, np.ndarray]:
    """The smaller and the larger of a measure's values on each trial's two
    sides.

    `values` [V] are of recordings or models; `enrol` and `test` [N] index
    them.
    """
    values = np.asarray(values, dtype=np.float64)
    left, right = values[np.asarray(enrol)], values[np.asarray(test)]
    return {
        f"min_{name}": np.minimum(left, right),
        f"max_{name}": np.maximum(left, right),
    }


def _columns(
    scores: ArrayLike, qualities: Mapping[str, ArrayLike] | None
) -> Sequence[np.ndarray]:
    """Score and qualities as float64 arrays of one dimension."""
    columns = [scores, *(qualities or {}).values()]
    return [np.asarray(column, dtype=np.float64) for column in columns]


# -- Same speaker or not: what a development list says about a score ----------
#
# A cosine means nothing by itself. Thresholds, the distributions of target and
# non-target scores and a calibration to log-likelihood ratios are fitted on a
# development list once, and travel with the encoder as a few hundred numbers
# of JSON.

#: Bins of the score distributions, over cosines from -1 to 1.
BINS = 100

#: False-alarm rates that have a threshold, where pairs enough measure it.
FARS = (0.01, 0.001)

#: Errors that measure a rate: with 30 it is within 30 % of the truth at 90 %,
#: if trials are independent (Doddington et al., Speech Communication, 2000).
ERRORS = 30


@dataclass(frozen=True)
class Decision:
    """Thresholds and score distributions of one development list.

    A pair is accepted when its score is at least the threshold. The threshold
    "EER" misses as large a share of the targets as it accepts non-targets;
    "FAR=1%" is the lowest that accepts at most 1 % of the non-targets, and
    "FAR=0.1%" likewise; see :meth:`not_measured`.
    """

    trials: str  # which list, for a person to read
    n_target: int
    n_nontarget: int
    eer: float  # in percent
    thresholds: dict[str, float]
    targets: tuple[int, ...]  # scores counted in `BINS` bins over [-1, 1]
    nontargets: tuple[int, ...]
    # exports of the first release may lack it
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.trials, str):
            raise ValueError(f"{reprlib.repr(self.trials)} is not a name")
        for value in (self.eer, *self.thresholds.values()):
            _finite(value)
        for value in (*self.targets, *self.nontargets):
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"{reprlib.repr(value)} is not a count")
        for side in (self.targets, self.nontargets):
            if len(side) != BINS:
                raise ValueError(f"{len(side)} bins, {BINS} are needed")
        for value in (self.n_target, self.n_nontarget):
            if type(value) is not int or not 0 < value < 2**63:
                raise ValueError(f"{reprlib.repr(value)} trials of a class")

    @classmethod
    def fit(
        cls,
        scores: ArrayLike,
        labels: ArrayLike,
        trials: str,
    ) -> Decision:
        """Fit on the cosines [N] of a development list of this name.

        A threshold that too few non-targets measure is left out.
        """
        scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
        curve = error_curve(scores, labels)
        eer, at_eer = curve.eer()
        # Cosines end at 1: an infinite threshold would not fit into JSON.
        at_far = {
            far_name(far): min(curve.at_far(far)[0], 1.0)
            for far in FARS
            if curve.n_nontarget >= _needed(far)
        }
        return cls(
            trials=trials,
            n_target=int(curve.n_target),
            n_nontarget=int(curve.n_nontarget),
            eer=float(eer),
            thresholds={"EER": float(at_eer), **at_far},
            targets=_histogram(scores[labels == 1]),
            nontargets=_histogram(scores[labels == 0]),
            calibration=fit_calibration(scores, labels),
        )

    def threshold(self, name: str = "EER") -> float:
        """The threshold of an operating point, by name."""
        if name not in self.thresholds:
            why, needed = "", self.not_measured().get(name)
            if needed:
                why = (
                    f" {name} needs {needed:,} different-speaker pairs, "
                    f"'{self.trials}' has {self.n_nontarget:,}; "
                    "`speechbrain-ram threshold` measures it on recordings of "
                    "yours."
                )
            raise ValueError(
                f"No threshold is named '{name}', there are "
                f"{', '.join(self.thresholds)}.{why}"
            )
        return self.thresholds[name]

    def not_measured(self) -> dict[str, int]:
        """Thresholds at false-alarm rates that the list had too few non-target
        trials for, and how many each needs.
        """
        needed = {far_name(far): _needed(far) for far in FARS}
        return {
            name: count
            for name, count in needed.items()
            if name not in self.thresholds and self.n_nontarget < count
        }

    def llr(self, score: float) -> float | None:
        """Natural log-likelihood ratio of a score; None if not calibrated."""
        if self.calibration is None:
            return None
        return float(self.calibration.apply([score])[0])

    def llr_step(self) -> float:
        """Cosine that raises the log-likelihood ratio by 1; 0 if it is not
        calibrated.
        """
        slope = self.calibration.weights[0] if self.calibration else 0.0
        return 1 / slope if slope > 0 else 0.0

    def shares(self, score: float) -> tuple[float, float]:
        """Share of target scores below a cosine, and of non-target scores
        above it.

        They are known at the edges of the bins and at the thresholds; from
        one such cosine to the next they are taken to change evenly.
        """
        below = np.cumsum([0.0, *self.targets])
        above = np.cumsum([0.0, *self.nontargets])
        at_eer = [(self.thresholds.get("EER", 1.0), self.eer / 100)]
        at_far = [
            (cosine, far)
            for name, cosine in self.thresholds.items()
            if (far := far_of(name)) is not None
        ]
        return (
            _between(score, below / self.n_target, at_eer),
            _between(
                score,
                (above[-1] - above) / self.n_nontarget,
                [*at_eer, *at_far],
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decision:
        """From plain data; a ValueError names what is wrong with it."""
        try:
            fields = dict(data)
            calibration = fields.pop("calibration")
            if calibration is not None:
                calibration = Calibration.from_dict(calibration)
            for side in ("targets", "nontargets"):
                fields[side] = tuple(fields[side])
            return cls(**fields, calibration=calibration)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"These are not thresholds and score distributions: {error!r}. "
                "Was the file edited, or written by another version?"
            ) from error


def _needed(far: float) -> int:
    """Non-target trials that measure a false-alarm rate."""
    return round(ERRORS / far)


def _between(
    score: float, shares: np.ndarray, known: Sequence[tuple[float, float]]
) -> float:
    """A share at a score, from those at the edges of bins [BINS + 1] and those
    at cosines where it is known.
    """
    edges = np.linspace(-1, 1, BINS + 1)
    for cosine, share in known:
        if -1 < cosine < 1:  # at 1 nothing is known: see `fit`
            after = int(np.searchsorted(edges, cosine, side="right"))
            # within what the bin leaves open, whatever a file says
            share = np.clip(share, *sorted(shares[after - 1 : after + 1]))
            edges = np.insert(edges, after, cosine)
            shares = np.insert(shares, after, share)
    return float(np.interp(score, edges, shares))


def _histogram(scores: np.ndarray) -> tuple[int, ...]:
    counts, _ = np.histogram(np.clip(scores, -1, 1), BINS, range=(-1, 1))
    return tuple(int(count) for count in counts)
