"""SITW in miniature: models become recordings, keys become labels."""

import os

import miniature
import pytest

from speechbrain_ram.corpora.voxceleb import prepare_sitw
from speechbrain_ram.data.manifest import ManifestError
from speechbrain_ram.verification.trials import (
    TrialError,
    check_utterances,
    read_trials,
)

VOICES = miniature.voices(4, 3)


@pytest.fixture
def root(tmp_path):
    return miniature.sitw(tmp_path / "sitw", VOICES[:2], VOICES[2:])


def test_core_core(tmp_path, root):
    before = sorted(os.walk(root))
    out = tmp_path / "out"
    prepare_sitw(root, out)
    assert sorted(os.listdir(out)) == ["sitw-dev.txt", "sitw-eval.txt"]
    for part in ("dev", "eval"):
        path = out / f"sitw-{part}.txt"
        trials = read_trials(path)
        check_utterances(trials, root)
        # By hand: model -> file, then every line of the key.
        models = dict(
            line.split()
            for line in (root / part / "lists" / "enroll-core.lst").open()
        )
        expected = []
        for line in (root / part / "keys" / "core-core.lst").open():
            model, test, truth = line.split()
            label = {"tgt": 1, "imp": 0}[truth]
            expected.append(f"{label} {part}/{models[model]} {part}/{test}")
        assert path.read_text().splitlines() == expected
        assert len(trials) == 2 * 4 and trials.labels.sum() == 4
    assert sorted(os.walk(root)) == before


def test_two_models_of_one_recording(tmp_path, root):
    """Two people in one recording enrol two models with one file."""
    lists = root / "dev" / "lists" / "enroll-core.lst"
    first, second = lists.read_text().splitlines()
    lists.write_text(f"{first}\n{second.split()[0]} {first.split()[1]}\n")
    prepare_sitw(root, tmp_path / "out")
    trials = read_trials(tmp_path / "out" / "sitw-dev.txt")
    assert len(trials) == 8
    assert trials.enrol_ids == (f"dev/{first.split()[1]}",)


def test_converted_recordings(tmp_path, root):
    for path in sorted(root.rglob("*.flac")):
        path.rename(path.with_suffix(".wav"))
    with pytest.raises(TrialError, match="SITW dev: 6 of 6 recordings are mi"):
        prepare_sitw(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_good(tmp_path, root):
    with pytest.raises(ManifestError, match="nowhere/dev' does not exist"):
        prepare_sitw(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ManifestError, match="lies within the corpus"):
        prepare_sitw(root, root / "out")
    lists = root / "dev" / "lists"
    (lists / "enroll-core.lst").write_text(
        (lists / "enroll-assist.lst").read_text()
    )
    with pytest.raises(ManifestError, match="3 fields, one .* assist"):
        prepare_sitw(root, tmp_path / "out")
    (root / "dev" / "keys" / "core-core.lst").unlink()
    with pytest.raises(TrialError, match="core-core.lst' does not exist"):
        lists.joinpath("enroll-core.lst").write_text("12013 audio/x.flac\n")
        prepare_sitw(root, tmp_path / "out")


def test_a_missing_recording(tmp_path, root):
    next((root / "eval" / "audio").iterdir()).unlink()
    with pytest.raises(TrialError, match="SITW eval: 1 of 6"):
        prepare_sitw(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
