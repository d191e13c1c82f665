"""Tests of thresholds and score distributions."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from small_encoder import dev_scores

from speechbrain_ram.verification.calibration import BINS, Decision
from speechbrain_ram.verification.metrics import eer


@pytest.fixture(scope="module")
def decision():
    return Decision.fit(*dev_scores(), "imagined")


def test_thresholds_are_operating_points(decision):
    scores, labels = dev_scores()
    targets, nontargets = scores[labels == 1], scores[labels == 0]
    at_eer = decision.threshold()
    misses = np.mean(targets < at_eer)
    assert misses == pytest.approx(np.mean(nontargets >= at_eer), abs=0.005)
    assert decision.eer == eer(scores, labels)
    at_far = decision.threshold("FAR=1%")
    assert np.mean(nontargets >= at_far) <= 0.01
    just_below = scores[scores < at_far].max()
    assert np.mean(nontargets >= just_below) > 0.01
    with pytest.raises(ValueError, match="there are EER, FAR=1%"):
        decision.threshold("FAR=2%")


def test_shares_count_scores(decision):
    scores, labels = dev_scores()
    targets, nontargets = scores[labels == 1], scores[labels == 0]
    for score in (-1.0, -0.2, 0.31, 0.55, 0.99, 1.0):
        below, above = decision.shares(score)
        assert below == pytest.approx(np.mean(targets < score), abs=0.06)
        assert above == pytest.approx(np.mean(nontargets > score), abs=0.06)
    # At the edge of a bin the count is exact.
    below, above = decision.shares(0.5 + 1e-9)
    assert below == np.mean(targets < 0.5)
    assert above == np.mean(nontargets >= 0.52)


def test_every_score_is_in_a_bin(decision):
    assert len(decision.targets) == len(decision.nontargets) == BINS
    assert sum(decision.targets) == decision.n_target == 400
    assert sum(decision.nontargets) == decision.n_nontarget == 4000
    # A cosine of 1 + 1e-7 is rounding, not an outlier.
    wide = Decision.fit([1.0000001, -1.0000001], [1, 0], "edges")
    assert (sum(wide.targets), sum(wide.nontargets)) == (1, 1)
    assert wide.shares(1.5) == (0.0, 0.0)


def test_calibration_puts_zero_between_the_classes(decision):
    assert decision.llr(0.9) > 3
    assert decision.llr(0.0) < -3
    assert abs(decision.llr(0.45)) < 2


def test_json_round_trip(decision):
    data = json.loads(json.dumps(decision.to_dict()))
    again = Decision.from_dict(data)
    assert again == decision
    assert again.llr(0.3) == decision.llr(0.3)


def test_it_is_calibrated_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert Decision.fit(*dev_scores(), "imagined").calibration is not None


def test_an_older_export_may_lack_the_calibration(decision):
    older = replace(decision, calibration=None)
    assert older.llr(0.5) is None
    assert Decision.from_dict(json.loads(json.dumps(older.to_dict()))) == older


def test_thresholds_are_finite():
    # The best non-target beats every target: no threshold has a FAR of 1 %.
    decision = Decision.fit([0.1, 0.9], [1, 0], "inverted")
    assert decision.threshold("FAR=1%") == 1.0
    json.dumps(decision.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "change",
    [
        {"targets": [1, 2]},
        {"targets": None},
        {"targets": [1.0] * BINS},
        {"targets": [-1] * BINS},
        {"targets": [10**400] * BINS},
        {"n_target": 0},
        {"n_nontarget": "3"},
        {"eer": "1_0"},
        {"eer": float("nan")},
        {"thresholds": {"EER": "0.5"}},
        {"thresholds": {"EER": float("inf")}},
        {"thresholds": [0.5]},
        {"trials": 3},
        {"surprise": 1},
        {"calibration": {"features": ["score"]}},
    ],
)
def test_damaged_data(decision, change):
    data = {**decision.to_dict(), **change}
    with pytest.raises(ValueError, match="not thresholds and score distrib"):
        Decision.from_dict(data)
    del data["calibration"]
    with pytest.raises(ValueError, match="not thresholds and score distrib"):
        Decision.from_dict(data)
