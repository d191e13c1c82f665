"""Rows, their files, and every way a manifest can be wrong."""

import os

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    build_manifest,
    check_outside,
    check_overlap,
    embedding_names,
    find_recordings,
    read_manifest,
    write_manifest,
)
from speechbrain_ram.utils import atomic_writer

HEADER = "ID,duration,wav,start,stop,spk_id\n"
ROW = "a/1.wav,1.5,$data_root/a/1.wav,0,24000,a\n"


def write_wav(path, seconds=1.0, rate=16000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.zeros((round(seconds * rate), channels))
    soundfile.write(path, samples, rate)
    return path


text = st.text(
    st.characters(codec="utf-8", exclude_characters="$\r\n\0"), min_size=1
).filter(lambda s: s == s.strip())


@given(
    st.lists(
        st.tuples(text, st.floats(1e-6, 1e5), st.integers(0, 10**9), text),
        min_size=1,
        unique_by=lambda row: row[0],
    )
)
def test_written_rows_are_read_back(tmp_path_factory, drawn):
    rows = [
        Utterance(name, seconds, f"$data_root/{name}", start, start + 7, who)
        for name, seconds, start, who in drawn
    ]
    path = tmp_path_factory.mktemp("manifest") / "m.csv"
    write_manifest(rows, path)
    assert read_manifest(path) == rows


def test_speechbrain_reads_it(tmp_path):
    row = Utterance("a/1.wav", 1.25, "$data_root/a/1.wav", 0, 20000, "a")
    write_manifest([row], tmp_path / "m.csv")
    text = (tmp_path / "m.csv").read_text()
    assert text == HEADER + "a/1.wav,1.25,$data_root/a/1.wav,0,20000,a\n"
    host = DynamicItemDataset.from_csv(
        tmp_path / "m.csv", replacements={"data_root": "/corpus"}
    )
    assert (
        host.data["a/1.wav"]["wav"] == "/corpus/a/1.wav" == row.path("/corpus")
    )
    assert host.data["a/1.wav"]["duration"] == 1.25


def test_columns_in_any_order_and_absolute_paths(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(
        "spk_id,wav,ID,extra,duration,stop,start\na,/x.wav,1,,2,9,4\n"
    )
    assert read_manifest(path) == [Utterance("1", 2.0, "/x.wav", 4, 9, "a")]
    assert read_manifest(path)[0].path("/corpus") == "/x.wav"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"line 1: found the columns None, expected ID,duration"),
        ("ID,wav\n", r"line 1: .*\(duration, start, stop, spk_id missing\)"),
        (HEADER, "holds no utterances"),
        (HEADER + ROW + ROW, "line 3: the ID 'a/1.wav' stands in line 2"),
        (HEADER + "a,1,$data_root/a\n", "line 2: found .* expected 6 values"),
        (HEADER + ROW[:-1] + ",x\n", "line 2: found .* expected 6 values"),
        (HEADER + ROW.replace("1.5", "long"), "duration is 'long', expected s"),
        (HEADER + ROW.replace("1.5", "nan"), "line 2: duration is 'nan'"),
        (HEADER + ROW.replace("1.5", "inf"), "line 2: duration is 'inf'"),
        (HEADER + ROW.replace("1.5", "0"), "line 2: duration is '0'"),
        (HEADER + ROW.replace(",0,", ",-1,"), "start is '-1', expected a samp"),
        (HEADER + ROW.replace(",0,", ",1.5,"), "start is '1.5'"),
        (HEADER + '"a\nb"' + ROW[1:] + "x\n", "line 4: found .'x'., exp"),
        (HEADER + '"' + "a" * 200_000, "line 2: not CSV .field larger"),
        (HEADER + "a," * 50_000, "line 2: found .* expected 6 values"),
        ("a," * 50_000, "line 1: found the columns .*ID, duration"),
        (HEADER + ROW[:-1] + "\0\n", "m.csv', line 2: .* NUL byte"),
        (HEADER + ROW.replace("24000", "0"), "stop is '0', .* above 0"),
        (HEADER + ROW.replace("24000,a", "24000,"), "line 2: spk_id is empty"),
        (
            HEADER + ROW.replace("$data_root", "$root"),
            r"wav is '\$root/a/1.wav'",
        ),
        (HEADER + ROW.replace("$data_root/", ""), "wav is 'a/1.wav', expected"),
    ],
)
def test_bad_manifests_are_explained(tmp_path, content, message):
    path = tmp_path / "m.csv"
    path.write_text(content)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("column", ["duration", "start", "stop"])
@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "inf",
        "nan",
        "-1",
        "1_0",
        "٣",
        "１２",
        "9" * 400,
        "9" * 5000,
        "1e999",
    ],
)
def test_what_is_no_number(tmp_path, column, wrong):
    values = {"duration": "1.5", "start": "0", "stop": "24000", column: wrong}
    row = "a,{duration},$data_root/a,{start},{stop},a\n".format(**values)
    (tmp_path / "m.csv").write_text(HEADER + row)
    with pytest.raises(
        ManifestError, match=f"m.csv, line 2: {column} is '.*in ASCII digits"
    ) as caught:
        read_manifest(tmp_path / "m.csv")
    assert len(str(caught.value)) < 400


def test_missing_manifest(tmp_path):
    with pytest.raises(ManifestError, match="m.csv' does not exist"):
        read_manifest(tmp_path / "m.csv")


def test_failed_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.csv"
    row = Utterance("a", 1.0, "$data_root/a", 0, 1, "s")
    write_manifest([row], path)
    before = path.read_bytes()
    with pytest.raises(ManifestError, match="Two utterances have the ID 'a'"):
        write_manifest([row, row], path)
    with pytest.raises(ManifestError, match="no utterance to write"):
        write_manifest([], path)
    with pytest.raises(ZeroDivisionError), atomic_writer(path) as file:
        file.write("half")
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.csv"]


def test_files_have_the_usual_permissions(tmp_path):
    with atomic_writer(tmp_path / "a") as file:
        file.write("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_finding_recordings(tmp_path):
    root = tmp_path / "corpus"
    for name in ("b/2.FLAC", "b/1.wav", "a/v/1.ogg", "a/v/notes.txt",
                 "a/._1.wav", ".trash/1.wav"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    other = tmp_path / "elsewhere"
    write_wav(other / "x.wav")
    (root / "linked").symlink_to(other)
    (root / "a" / "loop").symlink_to(root)
    expected = ["a/v/1.ogg", "b/1.wav", "b/2.FLAC", "linked/x.wav"]
    assert find_recordings(root) == expected
    assert find_recordings(root, (".ogg",)) == ["a/v/1.ogg"]


def test_nothing_to_find(tmp_path):
    with pytest.raises(ManifestError, match="'.*no' does not exist"):
        find_recordings(tmp_path / "no")
    with pytest.raises(ManifestError, match="holds no recordings: .*.flac"):
        find_recordings(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ManifestError, match="file' is not a folder"):
        find_recordings(tmp_path / "file")


@pytest.mark.parametrize("name", ["cost$5.wav", "two\nlines.wav"])
def test_names_that_cannot_be_written(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ManifestError, match="cannot go into a manifest"):
        build_manifest(tmp_path, [(name, "s")])


def test_rows_keep_same_named_files_apart(tmp_path):
    for name in ("a/v1/1.wav", "a/v2/1.wav", "b/1.flac"):
        write_wav(tmp_path / name, 0.75)
    names = [("b/1.flac", "b"), ("a/v2/1.wav", "a"), ("a/v1/1.wav", "a")]
    rows = build_manifest(tmp_path, names)
    assert [(row.id, row.spk_id) for row in rows] == names
    assert {row[3:5] for row in rows} == {(0, 12000)}
    assert rows[0].wav == "$data_root/b/1.flac"
    assert rows[0].duration == 0.75


def test_a_part_is_embedded_as_a_part():
    """Whatever shows it: its ID, its start, or another row."""

    def row(name, wav, start=0, stop=10):
        return Utterance(name, 1.0, wav, start, stop, "s")

    rows = [
        row("a.wav", "$data_root/a.wav"),
        row("b.wav@0-10", "/other/b.wav"),
        row("later", "$data_root/c.wav", 5),
        row("first", "$data_root/d.wav"),
        row("second", "$data_root/d.wav", 10, 20),
    ]
    assert embedding_names(rows) == [
        "a.wav",
        "/other/b.wav@0-10",
        "c.wav@5-10",
        *("d.wav@0-10", "d.wav@10-20"),
    ]


def test_unusable_files_are_named_or_listed(tmp_path, caplog):
    good = write_wav(tmp_path / "c" / "good.wav")
    slow = write_wav(tmp_path / "c" / "slow.wav", rate=8000)
    stereo = write_wav(tmp_path / "c" / "stereo.wav", channels=2)
    short = write_wav(tmp_path / "c" / "short.wav", 0.05)
    empty = tmp_path / "c" / "empty.wav"
    empty.touch()
    names = [(p.name, "s") for p in (good, slow, stereo, short, empty)]
    with pytest.raises(ManifestError) as caught:
        build_manifest(tmp_path / "c", names)
    message = str(caught.value)
    assert "3 of 5 recordings cannot be used" in message
    assert f"'{slow}' has a sample rate of 8000 Hz, 16000 Hz" in message
    assert f"'{stereo}' has 2 channels" in message
    assert f"'{empty}' is an empty file" in message
    assert message.endswith("`--skip_bad True` leaves them out.")

    listed = tmp_path / "out" / "skipped.txt"
    rows = build_manifest(
        tmp_path / "c", names, min_duration=0.1, skipped_list=listed
    )
    assert [row.id for row in rows] == ["good.wav"]
    assert listed.read_text().count("\n") == 4
    assert f"'{short}' lasts 0.050 s" in listed.read_text()

    allowed = build_manifest(
        tmp_path / "c", names[:4], resample=True, mixdown=True
    )
    assert [(row.stop, row.duration) for row in allowed] == [
        (16000, 1.0),
        (8000, 1.0),
        (16000, 1.0),
        (800, 0.05),
    ]


def test_ten_of_many_are_shown(tmp_path):
    names = [(f"{i:02d}.wav", "s") for i in range(15)]
    with pytest.raises(ManifestError, match="and 5 more") as caught:
        build_manifest(tmp_path, names)
    assert "09.wav" in str(caught.value)
    assert "10.wav" not in str(caught.value)
    assert "and 5 more.\nRepair or remove them" in str(caught.value)
    assert str(caught.value).endswith(f"Is '{tmp_path}' the right folder?")
    assert str(caught.value).count("right folder?") == 1


def test_nothing_left(tmp_path):
    write_wav(tmp_path / "a.wav", 0.5)
    with pytest.raises(ManifestError, match="1 are shorter than 1.0 s"):
        build_manifest(tmp_path, [("a.wav", "s")], min_duration=1.0)


def test_corpus_may_be_read_only(tmp_path):
    """Nothing but the cache and the list of skipped files is written."""
    write_wav(tmp_path / "c" / "a.wav")
    before = sorted(os.walk(tmp_path / "c"))
    build_manifest(
        tmp_path / "c",
        [("a.wav", "s")],
        cache=tmp_path / "o" / "cache",
        skipped_list=tmp_path / "o" / "skipped",
        verify=True,
    )
    assert sorted(os.walk(tmp_path / "c")) == before
    assert sorted(os.listdir(tmp_path / "o")) == ["cache", "skipped"]


def test_a_manifest_with_speakers_that_look_the_same(tmp_path):
    rows = [
        Utterance(f"{i}", 1.0, "$data_root/a", 0, 16000, name)
        for i, name in enumerate(("1089", "1089 "))
    ]
    write_manifest(rows, tmp_path / "m.csv")
    with pytest.raises(ManifestError, match="differ only in"):
        read_manifest(tmp_path / "m.csv")


def test_nobody_both_trains_and_tests():
    check_overlap(["id1", "id2"], ["id3"], "my test")
    with pytest.raises(
        ManifestError, match="^1 training speakers .* my test: id3.*Drop them"
    ):
        check_overlap(["id1", "id3"], ["id3"], "my test", "Drop them.")


def test_nothing_is_written_into_a_corpus(tmp_path):
    check_outside(tmp_path / "results", tmp_path / "corpus")
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    for inside in ("corpus", "corpus/results", "link/results"):
        with pytest.raises(ManifestError, match="lies within the corpus"):
            check_outside(tmp_path / inside, tmp_path / "corpus")
