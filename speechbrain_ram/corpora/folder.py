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

from speechbrain_ram.audio import AUDIO_EXTENSIONS
from speechbrain_ram.corpora.manifest import (
    ManifestError,
    Utterance,
    build_manifest,
    find_recordings,
    write_manifest,
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
    >>> from speechbrain_ram.corpora.manifest import read_manifest
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
    if output_dir.resolve().is_relative_to(data_root.resolve()):
        raise ManifestError(
            f"The output folder '{output_dir}' lies within the corpus "
            f"'{data_root}', where nothing is ever written. Choose another."
        )
    recordings = []
    for name in find_recordings(data_root, extensions):
        speaker, slash, _ = name.partition("/")
        if not slash:
            raise ManifestError(
                f"'{data_root / name}' lies in no speaker's folder. Expected "
                "ROOT/SPEAKER/.../UTTERANCE; is data_root one level too deep?"
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


def split_by_utterance(
    rows: Sequence[Utterance], valid_fraction: float, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Split utterances so that every speaker keeps one for training at least.

    The held-out share is spread over the speakers as evenly as whole
    utterances allow: speakers are put in a random order and each gives what
    brings the running total to its share.

    Arguments
    ---------
    rows : sequence of Utterance
        Of two or more speakers.
    valid_fraction : float
        Share held out, in (0, 1).
    seed : int
        The same seed and rows give the same split.

    Returns
    -------
    train, valid : list of Utterance
        Each in the order of `rows`.

    Raises
    ------
    ManifestError
        One speaker only, no speaker with two utterances, or a share outside
        of (0, 1).
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
            "telling speakers apart needs two or more. Is data_root the "
            "folder that holds the speakers' folders?"
        )
    single = [s for s, members in by_speaker.items() if len(members) == 1]
    if len(single) == len(by_speaker):
        raise ManifestError(
            "No speaker has two utterances, so that none can be held out for "
            "validation. Is data_root one level too high or too deep?"
        )
    if single:
        logger.warning(
            "%d speakers have one utterance each, which is kept for "
            "training: %s",
            len(single),
            ", ".join(sorted(single)[:10]),
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
