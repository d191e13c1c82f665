"""Recordings of any format to FLAC or WAV: parallel, checked, resumable.

    speechbrain-ram convert vox2/dev/aac vox2_flac

VoxCeleb2's m4a, and videos, need the extra ``m4a`` (PyAV). Every file is
decoded to its end, mixed down to mono and resampled to 16 kHz where it is not,
written under a temporary name, read back by its header, and renamed. A rerun
goes on where the last run ended; files that cannot be decoded are listed in
``OUTPUT/broken.txt`` and tried again the next time.

FLAC holds the same samples as WAV in about half the space.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from speechbrain_ram.data.audio import AUDIO_EXTENSIONS, Audio, AudioError
from speechbrain_ram.data.lengths import check_rate
from speechbrain_ram.data.manifest import (
    ManifestError,
    check_outside,
    find_recordings,
)
from speechbrain_ram.utils import atomic_path, atomic_writer

#: Ending of the new files -> libsndfile's name of the format.
FORMATS = {"flac": "FLAC", "wav": "WAV"}

_CHUNK = 64  # files a task


class Conversion(NamedTuple):
    """What a conversion came to."""

    converted: int  # files written by this call
    skipped: int  # that were there already
    broken: list[str]  # PATH: reason, of those that cannot be decoded


def convert_tree(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str = "flac",
    sample_rate: int = 16000,
    workers: int | None = None,
) -> Conversion:
    """Convert every recording below a folder to 16-bit mono files.

    `destination` gets the same folders and names, with another ending, and
    ``broken.txt``, which lists what cannot be decoded. What is complete stays
    where an error ends the work, and a rerun goes on from there.
    """
    if to not in FORMATS:
        raise ValueError(f"to is '{to}', allowed are {', '.join(FORMATS)}.")
    check_rate(sample_rate)
    if to == "flac" and sample_rate >= 2**16 and sample_rate % 10:
        raise ValueError(
            f"sample_rate is {sample_rate}, in FLAC only multiples of 10 are "
            "allowed above 65535. --to wav takes others."
        )
    source, destination = Path(source), Path(destination)
    check_outside(destination, source)
    names = find_recordings(source, AUDIO_EXTENSIONS)
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise ManifestError(
                f"'{other}' and '{name}' under '{source}' would become one "
                "file. Move one of them away."
            )
    destination.mkdir(parents=True, exist_ok=True)
    chunks = [
        (str(source), str(destination), names[i : i + _CHUNK], to, sample_rate)
        for i in range(0, len(names), _CHUNK)
    ]
    counts = {"converted": 0, "skipped": 0}
    broken: list[str] = []
    with tqdm(total=len(names), desc="Converting", unit="file") as bar:
        for outcomes in _map(chunks, workers or os.cpu_count() or 1):
            for outcome in outcomes:
                if outcome in counts:
                    counts[outcome] += 1
                else:
                    broken.append(outcome)
            bar.update(len(outcomes))
            bar.set_postfix(broken=len(broken))
    listing = destination / "broken.txt"
    if broken:
        with atomic_writer(listing) as file:
            file.writelines(f"{line}\n" for line in broken)
    else:
        listing.unlink(missing_ok=True)
    return Conversion(counts["converted"], counts["skipped"], broken)


def _map(chunks: list, workers: int) -> Iterator[list[str]]:
    """Convert chunks in order, in processes where that pays."""
    if workers == 1 or len(chunks) == 1:
        yield from map(_convert_chunk, chunks)
        return
    # Spawned: a fork would copy locks of threads that torch has started.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield from pool.map(_convert_chunk, chunks)
    finally:  # after an error, what has not begun is not begun
        pool.shutdown(cancel_futures=True)


def _convert_chunk(task: tuple) -> list[str]:
    """'converted', 'skipped' or ``NAME: reason`` of each file."""
    source, destination, names, to, sample_rate = task
    audio = Audio(sample_rate, resample=True, mixdown=True)
    outcomes = []
    for name in names:
        target = Path(destination, os.path.splitext(name)[0] + f".{to}")
        if _is_complete(target, sample_rate):
            outcomes.append("skipped")
            continue
        try:
            windows = audio.windows(os.path.join(source, name))
            _write_checked(target, windows, sample_rate, to)
        except AudioError as error:
            outcomes.append(f"{name}: {error}")
        else:
            outcomes.append("converted")
    return outcomes


def _is_complete(path: Path, sample_rate: int) -> bool:
    """Whether an earlier run finished this file: it was renamed then."""
    try:
        return Audio().info(path).sample_rate == sample_rate
    except AudioError:
        return False


def _write_checked(
    target: Path, windows: Iterator[torch.Tensor], sample_rate: int, to: str
) -> None:
    """Write, read the header back, rename; leave nothing half-written."""
    with atomic_path(target) as temporary:
        frames = 0
        try:
            with soundfile.SoundFile(
                temporary, "w", sample_rate, 1, "PCM_16", format=FORMATS[to]
            ) as file:
                for window in windows:
                    samples = (window.numpy() * 32768).round()
                    samples = samples.clip(-32768, 32767).astype(np.int16)
                    file.write(samples)
                    frames += len(samples)
            complete = frames_of(temporary) == frames
        except soundfile.SoundFileError:
            complete = False  # libsndfile does not say why
        if not complete:
            raise OSError(
                errno.ENOSPC,
                "the file could not be written to its end, as when the disk "
                "is full or a quota is used up. Make room and run again: "
                "finished files are kept",
                str(target),
            )


def frames_of(path: Path) -> int:
    """Samples of a recording, 0 where it is missing or damaged."""
    try:
        return Audio().info(path).frames
    except AudioError:
        return 0
