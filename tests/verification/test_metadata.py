"""Speakers in names, tables of speakers, groups of trials."""

import numpy as np
import pytest

from speechbrain_ram.verification.speakers import (
    check_speakers,
    known_speakers,
    read_speaker_table,
    trial_groups,
    trial_speakers,
)
from speechbrain_ram.verification.trials import TrialError, TrialList


def trial_list(pairs, models=None):
    enrol_ids = tuple(dict.fromkeys(e for e, _ in pairs))
    test_ids = tuple(dict.fromkeys(t for _, t in pairs))
    return TrialList(
        enrol_ids,
        test_ids,
        [enrol_ids.index(e) for e, _ in pairs],
        [test_ids.index(t) for _, t in pairs],
        [int(e[:3] == t[:3]) for e, t in pairs],
        models,
    )


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        (None, [("id1/a/1.wav", "id1/b.wav"), ("id1/a/1.wav", "id2/c.wav")]),
        (
            r"id\d",
            [("id1-enroll", "t/id1-x.wav"), ("id1-enroll", "t/id2-.wav")],
        ),
        ("s([12])_", [("s1_a", "s1_b"), ("s1_a", "s2_c")]),
    ],
)
def test_speakers_are_found_in_names(pattern, pairs):
    trials = trial_list(pairs)
    found = trial_speakers(trials, *([pattern] if pattern else []))
    assert len(found.names) == 2
    assert (found.enrol == [0, 0]).all()
    assert (found.test == [0, 1]).all()


def test_names_without_a_speaker_are_refused():
    trials = trial_list([("a.wav", "b/c.wav")])
    with pytest.raises(TrialError, match="no speaker in the name 'a.wav'"):
        trial_speakers(trials)
    with pytest.raises(TrialError, match="not a regular expression"):
        trial_speakers(trials, "(")


def test_speakers_are_known_only_where_names_show_them(caplog):
    pairs = [("id1/a.wav", "id1/b.wav"), ("id1/a.wav", "id2/c.wav")]
    assert known_speakers(trial_list(pairs)).names == ("id1", "id2")
    assert not caplog.records
    assert known_speakers(trial_list(pairs), r"[a-z]\.wav") is None
    assert "Without intervals over speakers: 1 of 2 trials" in caplog.text
    assert known_speakers(trial_list([("id1.wav", "id2.wav")])) is None
    assert "no speaker in the name 'id1.wav'" in caplog.text


def test_tables_are_read_as_text(tmp_path):
    path = tmp_path / "speakers.csv"
    path.write_text("speaker,gender,age\n0001,f,06\n0002,NA,7\n")
    table = read_speaker_table(path)
    assert table.loc["0001"].tolist() == ["f", "06"]
    assert table.loc["0002", "gender"] == "NA"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speaker\n0001\n", "has one column"),
        ("speaker\tgender\na\tf\na\tm\n", "names the speaker 'a' twice"),
        ("speaker\tgender\na\tf\tm\tx\nb\n", "line 2: .* has 4 fields, 2"),
        ("speaker\tgender\na\tf\n\nb\n", "line 4: 'b' has 1 fields, 2 .*, gen"),
        ("speaker,gender\na,f,x\nb,m,y\n", "line 2: 'a,f,x' has 3 fields"),
        ("", "is empty or has one column"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "speakers.tsv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TrialError, match=message):
        read_speaker_table(path)


def test_a_table_larger_than_any_is_not_read(tmp_path):
    path = tmp_path / "speakers.tsv"
    with open(path, "wb") as file:
        file.truncate(2**34)
    with pytest.raises(TrialError, match="speakers.tsv' has 17179869184 bytes"):
        read_speaker_table(path)


@pytest.fixture
def known(tmp_path):
    """Four speakers: two women, two men; one of each is a child."""
    path = tmp_path / "speakers.tsv"
    path.write_text(
        "speaker\tgender\tage group\n"
        "a\tf\tadult\nb\tf\tchild\nc\tm\tadult\nd\tm\tchild\n"
    )
    names = [f"{s}/{i}" for s in "abcd" for i in range(2)]
    pairs = [(e, t) for e in names for t in names if e < t]
    trials = trial_list(pairs)
    trials = TrialList(
        trials.enrol_ids,
        trials.test_ids,
        trials.enrol,
        trials.test,
        [int(e[0] == t[0]) for e, t in pairs],
    )
    return pairs, trials, read_speaker_table(path)


def test_groups_are_what_their_names_say(known):
    pairs, trials, table = known
    groups = trial_groups(
        trials.labels, trial_speakers(trials), table, ["gender", "age group"]
    )
    gender = dict(zip("abcd", "ffmm", strict=True))
    age = dict(zip("abcd", "acac", strict=True))

    def same(table):
        return [table[e[0]] == table[t[0]] for e, t in pairs]

    def both(table, value):
        return [table[e[0]] == table[t[0]] == value for e, t in pairs]

    target = trials.labels == 1
    expected = {
        "gender f": both(gender, "f"),
        "gender m": both(gender, "m"),
        "same gender": same(gender),
        "different gender": target | ~np.array(same(gender)),
        "age group adult": both(age, "a"),
        "age group child": both(age, "c"),
        "same age group": same(age),
        "different age group": target | ~np.array(same(age)),
    }
    assert list(groups) == list(expected)
    for name, mask in expected.items():
        assert (groups[name] == mask).all(), name


def test_groups_of_one_class_are_left_out(known):
    pairs, trials, table = known
    table["gender"] = ["f", "f", "f", "m"]  # one man: no male non-targets
    groups = trial_groups(
        trials.labels, trial_speakers(trials), table, ["gender"]
    )
    assert list(groups) == ["gender f", "same gender", "different gender"]


def test_what_is_not_known_makes_no_group(known):
    pairs, trials, table = known
    table.loc["b", "gender"] = ""
    groups = trial_groups(
        trials.labels, trial_speakers(trials), table, ["gender"]
    )
    assert list(groups) == ["gender m", "same gender", "different gender"]
    for mask in groups.values():
        for (enrol, test), member in zip(pairs, mask, strict=True):
            assert not (member and "b" in (enrol[0], test[0]))
    assert groups["same gender"].sum() == 1 + 6  # a's target, c and d's own
    assert groups["different gender"].sum() == 3 + 8


def test_labels_that_contradict_speakers_are_refused():
    names = TrialList(
        ("a/1",), ("a/2", "b/1", "c/1"), [0] * 3, range(3), [1, 0, 0]
    )
    check_speakers(names, trial_speakers(names))
    wrong = TrialList(
        names.enrol_ids, names.test_ids, names.enrol, names.test, [1, 0, 1]
    )
    with pytest.raises(
        TrialError, match="1 of 3 .* 'a/1 c/1' with label 1, of 'a' and 'c'"
    ):
        check_speakers(wrong, trial_speakers(wrong))


def test_bad_groupings_are_refused(known):
    _, trials, table = known
    speakers = trial_speakers(trials)
    with pytest.raises(TrialError, match="no column 'sex', it has gender"):
        trial_groups(trials.labels, speakers, table, ["sex"])
    with pytest.raises(TrialError, match="1 of 4 speakers .*: a"):
        trial_groups(trials.labels, speakers, table.drop("a"), ["gender"])


def test_measures_make_no_groups(tmp_path):
    path = tmp_path / "speakers.tsv"
    rows = "".join(f"s{i}\t{i}\n" for i in range(11))
    path.write_text("speaker\tage\n" + rows)
    pairs = [(f"s{i}/a", f"s{i}/b") for i in range(11)]
    trials = trial_list(pairs)
    with pytest.raises(TrialError, match="'age' has 11 values, at most 10"):
        trial_groups(
            trials.labels,
            trial_speakers(trials),
            read_speaker_table(path),
            ["age"],
        )
