"""Any folder of speakers: ``ROOT/SPEAKER/**/UTTERANCE.wav`` to manifests.

The first folder below the root names the speaker; what lies between it and
the recording (sessions, videos) is kept in the utterance's ID only.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from speechbrain.utils.logger import get_logger

from speechbrain_ram.corpora.held_out import choose_speakers, make_trials
from speechbrain_ram.corpora.tables import (
    Part,
    cut,
    is_kaldi,
    kaldi_parts,
    read_table,
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
        Whether files of another rate, or of several channels, are allowed.
    min_duration : float
        Seconds; shorter utterances are left out with a warning.
    verify : bool
        Decode every file once, to find damage that headers do not show.
    skip_bad : bool
        Leave unusable files out, listed in ``OUTPUT_DIR/skipped.txt``,
        instead of raising.
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
    rows = build_manifest(
        data_root,
        _of_folder(data_root, data_root),
        cache=output_dir / "headers.cache",
        sample_rate=sample_rate,
        resample=resample,
        mixdown=mixdown,
        min_duration=min_duration,
        verify=verify,
        skipped_list=output_dir / "skipped.txt" if skip_bad else None,
        workers=workers,
    )
    return write_split(rows, output_dir, valid_fraction, seed)


def write_split(
    rows: Sequence[Utterance],
    output_dir: Path,
    valid_fraction: float,
    seed: int,
) -> tuple[Path, Path]:
    """Write ``train.csv`` and ``valid.csv``; all speakers are in the first."""
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
    if corpus.is_dir():
        check_outside(output_dir, corpus)
    root, recordings, parts = _named_by(corpus, data_root)
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
        rows = cut(parts, rows, min_duration)
    generator = np.random.default_rng(seed)
    dev = choose_speakers(rows, dev_share, generator)
    held_out = [row for row in rows if row.spk_id in dev]
    trials = make_trials(held_out, max_trials, generator)
    manifests = write_split(
        [row for row in rows if row.spk_id not in dev],
        output_dir,
        valid_fraction,
        seed,
    )
    write_trials(trials, output_dir / "dev_trials.txt")
    spoken = defaultdict(list)
    for row in held_out:
        spoken[row.spk_id].append(row.id)
    write_models(spoken, output_dir / "dev_trials.spk2utt")
    logger.info("%d speakers are held out for %d trials", len(dev), len(trials))
    return manifests


def pair_folder(folder: str | os.PathLike, most: int = 1_000_000) -> TrialList:
    """All pairs of the recordings in a folder of speakers, as trials.

    Of more than `most` pairs of one speaker, or of two, so many are drawn; see
    :func:`.held_out.make_trials`. Names are relative to the folder. No
    recording is opened.
    """
    folder = Path(folder)
    found = _of_folder(folder, folder)
    check_speakers((speaker for _, speaker in found), folder)
    rows = [Utterance(name, 0.0, name, 0, 0, who) for name, who in found]
    trials = make_trials(rows, 2 * most, np.random.default_rng(0), most)
    targets = int(trials.labels.sum())
    if targets in (0, len(trials)):
        raise ManifestError(
            f"'{folder}' holds {len(rows)} recordings of "
            f"{len({who for _, who in found})} speakers. Two speakers are "
            "needed, one of them with two recordings, in a folder each."
        )
    return trials


def corpus_name(corpus: str | os.PathLike) -> str:
    """What a corpus is called where its path would say too much.

    Example
    -------
    >>> corpus_name("/data/voices/"), corpus_name("tables/radio.csv")
    ('voices', 'radio')
    """
    path = Path(corpus).resolve()
    return path.name if path.is_dir() else path.stem


def _named_by(
    corpus: Path, data_root: str | os.PathLike | None
) -> tuple[Path, list[tuple[str, str]], list[Part]]:
    """Root, (path, speaker) of each recording, and the rows of a table."""
    root = Path(data_root or corpus)
    if not corpus.is_dir():
        root = Path(data_root or corpus.parent)
        parts = read_table(corpus)
        near = [part for part in parts if not os.path.isabs(part.path)]
        if root.is_file() and near:
            raise ManifestError(
                f"{near[0].place}: '{near[0].path}' is a relative path. Say "
                "with --data_root which folder the table's paths start from."
            )
    elif is_kaldi(corpus):
        parts = list(kaldi_parts(corpus, root).values())
    else:
        return root, _of_folder(corpus, root), []
    check_speakers((part.speaker for part in parts), corpus)
    speaker_of = {part.path: part.speaker for part in parts}
    return root, list(speaker_of.items()), parts


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
                "CORPUS/SPEAKER/.../UTTERANCE; is the folder given one level "
                "too deep?"
            )
        recordings.append((prefix + name, speaker))
    return recordings
