"""The bootstrap against lists written out trial by trial, and coverage."""

import numpy as np
import pytest

from speechbrain_ram.verification import bootstrap as bootstrapping
from speechbrain_ram.verification.bootstrap import (
    Interval,
    _ends,
    _error_rates,
    _replicate,
    _Resampled,
    bootstrap,
    bootstrap_draws,
    bootstrap_thresholds,
    paired_bootstrap,
    too_few_speakers,
)
from speechbrain_ram.verification.metrics import (
    eer,
    error_curve,
    evaluate,
    min_dcf,
    threshold_at_far,
)


def speaker_list(n=3000, speakers=20, effect=1.0, seed=0, decimals=None):
    """Trials whose scores depend on who speaks."""
    rng = np.random.default_rng(seed)
    shift = effect * rng.standard_normal(speakers)
    labels = (rng.random(n) < 0.4).astype(np.int8)
    enrol = rng.integers(0, speakers, n)
    other = (enrol + rng.integers(1, speakers, n)) % speakers
    test = np.where(labels, enrol, other)
    scores = rng.standard_normal(n) + 2.5 * labels
    scores += (shift[enrol] + shift[test]) / 2
    if decimals is not None:
        scores = scores.round(decimals)
    return scores, labels, enrol, test


@pytest.mark.parametrize("decimals", [None, 1])
def test_a_replicate_is_the_list_with_repeated_trials(decimals):
    scores, labels, enrol, test = speaker_list(decimals=decimals)
    system = _Resampled(scores, labels, enrol, test)
    rng = np.random.default_rng(1)
    for _ in range(20):
        weights = rng.multinomial(20, np.full(20, 1 / 20))
        times = np.where(
            labels == 1, weights[enrol], weights[enrol] * weights[test]
        )
        written_out = np.repeat(scores, times), np.repeat(labels, times)
        curve = system.replicate(weights)
        assert curve.n_target == written_out[1].sum()
        assert curve.eer()[0] == pytest.approx(eer(*written_out))
        for p in (0.5, 0.05):
            assert curve.min_dcf(p)[0] == pytest.approx(
                min_dcf(*written_out, p)
            )


def test_thresholds_of_a_replicate_are_those_of_the_list_written_out():
    scores, labels, enrol, test = speaker_list()
    system = _Resampled(scores, labels, enrol, test, whole=True)
    weights = np.random.default_rng(1).multinomial(20, np.full(20, 1 / 20))
    times = np.where(
        labels == 1, weights[enrol], weights[enrol] * weights[test]
    )
    written_out = np.repeat(scores, times), np.repeat(labels, times)
    curve = system.replicate(weights)
    for far in (0.01, 0.1):
        expected, misses = threshold_at_far(*written_out, far)
        accepted = written_out[0] >= curve.at_far(far)[0]
        np.testing.assert_array_equal(accepted, written_out[0] >= expected)
        assert curve.at_far(far)[1] == pytest.approx(misses)


def test_thresholds_have_intervals():
    scores, labels, enrol, test = speaker_list(effect=0.3)
    trials = scores / 10, labels, enrol, test
    found = bootstrap_thresholds(*trials, fars=(0.01,), replicates=100)
    assert found["EER"].value == error_curve(*trials[:2]).eer()[1]
    assert found["FAR=1%"].value == threshold_at_far(*trials[:2], 0.01)[0]
    for each in found.values():
        assert each.low < each.value < each.high < each.low + 0.3
    high = bootstrap_thresholds(9 + scores, *trials[1:], replicates=10)["EER"]
    assert high.low == high.high == 1  # as cosines end there


def test_a_draw_without_targets_is_drawn_again():
    system = _Resampled([0.9, 0.1, 0.3], [1, 0, 0], list("aab"), list("abc"))
    assert system.replicate(np.array([0, 2, 1])) is None
    draws = bootstrap_draws(
        [0.9, 0.1, 0.3], [1, 0, 0], list("aab"), list("abc"), replicates=50
    )
    assert np.isfinite(draws["EER"]).all()


@pytest.mark.parametrize(
    "own, others, says",
    [
        (2, 2, "2 speakers have same-speaker trials, 10 are needed"),
        (9, 12, "9 speakers have same-speaker trials"),
        (12, 9, "9 speakers have different-speaker trials"),
        (10, 10, ""),
    ],
)
def test_few_speakers_have_no_intervals(own, others, says):
    """Two speakers have one draw, which made an interval of no width."""
    names = [*range(own), *range(others)] * 20
    other = [*range(own), *((i + 1) % others for i in range(others))] * 20
    labels = ([1] * own + [0] * others) * 20
    scores = np.random.default_rng(0).standard_normal(len(labels)) + labels
    who = labels, names, other
    assert says in too_few_speakers(*who)
    few = {"replicates": 20, "p_targets": ()}
    for found in (
        bootstrap(scores, *who, **few),
        paired_bootstrap(scores, scores, *who, **few),
        bootstrap_thresholds(scores, *who, replicates=20),
    ):
        assert bool(found) == (not says)
    assert bool(too_few_speakers(*who)) == bool(says)


def test_interval_holds_the_value_and_is_reproducible():
    trials = speaker_list()
    first = bootstrap(*trials, replicates=200, seed=3)
    assert bootstrap(*trials, replicates=200, seed=3) == first
    assert bootstrap(*trials, replicates=200, seed=4) != first
    exact = evaluate(*trials[:2])
    assert list(first) == [
        "EER",
        "minDCF(0.01)",
        "minDCF(0.001)",
        "minDCF(0.05)",
    ]
    assert first["EER"].value == exact.eer
    assert first["minDCF(0.05)"].value == exact.min_dcf[0.05]
    for interval in first.values():
        assert interval.low <= interval.value <= interval.high
    narrow = bootstrap(*trials, replicates=200, seed=3, level=0.5)["EER"]
    assert first["EER"].low < narrow.low < narrow.high < first["EER"].high


def test_intervals_are_reflected_percentiles():
    trials = speaker_list()
    _, value, draws = _replicate(
        [_Resampled(*trials)], _error_rates((0.5,)), 100, 3, False
    )
    found = bootstrap(*trials, p_targets=(0.5,), replicates=100, seed=3)
    low, high = np.percentile(draws[:, 0], [2.5, 97.5], axis=0)
    for i, interval in enumerate(found.values()):
        assert interval.value == value[0, i]
        assert interval.low == pytest.approx(2 * value[0, i] - high[i])
        assert interval.high == pytest.approx(2 * value[0, i] - low[i])


def test_intervals_hold_their_value_and_no_negative_rate():
    """Few errors: reflected percentiles end below zero, or off the value."""
    narrow = 0
    for seed in range(20):
        scores, labels, enrol, test = speaker_list(300, speakers=10, seed=seed)
        trials = scores + 3 * labels, labels, enrol, test
        _, value, draws = _replicate(
            [_Resampled(*trials)], _error_rates((0.01,)), 30, 0, False
        )
        ends = np.percentile(draws[:, 0], [2.5, 97.5], axis=0)
        narrow += ((value[0] < ends[0]) | (value[0] > ends[1])).sum()
        narrow += (2 * value[0] < ends[1]).sum()
        for interval in bootstrap(
            *trials, p_targets=(0.01,), replicates=30
        ).values():
            assert 0 <= interval.low <= interval.value <= interval.high
    assert narrow > 3  # else this test would test nothing


def test_intervals_end_where_the_metric_does():
    scores, labels, enrol, test = speaker_list(2000, speakers=12, effect=2.0)
    poor = scores - labels, labels, enrol, test
    found = bootstrap(*poor, p_targets=(0.05,), replicates=50)
    assert found["minDCF(0.05)"].value < 0.95
    assert found["minDCF(0.05)"].high == 1  # 1.05 by the formula
    inverted = scores - 12 * labels, labels, enrol, test
    found = bootstrap(*inverted, p_targets=(), replicates=50)
    assert 99 < found["EER"].value <= found["EER"].high <= 100


def test_intervals_are_widened_to_hold_their_value():
    value = np.array([0.5, 0.5])
    draws = np.stack([np.linspace(0.3, 0.4, 99), np.linspace(0.6, 0.7, 99)], 1)
    low, high = _ends(value, draws, 0.95)
    assert low[0] == high[1] == 0.5
    assert high[0] == pytest.approx(0.7, abs=0.01)
    assert low[1] == pytest.approx(0.3, abs=0.01)


def test_p_value_and_interval_agree():
    """At the level 1 - p the interval ends at zero."""
    scores, labels, enrol, test = speaker_list(4000, seed=9)
    noise = np.random.default_rng(9).standard_normal((2, 4000))
    options = {"p_targets": (), "replicates": 400}
    one, other = scores + noise[0], scores + 1.1 * noise[1]
    who = labels, enrol, test
    p = paired_bootstrap(one, other, *who, **options)["EER"].p_value
    assert 0.02 < p < 0.9
    within = paired_bootstrap(one, other, *who, level=1 - p - 0.02, **options)[
        "EER"
    ]
    beyond = paired_bootstrap(
        one, other, *who, level=min(1 - p + 0.02, 0.999), **options
    )["EER"]
    assert not within.low <= 0 <= within.high
    assert beyond.low <= 0 <= beyond.high


def test_names_of_speakers_may_be_strings():
    scores, labels, enrol, test = speaker_list(500)
    names = np.array([f"{i:02d}" for i in range(20)])
    assert bootstrap(
        scores, labels, names[enrol], names[test], replicates=20
    ) == bootstrap(scores, labels, enrol, test, replicates=20)


def test_intervals_grow_with_what_speakers_have_in_common():
    """Resampling trials would not see the difference."""

    def width(effect):
        trials = speaker_list(20_000, effect=effect)
        interval = bootstrap(*trials, p_targets=(), replicates=100)["EER"]
        return interval.high - interval.low

    assert width(1.0) > 3 * width(0.0)


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """95 % intervals hold what endless speakers would give, nearly always.

    Plain percentiles hold it for EER in 0.95, for minDCF(0.05) in 0.81 and
    for minDCF(0.01) in 0.37 of such lists.
    """
    endless = evaluate(*speaker_list(2_000_000, speakers=20_000)[:2])
    held = np.zeros(3)
    for seed in range(150):
        trials = speaker_list(4000, speakers=60, seed=seed + 1)
        found = bootstrap(*trials, p_targets=(0.05, 0.01), replicates=200)
        held += [
            interval.low <= truth <= interval.high
            for interval, truth in zip(
                found.values(),
                (endless.eer, endless.min_dcf[0.05], endless.min_dcf[0.01]),
                strict=True,
            )
        ]
    eer_share, dcf_share, hard_share = held / 150
    assert 0.88 <= eer_share <= 0.99
    assert 0.88 <= dcf_share <= 0.99
    assert 0.78 <= hard_share <= 0.99


@pytest.mark.slow
def test_intervals_of_few_speakers_would_not_cover_the_truth(monkeypatch):
    """Why ten are the least: 0.87 at ten, 0.76 at five, 0.50 at three."""
    monkeypatch.setattr(bootstrapping, "LEAST_SPEAKERS", 3)
    truth = eer(*speaker_list(1_000_000, speakers=20_000)[:2])
    held = {3: 0, 5: 0, 10: 0}
    for speakers in held:
        for seed in range(300):
            trials = speaker_list(1500, speakers, seed=seed + 1)
            found = bootstrap(*trials, p_targets=(), replicates=150)["EER"]
            held[speakers] += found.low <= truth <= found.high
    assert held[3] < 0.6 * 300 < held[5] < 0.82 * 300 < held[10]


@pytest.mark.slow
def test_p_values_are_small_as_often_as_they_should_be():
    """Two systems that differ by chance alone: p < 0.1 in 10 % of lists."""
    p_values = []
    for seed in range(150):
        scores, labels, enrol, test = speaker_list(2000, 60, seed=seed)
        noise = np.random.default_rng(seed).standard_normal((2, 2000))
        p_values.append(
            paired_bootstrap(
                *(scores + noise), labels, enrol, test, (), replicates=200
            )["EER"].p_value
        )
    assert 0.03 <= np.mean(np.array(p_values) < 0.1) <= 0.2


def test_pairing_sees_what_two_intervals_do_not():
    """A small gain on every trial, hidden by the spread of speakers."""
    scores, labels, enrol, test = speaker_list(6000, effect=1.5)
    better = scores + 0.15 * labels
    result = paired_bootstrap(
        better, scores, labels, enrol, test, replicates=300
    )["EER"]
    assert result.value == eer(better, labels) - eer(scores, labels)
    assert result.high < 0
    assert result.p_value < 0.01
    alone = [
        bootstrap(s, labels, enrol, test, replicates=100)["EER"]
        for s in (better, scores)
    ]
    assert alone[0].high > alone[1].low


def test_a_system_does_not_differ_from_itself():
    scores, labels, enrol, test = speaker_list(500)
    for difference in paired_bootstrap(
        scores, scores * 2, labels, enrol, test, replicates=50
    ).values():
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)
        assert difference.p_value == 1


def test_noise_is_not_significant():
    scores, labels, enrol, test = speaker_list(4000, seed=7)
    noise = np.random.default_rng(8).standard_normal((2, 4000))
    result = paired_bootstrap(
        scores + noise[0],
        scores + noise[1],
        labels,
        enrol,
        test,
        replicates=200,
    )["EER"]
    assert result.low < 0 < result.high
    assert result.p_value > 0.05


def test_intervals_print_themselves():
    assert f"{Interval(5.5, 4.25, 6.75):.2f}" == "5.50 [4.25, 6.75]"


@pytest.mark.parametrize(
    ("enrol", "test", "message"),
    [
        (list("ab"), list("ab"), r"\(2,\) and \(2,\) for \(3,\) scores"),
        (list("aaa"), list("aaa"), "at least two speakers"),
        (list("aab"), list("bbc"), "1 trials contradict .* index 0: label 1"),
        (list("aab"), list("abb"), "1 trials contradict .* index 2: label 0"),
    ],
)
def test_speakers_that_do_not_fit_are_refused(enrol, test, message):
    with pytest.raises(ValueError, match=message):
        bootstrap([0.9, 0.1, 0.2], [1, 0, 0], enrol, test)


def test_levels_in_percent_are_refused():
    with pytest.raises(ValueError, match="got 95"):
        bootstrap(*speaker_list(100), replicates=10, level=95)
