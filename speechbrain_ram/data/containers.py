"""The sound of videos, and of other containers that libsndfile cannot read.

MP4, MOV, M4A, 3GP, Matroska, WebM, AVI, WMV, FLV, and MPEG files, known
by their first bytes, not by their names. Needs the extra ``m4a`` (PyAV, which
brings its own FFmpeg); nothing else is ever handed to FFmpeg.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np

from speechbrain_ram.data.lengths import AudioError, AudioInfo
from speechbrain_ram.utils import install_command

#: Their usual file name endings; the reader goes by the first bytes.
VIDEO_EXTENSIONS = (
    ".m4a",
    ".mp4",
    ".mov",
    ".3gp",
    ".mkv",
    ".webm",
    ".avi",
    ".wmv",
    ".wma",
    ".flv",
    ".mpg",
    ".mpeg",
)

# First bytes of Matroska and WebM, ASF (WMV, WMA), FLV, MPEG.
_STARTS = (
    b"\x1a\x45\xdf\xa3",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    b"FLV\x01",
    b"\x00\x00\x01\xba",
)
_PACKET = 188  # bytes of an MPEG transport stream, each packet begins with G


def is_container(head: bytes) -> bool:
    """Whether a file that begins so is such a container."""
    return (
        head.startswith(_STARTS)
        or head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide")  # MP4, MOV
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or (len(head) > _PACKET and head[0] == head[_PACKET] == ord("G"))
    )


# An encoder's padding aside, the decoded length is the container's; a file
# that ends early misses more. 0.26 s is two AAC frames at 8 kHz.
_TOLERANCE_SECONDS = 0.26

# Decoding begins so much before a part: codecs need a moment to get going.
_LEAD_SECONDS = 0.5


def decode(
    path: str | os.PathLike,
    sample_rate: int = 16000,
    start: int = 0,
    stop: int | None = None,
) -> np.ndarray:
    """Decode a recording, or a part of it, as mono int16 [samples].

    `start` and `stop` are samples at `sample_rate`, end exclusive. It is an
    AudioError where less is there than was asked for or than the container
    says.
    """
    return np.concatenate(list(stream(path, sample_rate, start, stop)))


def stream(
    path: str | os.PathLike,
    sample_rate: int,
    start: int = 0,
    stop: int | None = None,
    least: int = 1,
) -> Iterator[np.ndarray]:
    """As :func:`decode`, in pieces of at least so many samples but the last."""
    wanted = sys.maxsize if stop is None else stop - start
    pieces, waiting, have = [], 0, 0
    with _opened(path) as (container, sound):
        import av  # there, or _opened would have said so

        promised = stop and stop / sample_rate
        if stop is None and sound.duration is not None:
            promised = float(sound.duration * sound.time_base)
        frames, begin = _frames_from(container, sound, start / sample_rate)
        skip = start - round(begin * sample_rate)
        resampler = av.AudioResampler("s16", "mono", sample_rate)
        for frame in chain(frames, [None]):  # None: what is left inside
            for part in resampler.resample(frame):
                samples = part.to_ndarray()[0]
                passed = min(skip, len(samples))
                skip -= passed
                samples = samples[passed:][: wanted - have]
                have += len(samples)
                waiting += len(samples)
                pieces.append(samples)
            if have >= wanted:
                break
            if waiting >= least:
                yield np.concatenate(pieces)
                pieces, waiting = [], 0
    if waiting:
        yield np.concatenate(pieces)
    if have == 0:
        raise AudioError(f"'{path}' holds no samples.")
    seconds = (start + have) / sample_rate
    if promised is not None and seconds < promised - _TOLERANCE_SECONDS:
        raise AudioError(
            f"'{path}' is truncated: {promised:.2f} s are promised, "
            f"{seconds:.2f} s could be decoded."
        )


def sound_of(path: str | os.PathLike) -> AudioInfo:
    """Length, rate and channels of the sound, without decoding.

    Where the format does not hold the length, the file is read through.
    """
    with _opened(path) as (container, stream):
        end = stream.duration
        if end is None:
            end = _last_moment(path, container, stream)
        rate = stream.rate or 0
        samples = round(end * stream.time_base * rate)
        return AudioInfo(samples, rate, stream.channels or 0)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple]:
    """A container and its first audio stream; errors become an AudioError."""
    try:
        import av
    except ImportError as error:
        raise AudioError(
            f"'{path}' is a video, or sound in a container like one. Reading "
            f"it needs PyAV: {install_command('m4a')}"
        ) from error
    try:
        # A title that is not UTF-8 does not matter here.
        with av.open(os.path.abspath(path), metadata_errors="replace") as file:
            if not file.streams.audio:
                raise AudioError(f"'{path}' has no audio stream.")
            stream = file.streams.audio[0]
            if stream.codec_context is None:
                raise AudioError(
                    f"'{path}' has sound that FFmpeg has no decoder for. Is it "
                    "damaged?"
                )
            yield file, stream
    except AudioError:
        raise
    # A ValueError: the format changes between frames.
    except (
        av.FFmpegError,
        OSError,
        ArithmeticError,
        TypeError,
        ValueError,
    ) as error:
        raise AudioError(f"'{path}' cannot be decoded: {error}") from error


def _last_moment(path: str | os.PathLike, container, stream) -> int:
    """Where the sound ends, in its unit of time, from all packets' times."""
    ends = {stream: 0.0}
    for packet in container.demux():
        if packet.pts is not None:
            end = packet.pts + (packet.duration or 0)
            last = ends.get(packet.stream, 0.0)
            ends[packet.stream] = max(last, float(end * packet.time_base))
    # A picture may go on after its sound, but something goes on to the end.
    promised = (container.duration or 0) / 1e6  # microseconds
    if max(ends.values()) < promised - 1:
        raise AudioError(
            f"'{path}' is truncated: {promised:.2f} s are promised, "
            f"{max(ends.values()):.2f} s are there."
        )
    return int(ends[stream] / stream.time_base) - (stream.start_time or 0)


def _frames_from(container, stream, seconds: float) -> tuple[Iterator, float]:
    """Decoded frames from `seconds` or earlier, and when they begin."""
    if seconds > _LEAD_SECONDS:
        unit, origin = stream.time_base, stream.start_time or 0
        place = origin + int((seconds - _LEAD_SECONDS) / unit)
        container.seek(place, stream=stream)
        frames = _from_the_middle(container, stream)
        first = next(frames, None)
        if first is not None and first.pts is not None:
            begin = float((first.pts - origin) * unit)
            if begin <= seconds:
                return chain([first], frames), begin
        container.seek(origin, stream=stream)  # sought in vain: from the start
    return container.decode(stream), 0.0


def _from_the_middle(container, stream) -> Iterator:
    """Frames after a seek, which may have led into the middle of one."""
    import av

    begun = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if begun:
                raise
            continue
        begun = begun or bool(frames)
        yield from frames
