"""Utterances that a table or a Kaldi data directory names.

An utterance is a recording, or a part of one: samples [start, stop).
"""

from __future__ import annotations

import csv
import io
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from speechbrain.utils.logger import get_logger

from speechbrain_ram.data.audio import AudioError, AudioInfo, audio_info
from speechbrain_ram.data.manifest import ManifestError, Utterance
from speechbrain_ram.data.names import TextError, part_name, read_text

logger = get_logger(__name__)

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BLANK = " \t\r"  # between Kaldi's fields; a name may hold Unicode's spaces
_KALDI_OVERSHOOT = 0.5  # seconds that Kaldi, too, cuts off without a word


class Part(NamedTuple):
    """What a row says; without start and stop it is the whole recording."""

    place: str  # for messages
    path: str
    speaker: str
    start: int | None = None
    stop: int | None = None

    @property
    def name(self) -> str:
        """What manifests and trial lists call it."""
        if self.stop is None:
            return self.path
        return part_name(self.path, self.start, self.stop)


def read_table(path: Path) -> list[Part]:
    """The rows of a CSV file with ``wav``, ``spk_id``, ``start``, ``stop``."""
    try:
        parts = list(_rows(path))
    except FileNotFoundError:
        raise ManifestError(
            f"'{path}' does not exist. Expected a folder of speakers, a Kaldi "
            "directory, or a CSV file with the columns wav and spk_id."
        ) from None
    except TextError as error:
        raise ManifestError(str(error)) from error
    except csv.Error as error:
        raise ManifestError(f"'{path}' cannot be read: {error}.") from error
    if not parts:
        raise ManifestError(f"'{path}' names no recordings.")
    return parts


def _rows(path: Path) -> Iterator[Part]:
    file = io.StringIO(read_text(path), newline="")
    reader = csv.DictReader(file, skipinitialspace=True)
    columns = reader.fieldnames or []
    if not {"wav", "spk_id"} <= set(columns):
        raise ManifestError(
            f"{path}, line 1: found the columns "
            f"{reprlib.repr(columns)}, expected wav and spk_id among them."
        )
    bounds = [column for column in ("start", "stop") if column in columns]
    if len(bounds) == 1:
        raise ManifestError(
            f"{path}, line 1: of the columns start and stop there is one "
            "only. Both are needed, or neither."
        )
    for record in reader:
        place = f"{path}, line {reader.line_num}"
        name, speaker = record["wav"], record["spk_id"]
        if not name or not speaker:
            raise ManifestError(f"{place}: wav or spk_id is empty.")
        _check_names(place, name, speaker)
        yield Part(
            place,
            name.removeprefix("$data_root/"),
            speaker,
            *(_sample(record[column], column, place) for column in bounds),
        )


def _sample(text: str | None, column: str, place: str) -> int:
    if text is None or not re.fullmatch("[0-9]{1,15}", text):
        raise ManifestError(
            f"{place}: {column} is {reprlib.repr(text)}, expected a whole "
            "number of samples at the recording's own rate. Is it in seconds?"
        )
    return int(text)


def _check_names(place: str, *names: str) -> None:
    """Names go into lists and tables, one a line."""
    for name in names:
        if _CONTROL.search(name):
            raise ManifestError(
                f"{place}: {reprlib.repr(name)} has a line break or another "
                "control character. Is a quote missing, or the file damaged?"
            )


def is_kaldi(corpus: str | os.PathLike) -> bool:
    """Whether a folder is a Kaldi data directory."""
    return all(
        os.path.isfile(os.path.join(corpus, name))
        for name in ("wav.scp", "utt2spk")
    )


def kaldi_parts(
    corpus: str | os.PathLike, root: str | os.PathLike
) -> dict[str, Part]:
    """Utterance -> its part, by ``wav.scp``, ``utt2spk`` and ``segments``.

    Relative paths in ``wav.scp`` start from `root`; a command is an error.
    """
    recordings = {}
    for place, (name, path) in _kaldi_lines(corpus, "wav.scp", 2):
        if path.endswith("|"):
            raise ManifestError(
                f"{place}: {reprlib.repr(path)} is a command. Only paths are "
                "read: run it once, and write the path of its result here."
            )
        recordings[name] = path
    speakers = dict(each for _, each in _kaldi_lines(corpus, "utt2spk", 2))
    segments = [
        (place, utterance, recording, float(start), float(end))
        for place, (utterance, recording, start, end) in _kaldi_lines(
            corpus, "segments", 4
        )
    ] or [(f"'{corpus}'", name, name, 0.0, -1.0) for name in recordings]
    lost = set(speakers) - {utterance for _, utterance, *_ in segments}
    if lost:
        raise ManifestError(
            f"'{corpus}': {len(lost)} utterances of utt2spk have no recording, "
            f"for example '{min(lost)}'. Kaldi's utils/fix_data_dir.sh takes "
            "out what is not in all files."
        )
    headers: dict[str, AudioInfo] = {}
    parts = {}
    for place, utterance, recording, start, end in segments:
        if recording not in recordings or utterance not in speakers:
            raise ManifestError(
                f"{place}: '{utterance}' of '{recording}' is not in wav.scp "
                "and utt2spk. Do the files belong together?"
            )
        path, speaker = recordings[recording], speakers[utterance]
        whole = Part(place, path, speaker)
        parts[utterance] = whole
        if start == 0 and end == -1:
            continue
        try:
            if path not in headers:
                headers[path] = audio_info(os.path.join(root, path))
        except AudioError:  # said, or left out, where recordings are read
            continue
        rate, frames = headers[path].sample_rate, headers[path].frames
        stop = frames if end == -1 else round(end * rate)
        if stop - frames < _KALDI_OVERSHOOT * rate:
            stop = min(stop, frames)
        parts[utterance] = whole._replace(start=round(start * rate), stop=stop)
    return parts


def _kaldi_lines(corpus, name: str, n_fields: int) -> Iterator[tuple]:
    """Place and fields of each line; nothing where the file is missing."""
    first = {}
    path = os.path.join(corpus, name)
    if not os.path.isfile(path):
        return
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.strip(_BLANK)
        if not line:
            continue
        fields = re.split(f"[{_BLANK}]+", line, maxsplit=n_fields - 1)
        place = f"{path}, line {number}"
        numbers = n_fields < 4 or all(map(_is_seconds, fields[2:]))
        if len(fields) != n_fields or not numbers:
            raise ManifestError(
                f"{place}: {reprlib.repr(line)} is not of Kaldi's form."
            )
        _check_names(place, *fields)
        if first.setdefault(fields[0], number) != number:
            raise ManifestError(
                f"{place}: '{fields[0]}' is in line {first[fields[0]]} already."
            )
        yield place, fields


def _is_seconds(text: str) -> bool:
    """-1 as an end is that of the recording."""
    return re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|-1(\.0*)?", text) is not None


def cut(
    parts: list[Part], rows: list[Utterance], min_duration: float
) -> list[Utterance]:
    """Utterances of a table; `rows` are its recordings."""
    whole = {row.id: row for row in rows}
    utterances, short = {}, []
    for part in parts:
        row = whole.get(part.path)
        if row is None:  # was left out
            continue
        utterance = row._replace(spk_id=part.speaker)
        if part.stop is not None and (part.start, part.stop) != (0, row.stop):
            if not 0 <= part.start < part.stop <= row.stop:
                raise ManifestError(
                    f"{part.place}: '{part.path}' has {row.stop} samples; "
                    f"there is no part from {part.start} to {part.stop}. Are "
                    "these samples at another rate, or of another recording?"
                )
            duration = (part.stop - part.start) * row.duration / row.stop
            if duration < min_duration:
                short.append(part)
                continue
            utterance = utterance._replace(
                id=part.name,
                duration=duration,
                start=part.start,
                stop=part.stop,
            )
        if utterance.id in utterances:
            hint = "Its start and stop are those of another row."
            if part.stop is None:
                hint = "Parts of a recording need the columns start and stop."
            raise ManifestError(
                f"{part.place}: '{utterance.id}' is there twice. {hint}"
            )
        utterances[utterance.id] = utterance
    if short:
        place, path, _, start, stop = short[0]
        text = (
            f"{len(short)} of {len(parts)} parts are shorter than "
            f"{min_duration} s, the first is {place}: samples {start} to "
            f"{stop} of '{path}'. A table has samples, not seconds."
        )
        if not utterances:
            raise ManifestError(text)
        logger.warning("Left out: %s", text)
    return list(utterances.values())
