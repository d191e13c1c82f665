"""Calibration against known ratios, a generic optimiser, and Cllr."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize

from speechbrain_ram.verification.calibration import (
    Calibration,
    fit_calibration,
    pair_quality,
)
from speechbrain_ram.verification.metrics import (
    act_dcf,
    cllr,
    eer,
    min_cllr,
    min_dcf,
)


def known_ratios(n=40_000, seed=0, mean=3.0):
    """Gaussian log-likelihood ratios: variance is twice the mean."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.2).astype(np.int8)
    llrs = rng.normal(np.where(labels, mean, -mean), np.sqrt(2 * mean))
    return llrs, labels


@pytest.mark.parametrize("p_target", [0.01, 0.5])
def test_true_ratios_are_found_again(p_target):
    llrs, labels = known_ratios(200_000)
    calibration = fit_calibration((llrs - 1) / 7, labels, p_target=p_target)
    assert calibration.features == ("score",)
    assert calibration.weights[0] == pytest.approx(7, rel=0.05)
    assert calibration.bias == pytest.approx(1, abs=0.15)
    assert calibration.p_target == p_target


def test_it_minimises_the_weighted_cost():
    """The same minimum as a general optimiser on the written-out cost."""
    scores, labels = known_ratios(3000, seed=1)
    quality = np.random.default_rng(2).standard_normal(3000)
    scores = scores / 7 + 0.2 * quality
    p = 0.1

    def cost(parameters):
        log_odds = parameters[0] * scores + parameters[1] * quality
        log_odds = log_odds + parameters[2] + np.log(p / (1 - p))
        return (
            p * np.logaddexp(0, -log_odds[labels == 1]).mean()
            + (1 - p) * np.logaddexp(0, log_odds[labels == 0]).mean()
        )

    best = minimize(cost, np.zeros(3), tol=1e-10).x
    mine = fit_calibration(scores, labels, {"q": quality}, p_target=p)
    np.testing.assert_allclose([*mine.weights, mine.bias], best, rtol=1e-2)


@pytest.mark.parametrize("p_target", [0.01, 0.5])
@pytest.mark.parametrize("apart", [False, True])
def test_it_agrees_with_scikit_learn(p_target, apart):
    """The same cost, penalty included, also where classes do not overlap."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    scores, labels = known_ratios(2000, seed=6)
    scores = scores / 7 + 3 * apart * labels
    quality = np.random.default_rng(7).standard_normal(2000)
    table = np.stack([scores, quality], axis=1)
    centre, scale = table.mean(axis=0), table.std(axis=0)
    model = linear_model.LogisticRegression(
        C=1e4, tol=1e-12, max_iter=10_000, solver="newton-cholesky"
    )
    share = labels.mean()
    weight = np.where(labels, p_target / share, (1 - p_target) / (1 - share))
    model.fit((table - centre) / scale, labels, sample_weight=weight)
    slopes = model.coef_[0] / scale
    bias = model.intercept_[0] - slopes @ centre
    bias -= np.log(p_target / (1 - p_target))
    mine = fit_calibration(scores, labels, {"q": quality}, p_target)
    np.testing.assert_allclose(
        [*mine.weights, mine.bias], [*slopes, bias], rtol=1e-6, atol=1e-6
    )


def test_a_fit_on_one_list_calibrates_another():
    dev, dev_labels = known_ratios(seed=3)
    other, labels = known_ratios(seed=4)
    calibration = fit_calibration(dev / 20 + 0.3, dev_labels)
    llrs = calibration.apply(other / 20 + 0.3)
    raw = other / 20 + 0.3
    assert cllr(raw, labels) > 0.8
    assert cllr(llrs, labels) < min_cllr(llrs, labels) + 0.01
    gap = act_dcf(llrs, labels, 0.05) - min_dcf(llrs, labels, 0.05)
    assert 0 <= gap < 0.02
    # a straight line: order and error rates stay
    assert eer(llrs, labels) == pytest.approx(eer(raw, labels))


def test_a_quality_measure_that_matters_helps():
    """Short recordings score lower: knowing the length corrects it."""
    rng = np.random.default_rng(5)
    llrs, labels = known_ratios(seed=5)
    seconds = rng.uniform(1, 10, 500)
    enrol, test = rng.integers(0, 500, (2, len(llrs)))
    qualities = pair_quality("log_seconds", np.log(seconds), enrol, test)
    scores = llrs + 3 * qualities["min_log_seconds"]
    plain = fit_calibration(scores, labels)
    informed = fit_calibration(scores, labels, qualities)
    assert informed.features == ("score", "min_log_seconds", "max_log_seconds")
    before = plain.apply(scores)
    after = informed.apply(scores, qualities)
    assert eer(after, labels) < eer(before, labels) - 1
    assert cllr(after, labels) < cllr(before, labels) - 0.05


def test_qualities_of_a_trial_are_symmetric():
    values = np.array([3.0, 1.0, 2.0])
    one = pair_quality("q", values, [0, 1], [2, 0])
    other = pair_quality("q", values, [2, 0], [0, 1])
    assert one["min_q"].tolist() == other["min_q"].tolist() == [2, 1]
    assert one["max_q"].tolist() == other["max_q"].tolist() == [3, 3]


def test_separated_classes_do_not_run_away():
    calibration = fit_calibration([0.0, 1, 2, 3], [0, 0, 1, 1])
    assert 1 < calibration.weights[0] < 15
    assert np.isfinite(calibration.bias)


def test_a_quality_that_never_varies_is_harmless():
    llrs, labels = known_ratios(2000)
    constant = fit_calibration(llrs, labels, {"q": np.ones(2000)})
    plain = fit_calibration(llrs, labels)
    np.testing.assert_allclose(
        constant.apply(llrs, {"q": np.ones(2000)}), plain.apply(llrs), atol=1e-3
    )


def test_saving_and_loading(tmp_path):
    calibration = Calibration(("score", "min_q"), (7.1, -0.3), 1.25, 0.01)
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 0.0], [1, 1]), "got 2 and 0"),
        (([1.0, np.nan], [1, 0]), "must be finite"),
        (([1.0, 0.0], [1, 0], {"q": [1.0, np.inf]}), "must be finite"),
        (([1.0, 0.0], [1, 0], {"q": [1.0]}), "one length, got .* and 2"),
        (([1.0, 0.0, 0.5], [1, 0, 2]), "labels must be 1"),
        (([1.0, 0.0], [1, 0], None, 1.0), "strictly between 0 and 1"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_calibration(*arguments)


def test_other_qualities_than_fitted_are_refused():
    calibration = Calibration(("score", "min_q"), (1.0, 1.0), 0.0, 0.01)
    with pytest.raises(ValueError, match=r"\('score', 'min_q'\), got \('sc"):
        calibration.apply([1.0])
    with pytest.raises(ValueError, match=r"one length, got \[\(2,\), \(1,\)\]"):
        calibration.apply([1.0, 2.0], {"min_q": [1.0]})


GOOD = {"features": ["score"], "weights": [1.0], "bias": 0, "p_target": 0.01}


def changed(**values):
    return json.dumps({**GOOD, **values})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"features": 3}',
        changed(bias="1_0"),
        changed(bias="0.5"),
        changed(bias=True),
        changed(bias=None),
        changed(bias=float("nan")),
        changed(bias=float("inf")),
        changed(bias=7).replace("7", "1e999"),
        changed(bias=7).replace("7", "9" * 4000),
        changed(weights=[1.0, 2.0]),
        changed(weights=["1"]),
        changed(features=[1]),
        changed(features=[], weights=[]),
        changed(p_target=1),
        "[" * 100_000,
        " " * 2**21,
    ],
)
def test_other_files_are_no_calibrations(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration.json' is not a calib"):
        Calibration.load(path)


def test_a_calibration_is_text_in_utf_8(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(GOOD))
    assert Calibration.load(path).apply([2.0]).tolist() == [2.0]
    path.write_text("{}", encoding="utf-16")
    with pytest.raises(ValueError, match=r"calibration.json', line 1: not te"):
        Calibration.load(path)
