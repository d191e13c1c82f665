"""Trial lists: which pairs of enrolment and test are compared, and the truth.

A list of any published form becomes one :class:`TrialList`: every utterance
named once, each trial two integers and a label. 3.5 million trials (CN-Celeb)
then take 32 MB, and embeddings are computed once per utterance.

=============  ===========================  ======================
form           one line                     labels
=============  ===========================  ======================
``voxceleb``   ``LABEL ENROL TEST``         ``1`` / ``0``
``kaldi``      ``ENROL TEST LABEL``         ``target`` / ``nontarget``
``sitw``       ``ENROL TEST LABEL``         ``tgt`` / ``imp``
``cnceleb``    ``ENROL TEST LABEL``         ``1`` / ``0``
=============  ===========================  ======================

Fields are separated by spaces or tabs; where names hold spaces, by tabs alone
(:class:`FieldReader`). Utterances are named by their path
relative to the corpus folder. Enrolment is an utterance or the name of a
*model*, which stands for one or more utterances.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from speechbrain_ram.data.names import (
    TextError,
    check_text,
    missing_hint,
    part_of,
)
from speechbrain_ram.utils import atomic_writer, first_ten

#: Order of the fields and spelling of (non-target, target) of each form.
FORMS = {
    "voxceleb": (("label", "enrol", "test"), ("0", "1")),
    "kaldi": (("enrol", "test", "label"), ("nontarget", "target")),
    "sitw": (("enrol", "test", "label"), ("imp", "tgt")),
    "cnceleb": (("enrol", "test", "label"), ("0", "1")),
}

_CHUNK = 100_000  # lines per step: bounds the memory that strings take
_ENDINGS = (".wav", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".sph", ".sv")


class TrialError(ValueError):
    """A trial list cannot be used; the message says where and why."""


@dataclass(frozen=True, eq=False)
class TrialList:
    """Pairs to compare, as indices into lists of unique names.

    Arguments
    ---------
    enrol_ids : tuple of str
        Unique names of the enrolment side: utterances, or models.
    test_ids : tuple of str
        Unique utterances of the test side.
    enrol, test : np.ndarray
        Shape [N] int32, indices into `enrol_ids` and `test_ids`.
    labels : np.ndarray
        Shape [N] int8, 1 for a target trial, 0 for a non-target trial.
    models : Mapping, optional
        Model name -> its utterances, where enrolment is by model. It may
        hold models that no trial names; every enrolment id must be in it.

    Example
    -------
    >>> trials = TrialList(
    ...     ("a/1.wav",), ("a/2.wav", "b/1.wav"), [0, 0], [0, 1], [1, 0]
    ... )
    >>> len(trials), trials.utterances
    (2, ('a/1.wav', 'a/2.wav', 'b/1.wav'))
    """

    enrol_ids: tuple[str, ...]
    test_ids: tuple[str, ...]
    enrol: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    models: Mapping[str, tuple[str, ...]] | None = None

    def __post_init__(self):
        for name in ("enrol_ids", "test_ids"):
            ids = tuple(getattr(self, name))
            if len(set(ids)) != len(ids):
                raise TrialError(f"{name} must be unique, and are not.")
            object.__setattr__(self, name, ids)
        # checked before they are cast, which would make 0 of 0.5 and of 256
        for name in ("enrol", "test"):
            index = np.asarray(getattr(self, name))
            if index.size and not np.issubdtype(index.dtype, np.integer):
                raise TrialError(
                    f"{name} must hold indices, whole numbers, got "
                    f"{index.dtype}."
                )
            limit = len(getattr(self, f"{name}_ids"))
            if index.size and not 0 <= index.min() <= index.max() < limit:
                raise TrialError(
                    f"{name} indices must lie in [0, {limit}), got "
                    f"[{index.min()}, {index.max()}]."
                )
            object.__setattr__(self, name, index.astype(np.int32, copy=False))
        labels = np.asarray(self.labels)
        if not ((labels == 0) | (labels == 1)).all():
            raise TrialError("labels must be 1 (target) or 0 (non-target).")
        object.__setattr__(self, "labels", labels.astype(np.int8, copy=False))
        shapes = self.enrol.shape, self.test.shape, labels.shape
        if len(set(shapes)) > 1 or labels.ndim != 1:
            raise TrialError(
                "enrol, test and labels must have one dimension and one "
                f"length, got {', '.join(map(str, shapes))}."
            )
        if self.models is not None:
            unknown = [m for m in self.enrol_ids if not self.models.get(m)]
            if unknown:
                raise TrialError(
                    f"{len(unknown)} enrolment models have no utterance: "
                    f"{first_ten(unknown)}. Is the enrolment list the one "
                    "that belongs to these trials?"
                )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def utterances(self) -> tuple[str, ...]:
        """Every utterance that needs an embedding, once, in a fixed order."""
        if self.models is None:
            enrolment: Iterable[str] = self.enrol_ids
        else:
            enrolment = (u for m in self.enrol_ids for u in self.models[m])
        return tuple(dict.fromkeys((*enrolment, *self.test_ids)))


def read_trials(
    path: str | os.PathLike,
    form: str = "voxceleb",
    models: Mapping[str, tuple[str, ...]] | None = None,
    strip_prefix: str = "",
    suffix: str | None = None,
) -> TrialList:
    """Read a trial list in one of the :data:`FORMS`.

    Arguments
    ---------
    path : path
        Text file, one trial a line; blank lines are skipped. Where tabs stand
        between the fields, names may hold spaces.
    form : str
        `voxceleb`, `kaldi`, `sitw` or `cnceleb`.
    models : Mapping, optional
        Model name -> utterances, from :func:`read_models`; without it the
        enrolment field names an utterance.
    strip_prefix : str
        Removed from the start of every utterance name that has it, for lists
        with absolute paths of another machine.
    suffix : str, optional
        Ending such as ".wav" that every utterance shall have: replaces the
        ending of another audio format, is added where there is none.

    Returns
    -------
    TrialList
        In the file's order. Duplicate lines are kept: published results
        count them.

    Raises
    ------
    TrialError
        With file, line number, the line and what was expected.

    Example
    -------
    >>> path = getfixture("tmp_path") / "trials.txt"
    >>> _ = path.write_text("1 a/1.wav a/2.wav\\n0 a/1.wav b/1.wav\\n")
    >>> trials = read_trials(path)
    >>> trials.labels.tolist(), trials.test_ids
    ([1, 0], ('a/2.wav', 'b/1.wav'))
    """
    if form not in FORMS:
        raise TrialError(
            f"form must be one of {', '.join(FORMS)}, got '{form}'."
        )
    order, spellings = FORMS[form]

    def problem(fields: dict[str, str]) -> str | None:
        if fields["label"] not in spellings:
            return f"has the label '{fields['label']}'"
        if models is not None and fields["enrol"] not in models:
            return f"names the model '{fields['enrol']}' without enrolment"
        return None

    lines = FieldReader(
        path,
        order,
        problem,
        f"LABEL {spellings[1]} or {spellings[0]} (form '{form}'). Is the list "
        f"in another form ({', '.join(f for f in FORMS if f != form)})?",
    )
    columns = {name: UniqueNames() for name in order}
    for chunk in lines.chunks():
        for name, column in columns.items():
            column.add(chunk[name])
        if not set(columns["label"].ids) <= set(spellings):
            raise lines.first_bad_line()

    truth = np.array([label == spellings[1] for label in columns["label"].ids])
    names = _Renamer(strip_prefix, suffix)
    test_ids, test = names(*columns["test"].finish())
    enrol_ids, enrol = columns["enrol"].finish()
    if models is None:
        enrol_ids, enrol = names(enrol_ids, enrol)
    else:
        unknown = [name for name in enrol_ids if name not in models]
        if unknown:
            raise TrialError(
                f"{lines.first_bad_line()} In all, {len(unknown)} enrolment "
                f"models are not in the enrolment list: {first_ten(unknown)}."
                " Do the two files belong together?"
            )
        models = {
            model: tuple(map(names.rename, models[model]))
            for model in enrol_ids
        }
    labels = truth[columns["label"].finish()[1]].astype(np.int8)
    return TrialList(enrol_ids, test_ids, enrol, test, labels, models)


def read_models(path: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """Read an enrolment list, one model a line: ``MODEL UTTERANCE [...]``.

    A line with tabs is separated by tabs alone: its names may hold spaces.
    This is the form of SITW's ``enroll-core.lst``, CN-Celeb's ``enroll.lst``
    and ``enroll.map``, and Kaldi's ``spk2utt``. A model may take several
    lines; its utterances are collected.

    Arguments
    ---------
    path : path
        Text file.

    Returns
    -------
    dict
        Model name -> its utterances, in the file's order.

    Raises
    ------
    TrialError
        The file is missing or empty, or a line names no utterance or is not
        UTF-8.

    Example
    -------
    >>> path = getfixture("tmp_path") / "enroll.lst"
    >>> _ = path.write_text("id1 id1/a.wav id1/b.wav\\n")
    >>> read_models(path)
    {'id1': ('id1/a.wav', 'id1/b.wav')}
    """
    models: dict[str, list[str]] = {}
    _check_list(path)
    for number, line, fields in _lines(path, by_tabs=True):
        if len(fields) == 1:
            raise TrialError(
                f"'{path}', line {number}: '{line}' names no utterance; "
                "expected was 'MODEL UTTERANCE [UTTERANCE ...]'. Is it an "
                "enrolment list?"
            )
        models.setdefault(fields[0], []).extend(fields[1:])
    if not models:
        raise TrialError(f"The enrolment list '{path}' is empty.")
    return {model: tuple(names) for model, names in models.items()}


def write_trials(trials: TrialList, path: str | os.PathLike) -> None:
    """Write a list in VoxCeleb's form, ``LABEL ENROL TEST``.

    Tabs stand between the fields where a name holds a space. Models are
    written by name; their utterances are not in this file.

    Arguments
    ---------
    trials : TrialList
        What to write.
    path : path
        Written under a temporary name first, then renamed.

    Example
    -------
    >>> path = getfixture("tmp_path") / "trials.txt"
    >>> write_trials(TrialList(("a",), ("b",), [0], [0], [1]), path)
    >>> path.read_text()
    '1 a b\\n'
    """
    enrol_ids, test_ids = trials.enrol_ids, trials.test_ids
    tab = separator((*enrol_ids, *test_ids))
    with atomic_writer(path) as file:
        for start in range(0, len(trials), _CHUNK):
            part = slice(start, start + _CHUNK)
            file.writelines(
                f"{label}{tab}{enrol_ids[e]}{tab}{test_ids[t]}\n"
                for label, e, t in zip(
                    trials.labels[part].tolist(),
                    trials.enrol[part].tolist(),
                    trials.test[part].tolist(),
                    strict=True,
                )
            )


def write_models(
    models: Mapping[str, Iterable[str]], path: str | os.PathLike
) -> None:
    """Write what :func:`read_models` reads: a name and its utterances.

    Example
    -------
    >>> path = getfixture("tmp_path") / "enroll.models"
    >>> write_models({"id1": ["id1/a.wav", "id1/b.wav"]}, path)
    >>> path.read_text()
    'id1 id1/a.wav id1/b.wav\\n'
    """
    lines = [(model, *names) for model, names in models.items()]
    tab = separator(name for line in lines for name in line)
    with atomic_writer(path) as file:
        file.writelines(tab.join(line) + "\n" for line in lines)


def speakers_beside(path: str | os.PathLike) -> dict[str, str]:
    """Speaker of each utterance, of ``LIST.spk2utt`` beside a trial list.

    Empty where there is no such file. Its form is Kaldi's: a speaker and the
    speaker's utterances in each line.
    """
    path = Path(path).with_suffix(".spk2utt")
    found = read_models(path) if path.is_file() else {}
    return {name: speaker for speaker in found for name in found[speaker]}


def check_utterances(
    trials: TrialList | Iterable[TrialList], root: str | os.PathLike
) -> None:
    """Make sure that every recording is there before any is used.

    Arguments
    ---------
    trials : TrialList, or several
        Whose utterances are looked for.
    root : path
        The folder that relative names start from.

    Raises
    ------
    TrialError
        Names the first ten missing files and says how many there are.
    """
    lists = [trials] if isinstance(trials, TrialList) else list(trials)
    names = dict.fromkeys(name for each in lists for name in each.utterances)
    check_recordings(names, root)


def check_recordings(names: Collection[str], root: str | os.PathLike) -> None:
    """As :func:`check_utterances`, of recordings and parts of recordings."""
    root = os.fspath(root)
    missing = [
        name
        for name in names
        if not os.path.isfile(part_of(os.path.join(root, name))[0])
    ]
    if missing:
        raise TrialError(
            f"{len(missing)} of {len(names)} recordings are missing under "
            f"'{root}': {first_ten(missing)}.{missing_hint(root, missing)} Is "
            "this the folder that the names in the list start from? "
            "`speechbrain-ram verify` adapts names from another machine with "
            "--strip_prefix, of another audio format with --suffix, and takes "
            "Kaldi's utterances with --kaldi DIR."
        )


class UniqueNames:
    """Strings -> unique strings and int32 codes, chunk by chunk.

    Example
    -------
    >>> names = UniqueNames()
    >>> names.add(np.array(["b", "a"], dtype=object))
    >>> names.add(np.array(["a"], dtype=object))
    >>> names.finish()
    (('b', 'a'), array([0, 1, 1], dtype=int32))
    """

    def __init__(self):
        self.ids: dict[str, int] = {}
        self._codes: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """Append an array of strings, dtype object."""
        codes, unique = pd.factorize(values)
        known = (self.ids.setdefault(u, len(self.ids)) for u in unique)
        table = np.fromiter(known, np.int32, len(unique))
        self._codes.append(table[codes])

    def finish(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The unique strings in order of appearance, and all codes."""
        return tuple(self.ids), np.concatenate(self._codes)


class FieldReader:
    """Large text files of a fixed number of fields.

    Spaces and tabs separate them. Where the tabs of any line give the right
    number of fields, tabs alone separate every line that holds one.

    Reads fast, in chunks; only when something is wrong it reads again slowly,
    to say in which line.

    Arguments
    ---------
    path : path
        Blank lines in it are skipped.
    names : sequence of str
        What the fields are called.
    problem : callable
        Takes one line as {name: text}, returns what is wrong with it ("has
        ...") or None.
    expected : str
        End of the error message: what the fields should hold.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        names: Sequence[str],
        problem: Callable[[dict[str, str]], str | None],
        expected: str,
    ):
        self.path, self.names = path, tuple(names)
        self.problem, self.expected = problem, expected

    def chunks(self) -> Iterator[dict[str, np.ndarray]]:
        """Arrays of strings (dtype object) by field, some lines at a time.

        Raises
        ------
        TrialError
            The file is missing or empty, or a line has too few or too many
            fields or is not UTF-8.
        """
        _check_list(self.path)
        if self._by_tabs:
            yield from self._chunks_by_tabs()
            return
        empty = True
        try:
            _, _, first = next(_lines(self.path), (0, "", []))
            if len(first) > len(self.names):
                raise self.first_bad_line()  # pandas only warns
            # dtype=object, because the category type would read the name
            # 00012 as the number 12; the extra column catches long lines
            with pd.read_csv(
                self.path,
                sep=r"\s+",
                header=None,
                names=[*self.names, "too many"],
                index_col=False,
                dtype=object,
                na_filter=False,
                quoting=csv.QUOTE_NONE,
                encoding="utf-8",
                compression=None,
                chunksize=_CHUNK,
            ) as reader:
                for chunk in reader:
                    empty = empty and chunk.empty
                    fields = {n: chunk[n].to_numpy() for n in self.names}
                    too_short = (fields[self.names[-1]] == "").any()
                    if too_short or (chunk["too many"] != "").any():
                        raise self.first_bad_line()
                    yield fields
        except pd.errors.ParserError as error:
            raise self.first_bad_line() from error
        if empty:
            raise TrialError(f"The file '{self.path}' holds no trials.")

    @cached_property
    def _by_tabs(self) -> bool:
        """Whether tabs are more than spaces here: names may hold spaces."""
        if not (_holds(self.path, b"\t") and _holds(self.path, b" ")):
            return False
        return any(
            "\t" in line and len(fields) == len(self.names)
            for _, line, fields in _lines(self.path, True)
        )

    def _chunks_by_tabs(self) -> Iterator[dict[str, np.ndarray]]:
        """As :meth:`chunks`; pandas knows one separator a file."""
        rows = (fields for _, _, fields in _lines(self.path, True))
        while chunk := list(islice(rows, _CHUNK)):
            if any(len(fields) != len(self.names) for fields in chunk):
                raise self.first_bad_line()
            columns = np.array(chunk, dtype=object).T
            yield dict(zip(self.names, columns, strict=True))

    def first_bad_line(self) -> TrialError:
        """The error that names the first line that is wrong."""
        template = " ".join(name.upper() for name in self.names)
        for number, line, fields in _lines(self.path, self._by_tabs):
            if len(fields) != len(self.names):
                problem = f"has {len(fields)} fields"
                if self._by_tabs and "\t" in line:
                    problem += " between tabs"
                elif len(fields) > len(self.names):
                    problem += " (tabs must stand between names with spaces)"
            else:
                problem = self.problem(
                    dict(zip(self.names, fields, strict=True))
                )
            if problem:
                return TrialError(
                    f"'{self.path}', line {number}: '{line}' {problem}; "
                    f"expected was '{template}' with {self.expected}"
                )
        return TrialError(f"'{self.path}' cannot be read as '{template}'.")


def separator(names: Iterable[str]) -> str:
    """What goes between the fields of a list: a tab where names hold spaces.

    Example
    -------
    >>> separator(["a/1.wav"]), separator(["a/1.wav", "anna b/1.wav"])
    (' ', '\\t')
    """
    names = tuple(names)
    bad = [n for n in names if not n or re.search(r"[\t\r\n]", n)]
    if bad:
        raise TrialError(
            f"{bad[0]!r} cannot stand in a list, which has tabs or spaces "
            "between names and a line for each trial. Rename the recording."
        )
    return "\t" if any(" " in name for name in names) else " "


def _check_list(path: str | os.PathLike) -> None:
    """Raise a TrialError for a list that is missing or no text."""
    try:
        check_text(path)
    except TextError as error:
        raise TrialError(str(error)) from error
    except FileNotFoundError as error:
        raise TrialError(f"The list '{path}' does not exist.") from error
    except OSError as error:
        raise TrialError(
            f"The list '{path}' cannot be read: {error.strerror}."
        ) from error


def _holds(path: str | os.PathLike, byte: bytes) -> bool:
    with open(path, "rb") as file:
        return any(
            byte in block for block in iter(partial(file.read, 1 << 20), b"")
        )


def _lines(
    path: str | os.PathLike, by_tabs: bool = False
) -> Iterator[tuple[int, str, list[str]]]:
    """Number, text and fields of each line that is not blank."""
    # as pandas splits; str.split would at any Unicode space
    between_spaces = re.compile(r"[^ \t\n]+").findall
    between_tabs = re.compile(r"[^\t\n]+").findall
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip(" \t\n"):
                tabs = by_tabs and "\t" in line
                split = between_tabs if tabs else between_spaces
                yield number, line.strip(" \n"), split(line)


class _Renamer:
    """Applies `strip_prefix` and `suffix` to utterance names."""

    def __init__(self, strip_prefix: str, suffix: str | None):
        self.strip_prefix, self.suffix = strip_prefix, suffix

    def rename(self, name: str) -> str:
        name = name.removeprefix(self.strip_prefix)
        if self.suffix is not None:
            stem, ending = os.path.splitext(name)
            stem = stem if ending.lower() in _ENDINGS else name
            name = stem + self.suffix
        return name

    def __call__(
        self, ids: tuple[str, ...], codes: np.ndarray
    ) -> tuple[tuple[str, ...], np.ndarray]:
        column = UniqueNames()  # two names may become one
        column.add(np.array([self.rename(name) for name in ids], dtype=object))
        unique, table = column.finish()
        return unique, table[codes]
