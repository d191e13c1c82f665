"""Scores against one pair at a time in float64; files against their text."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_ram.verification import scores as scoring
from speechbrain_ram.verification import trials as trials_module
from speechbrain_ram.verification.scores import (
    read_scores,
    score_trials,
    speaker_means,
    trial_vectors,
    unit_length,
    within_whitening,
    write_scores,
)
from speechbrain_ram.verification.trials import TrialError, TrialList


def naive_vector(name, embeddings, models, mean):
    """What one side of a trial is, by the definition."""

    def unit(vector):
        return vector / np.linalg.norm(vector)

    if models is None or name not in models:
        return unit(embeddings[name] - mean)
    return unit(
        np.mean([unit(embeddings[u] - mean) for u in models[name]], axis=0)
    )


def random_list(n=500, utterances=40, seed=0, models=False):
    """Trials over random names, and their embeddings in another order."""
    rng = np.random.default_rng(seed)
    names = [f"spk{i % 7}/{i}.wav" for i in range(utterances)]
    embeddings = {
        name: rng.standard_normal(8) * rng.uniform(0.1, 10) + 1
        for name in [*rng.permutation(names), "not/in/list.wav"]
    }
    enrol_ids = names[: utterances // 2]
    test_ids = names[utterances // 4 :]  # some utterances are on both sides
    table = None
    if models:
        table = {f"m{i}": tuple(names[i : i + 1 + i % 4]) for i in range(10)}
        enrol_ids = list(table)
    trials = TrialList(
        enrol_ids,
        test_ids,
        rng.integers(0, len(enrol_ids), n),
        rng.integers(0, len(test_ids), n),
        rng.integers(0, 2, n),
        table,
    )
    return trials, embeddings


@pytest.mark.parametrize("models", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("chunk", [4096, 7])
def test_scores_are_cosines_of_each_pair(models, centred, chunk, monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK", chunk)
    trials, embeddings = random_list(models=models)
    mean = np.full(8, 0.7) if centred else np.zeros(8)
    scores = score_trials(
        trials,
        list(embeddings),
        np.stack(list(embeddings.values())).astype(np.float32),
        mean if centred else None,
    )
    expected = [
        naive_vector(trials.enrol_ids[e], embeddings, trials.models, mean)
        @ naive_vector(trials.test_ids[t], embeddings, None, mean)
        for e, t in zip(trials.enrol, trials.test, strict=True)
    ]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=2e-6)


def test_an_utterance_on_both_sides_is_there_once():
    trials, embeddings = random_list(models=False)
    vectors = trial_vectors(
        trials, list(embeddings), np.stack(list(embeddings.values()))
    )
    assert len(vectors.vectors) == len(trials.utterances) == 40
    left = vectors.vectors[vectors.enrol]
    right = vectors.vectors[vectors.test]
    np.testing.assert_allclose(
        vectors.cosines(), (left * right).sum(1), atol=1e-6
    )


def test_a_model_of_one_utterance_is_that_utterance():
    trials, embeddings = random_list()
    by_model = TrialList(
        [f"model {i}" for i in range(len(trials.enrol_ids))],
        trials.test_ids,
        trials.enrol,
        trials.test,
        trials.labels,
        {f"model {i}": (name,) for i, name in enumerate(trials.enrol_ids)},
    )
    ids, matrix = list(embeddings), np.stack(list(embeddings.values()))
    np.testing.assert_allclose(
        score_trials(by_model, ids, matrix),
        score_trials(trials, ids, matrix),
        atol=1e-6,
    )


def test_the_embeddings_are_left_alone():
    trials, embeddings = random_list()
    matrix = np.stack(list(embeddings.values())).astype(np.float32)
    copy = matrix.copy()
    score_trials(trials, list(embeddings), matrix, mean=np.ones(8))
    speaker_means(matrix, list(embeddings), mean=np.ones(8))
    assert (matrix == copy).all()


def test_missing_and_useless_embeddings_are_named():
    trials = TrialList(("a",), ("b", "c"), [0, 0], [0, 1], [1, 0])
    with pytest.raises(ValueError, match="2 of 3 utterances have no .*: b, c"):
        score_trials(trials, ["a"], np.ones((1, 2)))
    for value, mean in ((0.0, None), (np.nan, None), (5.0, np.full(2, 5.0))):
        matrix = np.array([[1.0, 2.0], [value, value], [3.0, 1.0]])
        with pytest.raises(ValueError, match="1 of 3 embeddings .* is 'b'"):
            score_trials(trials, ["a", "b", "c"], matrix, mean)
    with pytest.raises(ValueError, match="the first is row 1"):
        unit_length(np.array([[1.0], [np.inf]]))


def test_speaker_means_are_means_of_unit_vectors():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((30, 6)) * 5
    speakers = [f"s{i % 4}" for i in range(30)]
    centre = rng.standard_normal(6)
    names, means = speaker_means(matrix, speakers, centre)
    assert names == ("s0", "s1", "s2", "s3")
    for name, mean in zip(names, means, strict=True):
        rows = [
            (row - centre) / np.linalg.norm(row - centre)
            for row, s in zip(matrix, speakers, strict=True)
            if s == name
        ]
        expected = np.mean(rows, axis=0)
        np.testing.assert_allclose(
            mean, expected / np.linalg.norm(expected), atol=1e-6
        )
    with pytest.raises(ValueError, match="30 embeddings and 2 speakers"):
        speaker_means(matrix, ["a", "b"])


def whitened_by_hand(matrix, speakers):
    """The covariance around speakers' means, from its definition."""
    scatter = np.zeros((matrix.shape[1], matrix.shape[1]))
    for name in set(speakers):
        rows = matrix[[s == name for s in speakers]].astype(np.float64)
        for row in rows:
            scatter += np.outer(row - rows.mean(0), row - rows.mean(0))
    return scatter + scatter.trace() / len(scatter) * np.eye(len(scatter))


@pytest.mark.parametrize("count", [7, 5000])  # above one block of rows
def test_whitening_is_the_inverse_of_the_scatter_within_speakers(count):
    rng = np.random.default_rng(count)
    speakers = [f"s{i % 6}" for i in range(count)]
    centres = {f"s{i}": 9 * rng.standard_normal(5) for i in range(6)}
    spread = rng.standard_normal((5, 5)) * [3, 1, 1, 0.1, 0.01]
    matrix = np.array([centres[s] for s in speakers])
    matrix = (matrix + rng.standard_normal((count, 5)) @ spread).astype("f4")
    whitening = within_whitening(matrix, speakers)
    expected = whitened_by_hand(matrix, speakers)
    # up to its scale, which unit length takes away
    product = whitening @ whitening.T @ expected
    np.testing.assert_allclose(
        product / product[0, 0], np.eye(5), atol=1e-5 * count**0.5
    )
    assert np.array_equal(whitening, within_whitening(matrix.copy(), speakers))

    def metric(one, other):  # the same without a square root
        inverse = np.linalg.inv(expected)
        lengths = [v @ inverse @ v for v in (one, other)]
        return one @ inverse @ other / np.prod(lengths) ** 0.5

    mean = rng.standard_normal(5)
    rows = unit_length(matrix[:4], mean, None, whitening)
    for i, j in ((0, 1), (2, 3)):
        cosine = metric(matrix[i] - mean, matrix[j] - mean)
        assert rows[i] @ rows[j] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize("rows", [np.eye(3), np.ones((3, 2))])
def test_whitening_needs_speakers_of_two_embeddings(rows):
    alone = ["a", "b", "c"] if len(rows[0]) == 3 else ["a", "a", "b"]
    with pytest.raises(
        ValueError, match="3 embeddings of . speakers.*--cohort"
    ):
        within_whitening(rows, alone)
    with pytest.raises(ValueError, match="3 embeddings and 2 speakers"):
        within_whitening(rows, ["a", "b"])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=1,
        max_size=30,
    )
)
def test_scores_survive_the_file_to_the_last_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("scores") / "scores.txt"
    n = len(values)
    index = np.arange(n)
    trials = TrialList(
        [f"e{i}" for i in range(n)],
        [f"t{i}" for i in range(n)],
        index,
        index[::-1],
        index % 2,
    )
    write_scores(trials, np.float32(values), path)
    again, scores = read_scores(path)
    assert (scores.astype(np.float32) == np.float32(values)).all()
    assert again.labels.tolist() == trials.labels.tolist()
    assert [again.test_ids[i] for i in again.test] == [
        f"t{i}" for i in range(n)
    ][::-1]
    assert [p.name for p in path.parent.iterdir()] == ["scores.txt"]


def test_score_files_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(trials_module, "_CHUNK", 3)
    trials, _ = random_list(n=20)
    scores = np.arange(20, dtype=np.float32) / 8
    write_scores(trials, scores, tmp_path / "scores.txt")
    lines = (tmp_path / "scores.txt").read_text().splitlines()
    assert lines == [
        f"{trials.enrol_ids[e]} {trials.test_ids[t]} {s} {y}"
        for e, t, s, y in zip(
            trials.enrol,
            trials.test,
            scores.tolist(),
            trials.labels,
            strict=True,
        )
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b 0.5 1\na b high 0\n", "line 2: .* has the score 'high'"),
        ("a b 0.5 1\na b nan 0\n", "line 2: .* has the score 'nan'"),
        ("a b -inf 1\na b 1 0\n", "line 1: .* has the score '-inf'"),
        ("a b 0.5 1\na b Infinity 0\n", "line 2: .* the score 'Infinity'"),
        ("a b 0.5 1\na b 1e999 0\n", "line 2: .* has the score '1e999'"),
        ("a b 0.5 1\na b 1_0 0\n", "line 2: .* has the score '1_0'"),
        ("a b 0x10 1\n", "line 1: .* has the score '0x10'"),
        ("a b \u0661\u0662 1\n", "line 1: .* has the score '\u0661\u0662'"),
        ("a b \uff11 1\n", "line 1: .* has the score '\uff11'"),
        ("a b 1e 1\n", "line 1: .* has the score '1e'"),
        ("a b 0.5 \u0661\n", "line 1: .* has the label '\u0661'"),
        ("a b 0.5 01\n", "line 1: .* has the label '01'"),
        ("a b 0.5 1\na b 0.5 yes\n", "line 2: .* has the label 'yes'"),
        ("1 a b\n", "line 1: .* has 3 fields; expected was 'ENROL TEST SCORE"),
    ],
)
def test_bad_score_files_are_refused(tmp_path, text, message):
    path = tmp_path / "scores.txt"
    path.write_text(text)
    with pytest.raises(TrialError, match=message):
        read_scores(path)


def test_one_score_a_trial_is_needed(tmp_path):
    trials, _ = random_list(n=20)
    with pytest.raises(ValueError, match="19 scores for 20 trials"):
        write_scores(trials, np.zeros(19), tmp_path / "scores.txt")
    assert not list(tmp_path.iterdir())


def test_agrees_with_speechbrains_cosine():
    import torch

    trials, embeddings = random_list()
    matrix = np.stack(list(embeddings.values())).astype(np.float32)
    rows = {name: torch.tensor(v) for name, v in embeddings.items()}
    similarity = torch.nn.CosineSimilarity(dim=-1, eps=1e-6)  # as it does
    expected = [
        similarity(
            rows[trials.enrol_ids[e]].float(), rows[trials.test_ids[t]].float()
        )
        for e, t in zip(trials.enrol, trials.test, strict=True)
    ]
    np.testing.assert_allclose(
        score_trials(trials, list(embeddings), matrix), expected, atol=2e-6
    )


@pytest.mark.real
def test_official_list_scores_by_speaker_direction():
    """On VoxCeleb1-O, one direction a speaker separates all trials."""
    from speechbrain_ram.verification.metrics import eer
    from speechbrain_ram.verification.trials import read_trials

    corpus = os.environ.get("SPEECHOCEAN762")
    path = Path(corpus or ".").parent / "trials" / "veri_test2.txt"
    if not corpus or not path.is_file():
        pytest.skip("no VoxCeleb1-O list beside SPEECHOCEAN762: NOT scored")
    trials = read_trials(path)
    rng = np.random.default_rng(0)
    speakers = {name.split("/")[0] for name in trials.utterances}
    direction = {s: rng.standard_normal(64) for s in sorted(speakers)}
    matrix = np.stack(
        [
            direction[name.split("/")[0]] * 4 + rng.standard_normal(64)
            for name in trials.utterances
        ]
    )
    scores = score_trials(trials, trials.utterances, matrix)
    assert eer(scores, trials.labels) == 0
