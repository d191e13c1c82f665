"""A folder of speakers: the split, and every folder that is no good."""

import os
from collections import Counter

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from speechbrain_ram.corpora.folder import prepare_folder
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    read_manifest,
    split_by_utterance,
)


def make_corpus(root, counts, seconds=0.2, **settings):
    """Write `counts[speaker]` files for each speaker."""
    rate = settings.get("rate", 16000)
    channels = settings.get("channels", 1)
    for speaker, count in counts.items():
        for i in range(count):
            path = root / speaker / f"session{i % 2}" / f"{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = np.zeros((round(seconds * rate), channels))
            soundfile.write(path, samples, rate)
    return root


@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=30).filter(
        lambda counts: max(counts) > 1
    ),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_split_properties(counts, share, seed):
    rows = [
        Utterance(f"{s}/{i}", 1.0, "", 0, 1, str(s))
        for s, count in enumerate(counts)
        for i in range(count)
    ]
    train, valid = split_by_utterance(rows, share, seed)
    assert sorted(train + valid) == sorted(rows)
    assert valid
    kept, held = (Counter(r.spk_id for r in part) for part in (train, valid))
    assert set(kept) == {str(s) for s in range(len(counts))}
    # No more than asked for (but one at least), and spread over speakers.
    assert len(valid) <= max(round(share * len(rows)), 1)
    if min(counts) > 1 / share and share < 0.5:
        assert len(valid) == round(share * len(rows))
        for s, count in enumerate(counts):
            assert abs(held[str(s)] - share * count) < 2
    assert (train, valid) == split_by_utterance(rows, share, seed)


def test_split_is_chosen_by_the_seed():
    rows = [
        Utterance(f"{s}{i}", 1.0, "", 0, 1, s) for s in "ab" for i in range(50)
    ]
    first, second = (split_by_utterance(rows, 0.1, seed)[1] for seed in (1, 2))
    assert first != second


def test_manifests_of_a_folder(tmp_path):
    counts = {"anna": 10, "ben": 20, "cleo": 1}
    root = make_corpus(tmp_path / "corpus", counts)
    before = sorted(os.walk(root))
    paths = prepare_folder(root, tmp_path / "out", valid_fraction=0.2)
    train, valid = map(read_manifest, paths)
    assert Counter(r.spk_id for r in train + valid) == counts
    assert len(valid) == 6
    assert "cleo" not in {r.spk_id for r in valid}
    for row in train + valid:
        assert row.id.startswith(f"{row.spk_id}/session")
        assert os.path.isfile(row.path(root))
    assert sorted(os.walk(root)) == before

    # The same again, file for file; another seed, other utterances.
    contents = [path.read_bytes() for path in paths]
    prepare_folder(root, tmp_path / "out", valid_fraction=0.2)
    assert [path.read_bytes() for path in paths] == contents
    other = prepare_folder(root, tmp_path / "out2", valid_fraction=0.2, seed=7)
    assert other[1].read_bytes() != contents[1]


def test_a_changed_file_changes_the_manifest(tmp_path):
    root = make_corpus(tmp_path / "corpus", {"anna": 2, "ben": 2})
    prepare_folder(root, tmp_path / "out", valid_fraction=0.5)
    changed = root / "ben" / "session0" / "0.wav"
    soundfile.write(changed, np.zeros(8000), 16000)
    paths = prepare_folder(root, tmp_path / "out", valid_fraction=0.5)
    rows = {row.id: row for path in paths for row in read_manifest(path)}
    assert rows["ben/session0/0.wav"].duration == 0.5
    assert rows["ben/session1/1.wav"].duration == 0.2


def test_folders_that_are_no_good(tmp_path):
    out = tmp_path / "out"

    def prepare(root, **settings):
        return prepare_folder(tmp_path / root, out, **settings)

    with pytest.raises(ManifestError, match="missing' does not exist"):
        prepare("missing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ManifestError, match="bare' holds no recordings"):
        prepare("bare")
    make_corpus(tmp_path / "one", {"anna": 5})
    with pytest.raises(ManifestError, match="one speaker only, 'anna'"):
        prepare("one")
    make_corpus(tmp_path / "singles", {"anna": 1, "ben": 1})
    with pytest.raises(ManifestError, match="No speaker has two utterances"):
        prepare("singles")
    make_corpus(tmp_path / "good", {"anna": 3, "ben": 3})
    for share in (0, 1, 10, -0.1, float("nan")):
        with pytest.raises(ManifestError, match=f"valid_fraction is {share}"):
            prepare("good", valid_fraction=share)
    with pytest.raises(ManifestError, match="lies within the corpus"):
        prepare_folder(tmp_path / "good", tmp_path / "good" / "out")
    soundfile.write(tmp_path / "good" / "stray.wav", np.zeros(9), 16000)
    with pytest.raises(ManifestError, match="stray.wav' lies in no speaker's"):
        prepare("good")
    # Nothing half-done is left behind.
    assert not (out / "train.csv").exists()
    assert not (out / "valid.csv").exists()


@pytest.mark.parametrize(
    ("settings", "option", "message"),
    [
        ({"rate": 8000}, "resample", "sample rate of 8000 Hz, 16000 Hz"),
        ({"rate": 48000}, "resample", "sample rate of 48000 Hz, 16000 Hz"),
        ({"channels": 2}, "mixdown", "2 channels, mono is needed"),
    ],
)
def test_other_rates_and_channels_only_when_asked(
    tmp_path, settings, option, message
):
    root = make_corpus(tmp_path / "corpus", {"a": 3, "b": 3}, **settings)
    message += f".*--{option} True"  # as a user types it
    with pytest.raises(ManifestError, match=message):
        prepare_folder(root, tmp_path / "out")
    paths = prepare_folder(root, tmp_path / "out", **{option: True})
    rows = [row for path in paths for row in read_manifest(path)]
    assert {row.duration for row in rows} == {0.2}


def test_a_rate_that_cannot_be_converted_is_found_before_training(tmp_path):
    root = make_corpus(tmp_path / "corpus", {"a": 3, "b": 3}, rate=44_101)
    with pytest.raises(ManifestError, match="44101 Hz, which cannot be conv"):
        prepare_folder(root, tmp_path / "out", resample=True)


def test_a_failed_preparation_keeps_the_manifests_of_before(tmp_path):
    root = make_corpus(tmp_path / "corpus", {"a": 3, "b": 3})
    paths = prepare_folder(root, tmp_path / "out")
    before = [path.read_bytes() for path in paths]
    bad = root / "a" / "session0" / "0.wav"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(ManifestError, match="0.wav' is truncated"):
        prepare_folder(root, tmp_path / "out")
    assert [path.read_bytes() for path in paths] == before
    prepare_folder(root, tmp_path / "out", skip_bad=True)
    assert len(read_manifest(paths[0]) + read_manifest(paths[1])) == 5
    assert str(bad) in (tmp_path / "out" / "skipped.txt").read_text()


@pytest.mark.real
def test_real_speech(tmp_path):
    if "SPEECHOCEAN762" not in os.environ:
        pytest.skip("set SPEECHOCEAN762 to the folder of that corpus")
    root = os.path.join(os.environ["SPEECHOCEAN762"], "train")
    train, valid = map(read_manifest, prepare_folder(root, tmp_path))
    assert (len(train), len(valid)) == (2250, 250)
    assert len({row.spk_id for row in train}) == 125
    row = valid[0]
    assert row.stop == len(soundfile.read(row.path(root))[0])
