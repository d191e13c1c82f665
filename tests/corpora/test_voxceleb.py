"""VoxCeleb as it comes, in miniature: layouts, lists, guards, accidents."""

import os
import shutil

import miniature
import pytest

from speechbrain_ram.corpora.voxceleb import (
    LISTS,
    find_speaker_folders,
    prepare_voxceleb,
)
from speechbrain_ram.data.manifest import ManifestError, read_manifest
from speechbrain_ram.verification.trials import (
    TrialError,
    check_utterances,
    read_trials,
)

VOICES = miniature.voices(6, 4)


@pytest.fixture
def vox1(tmp_path):
    return miniature.voxceleb1(tmp_path / "vox1", VOICES[:2], VOICES[2:4])


@pytest.fixture
def vox2(tmp_path):
    return miniature.voxceleb2(tmp_path / "vox2", VOICES[4:], ".wav")


def rows_of(paths):
    return [row for path in paths for row in read_manifest(path)]


@pytest.mark.parametrize("ending", [".wav", ".flac"])
@pytest.mark.parametrize("folder", ["dev/aac", "dev/wav", "wav", "."])
def test_layouts_of_voxceleb2(tmp_path, vox1, ending, folder):
    vox2 = miniature.voxceleb2(tmp_path / "v", VOICES[4:], ending, folder)
    before = sorted(os.walk(vox2)), sorted(os.walk(vox1))
    paths = prepare_voxceleb(vox2, vox1, tmp_path / "out", valid_fraction=0.25)
    rows = rows_of(paths)
    assert len(rows) == 8
    assert [path.name for path in paths] == ["train.csv", "valid.csv"]
    for row in rows:
        assert row.spk_id in ("id00012", "id00013")
        assert row.id.endswith(ending) and f"/{row.spk_id}/" in f"/{row.id}"
        assert os.path.isfile(row.path(vox2))
    assert (sorted(os.walk(vox2)), sorted(os.walk(vox1))) == before


@pytest.mark.parametrize(
    "folders",
    [
        ("dev/wav", "test/wav"),
        ("wav", "wav"),
        ("vox1_dev_wav/wav", "vox1_test_wav/wav"),
        (".", "."),
    ],
)
@pytest.mark.parametrize("cleaned", [True, False])
def test_layouts_of_voxceleb1(tmp_path, vox2, folders, cleaned):
    vox1 = miniature.voxceleb1(
        tmp_path / "v1", VOICES[:2], VOICES[2:4], folders
    )
    out = tmp_path / "out"
    prepare_voxceleb(vox2, vox1, out, cleaned=cleaned)
    for name, stem in (
        ("O", "veri_test"),
        ("E", "list_test_all"),
        ("H", "list_test_hard"),
    ):
        official = vox1 / f"{stem}{'2' if cleaned else ''}.txt"
        suffix = "" if cleaned else "-original"
        trials = read_trials(out / f"vox1-{name}{suffix}.txt")
        check_utterances(trials, vox1)
        expected = [line.split() for line in official.read_text().splitlines()]
        found = [
            [
                str(label),
                "/".join(trials.enrol_ids[enrol].split("/")[-3:]),
                "/".join(trials.test_ids[test].split("/")[-3:]),
            ]
            for enrol, test, label in zip(
                trials.enrol, trials.test, trials.labels, strict=True
            )
        ]
        assert found == expected  # every trial, in the official order


def test_the_real_list_is_read(tmp_path, vox2):
    """The published list O, all 37,611 trials, over empty recordings."""
    path = os.environ.get("VOXCELEB1_O")
    if not path:
        pytest.skip(
            "VOXCELEB1_O is not set to the path of veri_test2.txt: the "
            "published list was NOT read"
        )
    vox1 = tmp_path / "vox1"
    vox1.mkdir()
    shutil.copy(path, vox1 / "veri_test2.txt")
    for name in read_trials(path).utterances:
        file = vox1 / "test" / "wav" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    prepare_voxceleb(vox2, vox1, tmp_path / "out", lists=["O"])
    trials = read_trials(tmp_path / "out" / "vox1-O.txt")
    assert len(trials) == LISTS["O"][1][1] == 37611
    assert trials.labels.sum() == 18802
    assert len(trials.utterances) == 4708
    speakers = {name.split("/")[2] for name in trials.utterances}
    assert len(speakers) == 40


def test_test_archive_alone_does_for_list_o(tmp_path, vox1, vox2):
    shutil.rmtree(vox1 / "dev")
    prepare_voxceleb(vox2, vox1, tmp_path / "out", lists=["O"])
    with pytest.raises(TrialError, match="list_test_all2.txt' does not fit"):
        prepare_voxceleb(vox2, vox1, tmp_path / "out2", lists=["O", "E"])
    assert not (tmp_path / "out2").exists()


def test_lists_may_lie_elsewhere(tmp_path, vox1, vox2):
    meta = tmp_path / "meta"
    meta.mkdir()
    for file in vox1.glob("*_test*.txt"):
        file.rename(meta / file.name)
    with pytest.raises(TrialError, match="veri_test2.txt of VoxCeleb1-O is no"):
        prepare_voxceleb(vox2, vox1, tmp_path / "out")
    prepare_voxceleb(vox2, vox1, tmp_path / "out", lists_folder=meta)
    with pytest.raises(TrialError, match="lists are O, E, H, got 'X'"):
        prepare_voxceleb(vox2, vox1, tmp_path / "out", lists=["X"])


def test_voxceleb1_as_flac(tmp_path, vox1, vox2):
    """Recordings stored as FLAC answer to lists that say .wav."""
    import soundfile

    for path in sorted(vox1.rglob("*.wav")):
        samples, rate = soundfile.read(path)
        soundfile.write(path.with_suffix(".flac"), samples, rate)
        path.unlink()
    prepare_voxceleb(vox2, vox1, tmp_path / "out")
    trials = read_trials(tmp_path / "out" / "vox1-O.txt")
    assert all(name.endswith(".flac") for name in trials.utterances)


def test_m4a_is_read_and_better_converted(tmp_path, vox1, caplog):
    pytest.importorskip("av", reason="the extra m4a is not installed")
    from speechbrain_ram.corpora.convert import convert_tree

    vox2 = miniature.voxceleb2(tmp_path / "v", VOICES[4:])
    convert_tree(vox2, tmp_path / "flac", workers=1)
    paths = prepare_voxceleb(tmp_path / "flac", vox1, tmp_path / "out")
    assert len(rows_of(paths)) == 8
    assert "utterances under" not in caplog.text
    paths = prepare_voxceleb(vox2, vox1, tmp_path / "out2")
    assert "8 of 8 utterances" in caplog.text
    assert "speechbrain-ram convert" in caplog.text
    assert all(row.id.endswith(".m4a") for row in rows_of(paths))
    # converted in place, but for one
    for path in sorted((tmp_path / "flac").rglob("*.flac"))[1:]:
        path.rename(vox2 / path.relative_to(tmp_path / "flac"))
    found = rows_of(prepare_voxceleb(vox2, vox1, tmp_path / "out3"))
    assert sorted(row.id[-4:] for row in found) == [".m4a", *["flac"] * 7]


def test_voxceleb2_test_part_is_left_out(tmp_path, vox1, vox2, caplog):
    miniature.voxceleb2(vox2, VOICES[:1], ".wav", folder="test/aac")
    paths = prepare_voxceleb(vox2, vox1, tmp_path / "out")
    assert len(rows_of(paths)) == 8
    assert all(row.id.startswith("dev/") for row in rows_of(paths))


def test_half_extracted_voxceleb2_is_said(tmp_path, vox1, vox2, caplog):
    prepare_voxceleb(vox2, vox1, tmp_path / "out")
    assert "Training has 2 speakers and 8 utterances" in caplog.text
    assert "5994 and 1092009" in caplog.text


def test_short_lists_are_said(tmp_path, vox1, vox2, caplog):
    prepare_voxceleb(vox2, vox1, tmp_path / "out", lists=["O"])
    assert "veri_test2.txt' has 26 trials, the published list has 37611" in (
        caplog.text
    )


def test_list_names_files_that_are_not_there(tmp_path, vox1, vox2):
    gone = next((vox1 / "test").rglob("*.wav"))
    gone.unlink()
    with pytest.raises(TrialError, match="does not fit: 1 of 8") as caught:
        prepare_voxceleb(vox2, vox1, tmp_path / "out", lists=["O"])
    assert gone.name in str(caught.value)


def test_voxceleb1_in_training_refuses_e_and_h(tmp_path, vox1):
    train = vox1 / "dev" / "wav"
    paths = prepare_voxceleb(train, vox1, tmp_path / "out", lists=["O"])
    assert {row.spk_id for row in rows_of(paths)} == {"id10001", "id10002"}
    for name in "EH":
        with pytest.raises(
            ManifestError, match=f"2 training speakers .* VoxCeleb1-{name}: id1"
        ):
            prepare_voxceleb(train, vox1, tmp_path / "o", lists=["O", name])
    # Both archives in one folder: the test speakers have to go.
    both = miniature.voxceleb1(
        tmp_path / "both", VOICES[:2], VOICES[2:4], ("wav", "wav")
    )
    with pytest.raises(ManifestError, match="--drop_test_speakers True"):
        prepare_voxceleb(both, both, tmp_path / "o", lists=["O"])
    paths = prepare_voxceleb(
        both, both, tmp_path / "o", lists=["O"], drop_test_speakers=True
    )
    assert {row.spk_id for row in rows_of(paths)} == {"id10001", "id10002"}


def test_sitw_and_its_overlap_with_voxceleb1(tmp_path, vox1, vox2):
    sitw = miniature.sitw(tmp_path / "sitw", VOICES[:2], VOICES[2:4])
    out = tmp_path / "out"
    prepare_voxceleb(vox2, vox1, out, sitw_root=sitw)
    assert len(read_trials(out / "sitw-eval.txt")) == 2 * 6
    train = vox1 / "dev" / "wav"
    with pytest.raises(ManifestError, match="also in SITW .*--sitw_overlap"):
        prepare_voxceleb(train, vox1, out, lists=["O"], sitw_root=sitw)
    overlap = tmp_path / "voxceleb1_sitw_overlap.txt"
    settings = {"lists": ["O"], "sitw_root": sitw, "sitw_overlap": overlap}
    overlap.write_text("id10002\nid11111\n")
    with pytest.raises(ManifestError, match="one speaker only, 'id10001'"):
        prepare_voxceleb(train, vox1, out, **settings)
    # The published list holds names, which vox1_meta.csv translates.
    overlap.write_text("Dev_Speaker_1\nTest_Speaker_0\n")
    with pytest.raises(ManifestError, match="one speaker only, 'id10001'"):
        prepare_voxceleb(train, vox1, out, **settings)
    overlap.write_text("Dev_Speaker_1\nNo_Such_Name\n")
    with pytest.raises(ManifestError, match="1 speakers .* No_Such_Name"):
        prepare_voxceleb(train, vox1, out, **settings)
    overlap.write_text("Dev_Speaker_1\n")
    meta = vox1 / "vox1_meta.csv"
    meta.write_text(f"VoxCeleb1 ID\tName\nid10002\n{meta.read_text()}")
    with pytest.raises(ManifestError, match="line 2: 'id10002' has no name"):
        prepare_voxceleb(train, vox1, out, **settings)
    meta.unlink()
    with pytest.raises(ManifestError, match="Is vox1_meta.csv of VoxCeleb1"):
        prepare_voxceleb(train, vox1, out, **settings)


def test_the_same_utterance_twice(tmp_path, vox1, vox2):
    shutil.copytree(vox2 / "dev" / "aac", vox2 / "wav")
    with pytest.raises(ManifestError, match="the same utterance twice"):
        prepare_voxceleb(vox2, vox1, tmp_path / "out")


def test_folders_that_are_no_good(tmp_path, vox1, vox2):
    out = tmp_path / "out"
    with pytest.raises(ManifestError, match="nowhere' does not exist"):
        prepare_voxceleb(tmp_path / "nowhere", vox1, out)
    with pytest.raises(TrialError, match="veri_test2.txt of VoxCeleb1-O"):
        prepare_voxceleb(vox2, tmp_path / "nowhere", out)
    with pytest.raises(ManifestError, match="lies within the corpus"):
        prepare_voxceleb(vox2, vox1, vox1 / "out")
    with pytest.raises(ManifestError, match="none in a training speaker's"):
        miniature.write(tmp_path / "other/anna/1.wav", VOICES[0][0])
        prepare_voxceleb(tmp_path / "other", vox1, out)
    assert not out.exists()


def test_damaged_files_stop_or_are_listed(tmp_path, vox1, vox2):
    bad = sorted(vox2.rglob("*.wav"))[:2]
    bad[0].write_bytes(b"")
    miniature.write(bad[1], VOICES[0][0][:160])  # 0.01 s
    with pytest.raises(ManifestError, match="is an empty file"):
        prepare_voxceleb(vox2, vox1, tmp_path / "out")
    paths = prepare_voxceleb(vox2, vox1, tmp_path / "out", skip_bad=True)
    assert len(rows_of(paths)) == 6
    listed = (tmp_path / "out" / "skipped.txt").read_text()
    assert "empty file" in listed and "lasts 0.010 s" in listed


def test_finding_speaker_folders(tmp_path):
    for path in ("a/dev/wav/id00012/v", "b/id00013", ".c/id00014", "d/e/f/g/h"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "id00012.txt").touch()
    assert find_speaker_folders(tmp_path) == ["a/dev/wav", "b"]
    assert find_speaker_folders(tmp_path / "b") == [""]
    for name in ("id0001\u0661", "id00014\n"):  # \\d and $ take these
        (tmp_path / "e" / name).mkdir(parents=True)
    assert find_speaker_folders(tmp_path / "e") == []
