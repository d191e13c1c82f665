"""Trial lists: every published form, exact errors, large lists in a moment."""

import gzip
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_ram.verification import fields
from speechbrain_ram.verification import trials as module
from speechbrain_ram.verification.scores import read_scores, write_scores
from speechbrain_ram.verification.trials import (
    TrialError,
    TrialList,
    check_utterances,
    read_models,
    read_trials,
    write_trials,
)

ROWS = [
    ("id1/a/1.wav", "id1/b/2.wav", 1),
    ("id1/a/1.wav", "id2/a/1.wav", 0),
    ("id2/a/1.wav", "id1/a/1.wav", 0),
]


def rows(trials):
    """The trials as (enrol, test, label) tuples."""
    return [
        (trials.enrol_ids[e], trials.test_ids[t], int(y))
        for e, t, y in zip(
            trials.enrol, trials.test, trials.labels, strict=True
        )
    ]


def write(folder, text, name="trials.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("form", "template", "names"),
    [
        ("voxceleb", "{y} {e} {t}\n", "01"),
        ("kaldi", "{e} {t} {y}\n", ["nontarget", "target"]),
        ("sitw", "{e} {t} {y}\n", ["imp", "tgt"]),
        ("cnceleb", "{e} {t} {y}\n", "01"),
        ("voxceleb", "  {y}\t{e}   {t} \r\n\r\n", "01"),
    ],
)
def test_every_form_is_read(tmp_path, form, template, names):
    text = "".join(template.format(y=names[y], e=e, t=t) for e, t, y in ROWS)
    trials = read_trials(write(tmp_path, text), form)
    assert rows(trials) == ROWS
    assert trials.enrol_ids == ("id1/a/1.wav", "id2/a/1.wav")
    assert trials.utterances == ("id1/a/1.wav", "id2/a/1.wav", "id1/b/2.wav")
    assert trials.enrol.dtype == trials.test.dtype == np.int32
    assert trials.labels.dtype == np.int8
    assert trials.models is None
    assert len(trials) == 3


def test_names_are_strings_whatever_they_look_like(tmp_path):
    """Numbers, NA, quotes, comment signs: a table reader's traps."""
    text = '1 0012 12\n0 NA #x\n0 "a nan\n0 1e3 True\n'
    assert rows(read_trials(write(tmp_path, text))) == [
        ("0012", "12", 1),
        ("NA", "#x", 0),
        ('"a', "nan", 0),
        ("1e3", "True", 0),
    ]


def test_byte_order_mark_and_missing_last_newline(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf1 \xc3\xa9/1.wav b")
    assert rows(read_trials(path)) == [("é/1.wav", "b", 1)]


def test_duplicates_are_kept(tmp_path):
    trials = read_trials(write(tmp_path, "1 a b\n0 a c\n1 a b\n"))
    assert rows(trials) == [("a", "b", 1), ("a", "c", 0), ("a", "b", 1)]


def test_names_of_another_machine_are_adapted(tmp_path):
    text = "1 /old/vox/id1/a.wav id2/b.v1\n0 id3/c.M4A id3.x/d\n"
    trials = read_trials(
        write(tmp_path, text), strip_prefix="/old/vox/", suffix=".flac"
    )
    assert rows(trials) == [
        ("id1/a.flac", "id2/b.v1.flac", 1),
        ("id3/c.flac", "id3.x/d.flac", 0),
    ]


def test_names_that_become_one_are_one_utterance(tmp_path):
    path = write(tmp_path, "1 a.wav b.wav\n0 a.flac c\n1 a c.wav\n")
    trials = read_trials(path, suffix=".wav")
    assert trials.enrol_ids == ("a.wav",)
    assert trials.test_ids == ("b.wav", "c.wav")
    assert trials.test.tolist() == [0, 1, 1]


def test_sitw_enrolment_by_id(tmp_path):
    enrol = write(
        tmp_path, "12013 audio/x.flac\n00077 audio/y.flac\n", "enroll.lst"
    )
    keys = write(tmp_path, "12013 audio/t.flac imp\n12013 audio/u.flac tgt\n")
    trials = read_trials(keys, "sitw", models=read_models(enrol))
    assert rows(trials) == [
        ("12013", "audio/t.flac", 0),
        ("12013", "audio/u.flac", 1),
    ]
    assert trials.models == {"12013": ("audio/x.flac",)}  # the one it needs
    assert trials.utterances == ("audio/x.flac", "audio/t.flac", "audio/u.flac")


def test_models_of_several_utterances(tmp_path):
    """CN-Celeb's enroll.map and Kaldi's spk2utt; names are adapted too."""
    enrol = write(
        tmp_path,
        "id1-enroll id1/a.wav id1/b.wav\n\nid2-enroll id2/a.wav\n"
        "id1-enroll id1/c.wav\n",
        "enroll.map",
    )
    path = write(tmp_path, "id1-enroll test/t.wav 1\nid2-enroll test/t.wav 0\n")
    trials = read_trials(
        path, "cnceleb", models=read_models(enrol), suffix=".flac"
    )
    assert trials.models == {
        "id1-enroll": ("id1/a.flac", "id1/b.flac", "id1/c.flac"),
        "id2-enroll": ("id2/a.flac",),
    }
    assert trials.enrol_ids == ("id1-enroll", "id2-enroll")
    assert trials.utterances[-1] == "test/t.flac"


@pytest.mark.filterwarnings("error")  # one message, no warning of pandas
@pytest.mark.parametrize(
    ("text", "form", "message"),
    [
        ("1 a b\n\n0 a\n", "voxceleb", r"line 3: '0 a' has 2 fields"),
        ("1 a b\n0 a b c\n", "voxceleb", r"line 2: '0 a b c' has 4 fields"),
        ("1 a b c d e\n", "voxceleb", r"line 1: .* has 6 fields"),
        ("1 a b\n0 a b c d e\n", "voxceleb", r"line 2: .* has 6 fields"),
        ("1 a b\n2 a c\n", "voxceleb", r"line 2: '2 a c' has the label '2'"),
        ("a b target\na c tgt\n", "kaldi", "line 2: .* has the label 'tgt'"),
        ("1 a b\n", "kaldi", "LABEL target or nontarget.*sitw, cnceleb"),
        (b"1 a b\n0 \xff c\n", "voxceleb", "line 2: not text in UTF-8"),
        ("", "voxceleb", "holds no trials"),
        ("\n  \n", "voxceleb", "holds no trials"),
        ("1 a b\n", "vox", "form must be one of voxceleb, kaldi"),
    ],
)
def test_errors_name_file_line_text_and_expectation(
    tmp_path, text, form, message
):
    with pytest.raises(TrialError, match=message) as caught:
        read_trials(write(tmp_path, text), form)
    assert form == "vox" or "trials.txt" in str(caught.value)


def test_a_late_error_is_found_in_its_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "_CHUNK", 4)
    lines = ["1 a b\n"] * 11 + ["maybe a b\n"]
    with pytest.raises(TrialError, match="line 12: 'maybe a b'"):
        read_trials(write(tmp_path, "".join(lines)))


@pytest.mark.parametrize("space", ["\u00a0", "\u2028", "\u3000", "\x0c"])
def test_only_spaces_and_tabs_part_fields(tmp_path, space):
    """Python splits at more; an error must not blame such a line."""
    name = f"a{space}b.wav"
    path = write(tmp_path, f"1 {name} c\n0 {name} d\n")
    assert read_trials(path).enrol_ids == (name,)
    assert read_models(path)["1"] == (name, "c")
    with pytest.raises(TrialError, match="line 2: '2 e f' has the label '2'"):
        read_trials(write(tmp_path, f"1 {name} c\n2 e f\n"))


def test_old_line_ends_and_marks_are_no_part_of_a_name(tmp_path):
    assert len(read_trials(write(tmp_path, "1 a b\r0 a c\r"))) == 2
    path = write(tmp_path, b"\xef\xbb\xbfm1 a.wav\r\nm2 b.wav\r\n")
    assert read_models(path) == {"m1": ("a.wav",), "m2": ("b.wav",)}


def test_folders_and_packed_lists_are_refused(tmp_path):
    for read in (read_trials, read_models):
        with pytest.raises(TrialError, match="is not a regular file"):
            read(tmp_path)
    packed = write(tmp_path, gzip.compress(b"1 a b\n0 a c\n"), "trials.gz")
    with pytest.raises(TrialError, match="line 1: not text in UTF-8"):
        read_trials(packed)


def test_a_line_without_an_end_is_refused_in_little_memory(tmp_path):
    path = write(tmp_path, "")
    with open(path, "r+b") as file:
        file.truncate(3 * 2**30)  # NUL bytes that take no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_trials, read_models):
        with pytest.raises(TrialError, match="trials.txt' has a line of over"):
            read(path)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) / 2**10 < 100  # MB
    long = write(tmp_path, "1 a b\n0 " + "c" * 10**6 + "\n")
    with pytest.raises(TrialError, match="line 2: '0 ccc") as caught:
        read_trials(long)
    assert len(str(caught.value)) < 1000


def test_missing_files_are_named(tmp_path):
    with pytest.raises(TrialError, match=r"nothing\.txt' does not exist"):
        read_trials(tmp_path / "nothing.txt")
    with pytest.raises(TrialError, match=r"nothing\.lst' does not exist"):
        read_models(tmp_path / "nothing.lst")


def test_enrolment_lists_are_checked(tmp_path):
    with pytest.raises(TrialError, match="line 2: 'id2' names no utterance"):
        read_models(write(tmp_path, "id1 a.wav\nid2\n"))
    with pytest.raises(TrialError, match="line 2: not text in UTF-8"):
        read_models(write(tmp_path, b"id1 a.wav\nid2 \xff.wav\n"))
    with pytest.raises(TrialError, match="enrolment list .* is empty"):
        read_models(write(tmp_path, "\n"))
    path = write(tmp_path, "m1 t.wav 1\nm2 t.wav 0\n")
    with pytest.raises(
        TrialError,
        match="line 2: .m2 t.wav 0.*1 enrolment models are not.*: m2",
    ):
        read_trials(path, "cnceleb", models={"m1": ("a.wav",)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("a", "a"), ("b",), [0], [0], [1]), "enrol_ids must be unique"),
        ((("a",), ("b", "b"), [0], [0], [1]), "test_ids must be unique"),
        ((("a",), ("b",), [1], [0], [1]), r"enrol indices .* \[0, 1\)"),
        ((("a",), ("b",), [0], [-1], [1]), r"test indices .* \[-1, -1\]"),
        ((("a",), ("b",), [2**32], [0], [1]), r"enrol indices .* \[0, 1\)"),
        ((("a",), ("b",), [0.5], [0], [1]), "whole numbers, got float64"),
        ((("a",), ("b",), [0, 0], [0], [1]), r"one length, got \(2,\), \(1,"),
        ((("a",), ("b",), [[0]], [[0]], [[1]]), "must have one dimension"),
        ((("a",), ("b",), [0], [0], [2]), "labels must be 1"),
        ((("a",), ("b",), [0], [0], [256]), "labels must be 1"),
        ((("a",), ("b",), [0], [0], [0.5]), "labels must be 1"),
        ((("a",), ("b",), [0], [0], [1], {"c": ("x",)}), "1 .* models .*: a"),
        ((("a",), ("b",), [0], [0], [1], {"a": ()}), "1 .* models .*: a"),
    ],
)
def test_trial_lists_check_themselves(arguments, message):
    with pytest.raises(TrialError, match=message):
        TrialList(*arguments)


names = st.text("ab0./-", min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(names, names, st.integers(0, 1)), min_size=1, max_size=30
    )
)
def test_writing_and_reading_back(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("lists") / "trials.txt"
    path.write_text("".join(f"{y} {e} {t}\n" for e, t, y in wanted))
    trials = read_trials(path)
    assert rows(trials) == wanted
    copy = path.with_name("copy.txt")
    write_trials(trials, copy)
    assert copy.read_text() == path.read_text()
    assert [p.name for p in sorted(path.parent.iterdir())] == [
        "copy.txt",
        "trials.txt",
    ]


def test_chunks_are_joined(tmp_path, monkeypatch):
    for each in (fields, module):
        monkeypatch.setattr(each, "_CHUNK", 7)
    wanted = [(f"e{i % 5}", f"t{i * i % 11}", i % 2) for i in range(50)]
    path = write(tmp_path, "".join(f"{y} {e} {t}\n" for e, t, y in wanted))
    trials = read_trials(path)
    assert rows(trials) == wanted
    write_trials(trials, tmp_path / "copy.txt")
    assert (tmp_path / "copy.txt").read_text() == path.read_text()


def test_missing_recordings_are_listed_before_any_work(tmp_path):
    wanted = [f"spk/{i}.wav" for i in range(15)]
    text = "".join(f"1 spk/0.wav {name}\n" for name in wanted)
    trials = read_trials(write(tmp_path, text))
    (tmp_path / "spk").mkdir()
    for name in wanted[:3]:
        (tmp_path / name).touch()
    with pytest.raises(TrialError) as caught:
        check_utterances(trials, tmp_path)
    message = str(caught.value)
    assert "12 of 15 recordings are missing" in message
    assert "and 2 more" in message
    assert "spk/3.wav" in message
    assert "spk/12.wav" in message
    assert "spk/13.wav" not in message
    assert "spk/2.wav" not in message
    for name in wanted:
        (tmp_path / name).touch()
    check_utterances(trials, tmp_path)
    check_utterances([trials, trials], str(tmp_path))


def test_a_large_list_takes_little_memory(tmp_path):
    """300,000 lines: far less than a string an entry would take."""
    n = 300_000
    line = "id{:05d}-enroll test/id{:05d}-singing-01-{:03d}.wav {}\n"
    with open(tmp_path / "big.lst", "w") as file:
        for start in range(0, n, 1000):
            block = "".join(
                line.format(start % 196, i % 17, i % 1000, i % 2)
                for i in range(start, start + 1000)
            )
            file.write(block)
    size = os.path.getsize(tmp_path / "big.lst")
    code = """
        import resource, sys
        from speechbrain_ram.verification.trials import read_trials
        rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = rss()
        trials = read_trials(sys.argv[1], "cnceleb")
        print(len(trials), 1024 * (rss() - before))
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "big.lst"],
        capture_output=True,
        text=True,
        check=True,
    )
    length, peak = out.stdout.split()
    assert int(length) == n
    assert int(peak) < 4 * size  # 1.0 at 3.5 million lines


@pytest.mark.real
def test_the_published_lists():
    corpus = os.environ.get("SPEECHOCEAN762")
    if not corpus:
        pytest.skip("SPEECHOCEAN762 is not set: real lists were NOT read")
    dev = read_trials(Path(corpus) / "dev_trials.txt")
    assert len(dev) == 38_000
    assert dev.labels.sum() == 7_600
    assert len(dev.utterances) == 800
    check_utterances(dev, Path(corpus) / "dev")
    voxceleb = Path(corpus).parent / "trials" / "veri_test2.txt"
    if not voxceleb.is_file():
        pytest.skip(f"no '{voxceleb}': VoxCeleb1-O was NOT read")
    official = read_trials(voxceleb)
    assert len(official) == 37_611
    assert official.labels.sum() == 18_802
    assert len(official.utterances) == 4_708


def test_names_with_spaces_are_between_tabs(tmp_path):
    names = ("anna b/first take.wav", "c/1.wav")
    trials = TrialList(names, names, [0, 1], [1, 0], [1, 0])
    path = tmp_path / "trials.txt"
    write_trials(trials, path)
    first = "1\tanna b/first take.wav\tc/1.wav\n"
    assert path.read_text().startswith(first)
    again = read_trials(path)
    assert again.enrol_ids == names and again.labels.tolist() == [1, 0]
    write_scores(trials, np.array([0.5, 0.25]), tmp_path / "scores.txt")
    third, scores = read_scores(tmp_path / "scores.txt")
    assert third.enrol_ids == names and scores.tolist() == [0.5, 0.25]
    path.write_text(first + "1\tanna b/first take.wav\n")
    with pytest.raises(TrialError, match="line 2: .* 2 fields between tabs"):
        read_trials(path)
    path.write_text(first.replace("\t", " "))
    with pytest.raises(TrialError, match="5 fields .tabs must stand between"):
        read_trials(path)
    path.write_text("anna b\tanna b/1.wav\tanna b/2.wav\nc  c/1.wav c/2.wav\n")
    assert read_models(path) == {
        "anna b": ("anna b/1.wav", "anna b/2.wav"),
        "c": ("c/1.wav", "c/2.wav"),
    }


@pytest.mark.parametrize(
    "line",
    [
        "0 a/1.wav c/1.wav",
        "0\ta/1.wav\tc/1.wav",
        "\t0\t\ta/1.wav\tc/1.wav\t\r",
        "   \n\t\n0 a/1.wav c/1.wav\n \t ",
    ],
)
@pytest.mark.parametrize("spaces", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_spaces_and_tabs_between_fields(tmp_path, line, spaces, first):
    """In one list, in any order; more of them are no more fields."""
    other = "anna b/1.wav" if spaces else "b/1.wav"
    lines = [line, f"1\t{other}\tc/1.wav"]
    expected = [("a/1.wav", "c/1.wav", 0), (other, "c/1.wav", 1)]
    order = slice(None, None, 1 if first else -1)
    path = write(tmp_path, "\n".join(lines[order]) + "\n")
    assert rows(read_trials(path)) == expected[order]


def test_long_lists_between_tabs(tmp_path, monkeypatch):
    """In chunks as other lists; a bad line in a later one is found."""
    monkeypatch.setattr("speechbrain_ram.verification.fields._CHUNK", 3)
    expected = [(f"a {i}.wav", f"b{i % 4}.wav", i % 2) for i in range(8)]
    text = "".join(f"{y}\t{e}\t{t}\n" for e, t, y in expected)
    assert rows(read_trials(write(tmp_path, text))) == expected
    with pytest.raises(TrialError, match="line 9: .* has 2 fields"):
        read_trials(write(tmp_path, text + "1\ta b.wav\n"))
    with pytest.raises(TrialError, match="line 9: .* has the label '2'"):
        read_trials(write(tmp_path, text + "2\ta b.wav\tc.wav\n"))


@pytest.mark.parametrize("name", ["a b.wav", " a.wav", "a.wav ", "a\xa0b.wav"])
def test_what_is_written_is_read_back(tmp_path, name):
    trials = TrialList((name, "c"), ("c", name), [0, 1], [0, 1], [1, 0])
    write_trials(trials, tmp_path / "trials.txt")
    write_scores(trials, np.array([0.1, 1e-9]), tmp_path / "scores.txt")
    again, scores = read_scores(tmp_path / "scores.txt")
    assert rows(read_trials(tmp_path / "trials.txt")) == rows(trials)
    assert rows(again) == rows(trials) and scores.tolist() == [0.1, 1e-9]


def test_far_down_in_another_encoding(tmp_path):
    """Beyond the first block, where a character may lie on its border."""
    good = b"1 zo\xc3\xab/1.wav b/1.wav\n" * 60_000
    assert len(good) > 1 << 20
    path = write(tmp_path, b"\xef\xbb\xbf" + good)
    assert len(read_trials(path)) == 60_000
    for end in (b"1 zo\xeb/1.wav b\n", b"1 a\0/1.wav b\n"):
        write(tmp_path, b"\xef\xbb\xbf" + good + end)
        for read in (read_trials, read_scores, read_models):
            with pytest.raises(TrialError, match="line 60001: not text in UTF"):
                read(path)


def test_a_replacement_character_is_a_character(tmp_path):
    path = write(tmp_path, "m \ufffd.wav\n")
    assert read_models(path) == {"m": ("\ufffd.wav",)}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_lists_in_another_encoding(tmp_path, encoding):
    path = tmp_path / "trials.txt"
    path.write_bytes("1 zo\u00eb/1.wav b/1.wav\n".encode(encoding))
    for read in (read_trials, read_models):
        with pytest.raises(TrialError, match="line 1.*Latin-1") as caught:
            read(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "there, asked",
    [
        ("Zo\u00eb/1.wav", "Zoe\u0308/1.wav"),
        ("anna/1.wav ", "anna/1.wav"),
        ("Anna/1.WAV", "anna/1.wav"),
    ],
)
def test_a_missing_recording_that_is_nearly_there(tmp_path, there, asked):
    file = tmp_path / there
    file.parent.mkdir()
    file.write_bytes(b"")
    trials = TrialList((asked,), (asked,), [0], [0], [1])
    with pytest.raises(TrialError, match="is there: it differs from"):
        check_utterances(trials, tmp_path)
    for name in (f"{asked}@0-100", str(tmp_path / asked)):
        trials = TrialList((name,), (name,), [0], [0], [1])
        with pytest.raises(TrialError, match="is there: it differs from"):
            check_utterances(trials, tmp_path)


def test_a_folder_is_not_nearly_a_recording(tmp_path):
    (tmp_path / "anna").mkdir()
    trials = TrialList(("anna",), ("anna",), [0], [0], [1])
    with pytest.raises(TrialError, match="1 of 1 recordings are miss") as error:
        check_utterances(trials, tmp_path)
    assert "is there" not in str(error.value)


@pytest.mark.parametrize("name", ["a\tb.wav", "a\nb.wav", "a\rb.wav", ""])
def test_names_that_no_list_can_hold(tmp_path, name):
    trials = TrialList((name,), ("b",), [0], [0], [1])
    with pytest.raises(TrialError, match="cannot stand in a list"):
        write_trials(trials, tmp_path / "trials.txt")
    assert not list(tmp_path.iterdir())
