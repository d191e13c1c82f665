"""How recordings become embeddings: batches of like length, read ahead.

Recordings are sorted by length and batched by the seconds that a batch holds
with its padding, so that memory is bounded and little is padded. The result
is the same as one recording at a time (to 1e-4), given an encoder that honours
relative lengths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Condition
from typing import NamedTuple

import numpy as np
import torch

from speechbrain_ram.data.audio import AudioError, pad_waveforms
from speechbrain_ram.data.recordings import (
    WHOLE,
    Piece,
    Recording,
    audible,
    split_into_pieces,
)
from speechbrain_ram.utils import ahead, in_threads, n_threads

Encoder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Padding = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]

_THREADS = 4  # decode while the encoder computes; a GPU wants all cores
# Of a batch. Two batches are on a GPU, one computed and one on its way; they
# take the memory of the longest recording.
_CPU_SECONDS, _DEVICE_SECONDS = 2.0, WHOLE / 2


@dataclass(frozen=True)
class Embedder:
    """How recordings become embeddings; every way to one goes through here.

    A recording longer than 240 s (:data:`.recordings.WHOLE`) is cut into
    equal windows, whose embeddings are averaged; silent windows are left out.
    A batch holds at most `batch_seconds` of audio, padding included, or one
    longer recording. By default these are 120 s on a GPU, and 2 s on a CPU,
    whose caches a larger batch does not fit. `threads` batches are encoded at
    once: by default, on a CPU as many as PyTorch has threads, on a GPU two, one
    of which is padded and copied there while the other is computed.
    """

    encode: Encoder  # of waveforms [B, T] and relative lengths [B]: [B, E]
    sample_rate: int = 16000  # Hz, what the encoder was trained on
    resample: bool = False  # whether another sample rate is allowed
    mixdown: bool = False  # whether several channels are
    device: str | torch.device = "cpu"
    pad: Padding | None = None  # for a front-end with frames of its own
    batch_seconds: float | None = None
    threads: int | None = None

    def plan(self, recording: Recording, position: int = 0) -> list[Piece]:
        """Cut a recording into what is embedded at once, by its header."""
        return split_into_pieces(
            recording, position, self.sample_rate, self.resample, self.mixdown
        )

    def batches(self, samples: Mapping[int, int]) -> list[list[int]]:
        """Group recordings, given by position, of so many samples each."""
        seconds = self.batch_seconds
        if seconds is None:
            seconds = _CPU_SECONDS if self._on_cpu else _DEVICE_SECONDS
        most = int(seconds * self.sample_rate)
        place = list(samples)
        return [
            [place[i] for i in batch]
            for batch in length_batches(list(samples.values()), most)
        ]

    @property
    def _on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @contextmanager
    def embedding(
        self,
        batches: Iterable[list[int]],
        pieces: Callable[[int], list[Piece]],
        name: Callable[[int], str],
        warn: bool = False,
    ) -> Iterator[Iterator[Embedded]]:
        """Embed batches, in order, the next ones being read meanwhile.

        `pieces` gives what :meth:`plan` said of a position, `name` what a
        message calls it; `warn` warns of clipping.
        """
        threads = n_threads(self.device, self.threads)
        room = _Room(WHOLE)

        def encode(waveforms: list[torch.Tensor]) -> np.ndarray:
            seconds = sum(map(len, waveforms)) / self.sample_rate
            with room.taken(seconds):
                return self._encode(waveforms)

        def alone(i: int, window: torch.Tensor) -> np.ndarray:
            try:
                return encode([window])[0]
            except AudioError as error:  # the encoder knows no names
                raise AudioError(f"{name(i)}: {error}") from error

        def load(batch: list[int]) -> list:
            return [self._load(pieces(i), name(i), warn) for i in batch]

        def embed(work) -> Embedded:
            batch, loaded = work
            rows, errors = {}, {}
            kinds = enumerate(map(type, loaded))
            short = [i for i, kind in kinds if kind is torch.Tensor]
            if len(short) > 1:
                out = encode([loaded[i] for i in short])
                rows = dict(zip((batch[i] for i in short), out, strict=True))
            for i, windows in zip(batch, loaded, strict=True):
                if i in rows:
                    continue
                try:  # one window after the other, however long it is
                    if isinstance(windows, AudioError):
                        raise windows
                    if isinstance(windows, torch.Tensor):
                        windows = [windows]
                    each = [alone(i, window) for window in windows]
                    rows[i] = np.mean(each, axis=0, dtype=np.float64)
                except AudioError as error:
                    errors[i] = str(error)
            return Embedded(batch, rows, errors)

        readers = _THREADS
        if not self._on_cpu:
            readers = max(readers, os.cpu_count() or 1)
        with ThreadPoolExecutor(readers) as pool:
            batches = list(batches)
            loaded = ahead(pool, load, batches, depth=threads + readers - 1)
            work = zip(batches, loaded, strict=True)
            with (
                closing(loaded),
                closing(in_threads(embed, work, threads)) as done,
            ):
                yield done

    def _load(self, pieces: list[Piece], name: str, warn: bool):
        """A waveform; the windows of a long recording; or what is wrong."""
        windows = audible(pieces, name, warn)
        try:
            return windows if len(pieces) > 1 else next(windows)
        except AudioError as error:
            return error

    def _encode(self, waveforms: list[torch.Tensor]) -> np.ndarray:
        pad = self.pad or partial(pad_waveforms, hop=self.sample_rate // 100)
        padded, lens = pad(waveforms)
        with torch.inference_mode():
            out = self.encode(
                sent_to(self.device, padded), sent_to(self.device, lens)
            )
        if out.ndim != 2 or len(out) != len(waveforms):
            raise ValueError(
                f"encode must return [{len(waveforms)}, E] for this batch, "
                f"got {tuple(out.shape)}."
            )
        return out.float().cpu().numpy()


def sent_to(device: str | torch.device, values: torch.Tensor) -> torch.Tensor:
    """Values on a device; a GPU copies them while the CPU goes on.

    That takes memory that stays where it is: from any other, the CPU waits.
    """
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class _Room:
    """Threads share it: so much audio at most is encoded at once."""

    def __init__(self, seconds: float):
        self._seconds = self._free = seconds
        self._changed = Condition()

    @contextmanager
    def taken(self, seconds: float) -> Iterator[None]:
        """Wait until there is room for so much, at most for all."""
        seconds = min(seconds, self._seconds)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= seconds)
            self._free -= seconds
        try:
            yield
        finally:
            with self._changed:
                self._free += seconds
                self._changed.notify_all()


class Embedded(NamedTuple):
    """A batch of recordings by position, and what became of each."""

    batch: list[int]
    rows: dict[int, np.ndarray]
    errors: dict[int, str]


def length_batches(frames: Sequence[int], max_frames: int) -> list[list[int]]:
    """Group items by length, with at most `max_frames` of the longest.

    Longest first, so that a batch that does not fit into memory fails at once,
    and the progress bar's guess errs on the safe side.
    """
    order = sorted(range(len(frames)), key=lambda i: (-frames[i], i))
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        if batches and (len(batches[-1]) + 1) * longest <= max_frames:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = frames[i]
    return batches
