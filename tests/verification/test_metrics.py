"""Metrics against naive definitions, scikit-learn, SpeechBrain, known answers.

The naive versions below are O(N^2) in float64 and follow the definitions word
by word: accept at score >= threshold, thresholds at distinct scores and +inf.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from speechbrain_ram.verification import metrics


def naive_rates(scores, labels):
    """[(threshold, FNR, FPR), ...] by counting, lowest threshold first."""
    targets = [s for s, y in zip(scores, labels, strict=True) if y == 1]
    others = [s for s, y in zip(scores, labels, strict=True) if y == 0]
    return [
        (
            t,
            sum(s < t for s in targets) / len(targets),
            sum(s >= t for s in others) / len(others),
        )
        for t in [*sorted(set(scores)), float("inf")]
    ]


def naive_eer(scores, labels):
    rates = naive_rates(scores, labels)
    for (_, fnr0, fpr0), (_, fnr1, fpr1) in zip(rates, rates[1:], strict=False):
        if fnr0 < fpr0 and fnr1 >= fpr1:
            # the segment's point where FNR = FPR
            share = (fpr0 - fnr0) / ((fnr1 - fnr0) + (fpr0 - fpr1))
            return 100 * (fnr0 + share * (fnr1 - fnr0))
    raise AssertionError("no crossing")


def naive_dcf(rates, p, c_miss=1.0, c_fa=1.0):
    default = min(c_miss * p, c_fa * (1 - p))
    return min(
        (c_miss * p * fnr + c_fa * (1 - p) * fpr) / default
        for _, fnr, fpr in rates
    )


def naive_min_cllr(scores, labels):
    """Pool adjacent violators, one block at a time, equal scores first."""
    n_target, n_other = sum(labels), len(labels) - sum(labels)
    blocks = []
    for value in sorted(set(scores)):
        here = [y for s, y in zip(scores, labels, strict=True) if s == value]
        blocks.append([sum(here) / n_target, (len(here) - sum(here)) / n_other])
        while len(blocks) > 1 and (
            blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]
        ):
            target, other = blocks.pop()
            blocks[-1][0] += target
            blocks[-1][1] += other
    bits = 0.0
    for target, other in blocks:  # ratio = target / other
        if target:
            bits += target * np.log2(1 + other / target)
        if other:
            bits += other * np.log2(1 + target / other)
    return bits / 2


quick = settings(deadline=None, max_examples=60)

# Small integers make many ties; floats of all magnitudes make few.
score_values = st.one_of(
    st.integers(-4, 4).map(float),
    st.floats(-1e6, 1e6, allow_nan=False, width=32).map(float),
)


@st.composite
def scored_trials(draw, max_size=25):
    targets = draw(st.lists(score_values, min_size=1, max_size=max_size))
    others = draw(st.lists(score_values, min_size=1, max_size=max_size))
    return targets + others, [1] * len(targets) + [0] * len(others)


def random_trials(n, seed=0, decimals=None, dtype=np.float64):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.3).astype(np.int8)
    labels[:2] = 0, 1
    scores = rng.standard_normal(n) + 1.5 * labels
    if decimals is not None:
        scores = scores.round(decimals)
    return scores.astype(dtype), labels


@quick
@given(scored_trials())
def test_curve_counts_what_the_definition_counts(trials):
    curve = metrics.error_curve(*trials)
    rates = naive_rates(*trials)
    assert curve.thresholds.tolist() == [t for t, _, _ in rates]
    np.testing.assert_allclose(curve.fnr, [fnr for _, fnr, _ in rates])
    np.testing.assert_allclose(curve.fpr, [fpr for _, _, fpr in rates])


@quick
@given(scored_trials())
def test_eer_is_the_interpolated_crossing(trials):
    assert metrics.eer(*trials) == pytest.approx(naive_eer(*trials), abs=1e-9)


@quick
@given(
    scored_trials(),
    st.sampled_from([0.001, 0.01, 0.05, 0.5, 0.9]),
    st.sampled_from([(1.0, 1.0), (10.0, 1.0), (1.0, 3.0)]),
)
def test_min_dcf_is_the_cheapest_threshold(trials, p, costs):
    expected = naive_dcf(naive_rates(*trials), p, *costs)
    assert metrics.min_dcf(*trials, p, *costs) == pytest.approx(expected)
    assert 0 <= expected <= 1


@quick
@given(scored_trials())
def test_min_cllr_is_pav(trials):
    assert metrics.min_cllr(*trials) == pytest.approx(
        naive_min_cllr(*trials), abs=1e-9
    )


@quick
@given(scored_trials())
def test_corners_keep_what_matters(trials):
    curve = metrics.error_curve(*trials)
    corners = curve.corners()
    assert len(corners.thresholds) <= len(curve.thresholds)
    assert corners.eer()[0] == pytest.approx(curve.eer()[0], abs=1e-9)
    for p in metrics.P_TARGETS:
        assert corners.min_dcf(p)[0] == pytest.approx(curve.min_dcf(p)[0])


def test_corners_drop_points_inside_runs():
    scores = np.arange(1000.0)
    curve = metrics.error_curve(scores, scores >= 500)
    assert len(curve.thresholds) == 1001
    assert curve.corners().thresholds.tolist() == [0, 500, np.inf]


@quick
@given(scored_trials())
def test_monotone_maps_change_nothing(trials):
    scores, labels = np.array(trials[0]), trials[1]
    ranks = np.searchsorted(np.unique(scores), scores) * 0.5 - 3
    before, after = (
        metrics.evaluate(scores, labels),
        metrics.evaluate(ranks, labels),
    )
    assert before.eer == after.eer
    assert before.min_dcf == after.min_dcf
    assert before.min_cllr == after.min_cllr


@quick
@given(scored_trials())
def test_swapping_roles_mirrors_the_roc(trials):
    """Negated scores with flipped labels: FNR and FPR trade places."""
    scores, labels = np.array(trials[0]), np.array(trials[1])
    assert metrics.eer(-scores, 1 - labels) == pytest.approx(
        metrics.eer(scores, labels), abs=1e-9
    )
    assert metrics.min_dcf(
        -scores, 1 - labels, p_target=0.2, c_miss=2, c_fa=5
    ) == pytest.approx(
        metrics.min_dcf(scores, labels, p_target=0.8, c_miss=5, c_fa=2)
    )


@quick
@given(scored_trials())
def test_flipped_labels_give_the_other_side(trials):
    scores, labels = np.array(trials[0]), np.array(trials[1])
    assert metrics.eer(scores, 1 - labels) == pytest.approx(
        100 - metrics.eer(scores, labels), abs=1e-9
    )


@quick
@given(scored_trials(), st.integers(2, 4))
def test_repeating_every_trial_changes_nothing(trials, times):
    before = metrics.evaluate(*trials)
    after = metrics.evaluate(trials[0] * times, trials[1] * times)
    assert after.eer == pytest.approx(before.eer)
    assert after.min_dcf == pytest.approx(before.min_dcf)
    assert after.min_cllr == pytest.approx(before.min_cllr, abs=1e-9)


@quick
@given(scored_trials(), st.randoms())
def test_order_of_trials_does_not_matter(trials, random):
    order = list(range(len(trials[0])))
    random.shuffle(order)
    shuffled = [[part[i] for i in order] for part in trials]
    assert metrics.evaluate(*shuffled) == metrics.evaluate(*trials)


def test_perfect_and_inverted_separation():
    perfect = metrics.evaluate([2.0, 3.0, 0.0, 1.0], [1, 1, 0, 0])
    assert perfect.eer == 0
    assert set(perfect.min_dcf.values()) == {0}
    assert perfect.min_cllr == 0
    inverted = metrics.evaluate([0.0, 1.0, 2.0, 3.0], [1, 1, 0, 0])
    assert inverted.eer == 100
    assert set(inverted.min_dcf.values()) == {1}
    assert inverted.min_cllr == 1


def test_scores_that_say_nothing():
    result = metrics.evaluate(np.zeros(10), [1] * 3 + [0] * 7)
    assert result.eer == pytest.approx(50)
    assert result.min_dcf[0.01] == 1
    assert result.min_cllr == pytest.approx(1)
    assert result.eer_threshold == 0


def test_a_tie_is_one_threshold():
    """One target and one non-target at 0.5: no threshold parts them."""
    assert metrics.eer([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0]) == pytest.approx(
        100 / 4
    )


@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_scikit_learn(decimals, dtype):
    from sklearn.metrics import det_curve, roc_curve

    scores, labels = random_trials(3001, decimals=decimals, dtype=dtype)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    curve = metrics.error_curve(scores, labels)
    np.testing.assert_allclose(curve.fpr[::-1], fpr)
    np.testing.assert_allclose(1 - curve.fnr[::-1], tpr)
    # the EER from scikit-learn's curve alone
    crossing = np.interp(0, (1 - tpr - fpr)[::-1], fpr[::-1])
    assert metrics.eer(scores, labels) == pytest.approx(100 * crossing)

    fpr, fnr, thresholds = det_curve(labels, scores)
    mine = {
        t: (a, b)
        for t, a, b in zip(curve.thresholds, curve.fpr, curve.fnr, strict=True)
    }
    for row in zip(thresholds, fpr, fnr, strict=True):
        assert mine[row[0]] == pytest.approx(row[1:])

    corners = metrics.error_curve(scores, labels).corners()
    fpr, tpr = corners.fpr, 1 - corners.fnr
    fpr_all, tpr_all, _ = roc_curve(labels, scores)
    assert np.trapezoid(tpr[::-1], fpr[::-1]) == pytest.approx(
        np.trapezoid(tpr_all, fpr_all)
    )


def test_agrees_with_speechbrain_on_small_input():
    """SpeechBrain takes the nearest threshold, without interpolation."""
    from speechbrain.utils.metric_stats import EER, minDCF

    scores, labels = random_trials(400, seed=3)
    positive = torch.tensor(scores[labels == 1])
    negative = torch.tensor(scores[labels == 0])
    theirs, threshold = EER(positive, negative)
    step = 1 / (labels == 1).sum()  # its error is at most one trial's share
    assert abs(metrics.eer(scores, labels) / 100 - theirs) <= step
    mine = metrics.evaluate(scores, labels).eer_threshold
    between = (scores >= min(mine, threshold)) & (scores < max(mine, threshold))
    assert between.sum() <= 2
    cost, _ = minDCF(positive, negative, p_target=0.05)
    assert metrics.min_dcf(scores, labels, 0.05) == pytest.approx(
        min(cost / 0.05, 1), rel=1e-5
    )


def test_cllr_is_its_formula_and_never_below_the_minimum():
    scores, labels = random_trials(2000, seed=1)
    target, other = scores[labels == 1], scores[labels == 0]
    expected = (
        np.mean(np.log2(1 + np.exp(-target)))
        + np.mean(np.log2(1 + np.exp(other)))
    ) / 2
    assert metrics.cllr(scores, labels) == pytest.approx(expected)
    assert metrics.min_cllr(scores, labels) < expected
    # no overflow far from zero
    assert metrics.cllr([2000.0, -2000.0], [0, 1]) == pytest.approx(
        2000 / np.log(2)
    )


def test_min_cllr_is_cllr_of_scikit_learns_isotonic_regression():
    from sklearn.isotonic import IsotonicRegression

    scores, labels = random_trials(1000, seed=2, decimals=1)
    posterior = IsotonicRegression(out_of_bounds="clip").fit_transform(
        scores, labels
    )
    prior = labels.mean()
    with np.errstate(divide="ignore"):
        llrs = np.log(posterior / (1 - posterior)) - np.log(prior / (1 - prior))
    bounded = np.clip(llrs, -500, 500)  # scores that only one class has
    assert metrics.cllr(bounded, labels) == pytest.approx(
        metrics.min_cllr(scores, labels)
    )


def test_act_dcf_decides_at_the_bayes_threshold():
    llrs, labels = random_trials(500, seed=4)
    llrs *= 3
    for p, c_miss, c_fa in [(0.01, 1, 1), (0.5, 1, 10), (0.05, 10, 1)]:
        threshold = np.log(c_fa * (1 - p) / (c_miss * p))
        fnr = np.mean(llrs[labels == 1] < threshold)
        fpr = np.mean(llrs[labels == 0] >= threshold)
        expected = (c_miss * p * fnr + c_fa * (1 - p) * fpr) / min(
            c_miss * p, c_fa * (1 - p)
        )
        actual = metrics.act_dcf(llrs, labels, p, c_miss, c_fa)
        assert actual == pytest.approx(expected)
        assert actual >= metrics.min_dcf(llrs, labels, p, c_miss, c_fa) - 1e-12


def test_a_score_at_the_bayes_threshold_is_accepted():
    assert metrics.act_dcf([0.0, -1.0], [1, 0], p_target=0.5) == 0
    assert metrics.act_dcf([1.0, 0.0], [1, 0], p_target=0.5) == 1


def test_true_ratios_are_calibrated():
    """Scores that are likelihood ratios: Cllr is close to its minimum."""
    rng = np.random.default_rng(0)
    labels = np.arange(200_000) % 2
    mean = 2.0  # llrs of two Gaussians: variance is twice the mean
    llrs = rng.normal(np.where(labels, mean, -mean), np.sqrt(2 * mean))
    assert metrics.cllr(llrs, labels) == pytest.approx(
        metrics.min_cllr(llrs, labels), abs=2e-3
    )
    # and the EER of two such Gaussians is known
    assert metrics.eer(llrs, labels) == pytest.approx(
        100 * ndtr(-np.sqrt(mean / 2)), abs=0.2
    )


@pytest.mark.parametrize("far", [0.0, 0.001, 0.07, 0.5, 1.0])
def test_threshold_at_far_is_the_lowest_that_keeps_it(far):
    scores, labels = random_trials(300, decimals=1)
    threshold, fnr = metrics.threshold_at_far(scores, labels, far)
    allowed = [
        (t, miss) for t, miss, fa in naive_rates(scores, labels) if fa <= far
    ]
    assert (threshold, fnr) == pytest.approx(allowed[0])


def test_a_rate_that_is_a_whole_number_of_trials_is_reached():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    scores, labels = np.arange(101.0), [0] * 100 + [1]
    assert metrics.threshold_at_far(scores, labels, 0.29) == (71.0, 0.0)


def test_the_lowest_of_equally_good_thresholds_is_named(monkeypatch):
    """At p = 0.5, 1 and 3 cost the same: half the targets, or non-targets."""
    monkeypatch.setattr(metrics, "_CHUNK", 2)
    trials = [0.0, 1.0, 2.0, 3.0], [0, 1, 0, 1]
    assert metrics.error_curve(*trials).min_dcf(0.5) == (0.5, 1.0)


def test_the_threshold_nearest_to_the_eer_is_named():
    # FNR, FPR at 1: 0, 1/4; at 2: 1/2, 1/4; gaps 1/4 each, at 3: 1/2, 0
    trials = [0.0, 0.0, 0.0, 1.0, 2.0, 3.0], [0, 0, 0, 1, 0, 1]
    assert metrics.error_curve(*trials).eer()[1] == 2.0
    # FNR, FPR at 1: 0, 1/3; at 2: 1, 1/3: the first is nearer
    trials = [0.0, 0.0, 1.0, 2.0], [0, 0, 1, 0]
    assert metrics.error_curve(*trials).eer()[1] == 1.0


def test_evaluate_says_the_same_as_the_functions():
    llrs, labels = random_trials(700, dtype=np.float32)
    result = metrics.evaluate(llrs, labels, p_targets=(0.02, 0.3), llr=True)
    assert result.n_target == labels.sum()
    assert result.n_nontarget == len(labels) - labels.sum()
    assert result.eer == metrics.eer(llrs, labels)
    assert result.cllr == metrics.cllr(llrs, labels)
    assert result.min_cllr == metrics.min_cllr(llrs, labels)
    for p in (0.02, 0.3):
        assert result.min_dcf[p] == metrics.min_dcf(llrs, labels, p)
        assert result.act_dcf[p] == metrics.act_dcf(llrs, labels, p)
        # the threshold that it names costs what it says
        decided = llrs >= result.min_dcf_threshold[p]
        cost = p * np.mean(~decided[labels == 1])
        cost += (1 - p) * np.mean(decided[labels == 0])
        assert cost / min(p, 1 - p) == pytest.approx(result.min_dcf[p])
    # at the EER's threshold both rates are near it
    decided = llrs >= result.eer_threshold
    assert np.mean(~decided[labels == 1]) == pytest.approx(
        result.eer / 100, abs=0.01
    )
    assert metrics.evaluate(llrs, labels).cllr is None


def test_scans_in_steps_are_seamless(monkeypatch):
    scores, labels = random_trials(1000)
    whole = metrics.evaluate(scores, labels, llr=True)
    monkeypatch.setattr(metrics, "_CHUNK", 7)
    stepped = metrics.evaluate(scores, labels, llr=True)
    assert stepped.cllr == pytest.approx(whole.cllr)
    assert stepped.min_dcf == whole.min_dcf
    assert stepped.min_dcf_threshold == whole.min_dcf_threshold
    assert stepped.eer == whole.eer


@pytest.mark.parametrize(
    "convert", [list, torch.tensor, lambda x: np.asarray(x)[::1]]
)
def test_accepts_lists_arrays_and_tensors(convert):
    scores, labels = [0.9, 0.2, 0.4, 0.1], [1, 1, 0, 0]
    assert metrics.eer(convert(scores), convert(labels)) == 50


def test_input_is_left_alone():
    scores, labels = random_trials(50)
    copies = scores.copy(), labels.copy()
    metrics.evaluate(scores, labels, llr=True)
    assert (scores == copies[0]).all()
    assert (labels == copies[1]).all()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1, 1], "2 targets and 0 non-targets"),
        ([1.0, 2.0], [0, 0], "0 targets and 2 non-targets"),
        ([], [], "0 targets and 0 non-targets"),
        ([1.0, np.nan, 0.0], [1, 1, 0], "1 of 3 scores.*index 1"),
        ([1.0, np.inf], [1, 0], "1 of 2 scores.*index 1"),
        ([1.0], [1, 0], r"shapes \(1,\) and \(2,\)"),
        ([[1.0], [2.0]], [[1], [0]], "one-dimensional"),
        ([1.0, 2.0], [1, 2], "got 2"),
        ([1.0, 2.0], [0.5, 1], "got 0.5"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        metrics.eer,
        metrics.min_dcf,
        metrics.cllr,
        metrics.evaluate,
    ],
)
def test_bad_input_is_refused(function, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        function(scores, labels)


@pytest.mark.parametrize("p", [0, 1, 5, -0.1])
def test_priors_out_of_range_are_refused(p):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        metrics.min_dcf([1.0, 0.0], [1, 0], p_target=p)


def test_costs_and_rates_out_of_range_are_refused():
    with pytest.raises(ValueError, match="c_miss=0"):
        metrics.min_dcf([1.0, 0.0], [1, 0], c_miss=0)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 5"):
        metrics.threshold_at_far([1.0, 0.0], [1, 0], far=5)


# The challenge's example files and the results published with them.


@pytest.fixture
def published():
    corpus = os.environ.get("SPEECHOCEAN762")
    folder = Path(corpus or ".").parent / "score_refs" / "voxsrc2021"
    if not corpus or not folder.is_dir():
        pytest.skip(
            "no folder score_refs/voxsrc2021 beside the one that "
            "SPEECHOCEAN762 names: known answers were NOT checked"
        )
    scores, scored = _columns(folder / "scores.txt")
    labels, listed = _columns(folder / "trials.txt")
    assert scored == listed
    return scores, labels


def _columns(path):
    rows = [line.split() for line in path.read_text().splitlines()]
    return (
        np.array([float(row[0]) for row in rows]),
        [tuple(row[1:]) for row in rows],
    )


@pytest.mark.real
def test_published_eer(published):
    scores, labels = published
    assert len(scores) == 60_000
    assert labels.sum() == 29_969
    assert round(metrics.eer(scores, labels), 3) == 5.177


@pytest.mark.real
def test_published_min_dcf_needs_thresholds_inside_ties(published):
    """0.2919 was published, a real threshold reaches 0.2928.

    Stepping through the sorted list one trial at a time, in file order among
    equal scores, puts thresholds inside ties. The best of these "thresholds"
    accepts some trials of one score and rejects others of the same score.
    """
    scores, labels = published
    assert round(metrics.min_dcf(scores, labels, 0.05), 4) == 0.2928

    order = np.argsort(scores, kind="stable")
    target = labels[order] == 1
    fnr = np.cumsum(target) / target.sum()  # rejected: up to and with trial i
    fpr = 1 - np.cumsum(~target) / (~target).sum()
    cost = (0.05 * fnr + 0.95 * fpr) / 0.05
    assert round(cost.min(), 4) == 0.2919
    last_rejected = int(cost.argmin())
    tie = scores[order[last_rejected]]
    assert scores[order[last_rejected + 1]] == tie
    # at the two ends of that tie the cost is what ours can reach
    rejected = np.flatnonzero(scores[order] < tie)[-1]
    assert cost[rejected] >= metrics.min_dcf(scores, labels, 0.05) - 1e-12
