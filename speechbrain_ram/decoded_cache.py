"""Decoded recordings on a local disk: decode once, then read bytes.

Decoding is what a loader of FLAC and Ogg Vorbis files spends its time on: a
crop of 2 s costs 1 to 2 ms, its bytes from a decoded file 0.05 ms. The first
time that an utterance is asked for it is decoded whole and kept; afterwards
crops are read from what was kept. They are the same to the last bit: what fits
in 16 bits is kept in 16 bits, everything else (Ogg) as 32-bit floats.

One file an utterance, written under another name and then renamed. A source
whose size or time has changed is decoded anew. Where nothing can be written,
reading goes on without.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from speechbrain.utils.logger import get_logger

from speechbrain_ram.atomic import atomic_path
from speechbrain_ram.audio import from_16_bit, read_audio

logger = get_logger(__name__)

#: Formats of which a piece decoded alone equals that piece of the whole.
ENDINGS = (".flac", ".ogg")

# Mark, size and time of the source, samples, bytes a sample.
_HEADER = struct.Struct("<8sqqqq")
_MARK = b"DECODED1"
_WIDEST = 4


class DecodedCache:
    """Keeps decoded utterances, up to a bound.

    Which utterances are kept is decided from the manifest, in its order, so
    that no process has to count what others wrote: the bound holds for any
    number of workers. It is for one manifest; give each a folder of its own.
    Only files of one channel, or with mixdown, and of the right rate are kept.

    Arguments
    ---------
    folder : path
        On a local disk, outside the corpus; made where it is missing. It may
        be deleted at any time between runs.
    max_gb : float
        Bound in 10^9 bytes, counted at 4 bytes a sample. Sources of 16 bits
        (FLAC) take half of what is counted.

    Raises
    ------
    ValueError
        No room at all.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> path = str(folder / "a.flac")
    >>> soundfile.write(path, np.arange(1000) / 2000, 16000)
    >>> cache = DecodedCache(folder / "decoded", max_gb=0.1)
    >>> cache.plan([(path, (0, 1000))])
    [True]
    >>> piece = cache.read(path, (0, 1000), 300, 400)
    >>> torch.equal(piece, read_audio(path, 300, 400))
    True
    """

    def __init__(self, folder: str | os.PathLike, max_gb: float):
        if not max_gb > 0:
            raise ValueError(
                f"max_gb is {max_gb}, more than 0 is needed. An hour of audio "
                "at 16 kHz takes 0.23, of FLAC 0.12."
            )
        self.folder = Path(folder)
        self.max_gb = max_gb
        self._writes = True

    def plan(
        self, utterances: Sequence[tuple[str, tuple[int, int]]]
    ) -> list[bool]:
        """Choose what is kept: the first ones that fit.

        Arguments
        ---------
        utterances : sequence of (path, (start, stop))
            Where each lies, in samples of its file.

        Returns
        -------
        list of bool
            Whether :meth:`read` may be asked for it.
        """
        room, kept, missed = 1e9 * self.max_gb, [], 0
        for path, (start, stop) in utterances:
            size = _HEADER.size + _WIDEST * (stop - start)
            decodes = path.lower().endswith(ENDINGS)
            kept.append(decodes and size <= room)
            room -= size * kept[-1]
            missed += decodes and not kept[-1]
        logger.info(
            "'%s' will hold %d decoded utterances, at most %.1f GB",
            self.folder,
            sum(kept),
            self.max_gb - room / 1e9,
        )
        if missed:
            logger.warning(
                "max_gb, %g, leaves no room for %d utterances: they are "
                "decoded each time",
                self.max_gb,
                missed,
            )
        return kept

    def read(
        self,
        path: str,
        within: tuple[int, int],
        start: int,
        stop: int,
        sample_rate: int = 16000,
        mixdown: bool = False,
    ) -> torch.Tensor | None:
        """Read a piece of an utterance; keep the utterance if it is new.

        Arguments
        ---------
        path : str
            The recording.
        within : tuple of int
            Start and stop of the utterance, as in the plan.
        start, stop : int
            The piece, in samples of the recording, inside `within`.
        sample_rate, mixdown
            As for :func:`speechbrain_ram.audio.read_audio`.

        Returns
        -------
        torch.Tensor or None
            Shape [stop - start], float32; None where it is not kept.

        Raises
        ------
        AudioError
            The recording cannot be used.
        """
        try:
            source = os.stat(path)
        except OSError:
            return None
        state = source.st_size, source.st_mtime_ns
        entry = self._entry(path, within, sample_rate)
        first = within[0]
        found = _read_entry(entry, state, start - first, stop - first)
        if found is not None:
            return found
        if not self._writes:
            return None
        whole = read_audio(path, *within, sample_rate, mixdown=mixdown)
        try:
            _write_entry(entry, state, whole.numpy())
        except OSError as error:
            self._writes = False
            logger.warning(
                "Nothing more is kept in '%s': %s. Recordings that are not "
                "there yet are decoded each time.",
                self.folder,
                error,
            )
        return whole[start - first : stop - first]

    def _entry(self, path, within, sample_rate) -> Path:
        key = f"{path}\0{within[0]}\0{within[1]}\0{sample_rate}".encode()
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        return self.folder / name[:2] / name[2:]


def _read_entry(entry, state, start, stop) -> torch.Tensor | None:
    """Samples of an entry that is whole and of this state of its source."""
    try:
        file = os.open(entry, os.O_RDONLY)
    except OSError:
        return None
    try:
        head = os.pread(file, _HEADER.size, 0)
        if len(head) < _HEADER.size:
            return None
        mark, size, time, samples, width = _HEADER.unpack(head)
        if mark != _MARK or (size, time) != state or stop > samples:
            return None
        piece = np.empty(stop - start, "<i2" if width == 2 else "<f4")
        offset = _HEADER.size + width * start
        if os.preadv(file, [piece], offset) < piece.nbytes:
            return None
    except OSError:
        return None
    finally:
        os.close(file)
    return from_16_bit(piece) if width == 2 else torch.from_numpy(piece)


def _write_entry(entry: Path, state, samples: np.ndarray) -> None:
    """Write an entry that is whole or not there."""
    scaled = samples * np.float32(32768)
    narrow = np.clip(scaled, -32768, 32767).astype("<i2")
    if (narrow == scaled).all():
        data, width = narrow, 2
    else:
        data, width = samples.astype("<f4", copy=False), 4
    with atomic_path(entry) as temporary, open(temporary, "wb") as file:
        file.write(_HEADER.pack(_MARK, *state, len(data), width))
        file.write(data.tobytes())
