"""Tests of the agreement among one speaker's recordings."""

import numpy as np
import pytest

from speechbrain_ram.verification.enrolment import (
    EnrolmentDatabase,
    EnrolmentError,
)
from speechbrain_ram.verification.gates import agreements, misfits


def _voices(*speakers, noise=0.3):
    """Unit vectors [N, 16]: recordings of these speakers, in this order."""
    draw = np.random.default_rng(0)
    rows = np.eye(16)[list(speakers)]
    rows = rows + noise * draw.standard_normal(rows.shape) / 4
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("enrolled", [None, _voices(0, 0, 1).sum(axis=0)])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_each_recording_is_compared_with_the_others(n, enrolled):
    units = _voices(*range(n), noise=2.0)
    found = agreements(units, enrolled)
    for i, unit in enumerate(units):
        others = [each for j, each in enumerate(units) if j != i]
        if enrolled is not None:
            others.append(enrolled)
        mean = np.sum(others, axis=0)
        expected = np.inf  # nothing contradicts it
        if others:
            expected = unit @ mean / np.linalg.norm(mean)
        assert found[i] == pytest.approx(expected)


@pytest.mark.parametrize(
    "speakers, wrong",
    [
        ((0,), set()),
        ((0, 0), set()),
        ((0, 1), {0, 1}),  # nobody can tell which
        ((0, 0, 1), {2}),
        ((1, 0, 0), {0}),
        ((0, 1, 0, 0, 2, 0), {1, 4}),
        ((0, 1, 2), {0, 1, 2}),
        ((), set()),
    ],
)
def test_the_ones_that_do_not_fit_are_found(speakers, wrong):
    found = misfits(_voices(*speakers), 0.6)
    assert set(found) == wrong
    assert all(score < 0.6 for score in found.values())


def test_what_is_enrolled_counts_and_is_not_judged():
    enrolled = _voices(0, 0).sum(axis=0)
    assert set(misfits(_voices(0, 1), 0.6, enrolled)) == {1}
    assert set(misfits(_voices(1), 0.6, enrolled)) == {0}
    assert set(misfits(_voices(1, 1), 0.6, enrolled)) == {0, 1}


def test_one_misfit_and_nobody_is_enrolled(tmp_path):
    database = EnrolmentDatabase(tmp_path / "who.db", "f00d", 16)
    database.enrol("ada", _voices(0, 0))
    names = {"ada": ["a.wav"], "bob": ["b.wav", "c.wav", "d.wav"]}
    recordings = {"ada": _voices(0), "bob": _voices(1, 2, 1)}
    with pytest.raises(
        EnrolmentError,
        match=r"^Recordings do not fit .* 0\.500 or more: 'c.wav' of 'bob' \(0",
    ):
        database.enrol_many(recordings, 0.5, names)
    with pytest.raises(EnrolmentError, match=r": 'recording 2' of 'bob' \("):
        database.enrol("bob", recordings["bob"], 0.5)
    with pytest.raises(EnrolmentError, match="'recording 1' of 'ada'"):
        database.enrol("ada", _voices(1), 0.5)
    assert database.speakers() == {"ada": 2}
    assert database.enrol_many(recordings, -1.0) == {"ada": 3, "bob": 3}


def test_the_nearest_other_speaker(tmp_path):
    database = EnrolmentDatabase(tmp_path / "who.db", "f00d", 16)
    database.enrol("ada", np.eye(16)[0])
    assert database.nearest("ada") is None
    database.enrol_many({"bob": np.eye(16)[1], "eve": np.eye(16)[0]})
    assert database.nearest("ada").name == "eve"
    assert database.nearest("eve").name == "ada"
    assert database.nearest("eve").score == pytest.approx(1.0)
    with pytest.raises(EnrolmentError, match="Nobody called 'cy' is enrolled"):
        database.nearest("cy")
