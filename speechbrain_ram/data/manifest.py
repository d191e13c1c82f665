"""The manifest: one row an utterance, read from file headers alone.

Conventions: `duration` is in seconds; `start` and `stop` are samples at the
file's own rate, end exclusive; `wav` begins with ``$data_root/`` so that a
manifest can be moved with its corpus; `ID` is the path under the corpus root,
with its folders, so that files of one name in two folders stay apart. These
are SpeechBrain's columns, ``DynamicItemDataset.from_csv`` reads them too.

No recording is decoded unless asked (`verify=True`), nothing is written into
the corpus.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.logger import get_logger

from speechbrain_ram.data.audio import AUDIO_EXTENSIONS, Audio, AudioError
from speechbrain_ram.data.headers import many_objects, read_headers
from speechbrain_ram.data.names import (
    TextError,
    alike,
    missing_hint,
    part_name,
    part_of,
    read_text,
)
from speechbrain_ram.utils import atomic_writer, first_ten, number, whole_number

logger = get_logger(__name__)

#: The header line of a manifest.
COLUMNS = ("ID", "duration", "wav", "start", "stop", "spk_id")

#: What stands for the corpus folder in the `wav` column.
ROOT_PREFIX = "$data_root/"

_LARGEST = 2**48  # seconds or samples: 23 years at 384 kHz


class ManifestError(ValueError):
    """A corpus or a manifest cannot be used; the message says where and why."""


class Utterance(NamedTuple):
    """One row of a manifest; the module says what its columns mean."""

    id: str
    duration: float
    wav: str
    start: int
    stop: int
    spk_id: str

    def path(self, data_root: str | os.PathLike) -> str:
        """Return where the recording lies when the corpus is at `data_root`."""
        if self.wav.startswith(ROOT_PREFIX):
            return os.path.join(data_root, self.wav[len(ROOT_PREFIX) :])
        return self.wav


def embedding_names(rows: Sequence[Utterance]) -> list[str]:
    """What to embed for each row: its recording, or the part that it is.

    A row is a part where its ID names one, where it begins later than its
    recording, or where its recording has several rows.
    """
    uses = Counter(row.wav for row in rows)
    names = []
    for row in rows:
        name = row.wav.removeprefix(ROOT_PREFIX)
        named = part_of(row.id)[2] is not None
        if named or row.start > 0 or uses[row.wav] > 1:
            name = part_name(name, row.start, row.stop)
        names.append(name)
    return names


def build_manifest(
    data_root: str | os.PathLike,
    recordings: Iterable[tuple[str, str]],
    cache: str | os.PathLike | None = None,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
    min_duration: float = 0.0,
    verify: bool = False,
    skipped_list: str | os.PathLike | None = None,
    workers: int | None = None,
) -> list[Utterance]:
    """Read the headers of recordings, in parallel, into manifest rows.

    `recordings` are pairs of a path, relative to `data_root` or absolute, and a
    speaker. `cache`, `verify` and `workers` are those of
    :func:`~speechbrain_ram.data.headers.read_headers`. Recordings shorter than
    `min_duration` seconds are left out with a warning. Unusable ones are an
    error that names the first ten, or, with `skipped_list`, are left out and
    listed in that file.
    """
    root = Path(data_root)
    recordings = list(recordings)
    check_speakers((speaker for _, speaker in recordings), root)
    with many_objects():
        names = [name for name, _ in recordings]
        _check_names(names, root)
        headers = read_headers(root, names, cache, verify, workers)
        rows, skipped, short = _rows(
            root,
            recordings,
            headers,
            min_duration,
            Audio(sample_rate, resample, mixdown),
        )
    if skipped and skipped_list is None:
        gone = [name for name in names if not os.path.exists(root / name)]
        shown = first_ten(skipped, "\n  ")
        where = f" Is '{root}' the right folder?"
        raise ManifestError(
            f"{len(skipped)} of {len(names)} recordings cannot be used:\n  "
            f"{shown}\nRepair or remove them; `--skip_bad True` leaves them "
            f"out.{missing_hint(root, gone, where)}"
        )
    _report_left_out(skipped, short, len(names), min_duration, skipped_list)
    if not rows:
        raise ManifestError(
            f"None of the {len(recordings)} recordings under '{root}' is left: "
            f"{len(short)} are shorter than {min_duration} s, {len(skipped)} "
            "are unusable."
        )
    return rows


def check_speakers(speakers: Iterable[str], where: str | os.PathLike) -> None:
    """Refuse speakers that nobody, or no label file, can tell apart."""
    speakers = dict.fromkeys(speakers)
    arrow = CategoricalEncoder.VALUE_SEPARATOR
    for name in speakers:
        if arrow in name:
            raise ManifestError(
                f"The speaker {name!r} in '{where}' has {arrow!r} in the name, "
                "which separates names from numbers in SpeechBrain's label "
                "files. Rename the speaker."
            )
    twins = alike(speakers)
    if twins:
        raise ManifestError(
            f"The speakers {ascii(twins[0])} and {ascii(twins[1])} in "
            f"'{where}' differ only in Unicode's form or in spaces at the ends "
            "of the name, and would be trained as two. Rename one of them; if "
            "they are two people, give them names that can be told apart."
        )


def _check_names(names: Iterable[str], root: Path) -> None:
    """Refuse a file name that SpeechBrain would not read back."""
    for name in names:
        if "$" in name or not name.isprintable():
            raise ManifestError(
                f"The file name {name!r} under '{root}' cannot go into a "
                "manifest: '$' and unprintable characters are not allowed "
                "(SpeechBrain takes '$' for a variable). Rename the file."
            )


def _rows(root, recordings, headers, min_duration, audio):
    """Rows, and what is wrong with the files that become none."""
    rows, skipped, short = [], [], []
    for (name, speaker), header in zip(recordings, headers, strict=True):
        try:
            if isinstance(header, AudioError):
                raise header
            audio.check(root / name, header.channels, header.sample_rate)
        except AudioError as error:
            skipped.append(str(error))
            continue
        duration = header.frames / header.sample_rate
        if duration < min_duration:
            short.append(f"'{root / name}' lasts {duration:.3f} s only.")
            continue
        wav = name if os.path.isabs(name) else ROOT_PREFIX + name
        rows.append(Utterance(name, duration, wav, 0, header.frames, speaker))
    return rows, skipped, short


def _report_left_out(skipped, short, total, min_duration, skipped_list):
    """Warn of recordings that are left out, and list them if that was asked."""
    if short:
        logger.warning(
            f"{len(short)} of {total} recordings are shorter than "
            f"{min_duration} s and left out, the first: {short[0]}"
        )
    if skipped_list is not None:
        with atomic_writer(skipped_list) as file:
            file.writelines(f"{line}\n" for line in skipped + short)
    if skipped:
        logger.warning(
            f"{len(skipped)} of {total} recordings cannot be used and are "
            f"left out; all are listed in '{skipped_list}', the first: "
            f"{skipped[0]}"
        )


def write_manifest(rows: Iterable[Utterance], path: str | os.PathLike) -> None:
    """Write at least one row with a unique ID each, or nothing at all."""
    seen = set()
    with atomic_writer(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            if row.id in seen:
                raise ManifestError(
                    f"Two utterances have the ID '{row.id}'; '{path}' was not "
                    "written. IDs must be paths with their folders."
                )
            seen.add(row.id)
            writer.writerow(row)
        if not seen:
            raise ManifestError(f"There is no utterance to write to '{path}'.")


def read_manifest(path: str | os.PathLike) -> list[Utterance]:
    """Read and check a manifest; its columns may stand in any order."""
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"The manifest '{path}' does not exist. Was the corpus prepared?"
        )
    try:
        with many_objects():
            rows = list(_checked_rows(path))
    except TextError as error:
        raise ManifestError(str(error)) from error
    if not rows:
        raise ManifestError(f"The manifest '{path}' holds no utterances.")
    check_speakers((row.spk_id for row in rows), path)
    return rows


def _checked_rows(path: Path) -> Iterator[Utterance]:
    """The rows of a manifest, each with an ID of its own."""
    line_of_id: dict[str, int] = {}
    reader = csv.DictReader(
        io.StringIO(read_text(path), newline=""), skipinitialspace=True
    )
    try:
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
        if missing:
            raise ManifestError(
                f"{path}, line 1: found the columns {reader.fieldnames!s:.99}, "
                f"expected {','.join(COLUMNS)} ({', '.join(missing)} missing)."
            )
        for record in reader:
            place = f"{path}, line {reader.line_num}"
            row = _parse_row(record, place)
            if row.id in line_of_id:
                raise ManifestError(
                    f"{place}: the ID {row.id!r:.200} stands in line "
                    f"{line_of_id[row.id]} already; expected unique IDs."
                )
            line_of_id[row.id] = reader.line_num
            yield row
    except csv.Error as error:
        raise ManifestError(
            f"{path}, line {reader.line_num + 1}: not CSV ({error}). Is it a "
            "manifest, and was it copied whole?"
        ) from error


def _parse_row(record: dict[str, str | None], place: str) -> Utterance:
    """Turn one CSV record into an utterance, or say what is wrong with it."""
    if None in record or None in record.values():
        found = [value for value in record.values() if value]
        raise ManifestError(
            f"{place}: found {found!s:.300}, expected {len(COLUMNS)} values: "
            f"{','.join(COLUMNS)}."
        )

    def read(column, kind, low, text):
        try:
            value = kind(record[column])
        except ValueError:
            value = low - 1
        if not low <= value < _LARGEST:
            raise ManifestError(
                f"{place}: {column} is {record[column]!r:.80}, expected "
                f"{text}, in ASCII digits."
            )
        return value

    duration = read("duration", number, 1e-9, "seconds above 0")
    start = read("start", whole_number, 0, "a sample number, 0 or more")
    stop = read(
        "stop", whole_number, start + 1, f"a sample number above {start}"
    )
    for column in ("ID", "wav", "spk_id"):
        if not record[column]:
            raise ManifestError(f"{place}: {column} is empty.")
    wav = record["wav"]
    if "$" in wav.removeprefix(ROOT_PREFIX) or not (
        wav.startswith(ROOT_PREFIX) or os.path.isabs(wav)
    ):
        raise ManifestError(
            f"{place}: wav is {wav!r:.99}, expected '{ROOT_PREFIX}' and a path "
            "under the corpus folder, or an absolute path."
        )
    return Utterance(record["ID"], duration, wav, start, stop, record["spk_id"])


# -- Finding the recordings below a folder ------------------------------------


def find_recordings(
    data_root: str | os.PathLike,
    extensions: Sequence[str] = AUDIO_EXTENSIONS,
) -> list[str]:
    """List the recordings below a folder, sorted, links to folders followed.

    Paths are relative to it, with forward slashes. Endings are compared in
    lower case. Hidden files and folders are passed over (``._00001.wav`` is a
    trace of a macOS archive, not a recording).
    """
    root = Path(data_root)
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise ManifestError(
            f"The corpus folder '{root}' {state}. Is it spelled right, "
            "and is the disk mounted?"
        )
    endings = tuple(extensions)
    found = [
        name
        for name in _walk(root, "", set())
        if name.lower().endswith(endings)
    ]
    if not found:
        raise ManifestError(
            f"'{root}' holds no recordings: no file below it ends in one of "
            f"{', '.join(endings)}. Is the archive unpacked?"
        )
    return sorted(found)


def _walk(folder: Path, prefix: str, above: set[tuple[int, int]]) -> Iterator:
    """Relative file paths; `above` guards against loops of links."""
    status = folder.stat()
    key = (status.st_dev, status.st_ino)
    if key in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(
                    Path(entry.path), f"{prefix}{entry.name}/", above | {key}
                )
            else:
                yield prefix + entry.name


# -- Guards: nobody both trains and tests, nothing is written into a corpus ---


def check_overlap(
    train_speakers: Iterable[str],
    test_speakers: Iterable[str],
    test_name: str,
    remedy: str = "Leave them out of training.",
) -> None:
    """Refuse a speaker who is both trained on and tested on."""
    both = sorted(set(train_speakers) & set(test_speakers))
    if both:
        raise ManifestError(
            f"{len(both)} training speakers are also in {test_name}: "
            f"{first_ten(both)}. Its results would be worthless. "
            f"{remedy}"
        )


def check_outside(output: str | os.PathLike, corpus: str | os.PathLike) -> None:
    """Refuse an output folder within a corpus."""
    if Path(output).resolve().is_relative_to(Path(corpus).resolve()):
        raise ManifestError(
            f"The output folder '{output}' lies within the corpus "
            f"'{corpus}', where nothing is ever written. Choose another."
        )


# -- Holding out utterances for validation ------------------------------------


def split_by_utterance(
    rows: Sequence[Utterance], valid_fraction: float, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Split utterances so that every speaker keeps one for training at least.

    The held-out share, in (0, 1), is spread over the speakers as evenly as
    whole utterances allow: speakers are put in a random order and each gives
    what brings the running total to its share. Both parts keep the order of
    `rows`.
    """
    if not 0 < valid_fraction < 1:
        raise ManifestError(
            f"valid_fraction is {valid_fraction}, expected a share between 0 "
            "and 1, for example 0.1. Was a percentage meant?"
        )
    by_speaker = defaultdict(list)
    for index, row in enumerate(rows):
        by_speaker[row.spk_id].append(index)
    if len(by_speaker) < 2:
        raise ManifestError(
            f"There is one speaker only, '{next(iter(by_speaker), None)}'; "
            "telling speakers apart needs two or more. Is the "
            "corpus folder the one that holds the speakers' folders?"
        )
    single = [s for s, members in by_speaker.items() if len(members) == 1]
    if len(single) == len(by_speaker):
        raise ManifestError(
            "No speaker has two utterances, so that none can be held out for "
            "validation. Is the corpus folder one level too high or deep?"
        )
    if single:
        logger.warning(
            f"{len(single)} speakers have one utterance each, which is kept "
            f"for training: {first_ten(sorted(single))}"
        )
    generator = np.random.default_rng(seed)
    speakers = generator.permutation(sorted(by_speaker))
    held_out, seen = set(), 0
    for speaker in speakers:
        members = by_speaker[speaker]
        seen += len(members)
        due = round(seen * valid_fraction) - len(held_out)
        due = min(max(due, 0), len(members) - 1)
        held_out.update(generator.permutation(members)[:due].tolist())
    if not held_out:  # a share below one utterance in all
        largest = max(by_speaker.values(), key=len)
        held_out.add(int(generator.choice(largest)))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    valid = [row for i, row in enumerate(rows) if i in held_out]
    return train, valid
