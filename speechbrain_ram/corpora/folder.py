"""Any folder of speakers: ``ROOT/SPEAKER/**/UTTERANCE.wav`` to manifests.

The first folder below the root names the speaker; what lies between it and
the recording (sessions, videos) is kept in the utterance's ID only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from speechbrain.utils.logger import get_logger

from speechbrain_ram.data.audio import AUDIO_EXTENSIONS
from speechbrain_ram.data.find import find_recordings
from speechbrain_ram.data.guards import check_outside
from speechbrain_ram.data.manifest import (
    ManifestError,
    build_manifest,
    write_manifest,
)
from speechbrain_ram.data.split import split_by_utterance

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
