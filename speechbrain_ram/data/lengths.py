"""How long a recording is: what its header promises, and what is there.

libsndfile mends the length of a WAV, AIFF, AU, W64, SPHERE or Ogg file that was
cut short without a word, takes a WAV file whose length was never filled in for
empty, and estimates the length of an MP3 file that does not say it. The first
bytes of a file, and the last ones of Ogg, are read here to know better.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

#: Hz and channels of which a header is believed.
RATES = (1_000, 384_000)
_CHANNELS = 1024  # libsndfile reads no more

# No format needs less for silence: FLAC has up to 65,535 samples in 14 bytes.
_SAMPLES_PER_BYTE = 10_000

# First four bytes -> name and length of a chunk, where the first chunk begins,
# and the lengths from which on they mean 'unknown' where they cannot be true.
_CHUNKS = {
    b"RIFF": (struct.Struct("<4sI"), 12, 0x7FFE0000),
    b"RIFX": (struct.Struct(">4sI"), 12, 0x7FFE0000),
    b"RF64": (struct.Struct("<4sI"), 12, 2**62),
    b"FORM": (struct.Struct(">4sI"), 12, 0x7F000000),  # AIFF
    b"riff": (struct.Struct("<16sQ"), 40, 2**62),  # W64
    b"caff": (struct.Struct(">4sQ"), 8, 2**62),
}
_FORMATS = {b"RIFF": b"WAVE", b"RIFX": b"WAVE", b"RF64": b"WAVE"}
_MOST_CHUNKS = 100  # before the samples; a damaged file may seem to have more

_LARGEST_PAGE = 27 + 255 + 255 * 255  # of Ogg, in bytes
_LAST_PAGE = 4  # the flag of a page that ends its stream

# format, channels, rate, bytes a second, bytes a frame, bits a sample
_FMT = struct.Struct("<HHIIHH")
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


class AudioError(ValueError):
    """A recording cannot be used; the message names the file and says why."""


@dataclass(frozen=True)
class AudioInfo:
    """How long a recording is, and in what form."""

    frames: int  # samples a channel
    sample_rate: int
    channels: int


class Samples(NamedTuple):
    """Where in a file its samples lie, by its header."""

    first: int  # byte
    size: int  # bytes
    unknown: bool  # the header does not say how many: all that follow
    info: AudioInfo | None = None  # of PCM and float in WAV
    bare: bool = False  # 16-bit little-endian mono


def find_samples(
    path: str | os.PathLike, file: int, size: int, head: bytes
) -> Samples | None:
    """Find the samples of an uncompressed format; None for other formats.

    `path` is named in errors, `file` is a descriptor of `size` bytes that begin
    with `head`. It is an AudioError if the header promises more than is there.
    """
    start = head[:4]
    if start in _CHUNKS:
        found = _walk(file, size, head)
    elif start in (b".snd", b"dns.") and len(head) >= 12:  # AU
        order = ">" if start == b".snd" else "<"
        first, length = struct.unpack_from(f"{order}II", head, 4)
        found = first, length, 0xFFFFFFFF, b""
    elif start == b"NIST" and b"shorten" not in head:
        found = _sphere(head)
    else:
        if start == b"OggS":
            _check_ogg(path, file, size)
        return None
    if found is None:
        return None
    first, length, endless, fmt = found
    there = size - first
    unknown = length > there and length >= endless
    if length == 0 and start in _FORMATS:
        unknown = there > 0 and not _only_chunks(file, first, size, start)
    if unknown:
        length = there
    if length > there:
        raise AudioError(
            f"'{path}' is truncated: its header promises {length} bytes of "
            f"samples, {max(there, 0)} are there. Was a copy or an unpacking "
            "interrupted?"
        )
    kind, channels, rate, _, block, bits = (0,) * 6
    if start in (b"RIFF", b"RF64") and len(fmt) >= _FMT.size:
        kind, channels, rate, _, block, bits = _FMT.unpack_from(fmt)
    if kind not in (_PCM, _FLOAT, _EXTENSIBLE) or not (
        rate and channels and block
    ):
        return Samples(first, length, unknown)
    if block != channels * -(-bits // 8):  # rounded up to bytes
        raise AudioError(
            f"'{path}' is damaged: its header says {channels} channels of "
            f"{bits} bits in blocks of {block} bytes."
        )
    info = AudioInfo(length // block, rate, channels)
    bare = (kind, channels, block, bits) == (_PCM, 1, 2, 16)
    return Samples(first, length, unknown, info, bare)


def _walk(file: int, size: int, head: bytes) -> tuple | None:
    """Go through the chunks of a file up to its samples."""
    start = head[:4]
    layout, place, endless = _CHUNKS[start]
    if head[8:12] != _FORMATS.get(start, head[8:12]):
        return None
    wide, fmt = 0, b""
    for _ in range(_MOST_CHUNKS):
        room = layout.size + 40
        here = head[place : place + room]
        if len(here) < room:
            here = os.pread(file, room, place)
        if len(here) < layout.size:
            return None
        name, length = layout.unpack_from(here)
        place, content = place + layout.size, here[layout.size :]
        if start == b"riff":  # counts its own beginning
            length -= layout.size
            if length < 0:
                return None
        name = name[:4]
        if name in (b"data", b"SSND"):
            if start == b"RF64" and length == 0xFFFFFFFF:
                length = wide
            return place, length, endless, fmt
        if name == b"ds64" and len(content) >= 16:
            (wide,) = struct.unpack_from("<Q", content, 8)
        elif name == b"fmt ":
            fmt = content
        step = {b"riff": 8, b"caff": 1}.get(start, 2)
        place += -(-length // step) * step
        if place > size:
            return None
    return None


def _only_chunks(file: int, place: int, size: int, start: bytes) -> bool:
    """Whether only named chunks follow the samples, to the end."""
    layout = _CHUNKS[start][0]
    for _ in range(_MOST_CHUNKS):
        if place >= size:
            break
        here = os.pread(file, layout.size, place)
        if len(here) < layout.size:
            return False
        name, length = layout.unpack(here)
        if not (name.isascii() and name.decode("latin-1").isprintable()):
            return False
        place += layout.size + length + length % 2
    return place in (size, size + 1)


def _sphere(head: bytes) -> tuple | None:
    """The samples of a NIST SPHERE file."""

    first = re.match(rb"NIST_1A\n *(\d{1,6})\n", head)
    length = 1
    for key in (b"sample_count", b"sample_n_bytes", b"channel_count"):
        found = re.search(rb"\n%s -i (\d{1,12})" % key, head)
        if found is None or first is None:
            return None
        length *= int(found[1])
    return int(first[1]), length, 2**62, b""


def _check_ogg(path: str | os.PathLike, file: int, size: int) -> None:
    """Refuse an Ogg file, of any codec, that ends within a page or a packet.

    One that ends with a whole page is whole, also where that page does not say
    that it is the last one: live encoders leave such files.
    """
    tail = os.pread(file, _LARGEST_PAGE, max(size - _LARGEST_PAGE, 0))
    page = tail[tail.rfind(b"OggS\0") :]  # the last one begins here
    count = page[26] if len(page) > 26 else 255
    parts = page[27 : 27 + count]
    behind = len(page) - 27 - count - sum(parts)
    if len(parts) == count and behind >= 0 and page[:5] == b"OggS\0":
        goes_on = behind or parts[-1:] == b"\xff"  # the packet does
        if page[5] & _LAST_PAGE or not goes_on:
            return
    raise AudioError(
        f"'{path}' is truncated: its Ogg stream breaks off. Was a copy or a "
        "recording interrupted? `ffmpeg -i OLD.ogg -c copy NEW.ogg` keeps what "
        "is there."
    )


def flac_info(head: bytes) -> AudioInfo | None:
    """What STREAMINFO says, 0 samples if written to a pipe; else None."""
    if head[:4] != b"fLaC" or len(head) < 42 or head[4] & 0x7F:
        return None
    # 20 bits rate, 3 channels - 1, 5 depth - 1, 36 samples
    bits = int.from_bytes(head[18:26], "big")
    return AudioInfo(bits & 0xFFFFFFFFF, bits >> 44, (bits >> 41 & 7) + 1)


def mp3_is_counted(file: int, head: bytes) -> bool:
    """Whether an MP3 file says how many frames it has (Xing's header)."""
    place = 0
    for _ in range(_MOST_CHUNKS):
        if head[:3] != b"ID3" or len(head) < 10:
            break
        a, b, c, d = head[6:10]  # 7 bits each
        place += 10 + (a << 21 | b << 14 | c << 7 | d)
        head = os.pread(file, 4096, place)
    found = re.search(rb"(Xing|Info)...([\x00-\xff])(.{4})", head[:200], re.S)
    return bool(found and found[2][0] & 1 and any(found[3]))


def check_rate(rate: int) -> None:
    """Refuse to write recordings at a rate at which they cannot be read."""
    if not isinstance(rate, Integral) or not RATES[0] <= rate <= RATES[1]:
        raise ValueError(
            f"sample_rate is {rate}, whole numbers from {RATES[0]} to "
            f"{RATES[1]} are allowed. Is it in Hz? --sample-rate 16000 is what "
            "most encoders take."
        )


def check_promise(
    path: str | os.PathLike, info: AudioInfo, size: int
) -> AudioInfo:
    """Refuse what cannot be: memory and time are taken for it at once."""
    if not (
        1 <= info.channels <= _CHANNELS
        and RATES[0] <= info.sample_rate <= RATES[1]
    ):
        raise AudioError(
            f"'{path}' is damaged: its header says {info.channels} channels at "
            f"{info.sample_rate} Hz; up to {_CHANNELS} channels at {RATES[0]} "
            f"to {RATES[1]} Hz are read."
        )
    if info.frames <= 0:
        raise AudioError(
            f"'{path}' holds no samples (an empty recording, or one that was "
            "cut short)."
        )
    if info.frames > _SAMPLES_PER_BYTE * size:
        raise AudioError(
            f"'{path}' is damaged: its header promises {info.frames} samples "
            f"in {size} bytes."
        )
    return info
