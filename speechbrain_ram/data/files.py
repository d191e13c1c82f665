"""Files as they are, and as libsndfile must see them.

A descriptor that is surely a regular file's; and, where a header does not say
how many samples follow or says it wrongly, a view of the file that lets
libsndfile read to the end.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import soundfile

from speechbrain_ram.data.lengths import AudioError, Samples, mp3_is_counted

_HEAD = 4096  # bytes of a file's beginning that are read before anything else
BLOCK = 2**18  # samples decoded at once, of all channels together

#: What decoding a file to its end has found: its state -> samples.
_counted: dict[tuple, int] = {}


class File(NamedTuple):
    """A regular file: its descriptor, its state, its first bytes."""

    number: int
    status: os.stat_result
    head: bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return self.status.st_size


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[File]:
    """Open a regular file; errors in the block become an AudioError."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    # Without these, opening a pipe waits for somebody who writes into it.
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        number = os.open(path, flags)
    except (OSError, ValueError, TypeError) as error:
        raise AudioError(_why_unreadable(path, error)) from error
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise AudioError(_why_unreadable(path, None))
        yield File(number, status, os.pread(number, _HEAD, 0))
    except (
        soundfile.SoundFileError,
        OSError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise AudioError(_why_unreadable(path, error)) from error
    finally:
        os.close(number)


@contextmanager
def decoder_of(
    file: File, samples: Samples | None
) -> Iterator[tuple[soundfile.SoundFile, int]]:
    """libsndfile at the beginning of a file, and how many samples it gives."""
    source: int | _View = file.number
    if samples and samples.unknown and file.head[:4] in (b"RIFF", b"RIFX"):
        order = "<" if file.head[:4] == b"RIFF" else ">"
        size = struct.pack(f"{order}I", min(samples.size, 0xFFFFFFFF))
        source = _View(file.number, file.size, (samples.first - 4, size))
    os.lseek(file.number, 0, os.SEEK_SET)
    with soundfile.SoundFile(source, closefd=False) as decoder:
        # soundfile seeks after every read of what can be sought in, which an
        # MP3 pays with its next frames.
        decoder.seekable = lambda: False
        estimated = decoder.format == "MP3" and not mp3_is_counted(
            file.number, file.head
        )
        if not estimated and decoder.frames < 2**62:
            yield decoder, decoder.frames
            return
    status = file.status
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _counted:
        frames = 0
        with _endless(file, estimated) as decoder:
            size = BLOCK // decoder.channels
            while block := len(decoder.read(size, dtype="float32")):
                frames += block
        _counted[key] = frames
    with _endless(file, estimated) as decoder:
        yield decoder, _counted[key]


def _endless(file: File, estimated: bool) -> _Forward:
    """A decoder that goes on to the end, wherever the header says it is."""
    if estimated:
        # libsndfile stops where it estimates the end, from the size of the
        # file; no frame is 64 times smaller than another.
        return _Forward(_View(file.number, 64 * file.size))
    os.lseek(file.number, 0, os.SEEK_SET)
    return _Forward(file.number, closefd=False)


class _Forward(soundfile.SoundFile):
    """Reads on without looking for its place: an unknown end has none."""

    def seekable(self) -> bool:
        return False

    def seek(self, frames: int, whence: int = os.SEEK_SET) -> int:
        if self.format != "MP3":
            return super().seek(frames, whence)
        for begin in range(0, frames, BLOCK):  # a frame needs those before
            self.read(min(BLOCK, frames - begin), dtype="float32")
        return frames


class _View:
    """A file with other bytes at one place, or one that seems longer."""

    def __init__(
        self, number: int, size: int, patch: tuple[int, bytes] = (0, b"")
    ):
        self.number, self.size, self.patch = number, size, patch
        self.place = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int) -> bytes:
        data = bytearray(os.pread(self.number, size, self.place))
        for i, byte in enumerate(self.patch[1], self.patch[0] - self.place):
            if 0 <= i < len(data):
                data[i] = byte
        if not data and self.place == self.size - 128:
            data = bytearray(size)  # where an MP3 has its title: no title
        self.place += len(data)
        return bytes(data)


def _why_unreadable(path: str | os.PathLike, error: object) -> str:
    """Say why a file cannot be opened, in the order a person would check."""
    name, path = str(path), Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError):
        if os.path.islink(path):
            return f"'{name}' is a link to a file that is not there."
        return f"'{name}' does not exist."
    if os.path.isdir(path):
        return f"'{name}' is a folder, not a recording."
    if not stat.S_ISREG(status.st_mode):
        kind = "named pipe" if path.is_fifo() else "device or a socket"
        return (
            f"'{name}' is a {kind}, and recordings are read from files. Save "
            "it as a file first."
        )
    if status.st_size == 0:
        return f"'{name}' is an empty file (0 bytes)."
    if isinstance(error, OSError):
        return f"'{name}' cannot be read: {error.strerror or error}."
    reason = getattr(error, "error_string", str(error)).rstrip(".")
    return (
        f"'{name}' cannot be read as audio: {reason}. It may be truncated, "
        "or in a format that libsndfile does not know."
    )
