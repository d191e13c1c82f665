"""Recordings as a user has them: files, excerpts, arrays, of any length.

Each becomes pieces of bounded length that are read only when their turn
comes, so that a thousand files or a day of audio need the memory of one
batch. What no speaker can be heard in is refused here, by name.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from speechbrain_ram.data.audio import (
    AudioError,
    audio_info,
    check_format,
    read_audio,
)
from speechbrain_ram.data.containers import is_video, read_video, video_info

#: Longer recordings are embedded in windows, in seconds. Whole is what
#: VoxCeleb, SITW and CN-Celeb are scored on; 240 s take about 2 GB.
WHOLE = 240.0

#: Shorter recordings are refused, in seconds.
SHORTEST = 0.1

#: Standard deviation of a silent recording at most: one step of 16 bits.
SILENCE = 2.0**-15


class RecordingWarning(UserWarning):
    """A recording can be used, but is not as it should be."""


@dataclass(frozen=True)
class Segment:
    """A part of a file.

    Arguments
    ---------
    path : path
        The file, of audio or of video.
    start, stop : int
        Samples at the file's own rate, end exclusive; None is the file's end.
    """

    path: str | os.PathLike
    start: int = 0
    stop: int | None = None


Recording = str | os.PathLike | Segment | np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """What is embedded at once: a recording, or a window of a long one.

    Arguments
    ---------
    recording : int
        Which recording it belongs to.
    samples : int
        Its length at the encoder's sample rate, perhaps off by one.
    load : callable
        Returns its waveform, float32 of shape [samples].
    """

    recording: int
    samples: int
    load: Callable[[], torch.Tensor]


def describe(recording: Recording, position: int) -> str:
    """What a recording is called in a message."""
    if isinstance(recording, Segment):
        return f"'{recording.path}'"
    if isinstance(recording, (str, os.PathLike)):
        return f"'{recording}'"
    return f"recording {position}"


def split_into_pieces(
    recording: Recording,
    position: int,
    sample_rate: int,
    resample: bool,
    mixdown: bool,
    longest: float | None = None,
) -> list[Piece]:
    """Plan how a recording is read, from its header alone.

    Arguments
    ---------
    recording : path, Segment, np.ndarray or torch.Tensor
        An array is mono, of shape [samples], at `sample_rate`; integers count
        as full scale of their type.
    position : int
        Its place among the recordings.
    sample_rate : int
        In Hz, of the encoder.
    resample, mixdown : bool
        As for :func:`speechbrain_ram.data.audio.read_audio`.
    longest : float, optional
        Seconds; a longer recording is cut into equal windows of at most that.
        By default :data:`WHOLE`.

    Returns
    -------
    list of Piece

    Raises
    ------
    AudioError
        An unreadable header, a shape that is no recording, too short.

    Example
    -------
    >>> minute = np.zeros(60 * 16000)
    >>> pieces = split_into_pieces(minute, 0, 16000, False, False, 25.0)
    >>> [piece.samples for piece in pieces]
    [320000, 320000, 320000]
    """
    name = describe(recording, position)
    if isinstance(recording, (str, os.PathLike)):
        recording = Segment(recording)
    if isinstance(recording, Segment):
        video = is_video(recording.path)
        info = (video_info if video else audio_info)(recording.path)
        rate = info.sample_rate
        first = recording.start
        last = info.frames if recording.stop is None else recording.stop
        read = partial(
            read_video if video else read_audio,
            recording.path,
            sample_rate=sample_rate,
            resample=resample,
            mixdown=mixdown,
        )
        part = (first, recording.stop) != (0, None)
        if part and not 0 <= first < last <= info.frames:
            raise AudioError(
                f"{name} has {info.frames} samples; there is no part from "
                f"{first} to {last}."
            )
        check_format(
            *(recording.path, info.channels, rate),
            *(sample_rate, resample, mixdown),
        )
    else:
        waveform = _as_waveform(recording, name)
        rate, first, last = sample_rate, 0, len(waveform)

        def read(start: int, stop: int) -> torch.Tensor:
            return waveform[start:stop]

    seconds = (last - first) / rate
    if seconds < SHORTEST:
        raise AudioError(
            f"{name} lasts {1000 * seconds:.0f} ms, at least "
            f"{1000 * SHORTEST:.0f} ms are needed to hear a speaker."
        )
    windows = math.ceil(seconds / (longest or WHOLE))
    cuts = [first + (last - first) * i // windows for i in range(windows + 1)]
    return [
        Piece(
            position,
            int((stop - start) * sample_rate / rate),
            partial(read, start=start, stop=stop),
        )
        for start, stop in zip(cuts, cuts[1:], strict=False)
    ]


def audible(
    pieces: list[Piece], name: str, warn: bool = True
) -> Iterator[torch.Tensor]:
    """Read pieces one by one, without the silent ones.

    Arguments
    ---------
    pieces : list of Piece
        Of one recording.
    name : str
        What it is called in a message.
    warn : bool
        Whether to warn of clipping.

    Raises
    ------
    AudioError
        All are silent, one cannot be read, or is no waveform in [-1, 1].
    """
    heard = False
    for piece in pieces:
        waveform = piece.load()
        check_level(waveform, name, warn)
        if not is_silent(waveform):
            heard = True
            yield waveform
    if not heard:
        raise AudioError(
            f"{name} holds only silence. Was the microphone muted?"
        )


def is_silent(waveform: torch.Tensor) -> bool:
    """Whether nothing is there but at most a constant and rounding."""
    return float(waveform.std(unbiased=False)) <= SILENCE


def check_level(waveform: torch.Tensor, name: str, warn: bool) -> None:
    """Warn, if asked, where over 1 % of the samples are at full scale.

    Raises
    ------
    AudioError
        The samples are far beyond it, so they are no waveform in [-1, 1].
    """
    loudest = float(waveform.abs().max())
    if loudest > 8:
        raise AudioError(
            f"{name} has samples up to {loudest:g}, waveforms are in [-1, 1]. "
            "Are they 16-bit numbers? Divide by 32768, or pass them as int16."
        )
    if not warn:
        return
    share = float((waveform.abs() >= 0.999).float().mean())
    if share > 0.01:
        warnings.warn(
            f"{name} is clipped: {100 * share:.0f} % of its samples are at "
            "full scale. Its score is less certain.",
            RecordingWarning,
            stacklevel=2,
        )


def _as_waveform(array: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    """An array as float32 in [-1, 1], checked."""
    if not isinstance(array, (np.ndarray, torch.Tensor)):
        raise AudioError(
            f"{name} is a {type(array).__name__}; a path, a Segment, a NumPy "
            "array or a tensor is needed."
        )
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().numpy()
    if array.ndim != 1:
        raise AudioError(
            f"{name} has shape {array.shape}, [samples] is needed. Average "
            "the channels, and pass several recordings as a list."
        )
    if np.issubdtype(array.dtype, np.signedinteger):
        array = array / (np.iinfo(array.dtype).max + 1.0)
    if not np.isfinite(array).all():
        raise AudioError(f"{name} has samples that are NaN or infinite.")
    return torch.from_numpy(array.astype(np.float32))
