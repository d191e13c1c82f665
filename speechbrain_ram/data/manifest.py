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
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.logger import get_logger

from speechbrain_ram.atomic import atomic_writer
from speechbrain_ram.data.audio import AudioError, check_format
from speechbrain_ram.data.headers import (
    many_objects,
    read_headers,
)
from speechbrain_ram.data.names import (
    TextError,
    alike,
    missing_hint,
    part_name,
    part_of,
    read_text,
)

logger = get_logger(__name__)

#: The header line of a manifest.
COLUMNS = ("ID", "duration", "wav", "start", "stop", "spk_id")

#: What stands for the corpus folder in the `wav` column.
ROOT_PREFIX = "$data_root/"


class ManifestError(ValueError):
    """A corpus or a manifest cannot be used; the message says where and why."""


class Utterance(NamedTuple):
    """One row of a manifest.

    Arguments
    ---------
    id : str
        Unique; the path under the corpus root.
    duration : float
        Seconds.
    wav : str
        ``$data_root/`` and the path under the corpus root, or an absolute
        path.
    start, stop : int
        Samples at the file's own rate, end exclusive.
    spk_id : str
        The speaker.

    Example
    -------
    >>> row = Utterance("s1/a.wav", 1.5, "$data_root/s1/a.wav", 0, 24000, "s1")
    >>> row.path("/corpus")
    '/corpus/s1/a.wav'
    """

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

    Example
    -------
    >>> row = Utterance("a", 1.0, "$data_root/s/a.wav", 0, 16000, "s")
    >>> embedding_names([row])
    ['s/a.wav']
    >>> embedding_names([row, row._replace(id="b", start=16000, stop=32000)])
    ['s/a.wav@0-16000', 's/a.wav@16000-32000']
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

    Arguments
    ---------
    data_root : path
        The corpus folder.
    recordings : iterable of (str, str)
        Path, relative to `data_root` or absolute, and speaker.
    cache : path, optional
        A file outside of the corpus that remembers headers from one call to
        the next. A file is read again when its size or its time of change is
        another.
    sample_rate : int
        The rate in Hz that training needs.
    resample, mixdown : bool
        Whether files of another rate, or of several channels, are welcome.
    min_duration : float
        Seconds; shorter utterances are left out with a warning.
    verify : bool
        Decode every file to its end once. Only this finds damage that the
        header does not show (minutes to hours on a large corpus).
    skipped_list : path, optional
        When given, unusable recordings are left out and listed in this file,
        with their reasons; when not, the first few are named in an error.
    workers : int, optional
        Threads that wait for a slow disk, or decode; 4 a processor by
        default.

    Returns
    -------
    list of Utterance
        In the order of `recordings`.

    Raises
    ------
    ManifestError
        Unusable recordings, each with its reason, or none left.

    Example
    -------
    >>> import numpy, soundfile
    >>> root = getfixture("tmp_path")
    >>> (root / "anna").mkdir()
    >>> soundfile.write(root / "anna" / "1.wav", numpy.zeros(24000), 16000)
    >>> build_manifest(root, [("anna/1.wav", "anna")])[0].duration
    1.5
    """
    root = Path(data_root)
    recordings = list(recordings)
    check_speakers((speaker for _, speaker in recordings), root)
    with many_objects():
        names = [name for name, _ in recordings]
        headers = read_headers(root, names, cache, verify, workers)
        rows, skipped, short = _rows(
            root,
            recordings,
            headers,
            min_duration,
            (sample_rate, resample, mixdown),
        )
    hint = ""
    if skipped and skipped_list is None:
        gone = [name for name in names if not (root / name).exists()]
        hint = missing_hint(root, gone)
    _report_skipped(
        skipped, short, len(recordings), min_duration, skipped_list, hint
    )
    if not rows:
        raise ManifestError(
            f"None of the {len(recordings)} recordings under '{root}' is left: "
            f"{len(short)} are shorter than {min_duration} s, {len(skipped)} "
            "are unusable."
        )
    return rows


def check_speakers(speakers: Iterable[str], where: str | os.PathLike) -> None:
    """Raise a ManifestError for two names that nobody can tell apart.

    And for one that SpeechBrain cannot read back from its label file.
    """
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


def _rows(root, recordings, headers, min_duration, wanted):
    """Rows, and what is wrong with the files that become none."""
    rows, skipped, short = [], [], []
    for (name, speaker), header in zip(recordings, headers, strict=True):
        if isinstance(header, AudioError):
            skipped.append(str(header))
            continue
        try:
            check_format(
                root / name, header.channels, header.sample_rate, *wanted
            )
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


def _report_skipped(
    skipped, short, total, min_duration, skipped_list, hint
) -> None:
    """Raise for unusable recordings, or list them where that was asked."""
    if skipped and skipped_list is None:
        shown = "\n  ".join(skipped[:10])
        more = f"\n  ... and {len(skipped) - 10} more" * (len(skipped) > 10)
        raise ManifestError(
            f"{len(skipped)} of {total} recordings cannot be used:\n  {shown}"
            f"{more}\nRepair or remove them; `--skip_bad True` leaves them out."
            f"{hint}"
        )
    if short:
        logger.warning(
            "%d of %d recordings are shorter than %s s and left out, the "
            "first: %s",
            len(short),
            total,
            min_duration,
            short[0],
        )
    if skipped_list is not None:
        with atomic_writer(skipped_list) as file:
            file.writelines(f"{line}\n" for line in skipped + short)
    if skipped:
        logger.warning(
            "%d of %d recordings cannot be used and are left out; all are "
            "listed in '%s', the first: %s",
            len(skipped),
            total,
            skipped_list,
            skipped[0],
        )


def write_manifest(rows: Iterable[Utterance], path: str | os.PathLike) -> None:
    """Write a manifest; it appears complete or not at all.

    Arguments
    ---------
    rows : iterable of Utterance
        At least one, with unique ids.
    path : path
        The CSV file.

    Raises
    ------
    ManifestError
        No rows, or two rows of one id.
    """
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
    """Read and check a manifest.

    Arguments
    ---------
    path : path
        A CSV file with at least the columns of :data:`COLUMNS`, in any order.

    Returns
    -------
    list of Utterance

    Raises
    ------
    ManifestError
        Missing file or columns, or a bad row: the message gives file, line,
        the text found and what was expected.
    """
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
    except csv.Error as error:
        raise ManifestError(
            f"'{path}' cannot be read as CSV: {error}. Is it a manifest, and "
            "was it copied whole?"
        ) from error
    if not rows:
        raise ManifestError(f"The manifest '{path}' holds no utterances.")
    check_speakers((row.spk_id for row in rows), path)
    return rows


def _checked_rows(path: Path) -> Iterator[Utterance]:
    """The rows of a manifest, each with an ID of its own."""
    line_of_id: dict[str, int] = {}
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
        if missing:
            raise ManifestError(
                f"{path}, line 1: found the columns {reader.fieldnames}, "
                f"expected {','.join(COLUMNS)} ({', '.join(missing)} missing)."
            )
        for record in reader:
            place = f"{path}, line {reader.line_num}"
            row = _parse_row(record, place)
            if row.id in line_of_id:
                raise ManifestError(
                    f"{place}: the ID '{row.id}' stands in line "
                    f"{line_of_id[row.id]} already; expected unique IDs."
                )
            line_of_id[row.id] = reader.line_num
            yield row


def _parse_row(record: dict[str, str | None], place: str) -> Utterance:
    """Turn one CSV record into an utterance, or say what is wrong with it."""
    if None in record or None in record.values():
        raise ManifestError(
            f"{place}: found {[v for v in record.values() if v is not None]}, "
            f"expected {len(COLUMNS)} values: {','.join(COLUMNS)}."
        )

    def number(column, kind, low, text):
        try:
            value = kind(record[column])
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise ManifestError(
                f"{place}: {column} is '{record[column]}', expected {text}."
            )
        return value

    duration = number("duration", float, 1e-9, "seconds above 0")
    start = number("start", int, 0, "a sample number, 0 or more")
    stop = number("stop", int, start + 1, f"a sample number above {start}")
    for column in ("ID", "wav", "spk_id"):
        if not record[column]:
            raise ManifestError(f"{place}: {column} is empty.")
    wav = record["wav"]
    if "$" in wav.removeprefix(ROOT_PREFIX) or not (
        wav.startswith(ROOT_PREFIX) or os.path.isabs(wav)
    ):
        raise ManifestError(
            f"{place}: wav is '{wav}', expected '{ROOT_PREFIX}' and a path "
            "under the corpus folder, or an absolute path."
        )
    return Utterance(record["ID"], duration, wav, start, stop, record["spk_id"])
