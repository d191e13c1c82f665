"""The synthetic corpus: its shape, its repeatability, its difficulty."""

import itertools
import json
import os

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import roc_curve
from speechbrain.lobes.features import Fbank

from speechbrain_ram.corpora.folder import prepare_folder
from speechbrain_ram.corpora.synthetic import make_synthetic
from speechbrain_ram.data.manifest import ManifestError, read_manifest
from speechbrain_ram.verification.trials import check_utterances, read_trials

TINY = {
    "n_speakers": 3,
    "n_utterances": 3,
    "n_test_speakers": 2,
    "n_test_utterances": 3,
    "min_seconds": 0.3,
    "max_seconds": 0.6,
}


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_shape_of_the_corpus(tmp_path):
    corpus = make_synthetic(tmp_path / "corpus", **TINY)
    paths = prepare_folder(corpus.train_root, tmp_path / "out")
    rows = [row for path in paths for row in read_manifest(path)]
    assert len(rows) == 9
    assert {row.spk_id for row in rows} == {"id10001", "id10002", "id10003"}
    assert all(0.3 <= row.duration <= 0.6 for row in rows)
    info = soundfile.info(rows[0].path(corpus.train_root))
    assert (info.samplerate, info.channels, info.subtype) == (
        16000,
        1,
        "PCM_16",
    )
    video, name = rows[0].id.split("/")[1:]
    assert name[5:] == ".wav" and name[:5].isdigit() and len(video) == 11

    # All pairs of other speakers' utterances, none with itself.
    trials = read_trials(corpus.trials)
    check_utterances(trials, corpus.test_root)
    assert len(trials) == 6 * 5 // 2
    assert trials.labels.sum() == 2 * 3
    for enrol, test, label in zip(
        trials.enrol, trials.test, trials.labels, strict=True
    ):
        first, second = trials.enrol_ids[enrol], trials.test_ids[test]
        assert first != second
        assert label == (first.split("/")[0] == second.split("/")[0])
    test_speakers = {name.split("/")[0] for name in trials.utterances}
    assert not test_speakers & {row.spk_id for row in rows}
    assert sorted(os.listdir(tmp_path)) == ["corpus", "out"]


def test_same_settings_same_samples(tmp_path):
    make_synthetic(tmp_path / "a", **TINY)
    make_synthetic(tmp_path / "b", **TINY)
    make_synthetic(tmp_path / "c", **TINY, seed=1)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a if name.endswith(".wav"))
    sounds = [data for name, data in a.items() if name.endswith(".wav")]
    assert len(set(sounds)) == len(sounds) == 15


def test_samples_are_healthy(tmp_path):
    make_synthetic(tmp_path / "a", **TINY)
    for path in (tmp_path / "a").rglob("*.wav"):
        samples, _ = soundfile.read(path)
        assert 0.09 < np.abs(samples).max() < 0.91
        assert abs(samples.mean()) < 0.05 * samples.std()


def test_made_once(tmp_path, monkeypatch):
    corpus = make_synthetic(tmp_path / "a", **TINY)
    before = corpus.trials.stat().st_mtime_ns
    monkeypatch.setattr("speechbrain_ram.corpora.synthetic._write_corpus", None)
    assert make_synthetic(tmp_path / "a", **TINY) == corpus
    assert corpus.trials.stat().st_mtime_ns == before
    with pytest.raises(ManifestError, match="'seed': '1986 there, 2 wanted'"):
        make_synthetic(tmp_path / "a", **TINY, seed=2)
    stamp = tmp_path / "a" / "synthetic.json"
    for text in ("", "[" * 10_000, '{"seed": ' + "9" * 5000 + "}", "NaN"):
        stamp.write_text(text)
        with pytest.raises(ManifestError, match="synthetic.json' does not say"):
            make_synthetic(tmp_path / "a", **TINY)
    for text in ("[1]", "7", "null"):
        stamp.write_text(text)
        with pytest.raises(ManifestError, match="holds no synthetic corpus"):
            make_synthetic(tmp_path / "a", **TINY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ManifestError, match="mine' is not empty"):
        make_synthetic(tmp_path / "mine", **TINY)


def test_interrupted_making_leaves_nothing(tmp_path, monkeypatch):
    calls = itertools.count()

    def write(path, *_, **__):
        if next(calls) == 4:
            raise OSError("No space left on device")
        path.touch()

    monkeypatch.setattr(soundfile, "write", write)
    with pytest.raises(OSError, match="No space left"):
        make_synthetic(tmp_path / "deep" / "a", **TINY)
    assert os.listdir(tmp_path / "deep") == []


def test_two_processes_at_once(tmp_path, monkeypatch):
    """The slower one finds the corpus there when it wants to rename."""
    from speechbrain_ram.corpora import synthetic

    original = synthetic._write_corpus

    def slow(folder, settings):
        original(folder, settings)
        monkeypatch.setattr(synthetic, "_write_corpus", original)
        make_synthetic(tmp_path / "a", **TINY)

    monkeypatch.setattr(synthetic, "_write_corpus", slow)
    make_synthetic(tmp_path / "a", **TINY)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_speakers": 1}, "n_speakers is 1, expected >= 2"),
        ({"n_test_utterances": 1}, "n_test_utterances is 1"),
        ({"min_seconds": 0.01}, "min_seconds is 0.01"),
        ({"min_seconds": 5.0}, "max_seconds 0.6"),
    ],
)
def test_impossible_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic(tmp_path / "a", **{**TINY, **settings})
    assert not (tmp_path / "a").exists()


def test_average_spectra_do_not_give_the_speakers_away(tmp_path):
    """Else the corpus could not tell a good encoder from a poor one."""
    settings = {"n_speakers": 2, "n_utterances": 1, "n_test_speakers": 20}
    corpus = make_synthetic(tmp_path / "a", **settings)
    trials = read_trials(corpus.trials)
    fbank = Fbank(n_mels=80)
    means = []
    for name in trials.utterances:
        samples, _ = soundfile.read(corpus.test_root / name, dtype="float32")
        mean = fbank(torch.from_numpy(samples)[None])[0].mean(dim=0).numpy()
        means.append((mean - mean.mean()) / mean.std())
    means = np.stack(means) - np.mean(means, axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    rows = {name: row for row, name in enumerate(trials.utterances)}
    enrol = np.array([rows[name] for name in trials.enrol_ids])[trials.enrol]
    test = np.array([rows[name] for name in trials.test_ids])[trials.test]
    scores = (means[enrol] * means[test]).sum(axis=1)
    false_alarms, hits, _ = roc_curve(trials.labels, scores)
    at = np.argmin(np.abs(false_alarms - (1 - hits)))
    assert 0.30 < false_alarms[at] < 0.47


def test_settings_are_on_record(tmp_path):
    make_synthetic(tmp_path / "a", **TINY)
    stamp = json.loads((tmp_path / "a" / "synthetic.json").read_text())
    assert stamp == {**TINY, "seed": 1986, "version": 2}
