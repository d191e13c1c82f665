"""Recordings as a user has them: files, excerpts, arrays, of any length.

A recording is one of these:

- a path, or a :class:`Segment` of one;
- the content of a file: bytes, a ``BytesIO``, a file open with "rb";
- a NumPy array or a tensor, mono, shape [samples], at the encoder's rate, of
  floats in [-1, 1] or integers;
- ``(array, rate)``, ``{"array": ..., "sampling_rate": ...}`` as Hugging Face
  datasets have them, ``{"waveform": ..., "sample_rate": ...}``: an array of
  another rate, and with several channels, as readers return them.

Each becomes pieces of bounded length that are read only when their turn
comes, so that a thousand files or a day of audio need the memory of one
batch. What no speaker can be heard in is refused here, by name.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from speechbrain_ram.data.audio import Audio, AudioError, cut

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


#: Any of the kinds listed above.
Recording = Any

_ARRAYS = (np.ndarray, torch.Tensor)
_CONTENTS = (bytes, bytearray, io.IOBase)


@dataclass(frozen=True, eq=False)
class Piece:
    """What is embedded at once: a recording, or a window of a long one."""

    samples: int  # at the encoder's rate, perhaps off by one
    load: Callable[[], torch.Tensor]


def is_recording(given: object) -> bool:
    """Whether something is one recording, not several."""
    pair = isinstance(given, tuple) and len(given) == 2
    return (
        isinstance(
            given, (*_ARRAYS, *_CONTENTS, str, os.PathLike, Segment, dict)
        )
        or hasattr(given, "read")
        or (pair and isinstance(given[0], _ARRAYS) and _is_rate(given[1]))
    )


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

    `position` is its place among the recordings, `sample_rate` the encoder's. A
    recording of more than `longest` seconds, by default :data:`WHOLE`, is cut
    into equal windows.
    """
    name = describe(recording, position)
    audio = Audio(sample_rate, resample, mixdown)
    if isinstance(recording, (str, os.PathLike)):
        recording = Segment(recording)
    elif isinstance(recording, _CONTENTS) or hasattr(recording, "read"):
        recording = Segment(_Copy(recording, name))
    if isinstance(recording, Segment):
        info = audio.info(recording.path)
        rate, first = info.sample_rate, recording.start
        last = info.frames if recording.stop is None else recording.stop
        part = (first, recording.stop) != (0, None)
        if part and not 0 <= first < last <= info.frames:
            raise AudioError(
                f"{name} has {info.frames} samples; there is no part from "
                f"{first} to {last}."
            )
        audio.check(recording.path, info.channels, rate)
        read = partial(audio.read, recording.path)
    else:
        samples, rate = _as_array(recording, sample_rate, name)
        first, last = 0, len(samples)

        def read(start: int, stop: int) -> torch.Tensor:
            return audio.convert(samples[start:stop], rate, name)

        audio.check(name, samples.shape[1], rate)
    check_length((last - first) / rate, name)
    return [
        Piece(
            int((stop - start) * sample_rate / rate),
            partial(read, start=start, stop=stop),
        )
        for start, stop in cut(first, last, rate, longest or WHOLE)
    ]


def check_length(seconds: float, name: str) -> None:
    """Refuse what is too short to hear a speaker in."""
    if seconds < SHORTEST:
        raise AudioError(
            f"{name} lasts {1000 * seconds:.0f} ms, at least "
            f"{1000 * SHORTEST:.0f} ms are needed to hear a speaker."
        )


def audible(
    pieces: list[Piece], name: str, warn: bool = True
) -> Iterator[torch.Tensor]:
    """Read pieces of one recording one by one, without the silent ones.

    `name` stands in messages. It is an AudioError if all are silent.
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


def speech_seconds(waveform: torch.Tensor, sample_rate: int) -> float:
    """Seconds of a waveform [samples] that are loud: a measure of its speech.

    Counted are frames of 20 ms with at least a thousandth (-30 dB) of the power
    that 5 % of the frames exceed. Pauses are left out; music and steady noise
    are not, since nothing here recognises speech.
    """
    frame = sample_rate // 50
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame)
    power = frames.var(dim=1, unbiased=False)
    loud = power >= 1e-3 * torch.quantile(power, 0.95)
    return int(loud.sum()) * frame / sample_rate


def check_level(waveform: torch.Tensor, name: str, warn: bool) -> None:
    """Refuse what is no waveform in [-1, 1].

    If asked, warn where over 1 % of the samples are at full scale.
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


class _Copy(os.PathLike):
    """A file's content on the disk as long as somebody needs it."""

    def __init__(self, content: Any, name: str):
        if isinstance(content, io.TextIOBase):
            raise AudioError(f"{name} is open as text; open it with 'rb'.")
        if hasattr(content, "read"):
            try:
                if content.seekable():
                    content.seek(0)  # where writing into it has left it
                content = content.read()
            except (OSError, ValueError, AttributeError) as error:
                raise AudioError(f"{name} cannot be read: {error}.") from error
        if not isinstance(content, (bytes, bytearray)):
            raise AudioError(
                f"{name} is a file that gives {type(content).__name__}, bytes "
                "are needed: open it with 'rb'."
            )
        self._name = name
        self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._file.write(content)
        self._file.flush()

    def __fspath__(self) -> str:
        return self._file.name

    def __str__(self) -> str:
        return self._name


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and value > 0


def _as_array(
    given: Any, sample_rate: int, name: str
) -> tuple[np.ndarray, int]:
    """Samples [samples, channels] as float32 in [-1, 1], and their rate."""
    array, rate, bare = given, sample_rate, True
    if isinstance(given, dict):
        for keys in (("array", "sampling_rate"), ("waveform", "sample_rate")):
            if given.keys() >= set(keys):
                (array, rate), bare = (given[key] for key in keys), False
                array = np.asarray(array) if isinstance(array, list) else array
        if bare:
            raise AudioError(
                f"{name} is a dict with the keys {sorted(map(str, given))}; "
                "'array' and 'sampling_rate' are needed."
            )
    elif isinstance(given, tuple) and len(given) == 2:
        (array, rate), bare = given, False
    if not isinstance(array, _ARRAYS):
        raise AudioError(
            f"{name} is a {type(array).__name__}; a path, a Segment, an open "
            "file, a NumPy array or a tensor is needed, or (array, rate)."
        )
    if not (_is_rate(rate) and rate < math.inf and rate == int(rate)):
        raise AudioError(
            f"{name} has a sample rate of {rate!r}, a whole number of Hz is "
            "needed."
        )
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:  # NumPy does not know it
            array = array.float()
        array = array.numpy()
    if bare and array.ndim != 1 or array.ndim not in (1, 2):
        raise AudioError(
            f"{name} has shape {array.shape}, [samples] is needed. Average "
            "the channels, and pass several recordings as a list."
        )
    if array.ndim == 1:
        array = array[:, None]
    elif array.shape[0] < array.shape[1]:  # channels first, as torchaudio has
        array = array.T
    return _as_floats(array, name), int(rate)


def _as_floats(array: np.ndarray, name: str) -> np.ndarray:
    """Floats as they are, whole numbers by the full scale of their type."""
    kind, loudest, scale = array.dtype, 0, 1.0
    if np.issubdtype(kind, np.signedinteger) and array.size:
        loudest = max(abs(int(array.min())), abs(int(array.max())))
    if kind == np.int64 and loudest > 2**15:
        raise AudioError(
            f"{name} has int64 numbers up to {loudest}; 16-bit numbers, up to "
            "32768, are read. Pass it as int32 if that is its scale, or as "
            "floats in [-1, 1]."
        )
    if kind == np.int32 and 0 < loudest <= 2**15:
        raise AudioError(
            f"{name} has int32 numbers up to {loudest}, a tiny part of the "
            "range of 32 bits. Are they 16-bit numbers? Pass it as int16."
        )
    if kind == np.int64:
        scale = 2.0**15
    elif kind == np.uint8:
        scale = 2.0**7
    elif np.issubdtype(kind, np.signedinteger):
        scale = np.iinfo(kind).max + 1.0
    elif not np.issubdtype(kind, np.floating):
        raise AudioError(
            f"{name} has samples of type {kind}; floats in [-1, 1], or int16, "
            "int32, int64 or uint8 are needed."
        )
    if not np.isfinite(array).all():
        raise AudioError(f"{name} has samples that are NaN or infinite.")
    floats = array.astype(np.float32)
    if kind == np.uint8:
        floats -= 128
    floats /= scale  # a power of two: exact
    return floats
