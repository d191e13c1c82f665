"""Who speaks in a trial, and what is known about them.

Trial lists name recordings. The speaker is a part of that name, by default
the first folder of the path; a table of speakers (gender, age group, ...)
then splits a list into groups of trials.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from speechbrain_ram.data.plain import limited_text
from speechbrain_ram.utils import first_ten
from speechbrain_ram.verification.fields import TrialError, UniqueNames
from speechbrain_ram.verification.trials import TrialList

logger = logging.getLogger(__name__)

#: The first folder: "id10270" of "id10270/x6uYqmx31kE/00001.wav".
FIRST_FOLDER = r"^([^/]+)/"

_TABLE_BYTES = 2**26  # a million speakers and more
_MOST_VALUES = 10  # a column of more values is a measure, such as age


@dataclass(frozen=True, eq=False)
class TrialSpeakers:
    """The two speakers of every trial."""

    names: tuple[str, ...]  # unique
    enrol: np.ndarray  # [N] int32, indices into `names`
    test: np.ndarray  # [N] int32


def trial_speakers(
    trials: TrialList,
    pattern: str | None = None,
    speaker_of: Mapping[str, str] | None = None,
) -> TrialSpeakers:
    """Find the speakers in the names of recordings and models.

    `pattern` is searched in every name; its first group, or all that it
    matches if it has none, is the speaker (``id[0-9]{5}`` fits VoxCeleb and
    CN-Celeb). By default it is `speaker_of` each utterance, or else the first
    folder.
    """
    known = {} if pattern or not speaker_of else speaker_of
    pattern = pattern or FIRST_FOLDER
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise TrialError(
            f"the speaker pattern '{pattern}' is not a regular expression: "
            f"{error}."
        ) from error

    models = trials.models or {}

    def speaker(name: str) -> str:
        first = models[name][0] if name in models else name
        if first in known:
            return known[first]
        match = search(name)
        if match is None:
            raise TrialError(
                f"no speaker in the name '{name}': it does not match "
                f"'{pattern}'. Which part of it is the speaker?"
            )
        return match.group(1 if match.re.groups else 0)

    column = UniqueNames()
    for ids in (trials.enrol_ids, trials.test_ids):
        column.add(np.array([speaker(name) for name in ids], dtype=object))
    names, codes = column.finish()
    of_enrol, of_test = np.split(codes, [len(trials.enrol_ids)])
    return TrialSpeakers(names, of_enrol[trials.enrol], of_test[trials.test])


def known_speakers(
    trials: TrialList,
    pattern: str | None = None,
    speaker_of: Mapping[str, str] | None = None,
) -> TrialSpeakers | None:
    """As :func:`trial_speakers`, or None where names do not show speakers.

    They do not where a name does not match, or where a speaker found in this
    way contradicts a label. A warning says why.
    """
    try:
        speakers = trial_speakers(trials, pattern, speaker_of)
        check_speakers(trials, speakers)
    except TrialError as error:
        logger.warning("Without intervals over speakers: %s", error)
        return None
    return speakers


def check_speakers(trials: TrialList, speakers: TrialSpeakers) -> None:
    """Make sure that target trials, and no others, are of one speaker."""
    same = speakers.enrol == speakers.test
    wrong = np.flatnonzero(same != (trials.labels == 1))
    if wrong.size:
        i = wrong[0]
        enrol, test = speakers.names[speakers.enrol[i]], speakers.test[i]
        raise TrialError(
            f"{wrong.size} of {len(trials)} trials contradict their speakers, "
            f"the first is '{trials.enrol_ids[trials.enrol[i]]} "
            f"{trials.test_ids[trials.test[i]]}' with label "
            f"{trials.labels[i]}, of '{enrol}' and '{speakers.names[test]}'. "
            "Is the speaker another part of the recordings' names?"
        )


def read_speaker_table(path: str | os.PathLike) -> pd.DataFrame:
    """Read a table of strings by its first column, the speaker.

    It has a header line, and tabs or commas between columns. An empty field
    says that something is not known.
    """
    try:
        file = io.StringIO(limited_text(path, _TABLE_BYTES), newline="")
        separator = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        reader = csv.reader(file, delimiter=separator)
        # pandas would shift columns where a line has a field too many
        rows = [(reader.line_num, row) for row in reader if row]
    except ValueError as error:
        raise TrialError(str(error)) from error
    except (OSError, csv.Error) as error:
        raise TrialError(f"'{path}' cannot be read: {error}.") from error
    header, *lines = [row for _, row in rows] or [[]]
    if len(header) < 2:
        raise TrialError(
            f"'{path}' is empty or has one column; a header and a speaker and "
            "something about them in every line were expected."
        )
    for number, row in rows:
        if len(row) != len(header):
            raise TrialError(
                f"'{path}', line {number}: '{separator.join(row):.200}' has "
                f"{len(row)} fields, {len(header)} were expected as in the "
                f"header, {', '.join(header):.200}."
            )
    names = pd.Index([row[0] for row in lines], name=header[0])
    table = pd.DataFrame(
        [row[1:] for row in lines], names, header[1:], dtype=str
    )
    twice = table.index[table.index.duplicated()]
    if len(twice):
        raise TrialError(f"'{path}' names the speaker '{twice[0]}' twice.")
    return table


def trial_groups(
    labels: np.ndarray,
    speakers: TrialSpeakers,
    table: pd.DataFrame,
    columns: Sequence[str],
) -> dict[str, np.ndarray]:
    """Split trials by what columns of a table say of their speakers.

    For a column such as gender there is one group for each value, of trials
    whose two speakers both have it, and the groups "same gender" and
    "different gender", which share the target trials and split the
    non-targets. Trials of a speaker with an empty field are in none of them.
    Returns a bool array [N] by group; groups that lack a class are left out.
    """
    lost = [name for name in speakers.names if name not in table.index]
    if lost:
        raise TrialError(
            f"{len(lost)} of {len(speakers.names)} speakers are not in the "
            f"table: {first_ten(lost)}. Is the speaker another part of "
            "the recordings' names?"
        )
    target = np.asarray(labels) == 1
    groups: dict[str, np.ndarray] = {}
    for column in columns:
        if column not in table:
            raise TrialError(
                f"the speaker table has no column '{column}', it has "
                f"{', '.join(table.columns)}."
            )
        known = table.loc[list(speakers.names), column]
        values, codes = np.unique(known, return_inverse=True)
        if len(values) > _MOST_VALUES:
            raise TrialError(
                f"the column '{column}' has {len(values)} values, at most "
                f"{_MOST_VALUES} make groups. Is it a measure such as age?"
            )
        left, right = codes[speakers.enrol], codes[speakers.test]
        for code, value in enumerate(values):
            if value:
                both = (left == code) & (right == code)
                groups[f"{column} {value}"] = both
        told = (values != "")[left] & (values != "")[right]
        groups[f"same {column}"] = told & (target | (left == right))
        groups[f"different {column}"] = told & (target | (left != right))
    return {
        name: mask
        for name, mask in groups.items()
        if 0 < target[mask].sum() < mask.sum()
    }
