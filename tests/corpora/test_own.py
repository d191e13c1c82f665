"""Your own corpus: folders and tables, and trials that are fair."""

import itertools
import math
import os
import shutil
import tracemalloc
from collections import Counter

import miniature
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_ram.corpora.folder import (
    corpus_name,
    pair_folder,
    prepare_own,
)
from speechbrain_ram.corpora.held_out import make_trials
from speechbrain_ram.corpora.tables import kaldi_parts
from speechbrain_ram.data.audio import read_audio
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    read_manifest,
)
from speechbrain_ram.data.names import TextError, part_name, part_of
from speechbrain_ram.training.advice import session_note
from speechbrain_ram.verification.embedder import Embedder
from speechbrain_ram.verification.embeddings import extract
from speechbrain_ram.verification.trials import check_utterances, read_trials

VOICES = miniature.voices(6, 4)


@pytest.fixture
def corpus(tmp_path):
    for k, utterances in enumerate(VOICES):
        for i, samples in enumerate(utterances):
            path = tmp_path / "corpus" / f"speaker{k}" / "day1" / f"{i}.flac"
            miniature.write(path, samples)
    return tmp_path / "corpus"


def check(paths, root, speakers=6, held_out=2):
    train, valid = map(read_manifest, paths)
    trials = read_trials(paths[0].parent / "dev_trials.txt")
    check_utterances(trials, root)
    tested = {name.split("speaker")[1][0] for name in trials.utterances}
    trained = {row.spk_id[-1] for row in train}
    assert len(tested) == held_out and not tested & trained
    assert len(tested | trained) == speakers
    assert {row.spk_id for row in valid} <= {row.spk_id for row in train}
    for row in train + valid:
        assert os.path.isfile(row.path(root))
    return train, valid, trials


def test_a_folder(tmp_path, corpus):
    before = sorted(os.walk(corpus))
    paths = prepare_own(corpus, tmp_path / "out", valid_fraction=0.25)
    train, valid, trials = check(paths, corpus)
    assert len(train + valid) == 16
    assert (trials.labels.sum(), len(trials)) == (2 * 6, 2 * 2 * 6)
    assert sorted(os.walk(corpus)) == before
    contents = [path.read_bytes() for path in (tmp_path / "out").glob("*.*")]
    prepare_own(corpus, tmp_path / "out", valid_fraction=0.25)
    again = [path.read_bytes() for path in (tmp_path / "out").glob("*.*")]
    assert contents == again
    other = prepare_own(corpus, tmp_path / "other", seed=3)
    assert other[0].read_bytes() != paths[0].read_bytes()


def test_a_folder_below_another_root(tmp_path, corpus):
    paths = prepare_own(corpus, tmp_path / "out", data_root=tmp_path)
    train, _, _ = check(paths, tmp_path)
    assert train[0].id.startswith("corpus/speaker")


@pytest.mark.parametrize("absolute", [False, True])
def test_a_table(tmp_path, corpus, absolute):
    table = tmp_path / "table.csv"
    with open(table, "w") as file:
        file.write("age,spk_id, wav\n")
        for path in sorted(corpus.rglob("*.flac")):
            name = path if absolute else path.relative_to(tmp_path)
            file.write(f"33,{path.parts[-3]}, {name}\n")
    paths = prepare_own(table, tmp_path / "out")
    train, _, _ = check(paths, tmp_path)
    assert train[0].wav.startswith(
        str(corpus) if absolute else "$data_root/corpus/"
    )


def test_a_manifest_of_ours_is_such_a_table(tmp_path, corpus):
    first, _ = prepare_own(corpus, tmp_path / "out")
    paths = prepare_own(first, tmp_path / "two", data_root=corpus)
    check(paths, corpus, speakers=4)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(2, 12), min_size=2, max_size=6),
    max_trials=st.integers(4, 200),
    seed=st.integers(0, 99),
)
def test_trials(counts, max_trials, seed):
    rows = [
        Utterance(f"{s}/{i}", 1.0, "", 0, 1, str(s))
        for s, count in enumerate(counts)
        for i in range(count)
    ]
    trials = make_trials(rows, max_trials, np.random.default_rng(seed))
    assert len(trials) <= max_trials
    pairs = [frozenset(p) for p in zip(trials.enrol, trials.test, strict=True)]
    assert len(set(pairs)) == len(pairs)
    for pair, label in zip(pairs, trials.labels, strict=True):
        first, second = (rows[i] for i in pair)  # two different ones
        assert label == (first.spk_id == second.spk_id)
    possible = sum(n * (n - 1) // 2 for n in counts)
    kinds = Counter(trials.labels.tolist())
    assert kinds[1] == min(possible, max_trials // 2)
    others = len(rows) * (len(rows) - 1) // 2 - possible
    assert kinds[0] == min(kinds[1], others)


@settings(max_examples=60, deadline=None)
@given(
    sessions=st.lists(
        st.lists(st.integers(1, 4), min_size=1, max_size=4),
        min_size=2,
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
def test_targets_pair_sessions_where_there_are_some(sessions, seed):
    """All possible trials, against a list of all pairs."""
    rows = [
        Utterance(f"{s}/{k}/{i}", 1.0, "", 0, 1, str(s))
        for s, counts in enumerate(sessions)
        for k, count in enumerate(counts)
        for i in range(count)
    ]
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    expected = set()
    for a, b in itertools.combinations(range(len(rows)), 2):
        speaker = rows[a].spk_id
        if speaker == rows[b].spk_id:
            alone = len(sessions[int(speaker)]) == 1
            folders = {os.path.dirname(rows[i].id) for i in (a, b)}
            if alone or len(folders) == 2:
                expected.add((a, b))
    trials = make_trials(rows, 10**6, np.random.default_rng(seed))
    pairs = np.stack([trials.enrol, trials.test], axis=1)
    assert set(map(tuple, pairs[trials.labels == 1].tolist())) == expected


def test_all_pairs_of_a_folder_of_speakers(corpus):
    files = [str(p.relative_to(corpus)) for p in corpus.rglob("*.flac")]
    trials = pair_folder(corpus)
    names = np.array(trials.enrol_ids)
    found = {
        (frozenset(pair), bool(label))
        for *pair, label in zip(
            names[trials.enrol], names[trials.test], trials.labels, strict=True
        )
    }
    assert len(found) == len(trials)
    assert found == {
        (frozenset((a, b)), a.split("/")[0] == b.split("/")[0])
        for a, b in itertools.combinations(files, 2)
    }
    some = pair_folder(corpus, most=5)
    assert Counter(some.labels.tolist()) == {0: 5, 1: 5}


def test_trials_are_drawn_from_all_pairs_alike():
    """Chi-square of 4,000 draws of 3 of 15 pairs, alike at 0.001."""
    rows = [Utterance(f"{i}", 1.0, "", 0, 1, "ab"[i // 6]) for i in range(8)]
    counts = Counter()
    for seed in range(4000):
        trials = make_trials(rows, 6, np.random.default_rng(seed))
        same = trials.labels == 1
        counts.update(zip(trials.enrol[same], trials.test[same], strict=True))
    assert len(counts) == 16  # 15 pairs of six, 1 of two
    expected = 4000 * 3 / 16
    chi = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi < 37.7  # 15 degrees of freedom


@pytest.mark.parametrize("counts", [(800, 2), (3000, 2), (4000, 4000)])
def test_many_pairs_are_not_all_made(counts):
    """As many numbers as trials and utterances, not as pairs."""
    rows = [
        Utterance(f"{s}/{i}", 1.0, "", 0, 1, str(s))
        for s, count in enumerate(counts)
        for i in range(count)
    ]
    tracemalloc.start()
    trials = make_trials(rows, 2000, np.random.default_rng(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kinds = Counter(trials.labels.tolist())
    assert kinds[1] == 1000 and kinds[0] == min(1000, counts[0] * counts[1])
    assert peak < 8e6


def test_corpora_that_are_no_good(tmp_path, corpus):
    out = tmp_path / "out"
    with pytest.raises(ManifestError, match="nothing.csv' does not exist. Exp"):
        prepare_own(tmp_path / "nothing.csv", out)
    (tmp_path / "t.csv").write_text("path,speaker\na,b\n")
    with pytest.raises(ManifestError, match="line 1: found the columns"):
        prepare_own(tmp_path / "t.csv", out)
    (tmp_path / "t.csv").write_text("wav,spk_id\na.wav,\n")
    with pytest.raises(ManifestError, match="line 2: wav or spk_id is empty"):
        prepare_own(tmp_path / "t.csv", out)
    (tmp_path / "t.csv").write_text("wav,spk_id\n")
    with pytest.raises(ManifestError, match="names no recordings"):
        prepare_own(tmp_path / "t.csv", out)
    with pytest.raises(ManifestError, match="lies within the corpus"):
        prepare_own(corpus, corpus / "out")
    with pytest.raises(ManifestError, match="dev_share is 10, expected"):
        prepare_own(corpus, out, dev_share=10)
    match = "0.9 holds 5 of 6 .* 4 can be: 6 have two .* 0.6666 or less"
    with pytest.raises(ManifestError, match=match):
        prepare_own(corpus, out, dev_share=0.9)
    miniature.write(corpus / "stray.wav", VOICES[0][0])
    with pytest.raises(ManifestError, match="stray.wav' lies in no speaker's"):
        prepare_own(corpus, out)
    assert not (out / "train.csv").exists()


def test_too_few_speakers_or_no_speakers(tmp_path, corpus):
    """What helps is said, not what cannot help."""
    share = math.floor(1e4 * 4 / 6) / 1e4
    prepare_own(corpus, tmp_path / "most", dev_share=share)
    for single in (0, 1, 2, 3, 4):
        for file in (corpus / f"speaker{single}").rglob("[1-9].flac"):
            file.unlink()
    out = tmp_path / "out"
    match = "^Of 6 speakers, 1 have two utterances or more. Two such .* level"
    with pytest.raises(ManifestError, match=match) as caught:
        prepare_own(corpus, out)
    assert "dev_share" not in str(caught.value)
    (tmp_path / "up").mkdir()
    corpus.rename(tmp_path / "up" / "three")
    for number, names, folder in (
        ("is 1", "three", tmp_path / "up"),
        ("are 3", "speaker3, speaker4, speaker5", tmp_path / "up" / "three"),
    ):
        for k in range(3):
            shutil.rmtree(folder / f"speaker{k}", ignore_errors=True)
        match = f"^Four speakers .* Found {number}: {names}. .* level too high"
        with pytest.raises(ManifestError, match=match) as caught:
            prepare_own(folder, out)
        assert "dev_share" not in str(caught.value)
    assert not (out / "train.csv").exists()


def test_paths_with_spaces(tmp_path, corpus):
    """In trials too, whose fields are then between tabs."""
    for k in range(6):
        (corpus / f"speaker{k}").rename(corpus / f"a speaker{k}")
    paths = prepare_own(corpus, tmp_path / "out")
    _, _, trials = check(paths, corpus)
    assert all(" " in name for name in trials.utterances)
    check_utterances(trials, corpus)


@pytest.fixture
def long_files(tmp_path):
    """Two speakers in each of three recordings, four utterances of each."""
    folder = tmp_path / "long"
    parts = []
    for k in range(3):
        pieces = [
            (f"s{2 * k + j % 2}", voice)
            for j, voice in enumerate(
                v
                for pair in zip(*VOICES[2 * k : 2 * k + 2], strict=True)
                for v in pair
            )
        ]
        miniature.write(
            folder / f"{k}.wav", np.concatenate([v for _, v in pieces])
        )
        start = 0
        for speaker, voice in pieces:
            parts.append((f"{k}.wav", speaker, start, start + len(voice)))
            start += len(voice)
    return folder, parts


def check_parts(paths, long_files):
    """Each part has its own speaker's voice, in training and in trials."""
    root, parts = long_files
    speaker_of = {part_name(w, a, b): s for w, s, a, b in parts}
    train, valid = map(read_manifest, paths)
    trials = read_trials(paths[0].parent / "dev_trials.txt")
    check_utterances(trials, root)
    tested = {speaker_of[name] for name in trials.utterances}
    assert len(tested) == 2 and not tested & {row.spk_id for row in train}
    assert len({row.id for row in train + valid}) == 16
    for row in train + valid:
        assert speaker_of[row.id] == row.spk_id
        samples = read_audio(row.path(root), row.start, row.stop).numpy()
        assert any(
            len(voice) == len(samples) and np.abs(voice - samples).max() < 1e-4
            for voice in VOICES[int(row.spk_id[1:])]
        )
    # Each file is a session here: there are no targets but within it.
    assert "12 target trials, 0 pair recordings of two folders or files (" in (
        session_note(trials)
    )
    for enrol, test, label in zip(
        trials.enrol, trials.test, trials.labels, strict=True
    ):
        names = trials.enrol_ids[enrol], trials.test_ids[test]
        assert label == (speaker_of[names[0]] == speaker_of[names[1]])
    embeddings = extract(
        Embedder(lambda wavs, lens: wavs[:, 99:100]),
        trials.utterances,
        root,
        progress=False,
    )
    for name, row in zip(embeddings.ids, embeddings.matrix, strict=True):
        path, start, stop = part_of(name)
        samples = read_audio(root / path, start, stop)
        assert float(row[0]) == float(samples[99])


def test_parts_of_recordings_are_utterances(tmp_path, long_files):
    folder, parts = long_files
    table = tmp_path / "t.csv"
    lines = [f"{w},{s},{a},{b}\n" for w, s, a, b in parts]
    table.write_text("wav,spk_id,start,stop\n" + "".join(lines))
    paths = prepare_own(table, tmp_path / "out", folder)
    check_parts(paths, long_files)


@pytest.mark.parametrize(
    "lines, match",
    [
        ("0.wav,a,0.5,1.5\n", "line 2: start is '0.5', .* in seconds"),
        (
            "0.wav,a,0,99999999\n",
            "no part from 0 to 99999999. Are .* another rate",
        ),
        ("0.wav,a,50,50\n", "no part from 50 to 50"),
        ("0.wav,a,0,100\n0.wav,b,0,100\n", "line 3: .* is there twice"),
        ("0.wav,a,,\n", "start is ''"),
        ("0.wav,a,0\n", "line 2: stop is None, expected a whole number"),
        *(
            (f"0.wav,a,0,{text}\n", "line 2: stop is .*, expected a whole")
            for text in [
                "9" * 400,
                "1_0",
                "\u0661\u0660",
                "\uff11",
                "1e3",
                "-1",
            ]
        ),
        ('"0\n.wav",a,0,9\n', r"line 3: '0\\n.wav' has a line break"),
        ('0.wav,"a\r\nb",0,9\n', r"line 3: 'a\\r\\nb' has a line break"),
        ("0.wav,a\x1b[2J,0,9\n", r"line 2: 'a\\x1b\[2J' has a line break or"),
        ("0.wav,a\0,0,9\n", "line 2: not text in UTF-8 .a NUL byte"),
        ("a" * 200_000 + ",a,0,9\n", "t.csv' cannot be read: field larger"),
    ],
)
def test_bounds_that_are_none(tmp_path, long_files, lines, match):
    table = tmp_path / "t.csv"
    table.write_text("wav,spk_id,start,stop\n" + lines)
    with pytest.raises(ManifestError, match=match):
        prepare_own(table, tmp_path / "out", long_files[0], min_duration=0)
    table.write_text("wav,spk_id,start\n0.wav,a,0\n")
    with pytest.raises(ManifestError, match="of the columns start and stop"):
        prepare_own(table, tmp_path / "out", long_files[0])


def kaldi(folder, long_files, segments=True):
    _, parts = long_files
    folder.mkdir()
    names = sorted({part[0] for part in parts})
    scp = "".join(f"rec{name[0]} {name}\n" for name in names)
    (folder / "wav.scp").write_text(scp)
    utt2spk, lines = "", ""
    for i, (name, speaker, start, stop) in enumerate(parts):
        utt2spk += f"{speaker}-{i} {speaker}\n"
        seconds = f"{start / 16000:.6f} {stop / 16000:.6f}"
        lines += f"{speaker}-{i} rec{name[0]} {seconds}\n"
    (folder / "utt2spk").write_text(utt2spk)
    (folder / "segments").write_text(lines)
    return folder


def test_a_kaldi_directory(tmp_path, long_files):
    folder = kaldi(tmp_path / "kaldi", long_files)
    paths = prepare_own(folder, tmp_path / "out", long_files[0])
    check_parts(paths, long_files)


def test_targets_pair_two_recordings_of_parts():
    """A recording cut into parts is a session."""
    rows = [
        Utterance(f"{file}@{i}-{i + 1}", 1.0, "", i, i + 1, speaker)
        for speaker, files in (("a", "wx"), ("b", "yz"))
        for file in files
        for i in range(3)
    ]
    trials = make_trials(rows, 100, np.random.default_rng(0))
    assert trials.labels.sum() == 2 * 3 * 3
    assert "Of 18 target trials, 18 pair" in session_note(trials)


@pytest.mark.parametrize(
    "end, stop", [("-1", None), ("FRAMES+0.4", None), ("0.5", 8000)]
)
def test_ends_that_kaldi_allows(tmp_path, long_files, end, stop):
    """-1 is the recording's end, up to half a second beyond is cut."""
    frames = soundfile.info(long_files[0] / "0.wav").frames
    if "+" in end:
        end = frames / 16000 + 0.4
    folder = kaldi(tmp_path / "kaldi", long_files)
    (folder / "segments").write_text(f"u rec0 0.25 {end}\n")
    (folder / "utt2spk").write_text("u s0\n")
    part = kaldi_parts(folder, long_files[0])["u"]
    assert (part.start, part.stop) == (4000, stop or frames)


@pytest.mark.parametrize(
    "file, line, match",
    [
        ("wav.scp", "rec1 x.wav", "wav.scp, line 2: 'rec1' is in line 1 alre"),
        ("utt2spk", "x s0", "1 utterances of utt2spk have no rec.* 'x'|not in"),
        ("segments", "s0-0 rec0 0 0", "no part from 0 to 0"),
        ("segments", "s0-0 rec0 -1 1", "no part from -16000 to 16000"),
        ("segments", "s0-0 rec0 0 99", "no part from 0 to 1584000"),
        ("segments", "s0-0 rec0 0 ten", "line 1: .* not of Kaldi's form"),
        *(
            (
                "segments",
                f"s0-0 rec0 0 {text}",
                "line 1: .* not of Kaldi's form",
            )
            for text in [
                "9" * 400,
                "1_0",
                "\u0661",
                "\uff11",
                "nan",
                "1e9",
                "-2",
            ]
        ),
        ("wav.scp", "rec0", "wav.scp, line 1: 'rec0' is not of Kaldi's form"),
        ("wav.scp", "rec0 touch executed |", "line 1: .* is a command"),
        ("wav.scp", "rec0 a\u2028b.wav", "line 1: .* has a line break"),
        ("utt2spk", "s0-0 a\x85b", "utt2spk, line 1: .* has a line break"),
        ("utt2spk", "s0-0 a\0b", "utt2spk', line 1: not text in UTF-8"),
    ],
)
def test_kaldi_lists_that_are_wrong(
    tmp_path, monkeypatch, long_files, file, line, match
):
    monkeypatch.chdir(tmp_path)
    folder = kaldi(tmp_path / "kaldi", long_files)
    lines = (folder / file).read_text().splitlines()
    (folder / file).write_text("\n".join([line, *lines[1:]]) + "\n")
    with pytest.raises((ManifestError, TextError), match=match):
        prepare_own(folder, tmp_path / "out", long_files[0])
    assert not os.path.exists("executed")
    (folder / file).write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ManifestError, match="is not in wav.scp and utt2spk|no"):
        prepare_own(folder, tmp_path / "out", long_files[0])


def test_seconds_in_a_table(tmp_path, long_files):
    """Whole numbers of seconds are far too few samples."""
    table = tmp_path / "t.csv"
    lines = "".join(f"0.wav,s{k},{k},{k + 1}\n" for k in range(6))
    table.write_text(f"wav,spk_id,start,stop\n{lines}")
    with pytest.raises(ManifestError, match="6 of 6 parts .* not seconds"):
        prepare_own(table, tmp_path / "out", long_files[0])


def test_a_kaldi_directory_of_whole_files(tmp_path, corpus):
    folder = tmp_path / "kaldi"
    folder.mkdir()
    files = sorted(corpus.rglob("*.flac"))
    ids = [(f"{f.parts[-3]}-{i}", f) for i, f in enumerate(files)]
    (folder / "wav.scp").write_text(
        "".join(f"{i} {f.relative_to(corpus)}\n" for i, f in ids)
    )
    (folder / "utt2spk").write_text(
        "".join(f"{i} {i.split('-')[0]}\n" for i, f in ids)
    )
    paths = prepare_own(folder, tmp_path / "out", corpus)
    check(paths, corpus)
    with open(folder / "wav.scp", "a") as file:
        file.write("x sox a.wav -t wav - |\n")
    with pytest.raises(ManifestError, match="wav.scp, line 25: .* a command"):
        prepare_own(folder, tmp_path / "out", corpus)
    (folder / "wav.scp").write_text("stranger a.wav\n")
    with pytest.raises(ManifestError, match="have no recording"):
        prepare_own(folder, tmp_path / "out", corpus)


@pytest.mark.parametrize(
    "first, second",
    [("Zoe\u0308", "Zo\u00eb"), ("1089", "1089 ")],
)
def test_speakers_that_look_the_same(tmp_path, corpus, first, second):
    (corpus / "speaker0").rename(corpus / first)
    (corpus / "speaker1").rename(corpus / second)
    with pytest.raises(ManifestError, match="differ only in Unicode's form"):
        prepare_own(corpus, tmp_path / "out")


def test_a_speaker_that_no_label_file_can_hold(tmp_path, corpus):
    """SpeechBrain would not load the encoder that is trained on it."""
    (corpus / "speaker0").rename(corpus / "a => b")
    with pytest.raises(ManifestError, match="'a => b' .* Rename the speaker"):
        prepare_own(corpus, tmp_path / "out")


def test_a_table_of_relative_paths_needs_their_folder(tmp_path, corpus):
    table = tmp_path / "t.csv"
    table.write_text("wav,spk_id\nspeaker0/day1/1.flac,a\n")
    with pytest.raises(ManifestError, match="line 2: .* Say with --data_root"):
        prepare_own(table, tmp_path / "out", data_root=table)


def test_parts_of_a_missing_recording_of_kaldi(tmp_path, long_files):
    root, parts = long_files
    folder = kaldi(tmp_path / "kaldi", long_files)
    names = sorted({part[0] for part in parts})
    (root / names[-1]).rename(root / names[-1].upper())
    with pytest.raises(ManifestError, match="is there: it differs from"):
        prepare_own(folder, tmp_path / "out", root)
    paths = prepare_own(folder, tmp_path / "out", root, skip_bad=True)
    kept = {row.wav for path in paths for row in read_manifest(path)}
    assert not any(names[-1] in wav for wav in kept)
    assert names[-1] in (tmp_path / "out" / "skipped.txt").read_text()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_in_another_encoding(tmp_path, corpus, encoding):
    table = tmp_path / "t.csv"
    table.write_bytes("wav,spk_id\na.wav,Zo\u00eb\n".encode(encoding))
    with pytest.raises(ManifestError, match="t.csv'.*not text in UTF-8"):
        prepare_own(table, tmp_path / "out", data_root=corpus)


def test_a_recording_of_a_table_that_is_nearly_there(tmp_path, corpus):
    (corpus / "speaker0").rename(corpus / "Zoe\u0308")
    table = tmp_path / "t.csv"
    table.write_text("wav,spk_id\nZo\u00eb/day1/1.flac,a\n")
    with pytest.raises(ManifestError, match="is there: it differs from"):
        prepare_own(table, tmp_path / "out", data_root=corpus)


def test_a_folder_keeps_the_dots_of_its_name(tmp_path):
    folder, table = tmp_path / "voices.v2", tmp_path / "radio.v2.csv"
    folder.mkdir()
    table.touch()
    assert corpus_name(folder) == "voices.v2"
    assert corpus_name(table) == "radio.v2"
