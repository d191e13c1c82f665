"""Reading recordings out of tar shards, as :mod:`corpora.shards` packs them.

The path of a packed recording is ``SHARD.tar#BYTE``: the shard, and where its
16-bit samples begin. A piece of it is one read of its bytes: no header, no
decoding, no listing of folders.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import torch

from speechbrain_ram.data.audio import AudioError, from_16_bit

_MARK = ".tar#"


def is_packed(path: str | os.PathLike) -> bool:
    """Whether a path names samples in a shard.

    Example
    -------
    >>> is_packed("/shards/shard-000002.tar#51756"), is_packed("/a.wav")
    (True, False)
    """
    return _MARK in str(path)


def read_packed(path: str, start: int, stop: int) -> torch.Tensor:
    """Read samples of a packed utterance.

    Arguments
    ---------
    path : str
        ``SHARD.tar#BYTE`` from a packed manifest.
    start, stop : int
        Samples of the utterance, end exclusive.

    Returns
    -------
    torch.Tensor
        Shape [stop - start], float32 in [-1, 1]: bit for bit what
        :func:`speechbrain_ram.data.audio.read_audio` gives of a 16-bit source.

    Raises
    ------
    AudioError
        The shard is missing or truncated.
    """
    shard, _, offset = path.rpartition("#")
    try:
        data = os.pread(
            _descriptor(shard), 2 * (stop - start), int(offset) + 2 * start
        )
    except OSError as error:
        raise AudioError(
            f"'{path}' cannot be read: {error}. Were the shards moved since "
            "they were packed?"
        ) from error
    if len(data) < 2 * (stop - start):
        raise AudioError(
            f"'{path}' is truncated: samples {start} to {stop} were asked "
            f"for, {len(data) // 2} could be read. Was a copy interrupted?"
        )
    return from_16_bit(np.frombuffer(data, "<i2"))


@cache
def _descriptor(shard: str) -> int:
    """Open a shard once a process; pread() shares no position with others."""
    return os.open(shard, os.O_RDONLY)
