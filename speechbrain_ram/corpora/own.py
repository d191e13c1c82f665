"""Your own corpus: a folder of speakers, or a table, with trials of its own.

A share of the speakers is held out, and pairs of their utterances become the
trials that choose the best checkpoint and make the report.
"""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from speechbrain.utils.logger import get_logger

from speechbrain_ram.corpora.find import find_recordings
from speechbrain_ram.corpora.guards import check_outside
from speechbrain_ram.corpora.manifest import (
    ManifestError,
    Utterance,
    build_manifest,
    write_manifest,
)
from speechbrain_ram.corpora.split import split_by_utterance
from speechbrain_ram.names import TextError, read_text
from speechbrain_ram.trials import TrialList, write_trials

logger = get_logger(__name__)


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
        A folder ``SPEAKER/**/UTTERANCE.wav``, or a CSV file with the columns
        ``wav`` (a path, relative to `data_root` or absolute) and ``spk_id``.
    output_dir : path
        Takes ``train.csv``, ``valid.csv`` and ``dev_trials.txt``, whose paths
        are relative to `data_root`.
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
    bounds: dict[str, tuple] = {}
    if corpus.is_dir():
        root = Path(data_root or corpus)
        check_outside(output_dir, corpus)
        recordings = _of_folder(corpus, root)
    else:
        root = Path(data_root or corpus.parent)
        recordings, bounds = _of_table(corpus)
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
    _check_whole(rows, bounds)
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
    return Path(corpus).resolve().stem


def make_trials(
    rows: Sequence[Utterance], max_trials: int, generator: np.random.Generator
) -> TrialList:
    """Draw pairs of utterances, as many of one speaker as of two.

    Time and memory grow with `max_trials` and the number of utterances, not
    with the number of pairs. Of a speaker whose recordings lie in several
    folders, taken for sessions, the target trials pair different ones.

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
    sessions = [(row.spk_id, os.path.dirname(row.id)) for row in rows]
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


def _of_table(path: Path) -> tuple[list[tuple[str, str]], dict[str, tuple]]:
    """(path, speaker) of a table; of a path its line, start and stop."""
    recordings: list[tuple[str, str]] = []
    bounds: dict[str, tuple] = {}
    try:
        file = io.StringIO(read_text(path), newline="")
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = reader.fieldnames or []
        if not {"wav", "spk_id"} <= set(columns):
            raise ManifestError(
                f"{path}, line 1: found the columns {columns}, expected "
                "wav and spk_id among them."
            )
        for record in reader:
            place = f"{path}, line {reader.line_num}"
            if not record["wav"] or not record["spk_id"]:
                raise ManifestError(f"{place}: wav or spk_id is empty.")
            name = record["wav"].removeprefix("$data_root/")
            recordings.append((name, record["spk_id"]))
            part = record.get("start"), record.get("stop")
            bounds.setdefault(name, (place, *part))
    except FileNotFoundError:
        raise ManifestError(
            f"'{path}' does not exist. Expected a folder of speakers, or a "
            "CSV file with the columns wav and spk_id."
        ) from None
    except (TextError, csv.Error) as error:
        raise ManifestError(f"'{path}' cannot be read: {error}") from error
    if not recordings:
        raise ManifestError(f"'{path}' names no recordings.")
    return recordings, bounds


def _check_whole(rows: Sequence[Utterance], bounds: dict[str, tuple]) -> None:
    """Refuse a table of parts: they would be trained as whole recordings."""
    for row in rows:
        place, start, stop = bounds.get(row.id, ("", None, None))
        whole = start in (None, "", "0") and stop in (None, "", str(row.stop))
        if not whole:
            raise ManifestError(
                f"{place}: '{row.id}' from {start} to {stop} is a part of a "
                f"recording of {row.stop} samples. Corpora of whole "
                "recordings are read so far: cut it into files, or remove "
                "the columns start and stop."
            )


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
            f"or more (in paths without spaces) and {count} are to be held out "
            "for trials, leaving two or more to train on. Are there more "
            "speakers, or is a smaller --dev_share meant?"
        )
    return set(generator.permutation(usable)[:count].tolist())
