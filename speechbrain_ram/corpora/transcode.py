"""One recording at a time, from any codec to 16-bit mono FLAC or WAV.

Kept apart from :mod:`speechbrain_ram.corpora.convert`, and free of torch, so
that worker processes start within a moment.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import soundfile

#: Ending of the new files -> libsndfile's name of the format.
FORMATS = {"flac": "FLAC", "wav": "WAV"}

# An encoder's padding aside, the decoded length is the container's; a file
# that ends early misses more. 0.1 s is two AAC frames at 22 kHz.
_TOLERANCE_SECONDS = 0.1


class DecodeError(ValueError):
    """A recording cannot be decoded; the message names it and says why."""


def import_av():
    """Import PyAV, or say how to get it."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "Reading m4a files needs PyAV: pip install 'speechbrain-ram[m4a]'"
        ) from error
    return av


def transcode_chunk(task: tuple) -> list[str]:
    """Convert some files.

    Arguments
    ---------
    task : tuple
        Source folder, destination folder, names relative to both, ending of
        the new files, their sample rate.

    Returns
    -------
    list of str
        Of each file 'converted', 'skipped', or ``NAME: reason``.
    """
    source, destination, names, to, sample_rate = task
    outcomes = []
    for name in names:
        path = os.path.join(source, name)
        target = Path(destination, os.path.splitext(name)[0] + f".{to}")
        if _is_complete(target, sample_rate):
            outcomes.append("skipped")
            continue
        try:
            samples = decode(path, sample_rate)
        except DecodeError as error:
            outcomes.append(f"{name}: {error}")
            continue
        _write_checked(target, samples, sample_rate, to)
        outcomes.append("converted")
    return outcomes


def _is_complete(path: Path, sample_rate: int) -> bool:
    """Whether an earlier run finished this file: it was renamed then."""
    try:
        return soundfile.info(str(path)).samplerate == sample_rate
    except soundfile.SoundFileError:
        return False


def decode(path: str | os.PathLike, sample_rate: int = 16000) -> np.ndarray:
    """Decode a recording of any format that FFmpeg knows.

    Arguments
    ---------
    path : path
        The file.
    sample_rate : int
        In Hz, of the result.

    Returns
    -------
    np.ndarray
        Shape [samples], int16, mono.

    Raises
    ------
    DecodeError
        Not audio, or damaged, or shorter than its container says.
    """
    av = import_av()
    pieces = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise DecodeError(f"'{path}' has no audio stream.")
            stream = container.streams.audio[0]
            promised = None
            if stream.duration is not None:
                promised = float(stream.duration * stream.time_base)
            resampler = av.AudioResampler("s16", "mono", sample_rate)
            for frame in container.decode(stream):
                pieces += [f.to_ndarray()[0] for f in resampler.resample(frame)]
            pieces += [f.to_ndarray()[0] for f in resampler.resample(None)]
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"'{path}' cannot be decoded: {error}") from error
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    if len(samples) == 0:
        raise DecodeError(f"'{path}' holds no samples.")
    seconds = len(samples) / sample_rate
    if promised is not None and seconds < promised - _TOLERANCE_SECONDS:
        raise DecodeError(
            f"'{path}' is truncated: {promised:.2f} s are promised, "
            f"{seconds:.2f} s could be decoded."
        )
    return samples


def _write_checked(
    target: Path, samples: np.ndarray, sample_rate: int, to: str
) -> None:
    """Write, read the header back, rename; leave nothing half-written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            soundfile.write(
                temporary,
                samples,
                sample_rate,
                format=FORMATS[to],
                subtype="PCM_16",
            )
            complete = soundfile.info(str(temporary)).frames == len(samples)
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
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
