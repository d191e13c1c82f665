"""Score normalisation against one trial at a time in float64."""

import numpy as np
import pytest

from speechbrain_ram.verification import scores as score_norm
from speechbrain_ram.verification.scores import (
    METHODS,
    cohort_statistics,
    normalise,
    unit_length,
)


def naive(score, e, t, cohort, method, top_n):
    """Eq. 1-8 of Matejka et al., 2017, word by word."""
    scores_e, scores_t = cohort @ e, cohort @ t
    if method == "as-norm1":
        scores_e = np.sort(scores_e)[-top_n:]
        scores_t = np.sort(scores_t)[-top_n:]
    elif method == "as-norm2":
        near_e = np.argsort(scores_e)[-top_n:]
        near_t = np.argsort(scores_t)[-top_n:]
        scores_e, scores_t = scores_e[near_t], scores_t[near_e]
    z = (score - scores_e.mean()) / scores_e.std()
    t = (score - scores_t.mean()) / scores_t.std()
    return {"z-norm": z, "t-norm": t}.get(method, (z + t) / 2)


@pytest.fixture
def system():
    rng = np.random.default_rng(0)
    vectors = unit_length(rng.standard_normal((30, 12)))
    cohort = unit_length(rng.standard_normal((50, 12)))
    # rows 0-19 enrol, 10-29 test: some are on both sides, 5 on none
    enrol, test = rng.integers(0, 20, 400), rng.integers(10, 30, 400)
    enrol[enrol == 5] = 6
    scores = np.einsum("ne,ne->n", vectors[enrol], vectors[test])
    return scores, vectors, enrol, test, cohort


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "trials"), [(2048, 4096), (3, 7)])
def test_every_method_is_its_equation(
    system, method, rows, trials, monkeypatch
):
    monkeypatch.setattr(score_norm, "_ROWS", rows)
    monkeypatch.setattr(score_norm, "_TRIALS", trials)
    scores, vectors, enrol, test, cohort = system
    result = normalise(*system, method=method, top_n=9)
    v, c = vectors.astype(np.float64), cohort.astype(np.float64)
    expected = [
        naive(s, v[e], v[t], c, method, 9)
        for s, e, t in zip(scores, enrol, test, strict=True)
    ]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_methods_differ(system):
    results = [normalise(*system, method=m, top_n=9) for m in METHODS]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert np.abs(one - other).max() > 0.1


def test_a_whole_cohort_is_not_adaptive(system):
    whole = normalise(*system, method="s-norm")
    for method in ("as-norm1", "as-norm2"):
        adaptive = normalise(*system, method=method, top_n=50)
        np.testing.assert_allclose(adaptive, whole, rtol=1e-4, atol=1e-4)


def test_sides_are_interchangeable_in_symmetric_methods(system):
    scores, vectors, enrol, test, cohort = system
    for method in ("s-norm", "as-norm1", "as-norm2"):
        np.testing.assert_allclose(
            normalise(scores, vectors, test, enrol, cohort, method, 9),
            normalise(scores, vectors, enrol, test, cohort, method, 9),
            rtol=1e-5,
            atol=1e-5,
        )


def test_statistics_of_chosen_rows_only(system):
    _, vectors, _, _, cohort = system
    mean, std = cohort_statistics(vectors, cohort)
    some_mean, some_std = cohort_statistics(
        vectors, cohort, rows=np.array([4, 7])
    )
    assert np.isfinite(some_mean).sum() == np.isfinite(some_std).sum() == 2
    np.testing.assert_allclose(some_mean[[4, 7]], mean[[4, 7]], rtol=1e-5)
    np.testing.assert_allclose(some_std[[4, 7]], std[[4, 7]], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "asnorm"}, "one of z-norm, t-norm, .*got 'asnorm'"),
        ({"top_n": 51}, "at least 51 speakers, got 50 with top_n=51"),
        ({"top_n": 1}, "at least 2 speakers, got 50 with top_n=1"),
    ],
)
def test_bad_choices_are_refused(system, options, message):
    with pytest.raises(ValueError, match=message):
        normalise(*system, **options)


def test_bad_cohorts_are_refused(system):
    scores, vectors, enrol, test, cohort = system
    with pytest.raises(ValueError, match="7 dimensions, the embeddings 12"):
        normalise(scores, vectors, enrol, test, cohort[:, :7], "s-norm")
    with pytest.raises(ValueError, match="at least 2 speakers, got 1"):
        normalise(scores, vectors, enrol, test, cohort[:1], "z-norm")
    same = np.repeat(cohort[:1], 5, axis=0)
    with pytest.raises(ValueError, match="repeat one speaker"):
        normalise(scores, vectors, enrol, test, same * 0, "z-norm")
