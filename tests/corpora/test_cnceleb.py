"""CN-Celeb in miniature: two parts, two protocols, joined utterances."""

import os
import shutil

import miniature
import numpy as np
import pytest
import soundfile

from speechbrain_ram.corpora.cnceleb import join_short, prepare_cnceleb
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    read_manifest,
)
from speechbrain_ram.verification.trials import (
    TrialError,
    check_utterances,
    read_models,
    read_trials,
)

VOICES = miniature.voices(6, 6)


@pytest.fixture
def root(tmp_path):
    return miniature.cnceleb(
        tmp_path / "cn", VOICES[:2], VOICES[2:4], VOICES[4:]
    )


def prepare(root, tmp_path, **settings):
    """Prepare, and return all rows."""
    paths = prepare_cnceleb(
        root, tmp_path / "out", valid_fraction=0.25, **settings
    )
    return [row for path in paths for row in read_manifest(path)]


def test_training_part(tmp_path, root, caplog):
    before = sorted(os.walk(root))
    rows = prepare(root, tmp_path)
    speakers = {"id00000", "id00001", "id10000", "id10001"}
    assert {row.spk_id for row in rows} == speakers  # none of eval's
    assert len(rows) == 4 * 6
    for row in rows:
        assert os.path.isfile(row.path(root))
        assert row.id.split("/")[0] in ("CN-Celeb_flac", "CN-Celeb2_flac")
    assert "names 2 speakers; the released list has 797, papers say 800" in (
        caplog.text
    )
    assert "released list has 1996, papers say 2000" in caplog.text
    assert "4 speakers train and 2 are tested; the paper has 2800 and 200" in (
        caplog.text
    )
    assert sorted(os.walk(root)) == before


def test_concatenated_enrolment(tmp_path, root):
    prepare(root, tmp_path)
    trials = read_trials(tmp_path / "out" / "cnceleb-concat.txt")
    check_utterances(trials, root)
    lists = root / "CN-Celeb_flac" / "eval" / "lists"
    expected = []
    for line in (lists / "trials.lst").open():
        model, test, label = line.split()
        eval_folder = "CN-Celeb_flac/eval"
        expected.append(
            f"{label} {eval_folder}/enroll/{model}.flac "
            f"{eval_folder}/{test.replace('.wav', '.flac')}"
        )
    found = (tmp_path / "out" / "cnceleb-concat.txt").read_text()
    assert found.splitlines() == expected
    assert (len(trials), trials.labels.sum()) == (12, 6)


def test_averaged_enrolment(tmp_path, root):
    prepare(root, tmp_path)
    out = tmp_path / "out"
    models = read_models(out / "cnceleb-average.models")
    trials = read_trials(out / "cnceleb-average.txt", models=models)
    check_utterances(trials, root)
    assert trials.enrol_ids == ("id00800-enroll", "id00801-enroll")
    data = "CN-Celeb_flac/data/id00800"
    assert models["id00800-enroll"] == (
        f"{data}/interview-01-001.flac",
        f"{data}/singing-01-002.flac",
        f"{data}/live_broadcast-01-003.flac",
    )
    other = read_trials(out / "cnceleb-concat.txt")
    assert (other.labels == trials.labels).all()
    assert other.test_ids == trials.test_ids


def test_converted_to_wav(tmp_path, root):
    for path in sorted(root.rglob("*.flac")):
        samples, rate = soundfile.read(path)
        soundfile.write(path.with_suffix(".wav"), samples, rate)
    # Both are there: each utterance counts once.
    assert len(prepare(root, tmp_path)) == 24
    for path in sorted(root.rglob("*.flac")):
        path.unlink()
    rows = prepare(root, tmp_path)
    assert len(rows) == 24
    assert rows[0].id.endswith(".wav")
    trials = read_trials(tmp_path / "out" / "cnceleb-concat.txt")
    check_utterances(trials, root)


def test_first_part_alone_and_folders_elsewhere(tmp_path, root):
    assert len(prepare(root, tmp_path, cnceleb2=None)) == 12
    elsewhere = tmp_path / "elsewhere" / "cn2"
    elsewhere.parent.mkdir()
    (root / "CN-Celeb2_flac").rename(elsewhere)
    rows = prepare(root, tmp_path, cnceleb2=str(elsewhere))
    assert len(rows) == 24
    assert all(os.path.isfile(row.path(root)) for row in rows)


def test_joining_short_utterances(tmp_path, root):
    joining = {"join_below": 1.1, "joined": tmp_path / "joined"}
    plain = {row.id: row for row in prepare(root, tmp_path)}
    before = sorted(os.walk(root))
    rows = prepare(root, tmp_path, **joining)
    total = sum(row.stop - row.start for row in plain.values())
    assert sum(row.stop - row.start for row in rows) == total  # none lost
    joined = [row for row in rows if row.id not in plain]
    assert joined
    short = [row for row in rows if row.duration < 1.1]
    assert all(row.id in plain for row in short)  # alone of their kind
    for row in joined:
        samples, rate = soundfile.read(row.path(root), dtype="int16")
        assert (len(samples), rate) == (row.stop, 16000)
        # Its name says which comes first, and how many there are.
        folder = "CN-Celeb2_flac" if row.spk_id > "id1" else "CN-Celeb_flac"
        stem, count = os.path.basename(row.id)[:-5].split("-join")
        genre = stem.split("-")[0]
        first = f"{folder}/data/{row.spk_id}/{stem}.flac"
        mates = [
            name
            for name in sorted(plain)
            if name >= first
            and name.startswith(f"{folder}/data/{row.spk_id}/{genre}")
            and plain[name].duration < 1.1
        ][: int(count)]
        pieces = [soundfile.read(root / m, dtype="int16")[0] for m in mates]
        assert np.array_equal(samples, np.concatenate(pieces))
    assert sorted(os.walk(root)) == before

    # A rerun writes nothing again; a half file is replaced.
    path = joined[0].path(root)
    stamps = {row.id: os.stat(row.path(root)).st_mtime_ns for row in joined}
    prepare(root, tmp_path, **joining)
    for row in joined:
        assert os.stat(row.path(root)).st_mtime_ns == stamps[row.id]
    os.truncate(path, 100)
    prepare(root, tmp_path, **joining)
    assert soundfile.info(path).frames == joined[0].stop


def test_joined_recordings_need_a_folder(tmp_path, root):
    with pytest.raises(ManifestError, match="join_below is 1.1, but `joined`"):
        prepare(root, tmp_path, join_below=1.1)
    within = root / "CN-Celeb2_flac" / "joined"
    with pytest.raises(ManifestError, match="joined' lies within the corpus"):
        prepare(root, tmp_path, join_below=1.1, joined=within)
    assert not within.exists() and not (tmp_path / "out").exists()


def test_joining_keeps_to_one_kind(tmp_path):
    rows = []
    for i, (speaker, kind, seconds) in enumerate(
        [
            ("a", "x", 1.0),
            ("a", "y", 1.0),  # alone of its kind
            ("a", "x", 1.5),
            ("b", "x", 1.0),  # alone of its speaker
            ("a", "x", 1.0),
            ("a", "x", 2.0),
            ("a", "x", 0.5),  # 1.5 s left over go to the group before
            ("a", "x", 9.0),  # long already
        ]
    ):
        name = f"{speaker}/{kind}-{i}.wav"
        miniature.write(tmp_path / name, np.full(int(seconds * 16000), i / 10))
        rows.append(
            Utterance(
                name,
                seconds,
                f"$data_root/{name}",
                0,
                int(seconds * 16000),
                speaker,
            )
        )
    joined = join_short(
        rows, tmp_path, tmp_path / "j", 2.0, lambda n: n.split("/")[1][0]
    )
    assert {(row.id, row.duration) for row in joined} == {
        ("a/x-7.wav", 9.0),
        ("a/y-1.wav", 1.0),
        ("b/x-3.wav", 1.0),
        ("a/x-5.wav", 2.0),
        ("joined/a/x-0-join4.flac", 4.0),
    }


def test_speakers_on_both_sides(tmp_path, root):
    dev = root / "CN-Celeb_flac" / "dev" / "dev.lst"
    dev.write_text(dev.read_text() + "id00801\n")
    with pytest.raises(
        ManifestError, match="1 training speakers .* eval part: id00801"
    ):
        prepare(root, tmp_path)


def test_speaker_in_both_parts(tmp_path, root):
    (root / "CN-Celeb2_flac" / "spk.lst").write_text("id00001\nid10000\n")
    with pytest.raises(ManifestError, match="'id00001' is in CN-Celeb1's dev"):
        prepare(root, tmp_path)


def test_half_extracted(tmp_path, root, caplog):
    shutil.rmtree(root / "CN-Celeb2_flac" / "data" / "id10001")
    rows = prepare(root, tmp_path)
    assert len(rows) == 18
    assert "1 of 2 listed speakers have no recordings" in caplog.text
    assert "id10001" in caplog.text
    (root / "CN-Celeb2_flac" / "spk.lst").unlink()
    with pytest.raises(ManifestError, match="spk.lst', does not exist"):
        prepare(root, tmp_path)
    shutil.rmtree(root / "CN-Celeb2_flac")
    with pytest.raises(ManifestError, match="CN-Celeb2_flac/data' does not"):
        prepare(root, tmp_path)


def test_lists_that_do_not_fit(tmp_path, root):
    lists = root / "CN-Celeb_flac" / "eval" / "lists"
    next((root / "CN-Celeb_flac" / "eval" / "test").iterdir()).unlink()
    with pytest.raises(TrialError, match="1 of 8 recordings are missing"):
        prepare(root, tmp_path)
    trials = (lists / "trials.lst").read_text()
    (lists / "trials.lst").write_text(trials + "id00802-enroll test/x.wav 1\n")
    with pytest.raises(TrialError, match="id00802-enroll"):
        prepare(root, tmp_path)
    (lists / "enroll.map").unlink()
    (lists / "trials.lst").write_text(trials)
    with pytest.raises(TrialError, match="enroll.map|missing"):
        prepare(root, tmp_path)
    (lists / "enroll.lst").write_text("id00800-enroll a.wav b.wav\n" * 2)
    assert not (tmp_path / "out" / "train.csv").exists()


def test_never_written_into(tmp_path, root):
    with pytest.raises(ManifestError, match="lies within the corpus"):
        prepare_cnceleb(root, root / "CN-Celeb_flac" / "out")
