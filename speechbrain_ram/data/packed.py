"""Recordings in tar shards, as data/shards.py packs them.

The path of a packed recording is ``SHARD.tar#BYTE``: the shard, and where its
16-bit samples begin. A piece of it is one read of its bytes: no header, no
decoding, no listing of folders.
"""

from __future__ import annotations

import os
import tarfile
from functools import cache

import numpy as np
import torch

from speechbrain_ram.data.lengths import AudioError
from speechbrain_ram.utils import whole_number

_MARK = ".tar#"

_HEAD = 28  # bytes of a WAV header up to the rate, its last four


def is_packed(path: str | os.PathLike) -> bool:
    """Whether a path names samples in a shard."""
    return _MARK in str(path)


def read_packed(
    path: str | os.PathLike, start: int, stop: int | None, sample_rate: int
) -> torch.Tensor:
    """Read samples of a packed utterance, int16; the shard has one rate."""
    shard, _, offset = str(path).rpartition("#")
    try:
        place = whole_number(offset)
        file, rate = _opened(shard)
        there = max(os.fstat(file).st_size - place, 0) // 2
    except (OSError, ValueError) as error:
        raise AudioError(
            f"'{path}' cannot be read: {error}. Were the shards moved since "
            "they were packed?"
        ) from error
    if rate != sample_rate:
        raise AudioError(
            f"'{path}' was packed at {rate} Hz, {sample_rate} Hz is needed. "
            f"Pack the corpus with the sample rate {sample_rate} into another "
            "folder: --sample-rate, or `sample_rate` of prepare_shards."
        )
    if place < 0 or stop is None or not 0 <= start < stop:
        raise AudioError(
            f"'{path}' has no samples {start} to {stop}: both are needed, of a "
            "packed manifest."
        )
    if there < stop:
        raise AudioError(
            f"'{path}' is truncated: samples {start} to {stop} were asked "
            f"for, {max(there - start, 0)} could be read. Was a copy "
            "interrupted?"
        )
    data = os.pread(file, 2 * (stop - start), place + 2 * start)
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16))


@cache
def _opened(shard: str) -> tuple[int, int]:
    """A shard, opened once a process, and its rate.

    pread() shares no position with others.
    """
    # A pipe would wait for somebody who writes into it.
    file = os.open(shard, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        head = os.pread(file, _HEAD, tarfile.BLOCKSIZE)
        if len(head) < _HEAD or not head.startswith(b"RIFF"):
            raise ValueError("it does not begin with a WAV file")
    except (OSError, ValueError):
        os.close(file)
        raise
    return file, int.from_bytes(head[-4:], "little")
