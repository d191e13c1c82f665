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
    for score in np.linspace(-1, 1, 401):
        below, above = decision.shares(score)
        assert below == pytest.approx(np.mean(targets < score), abs=0.02)
        assert above == pytest.approx(np.mean(nontargets > score), abs=0.005)
    # At the edge of a bin the count is exact.
    below, above = decision.shares(0.5)
    assert below == pytest.approx(np.mean(targets < 0.5))
    assert above == pytest.approx(np.mean(nontargets > 0.5))


def test_shares_agree_with_the_thresholds():
    """Where scores lie at one end of a bin, too."""
    nontargets = np.append(np.zeros(2880), np.linspace(0.591, 0.5999, 120))
    targets = np.linspace(0.5, 0.9, 100)
    decision = Decision.fit(
        np.concatenate([nontargets, targets]), [0] * 3000 + [1] * 100, "steep"
    )
    at_far = decision.threshold("FAR=1%")
    assert 0.596 < at_far < 0.598
    assert decision.shares(at_far)[1] == pytest.approx(0.01)
    for score in (0.3, 0.585, at_far - 0.001):
        assert decision.shares(score)[1] > 0.01
    for score in (at_far + 0.001, 0.599):
        assert 0 < decision.shares(score)[1] < 0.01


@pytest.mark.parametrize("n", [400, 40])
def test_shares_at_the_threshold_are_the_error_rate(n):
    rng = np.random.default_rng(n)
    scores = 0.2 * rng.standard_normal(2 * n) + np.repeat([0, 0.5], n)
    decision = Decision.fit(scores, np.repeat([0, 1], n), "few")
    shares = decision.shares(decision.threshold())
    assert shares == pytest.approx([decision.eer / 100] * 2, abs=1 / n)


def test_shares_never_turn_back(decision):
    for each in (
        decision,
        replace(decision, eer=99.0),  # as a damaged file may say
        replace(decision, thresholds={"EER": 0.1, "FAR=1%": -0.9}),
    ):
        rows = [each.shares(score) for score in np.linspace(-1.1, 1.1, 1001)]
        below, above = np.array(rows).T
        assert below[0] == above[-1] == 0 and below[-1] == above[0] == 1
        assert (np.diff(below) >= 0).all() and (np.diff(above) <= 0).all()


def test_every_score_is_in_a_bin(decision):
    assert len(decision.targets) == len(decision.nontargets) == BINS
    assert sum(decision.targets) == decision.n_target == 400
    assert sum(decision.nontargets) == decision.n_nontarget == 4000
    # A cosine of 1 + 1e-7 is rounding, not an outlier.
    wide = Decision.fit([1.0000001, -1.0000001], [1, 0], "edges")
    assert (sum(wide.targets), sum(wide.nontargets)) == (1, 1)
    assert wide.shares(1.5) == (1.0, 0.0)


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
    scores, labels = [0.1] + 3000 * [0.9], [1] + 3000 * [0]
    decision = Decision.fit(scores, labels, "inverted")
    assert decision.threshold("FAR=1%") == 1.0
    json.dumps(decision.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "nontargets, names, lacks",
    [
        (20, ["EER"], {"FAR=1%": 3000, "FAR=0.1%": 30000}),
        (2999, ["EER"], {"FAR=1%": 3000, "FAR=0.1%": 30000}),
        (3000, ["EER", "FAR=1%"], {"FAR=0.1%": 30000}),
        (30000, ["EER", "FAR=1%", "FAR=0.1%"], {}),
    ],
)
def test_what_too_few_pairs_measure_is_left_out(nontargets, names, lacks):
    scores = np.append([0.8, 0.9], np.linspace(-0.5, 0.85, nontargets))
    decision = Decision.fit(scores, [1, 1] + [0] * nontargets, "dev")
    assert list(decision.thresholds) == names
    assert decision.not_measured() == lacks
    for name, needed in lacks.items():
        with pytest.raises(ValueError, match=f"{name} needs {needed:,} differ"):
            decision.threshold(name)


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
