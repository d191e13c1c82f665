"""Same speaker or not: what a development list says about a score.

A cosine means nothing by itself. Thresholds, the distributions of target and
non-target scores and, where scikit-learn is there, a calibration to
log-likelihood ratios are fitted on a development list once, and travel with
the encoder as a few hundred numbers of JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from speechbrain_ram.verification.calibration import (
    Calibration,
    fit_calibration,
)
from speechbrain_ram.verification.metrics import error_curve, threshold_at_far

#: Bins of the score distributions, over cosines from -1 to 1.
BINS = 100


@dataclass(frozen=True)
class Decision:
    """Thresholds and score distributions of one development list.

    Arguments
    ---------
    trials : str
        Which list, for a person to read.
    n_target, n_nontarget : int
        Its trials of each class.
    eer : float
        In percent.
    thresholds : dict of str to float
        "EER": where as many targets are missed as non-targets accepted.
        "FAR=1%": the lowest that accepts at most 1 % of the non-targets.
        A pair is accepted when its score is at least the threshold.
    targets, nontargets : tuple of int
        Scores of each class, counted in `BINS` equal bins over [-1, 1].
    calibration : Calibration, optional
        From cosine to the natural logarithm of a likelihood ratio.

    Example
    -------
    >>> decision = Decision.fit([0.9, 0.8, 0.4, 0.1], [1, 1, 0, 0], "toy")
    >>> decision.threshold(), decision.threshold("FAR=1%")
    (0.8, 0.8)
    >>> decision.shares(0.5)  # of targets below, of non-targets above
    (0.0, 0.0)
    """

    trials: str
    n_target: int
    n_nontarget: int
    eer: float
    thresholds: dict[str, float]
    targets: tuple[int, ...]
    nontargets: tuple[int, ...]
    calibration: Calibration | None = None

    @classmethod
    def fit(cls, scores: ArrayLike, labels: ArrayLike, trials: str) -> Decision:
        """Fit on a scored development list.

        Arguments
        ---------
        scores : array
            Shape [N], cosines.
        labels : array
            Shape [N], 1 for a target trial, 0 for a non-target trial.
        trials : str
            Name of the list.

        Returns
        -------
        Decision
            Without calibration if scikit-learn is not installed.

        Raises
        ------
        ValueError
            A class is missing, or a score is NaN or infinite.
        """
        scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
        curve = error_curve(scores, labels)
        eer, at_eer = curve.eer()
        at_far, _ = threshold_at_far(scores, labels, 0.01)
        try:
            calibration = fit_calibration(scores, labels)
        except ImportError:
            calibration = None
        return cls(
            trials=trials,
            n_target=int(curve.n_target),
            n_nontarget=int(curve.n_nontarget),
            eer=float(eer),
            # Cosines end at 1: an infinite threshold would not fit into JSON.
            thresholds={"EER": float(at_eer), "FAR=1%": min(at_far, 1.0)},
            targets=_histogram(scores[labels == 1]),
            nontargets=_histogram(scores[labels == 0]),
            calibration=calibration,
        )

    def threshold(self, name: str = "EER") -> float:
        """The threshold of an operating point, by name."""
        if name not in self.thresholds:
            raise ValueError(
                f"No threshold is named '{name}', there are "
                f"{', '.join(self.thresholds)}."
            )
        return self.thresholds[name]

    def llr(self, score: float) -> float | None:
        """Natural log-likelihood ratio of a score; None if not calibrated."""
        if self.calibration is None:
            return None
        return float(self.calibration.apply([score])[0])

    def shares(self, score: float) -> tuple[float, float]:
        """Where a score lies among the development scores.

        Arguments
        ---------
        score : float
            Cosine.

        Returns
        -------
        tuple of float
            Share of target scores below it, and of non-target scores above
            it, each to the width of a bin (0.02).
        """
        bin_of_score = int(np.clip((score + 1) / 2 * BINS, 0, BINS - 1))
        below = sum(self.targets[:bin_of_score]) / self.n_target
        above = sum(self.nontargets[bin_of_score + 1 :]) / self.n_nontarget
        return below, above

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
                calibration = Calibration(
                    tuple(calibration["features"]),
                    tuple(calibration["weights"]),
                    calibration["bias"],
                    calibration["p_target"],
                )
            for side in ("targets", "nontargets"):
                fields[side] = tuple(int(count) for count in fields[side])
                if len(fields[side]) != BINS:
                    raise ValueError(f"{side} has {len(fields[side])} bins")
            return cls(**fields, calibration=calibration)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"These are no thresholds and score distributions: {error!r}. "
                "Was the file edited, or written by another version?"
            ) from error


def _histogram(scores: np.ndarray) -> tuple[int, ...]:
    counts, _ = np.histogram(np.clip(scores, -1, 1), BINS, range=(-1, 1))
    return tuple(int(count) for count in counts)
