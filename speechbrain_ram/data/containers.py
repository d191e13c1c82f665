"""The sound of videos, and of other containers that libsndfile cannot read.

MP4, MOV, M4A, 3GP, Matroska, WebM, AVI, WMV, FLV, and MPEG files, known
by their first bytes, not by their names. Needs the extra ``m4a`` (PyAV, which
brings its own FFmpeg); nothing else is ever handed to FFmpeg.
"""

from __future__ import annotations

import os

import torch

from speechbrain_ram.data import transcode
from speechbrain_ram.data.audio import (
    AudioError,
    AudioInfo,
    check_format,
    from_16_bit,
)

#: File name endings that are taken for recordings when a person's folder is
#: searched; any other name is found by its content when it is given itself.
VIDEO_EXTENSIONS = (
    *(".m4a", ".mp4", ".mov", ".3gp", ".mkv", ".webm", ".avi"),
    *(".wmv", ".wma", ".flv", ".mpg", ".mpeg"),
)

# First bytes of Matroska and WebM, ASF (WMV, WMA), FLV, MPEG.
_STARTS = (
    b"\x1a\x45\xdf\xa3",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    b"FLV\x01",
    b"\x00\x00\x01\xba",
)
_PACKET = 188  # bytes of an MPEG transport stream, each packet begins with G


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file is such a container; False where it cannot be opened.

    Example
    -------
    >>> path = getfixture("tmp_path") / "film.wav"
    >>> _ = path.write_bytes(bytes(4) + b"ftypisom")
    >>> is_video(path)
    True
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_PACKET + 1)
    except OSError:
        return False
    return (
        head.startswith(_STARTS)
        or head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide")  # MP4, MOV
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or (len(head) > _PACKET and head[0] == head[_PACKET] == ord("G"))
    )


def video_info(path: str | os.PathLike) -> AudioInfo:
    """Length, rate and channels of a video's sound.

    Arguments
    ---------
    path : path
        The file.

    Returns
    -------
    AudioInfo

    Raises
    ------
    AudioError
        PyAV is missing, or there is no sound that it can decode.
    """
    try:
        return AudioInfo(*transcode.sound_of(path))
    except (ImportError, transcode.DecodeError) as error:
        raise AudioError(_why(path, error)) from error


def read_video(
    path: str | os.PathLike,
    start: int = 0,
    stop: int | None = None,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
) -> torch.Tensor:
    """Read a video's sound, or a piece of it, as a mono waveform.

    Arguments
    ---------
    path, start, stop, sample_rate, resample, mixdown
        As for :func:`speechbrain_ram.data.audio.read_audio`: `start` and `stop`
        are samples at the sound's own rate.

    Returns
    -------
    torch.Tensor
        Shape [samples], float32.

    Raises
    ------
    AudioError
        As :func:`video_info`; damaged, or of another rate or several channels
        where that was not allowed.
    """
    info = video_info(path)
    check_format(
        *(path, info.channels, info.sample_rate),
        *(sample_rate, resample, mixdown),
    )
    ratio = sample_rate / info.sample_rate
    if stop is not None:
        stop = round(stop * ratio)
    try:
        samples = transcode.decode(
            path, sample_rate, round(start * ratio), stop
        )
    except transcode.DecodeError as error:
        raise AudioError(_why(path, error)) from error
    return from_16_bit(samples)


def _why(path: str | os.PathLike, error: Exception) -> str:
    if isinstance(error, ImportError):
        return (
            f"'{path}' is a video, or sound in a container like one. Reading "
            'it needs PyAV: pip install "speechbrain-ram[m4a]"'
        )
    return str(error)
