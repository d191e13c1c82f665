"""Any folder of speakers: ``ROOT/SPEAKER/**/UTTERANCE.wav`` to manifests.

The first folder below the root names the speaker; what lies between it and
the recording (sessions, videos) is kept in the utterance's ID only.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from speechbrain.utils.logger import get_logger

from speechbrain_ram.data.audio import (
    AUDIO_EXTENSIONS,
    AudioError,
    AudioInfo,
    audio_info,
)
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    build_manifest,
    check_outside,
    check_speakers,
    find_recordings,
    split_by_utterance,
    write_manifest,
)
from speechbrain_ram.data.names import (
    TextError,
    part_name,
    read_text,
    session_of,
)
from speechbrain_ram.verification.trials import (
    TrialList,
    write_models,
    write_trials,
)

logger = get_logger(__name__)


def prepare_folder(
    data_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    valid_fraction: float = 0.1,
    seed: int = 1986,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
    min_duration: float = 0.1,
    verify: bool = False,
    skip_bad: bool = False,
    extensions: Sequence[str] = AUDIO_EXTENSIONS,
    workers: int | None = None,
) -> tuple[Path, Path]:
    """Write the training and validation manifests of a folder of speakers.

    Called again, it reads only the headers of files that changed.

    Arguments
    ---------
    data_root : path
        The folder whose sub-folders are the speakers.
    output_dir : path
        Where ``train.csv``, ``valid.csv`` and the header cache go; not
        within `data_root`.
    valid_fraction : float
        Share of the utterances held out for validation, in (0, 1).
    seed : int
        Chooses the utterances held out.
    sample_rate : int
        The rate in Hz that training needs.
    resample, mixdown : bool
        Whether files of another rate, or of several channels, are welcome.
    min_duration : float
        Seconds; shorter utterances are left out with a warning.
    verify : bool
        Decode every file once, to find damage that headers do not show.
    skip_bad : bool
        Leave unusable files out, listed in ``OUTPUT_DIR/skipped.txt``,
        instead of raising.
    extensions : sequence of str
        File name endings that count as recordings.
    workers : int, optional
        Threads that read headers.

    Returns
    -------
    train_csv, valid_csv : pathlib.Path

    Raises
    ------
    ManifestError
        Missing folder, no recordings, one speaker only, unusable files; the
        message names them. Neither manifest is written then.

    Example
    -------
    >>> import numpy, soundfile
    >>> from speechbrain_ram.data.manifest import read_manifest
    >>> root = getfixture("tmp_path")
    >>> for name in ("anna/1", "anna/2", "ben/1", "ben/2"):
    ...     file = root / "corpus" / f"{name}.wav"
    ...     file.parent.mkdir(parents=True, exist_ok=True)
    ...     soundfile.write(file, numpy.zeros(16000), 16000)
    >>> train, valid = prepare_folder(
    ...     root / "corpus", root / "out", valid_fraction=0.5
    ... )
    >>> [row.spk_id for row in read_manifest(train)]
    ['anna', 'ben']
    """
    data_root, output_dir = Path(data_root), Path(output_dir)
    check_outside(output_dir, data_root)
    recordings = []
    for name in find_recordings(data_root, extensions):
        speaker, slash, _ = name.partition("/")
        if not slash:
            raise ManifestError(
                f"'{data_root / name}' lies in no speaker's folder. Expected "
                "ROOT/SPEAKER/.../UTTERANCE; is the folder given one level too "
                "deep?"
            )
        recordings.append((name, speaker))

    rows = build_manifest(
        data_root,
        recordings,
        cache=output_dir / "headers.cache",
        sample_rate=sample_rate,
        resample=resample,
        mixdown=mixdown,
        min_duration=min_duration,
        verify=verify,
        skipped_list=output_dir / "skipped.txt" if skip_bad else None,
        workers=workers,
    )
    train, valid = split_by_utterance(rows, valid_fraction, seed)
    train_csv, valid_csv = output_dir / "train.csv", output_dir / "valid.csv"
    write_manifest(train, train_csv)
    write_manifest(valid, valid_csv)
    logger.info(
        "%d training and %d validation utterances, %.1f hours, in '%s'",
        len(train),
        len(valid),
        sum(row.duration for row in rows) / 3600,
        output_dir,
    )
    return train_csv, valid_csv


# -- Your own corpus: folders or a table, with trials of its own --------------
#
# A share of the speakers is held out, and pairs of their utterances become the
# trials that choose the best checkpoint and make the report.


def prepare_own(
    corpus: str | os.PathLike,
    output_dir: str | os.PathLike,
    data_root: str | os.PathLike | None = None,
    dev_share: float = 0.1,
    max_trials: int = 20000,
    valid_fraction: float = 0.1,
    seed: int = 1986,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
    min_duration: float = 0.1,
    skip_bad: bool = False,
    workers: int | None = None,
) -> tuple[Path, Path]:
    """Write manifests of training and validation, and development trials.

    Arguments
    ---------
    corpus : path
        A folder ``SPEAKER/**/UTTERANCE.wav``; a Kaldi data directory; or a CSV
        file with the columns ``wav`` (a path, relative to `data_root` or
        absolute) and ``spk_id``, perhaps ``start`` and ``stop`` in samples.
    output_dir : path
        Takes ``train.csv``, ``valid.csv`` and ``dev_trials.txt``, whose paths
        are relative to `data_root`, and ``dev_trials.spk2utt``, which says
        who speaks in the trials.
    data_root : path, optional
        By default the folder itself, or the one that the CSV file is in.
    dev_share : float
        Share of the speakers who are held out for the trials, in (0, 1); two
        at least.
    max_trials : int
        Half of them targets, as far as there are so many.
    valid_fraction, seed, sample_rate, resample, mixdown, min_duration
        As for :func:`speechbrain_ram.corpora.folder.prepare_folder`.
    skip_bad, workers
        As for :func:`speechbrain_ram.corpora.folder.prepare_folder`.

    Returns
    -------
    train_csv, valid_csv : pathlib.Path

    Raises
    ------
    ManifestError
        Nothing to train on, or too few speakers to hold any out.
    """
    corpus, output_dir = Path(corpus), Path(output_dir)
    parts: list[_Part] = []
    root = Path(data_root or corpus)
    if not corpus.is_dir():
        root = Path(data_root or corpus.parent)
        parts = _of_table(corpus)
        near = [part for part in parts if not os.path.isabs(part.path)]
        if root.is_file() and near:
            raise ManifestError(
                f"{near[0].place}: '{near[0].path}' is a relative path. Say "
                "with --data_root which folder the table's paths start from."
            )
    elif is_kaldi(corpus):
        check_outside(output_dir, corpus)
        parts = list(kaldi_parts(corpus, root).values())
    else:
        check_outside(output_dir, corpus)
        recordings = _of_folder(corpus, root)
    if parts:
        check_speakers((part.speaker for part in parts), corpus)
        speaker_of = {part.path: part.speaker for part in parts}
        recordings = list(speaker_of.items())
    rows = build_manifest(
        root,
        recordings,
        cache=output_dir / "headers.cache",
        sample_rate=sample_rate,
        resample=resample,
        mixdown=mixdown,
        min_duration=min_duration,
        skipped_list=output_dir / "skipped.txt" if skip_bad else None,
        workers=workers,
    )
    if parts:
        rows = _cut(parts, rows, min_duration)
    generator = np.random.default_rng(seed)
    dev = _choose_speakers(rows, dev_share, generator)
    trials = make_trials(
        [row for row in rows if row.spk_id in dev], max_trials, generator
    )
    train, valid = split_by_utterance(
        [row for row in rows if row.spk_id not in dev], valid_fraction, seed
    )
    train_csv, valid_csv = output_dir / "train.csv", output_dir / "valid.csv"
    write_manifest(train, train_csv)
    write_manifest(valid, valid_csv)
    write_trials(trials, output_dir / "dev_trials.txt")
    held_out = defaultdict(list)
    for row in rows:
        if row.spk_id in dev:
            held_out[row.spk_id].append(row.id)
    write_models(held_out, output_dir / "dev_trials.spk2utt")
    logger.info(
        "%d speakers to train on, %d held out for %d trials",
        len({row.spk_id for row in train}),
        len(dev),
        len(trials),
    )
    return train_csv, valid_csv


def corpus_name(corpus: str | os.PathLike) -> str:
    """What a corpus is called where its path would say too much.

    Example
    -------
    >>> corpus_name("/data/voices/"), corpus_name("tables/radio.csv")
    ('voices', 'radio')
    """
    path = Path(corpus).resolve()
    return path.name if path.is_dir() else path.stem


def make_trials(
    rows: Sequence[Utterance], max_trials: int, generator: np.random.Generator
) -> TrialList:
    """Draw pairs of utterances, as many of one speaker as of two.

    Time and memory grow with `max_trials` and the number of utterances, not
    with the number of pairs. Of a speaker who has several sessions
    (:func:`speechbrain_ram.data.names.session_of`), the target trials pair
    different ones.

    Arguments
    ---------
    rows : sequence of Utterance
        Of two or more speakers.
    max_trials : int
        Upper bound; fewer where there are not so many pairs.
    generator : np.random.Generator
        Draws them.

    Returns
    -------
    TrialList
        Without repetitions, and no utterance against itself.
    """
    names = tuple(row.id for row in rows)
    sessions = [(row.spk_id, session_of(row.id)) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (sessions[i], i))
    speaker_end = _block_ends([rows[i].spk_id for i in order])
    session_end = _block_ends([sessions[i] for i in order])
    one_session = session_end - _block_begins(session_end) == (
        speaker_end - _block_begins(speaker_end)
    )
    place = np.arange(len(order))
    after = np.where(one_session, place + 1, session_end)
    same = _draw_pairs(after, speaker_end, max(max_trials // 2, 1), generator)
    everyone = np.full(len(order), len(order))
    different = _draw_pairs(speaker_end, everyone, max(len(same), 1), generator)
    index = np.array(order)
    parts = [np.sort(index[pairs], axis=1) for pairs in (same, different)]
    pairs = np.concatenate([part[np.lexsort(part.T[::-1])] for part in parts])
    return TrialList(
        names,
        names,
        pairs[:, 0],
        pairs[:, 1],
        np.repeat([1, 0], [len(same), len(different)]),
    )


def _block_ends(keys: Sequence) -> np.ndarray:
    """Where the run of equal keys ends that each one stands in."""
    ends = np.empty(len(keys), np.int64)
    end = len(keys)
    for i in range(len(keys) - 1, -1, -1):
        if i + 1 < len(keys) and keys[i] != keys[i + 1]:
            end = i + 1
        ends[i] = end
    return ends


def _block_begins(ends: np.ndarray) -> np.ndarray:
    return np.searchsorted(ends, ends)


def _draw_pairs(
    first: np.ndarray,
    end: np.ndarray,
    wanted: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Draw pairs (i, j) with first[i] <= j < end[i], [at most wanted, 2].

    Pairs are numbered: those of i come after those of all before i.
    """
    last = np.cumsum(end - first)
    total = int(last[-1])
    if total <= wanted:
        chosen = np.arange(total)
    else:
        chosen = generator.choice(total, wanted, replace=False, shuffle=False)
    i = np.searchsorted(last, chosen, side="right")
    j = first[i] + chosen - (last[i] - (end - first)[i])
    return np.stack([i, j], axis=1)


def _of_folder(corpus: Path, root: Path) -> list[tuple[str, str]]:
    """(path relative to the root, speaker) of a folder of speakers."""
    prefix = os.path.relpath(corpus, root)
    prefix = "" if prefix == "." else f"{prefix}/"
    recordings = []
    for name in find_recordings(corpus):
        speaker, slash, _ = name.partition("/")
        if not slash:
            raise ManifestError(
                f"'{corpus / name}' lies in no speaker's folder. Expected "
                "CORPUS/SPEAKER/.../UTTERANCE; is it one level too deep?"
            )
        recordings.append((prefix + name, speaker))
    return recordings


class _Part(NamedTuple):
    """A row of a table: a recording, or samples [start, stop) of it."""

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


def _of_table(path: Path) -> list[_Part]:
    """The rows of a CSV file."""
    try:
        file = io.StringIO(read_text(path), newline="")
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = reader.fieldnames or []
        if not {"wav", "spk_id"} <= set(columns):
            raise ManifestError(
                f"{path}, line 1: found the columns {columns}, expected "
                "wav and spk_id among them."
            )
        if len({"start", "stop"} & set(columns)) == 1:
            raise ManifestError(
                f"{path}, line 1: of the columns start and stop there is one "
                "only. Both are needed, or neither."
            )
        parts = []
        for record in reader:
            place = f"{path}, line {reader.line_num}"
            if not record["wav"] or not record["spk_id"]:
                raise ManifestError(f"{place}: wav or spk_id is empty.")
            name = record["wav"].removeprefix("$data_root/")
            bounds = [
                _sample(record[column], column, place)
                for column in ("start", "stop")
                if column in columns
            ]
            parts.append(_Part(place, name, record["spk_id"], *bounds))
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


def _sample(text: str | None, column: str, place: str) -> int:
    if text is None or not re.fullmatch("[0-9]{1,15}", text):
        raise ManifestError(
            f"{place}: {column} is '{text}', expected a whole number of "
            "samples at the recording's own rate. Is it in seconds?"
        )
    return int(text)


def is_kaldi(corpus: str | os.PathLike) -> bool:
    """Whether a folder is a Kaldi data directory."""
    return all(
        os.path.isfile(os.path.join(corpus, name))
        for name in ("wav.scp", "utt2spk")
    )


def kaldi_parts(
    corpus: str | os.PathLike, root: str | os.PathLike
) -> dict[str, _Part]:
    """Utterance -> recording and bounds, of a Kaldi data directory.

    Arguments
    ---------
    corpus : path
        Holds ``wav.scp``, ``utt2spk`` and, where utterances are parts of
        recordings, ``segments``.
    root : path
        What relative paths in ``wav.scp`` start from.

    Raises
    ------
    ManifestError
        A pipe instead of a path, or lines that do not belong together.
    """
    recordings = {}
    for place, (name, path) in _kaldi_lines(corpus, "wav.scp", 2):
        if path.endswith("|"):
            raise ManifestError(
                f"{place}: '{path}' is a command. Only paths are read: run it "
                "once, and write the path of its result here."
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
        if start == 0 and end == -1:  # whole
            parts[utterance] = _Part(place, path, speaker)
            continue
        try:
            if path not in headers:
                headers[path] = audio_info(os.path.join(root, path))
        except AudioError:  # said, or left out, where recordings are read
            parts[utterance] = _Part(place, path, speaker)
            continue
        rate, frames = headers[path].sample_rate, headers[path].frames
        stop = frames if end == -1 else round(end * rate)
        if stop - frames < _KALDI_OVERSHOOT * rate:
            stop = min(stop, frames)
        bounds = round(start * rate), stop
        parts[utterance] = _Part(place, path, speaker, *bounds)
    return parts


_KALDI_OVERSHOOT = 0.5  # seconds that Kaldi, too, cuts off without a word


def _kaldi_lines(corpus, name: str, n_fields: int) -> Iterator[tuple]:
    """Place and fields of each line; nothing where the file is missing."""
    first = {}
    path = os.path.join(corpus, name)
    if not os.path.isfile(path):
        return
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.strip().split(maxsplit=n_fields - 1)
        place = f"{path}, line {number}"
        numbers = n_fields < 4 or all(map(_is_seconds, fields[2:]))
        if fields and (len(fields) != n_fields or not numbers):
            raise ManifestError(f"{place}: '{line}' is not of Kaldi's form.")
        if fields:
            if first.setdefault(fields[0], number) != number:
                raise ManifestError(
                    f"{place}: '{fields[0]}' is in line {first[fields[0]]} "
                    "already."
                )
            yield place, fields


def _is_seconds(text: str) -> bool:
    """-1 as an end is that of the recording."""
    return re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|-1(\.0*)?", text) is not None


def _cut(
    parts: list[_Part], rows: list[Utterance], min_duration: float
) -> list[Utterance]:
    """Utterances of a table; `rows` are its recordings."""
    whole = {row.id: row for row in rows}
    cut, short = {}, []
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
            utterance = Utterance(
                part.name,
                duration,
                row.wav,
                part.start,
                part.stop,
                part.speaker,
            )
        if utterance.id in cut:
            hint = "Its start and stop are those of another row."
            if part.stop is None:
                hint = "Parts of a recording need the columns start and stop."
            raise ManifestError(
                f"{part.place}: '{utterance.id}' is there twice. {hint}"
            )
        cut[utterance.id] = utterance
    if short:
        place, path, _, start, stop = short[0]
        text = (
            f"{len(short)} of {len(parts)} parts are shorter than "
            f"{min_duration} s, the first is {place}: samples {start} to "
            f"{stop} of '{path}'. A table has samples, not seconds."
        )
        if not cut:
            raise ManifestError(text)
        logger.warning("Left out: %s", text)
    return list(cut.values())


def _choose_speakers(
    rows: list[Utterance], share: float, generator: np.random.Generator
) -> set[str]:
    """Draw the speakers who are held out."""
    if not 0 < share < 1:
        raise ManifestError(
            f"dev_share is {share}, expected a share between 0 and 1."
        )
    by_speaker = defaultdict(list)
    for row in rows:
        by_speaker[row.spk_id].append(row.id)
    usable = sorted(
        speaker for speaker, names in by_speaker.items() if len(names) > 1
    )
    count = max(2, round(share * len(by_speaker)))
    if len(usable) < count or len(by_speaker) - count < 2:
        raise ManifestError(
            f"Of {len(by_speaker)} speakers, {len(usable)} have two utterances "
            f"or more and {count} are to be held out for trials, leaving two "
            "or more to train on. Are there more speakers, or is a smaller "
            "--dev_share meant?"
        )
    return set(generator.permutation(usable)[:count].tolist())
