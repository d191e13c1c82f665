"""Pieces of recordings, without libsndfile where the samples lie bare.

libsndfile takes 0.2 ms for a crop of 2 s from a WAV file, most of it to turn
integers into floats one by one; reading the bytes and converting them at once
takes 0.03 ms. :func:`read_samples` does that for plain WAV files and for packed
shards, and leaves everything else, errors included, to
:func:`speechbrain_ram.data.audio.read_audio`. The samples are the same to the last
bit.
"""

from __future__ import annotations

import os
import struct

import numpy as np
import torch

from speechbrain_ram.data.audio import from_16_bit, read_audio
from speechbrain_ram.data.packed import is_packed, read_packed

_HEAD = 4096  # bytes; samples that begin later are left to libsndfile


def read_samples(
    path: str,
    start: int,
    stop: int,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
) -> torch.Tensor:
    """Read a piece of a recording; ``read_audio`` with shorter ways.

    Arguments
    ---------
    path, start, stop, sample_rate, resample, mixdown
        As for :func:`speechbrain_ram.data.audio.read_audio`; `path` may also name
        a packed recording.

    Returns
    -------
    torch.Tensor
        Shape [samples], float32.

    Raises
    ------
    AudioError
        As ``read_audio``.

    Example
    -------
    >>> import soundfile
    >>> path = str(getfixture("tmp_path") / "a.wav")
    >>> soundfile.write(path, np.arange(100) / 100, 16000)
    >>> whole = read_audio(path)
    >>> torch.equal(read_samples(path, 10, 20), whole[10:20])
    True
    """
    if is_packed(path):
        return read_packed(path, start, stop)
    found = None
    if path.lower().endswith(".wav"):
        found = _read_plain_wav(path, start, stop, sample_rate)
    if found is not None:
        return found
    return read_audio(path, start, stop, sample_rate, resample, mixdown)


def _read_plain_wav(
    path: str, start: int, stop: int, sample_rate: int
) -> torch.Tensor | None:
    """Read 16-bit mono PCM; None where there is anything else."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        first, frames = _plain_samples(os.pread(file, _HEAD, 0), sample_rate)
        if not 0 <= start < stop <= frames:
            return None
        data = os.pread(file, 2 * (stop - start), first + 2 * start)
    except OSError:
        return None
    finally:
        os.close(file)
    if len(data) < 2 * (stop - start):
        return None
    return from_16_bit(np.frombuffer(data, "<i2"))


def _plain_samples(head: bytes, sample_rate: int) -> tuple[int, int]:
    """Byte of the first sample and number of samples; (0, 0) if not plain."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return 0, 0
    wanted = struct.pack("<HHIIHH", 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    plain, position = False, 12
    while position + 8 <= len(head):
        name = head[position : position + 4]
        (size,) = struct.unpack_from("<I", head, position + 4)
        position += 8
        if name == b"fmt ":
            plain = head[position : position + 16] == wanted
        elif name == b"data":
            return (position, size // 2) if plain else (0, 0)
        position += size + size % 2
    return 0, 0
