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
(:class:`.fields.FieldReader`). Utterances are named by their path
relative to the corpus folder. Enrolment is an utterance or the name of a
*model*, which stands for one or more utterances.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from speechbrain_ram.data.names import missing_hint, part_of
from speechbrain_ram.utils import atomic_writer, first_ten
from speechbrain_ram.verification.fields import (
    FieldReader,
    TrialError,
    UniqueNames,
    check_list,
    lines_of,
    separator,
)

#: Order of the fields and spelling of (non-target, target) of each form.
FORMS = {
    "voxceleb": (("label", "enrol", "test"), ("0", "1")),
    "kaldi": (("enrol", "test", "label"), ("nontarget", "target")),
    "sitw": (("enrol", "test", "label"), ("imp", "tgt")),
    "cnceleb": (("enrol", "test", "label"), ("0", "1")),
}

_CHUNK = 100_000  # lines written at once
_ENDINGS = (".wav", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".sph", ".sv")


@dataclass(frozen=True, eq=False)
class TrialList:
    """Pairs to compare, as indices into lists of unique names.

    `models` may hold models that no trial names; every enrolment id must be in
    it.
    """

    enrol_ids: tuple[str, ...]
    test_ids: tuple[str, ...]
    enrol: np.ndarray  # [N] int32, indices into `enrol_ids`
    test: np.ndarray  # [N] int32, indices into `test_ids`
    labels: np.ndarray  # [N] int8, 1 for a target trial, 0 for a non-target
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
    """Read a trial list in one of the :data:`FORMS`, in the file's order.

    Without `models` (from :func:`read_models`) the enrolment field names an
    utterance. `strip_prefix` is removed from every utterance name that has it;
    `suffix` replaces the ending of another audio format, or is added. Duplicate
    lines are kept: published results count them.
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


def read_list_and_models(
    path: str | os.PathLike,
    form: str = "voxceleb",
    models: str | os.PathLike | None = None,
    strip_prefix: str = "",
    suffix: str | None = None,
    one_kind: bool = False,
) -> TrialList:
    """As :func:`read_trials`, with the models of the file `models`, or of
    ``LIST.models`` if that is there; trials of one kind alone are an error
    unless `one_kind` allows them.
    """
    models = models or models_beside(path)
    known = read_models(models) if models else None
    trials = read_trials(path, form, known, strip_prefix, suffix)
    targets = int(trials.labels.sum())
    if targets in (0, len(trials)) and not one_kind:
        raise TrialError(
            f"'{path}' has {targets} targets among {len(trials)} trials, both "
            "kinds are needed."
        )
    return trials


def models_beside(path: str | os.PathLike) -> Path | None:
    """The enrolment list ``LIST.models`` of a trial list, if there is one."""
    beside = Path(path).with_suffix(".models")
    return beside if beside.is_file() else None


def read_models(path: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """Read an enrolment list, one model a line: ``MODEL UTTERANCE [...]``.

    This is the form of SITW's ``enroll-core.lst``, CN-Celeb's ``enroll.lst``
    and ``enroll.map``, and Kaldi's ``spk2utt``. A line with tabs is separated
    by tabs alone. A model may take several lines.
    """
    models: dict[str, list[str]] = {}
    check_list(path)
    for number, line, fields in lines_of(path, by_tabs=True):
        if len(fields) == 1:
            raise TrialError(
                f"'{path}', line {number}: '{line:.200}' names no utterance; "
                "expected was 'MODEL UTTERANCE [UTTERANCE ...]'. Is it an "
                "enrolment list?"
            )
        models.setdefault(fields[0], []).extend(fields[1:])
    if not models:
        raise TrialError(f"The enrolment list '{path}' is empty.")
    return {model: tuple(names) for model, names in models.items()}


def write_trials(
    trials: TrialList,
    path: str | os.PathLike,
    fields: Sequence[str] = ("label", "enrol", "test"),
    scores: np.ndarray | None = None,
) -> None:
    """Write one line a trial; of models, the names alone."""
    enrol_ids, test_ids = trials.enrol_ids, trials.test_ids
    tab = separator((*enrol_ids, *test_ids))
    with atomic_writer(path) as file:
        for start in range(0, len(trials), _CHUNK):
            part = slice(start, start + _CHUNK)
            columns = {
                "label": trials.labels[part].astype(str),
                "enrol": [enrol_ids[i] for i in trials.enrol[part]],
                "test": [test_ids[i] for i in trials.test[part]],
            }
            if scores is not None:
                columns["score"] = scores[part].astype(str)  # exact digits
            lines = zip(*(columns[name] for name in fields), strict=True)
            file.writelines(tab.join(line) + "\n" for line in lines)


def write_models(
    models: Mapping[str, Iterable[str]], path: str | os.PathLike
) -> None:
    """Write what :func:`read_models` reads."""
    lines = [(model, *names) for model, names in models.items()]
    tab = separator(name for line in lines for name in line)
    with atomic_writer(path) as file:
        file.writelines(tab.join(line) + "\n" for line in lines)


def speakers_beside(path: str | os.PathLike) -> dict[str, str]:
    """Speaker of each utterance by ``LIST.spk2utt``, if there is one."""
    path = Path(path).with_suffix(".spk2utt")
    found = read_models(path) if path.is_file() else {}
    return {name: speaker for speaker in found for name in found[speaker]}


def check_utterances(
    trials: TrialList | Iterable[TrialList], root: str | os.PathLike
) -> None:
    """Make sure that every recording of one or more lists is there."""
    lists = [trials] if isinstance(trials, TrialList) else list(trials)
    names = dict.fromkeys(name for each in lists for name in each.utterances)
    check_recordings(names, root)


def check_recordings(names: Collection[str], root: str | os.PathLike) -> None:
    """As :func:`check_utterances`, of recordings and their parts by name."""
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
