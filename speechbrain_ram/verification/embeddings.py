"""One embedding per utterance: batches of like length, read ahead.

Utterances are sorted by length and batched by the seconds that a batch holds
with its padding, so that memory is bounded and little is padded. The result
is the same as one utterance at a time (to 1e-4), given an encoder that honours
relative lengths.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from threading import Condition
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from speechbrain_ram.data.audio import AudioError, pad_waveforms
from speechbrain_ram.data.names import part_of
from speechbrain_ram.data.recordings import (
    WHOLE,
    Piece,
    Recording,
    Segment,
    audible,
    split_into_pieces,
)
from speechbrain_ram.utils import (
    ahead,
    all_numbers,
    first_ten,
    in_threads,
    n_processes,
    n_threads,
    rank,
    together,
    wait_for_all,
)
from speechbrain_ram.verification.store import (
    EmbeddingSet,
    EmbeddingStore,
    file_state,
    merge,
)

Encoder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Padding = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]

_THREADS = 4  # decode while the encoder computes
_CPU_SECONDS, _DEVICE_SECONDS = 2.0, 60.0  # of a batch
_SECONDS_BETWEEN_PARTS = 60


@dataclass(frozen=True)
class Embedder:
    """How recordings become embeddings; every way to one goes through here.

    A recording of at most 240 s is embedded whole
    (:data:`speechbrain_ram.data.recordings.WHOLE`). A longer one is cut into
    equal windows of at most that, whose embeddings are averaged; silent
    windows are left out.

    Arguments
    ---------
    encode : callable
        `encode(wavs, lens)` with waveforms [B, T] float32 and relative
        lengths [B], returns embeddings [B, E].
    sample_rate : int
        In Hz, what the encoder was trained on.
    resample, mixdown : bool
        As for :func:`speechbrain_ram.data.audio.read_audio`.
    device : str or torch.device
        Where `encode` wants its input.
    pad : callable, optional
        Batches waveforms; given by front-ends that do not frame as the host's
        Fbank does (:meth:`speechbrain_ram.features.KaldiFbank.pad`).
    batch_seconds : float, optional
        Bound on the audio of a batch, padding included. A recording longer
        than that is a batch of its own. By default 60 on a GPU, and 2 on a
        CPU, whose caches a larger batch does not fit.
    threads : int, optional
        How many batches are encoded at once. By default, on a CPU as many as
        PyTorch has threads, which then share nothing; on a GPU one. With 1,
        `encode` is never called by two threads at once.
    """

    encode: Encoder
    sample_rate: int = 16000
    resample: bool = False
    mixdown: bool = False
    device: str | torch.device = "cpu"
    pad: Padding | None = None
    batch_seconds: float | None = None
    threads: int | None = None

    def plan(self, recording: Recording, position: int = 0) -> list[Piece]:
        """Cut a recording into what is embedded at once, by its header.

        Raises
        ------
        AudioError
            It cannot be used.
        """
        return split_into_pieces(
            recording, position, self.sample_rate, self.resample, self.mixdown
        )

    def batches(self, samples: Mapping[int, int]) -> list[list[int]]:
        """Group recordings, given by position, of so many samples each."""
        seconds = self.batch_seconds
        if seconds is None:
            on_cpu = torch.device(self.device).type == "cpu"
            seconds = _CPU_SECONDS if on_cpu else _DEVICE_SECONDS
        most = int(seconds * self.sample_rate)
        place = list(samples)
        return [
            [place[i] for i in batch]
            for batch in length_batches(list(samples.values()), most)
        ]

    @contextmanager
    def embedding(
        self,
        batches: Iterable[list[int]],
        pieces: Callable[[int], list[Piece]],
        name: Callable[[int], str],
        warn: bool = False,
    ) -> Iterator[Iterator[Embedded]]:
        """Embed batches, in order, the next ones being read meanwhile.

        Arguments
        ---------
        batches : iterable of list of int
            Positions of recordings, from :meth:`batches`.
        pieces : callable
            What :meth:`plan` said of a recording.
        name : callable
            What a recording is called in a message.
        warn : bool
            Whether to warn of clipping.

        Yields
        ------
        iterator of Embedded
            One a batch.
        """
        threads = n_threads(self.device, self.threads)
        room = _Room(WHOLE)

        def encode(waveforms: list[torch.Tensor]) -> np.ndarray:
            seconds = sum(map(len, waveforms)) / self.sample_rate
            with room.taken(seconds):
                return self._encode(waveforms)

        def load(batch: list[int]) -> list:
            return [self._load(pieces(i), name(i), warn) for i in batch]

        def embed(work) -> Embedded:
            batch, loaded = work
            rows, errors = {}, {}
            short = [
                i
                for i, each in enumerate(loaded)
                if isinstance(each, torch.Tensor)
            ]
            if short:
                out = encode([loaded[i] for i in short])
                rows = dict(zip((batch[i] for i in short), out, strict=True))
            for i, windows in zip(batch, loaded, strict=True):
                if i in rows:
                    continue
                try:  # one window after the other, however long it is
                    if isinstance(windows, AudioError):
                        raise windows
                    each = [encode([window])[0] for window in windows]
                    rows[i] = np.mean(each, axis=0, dtype=np.float64)
                except AudioError as error:
                    errors[i] = str(error)
            return Embedded(batch, rows, errors)

        with ThreadPoolExecutor(_THREADS) as pool:
            batches = list(batches)
            loaded = ahead(pool, load, batches, depth=threads + 3)
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
            out = self.encode(padded.to(self.device), lens.to(self.device))
        if out.ndim != 2 or len(out) != len(waveforms):
            raise ValueError(
                f"encode must return [{len(waveforms)}, E] for this batch, "
                f"got {tuple(out.shape)}."
            )
        return out.float().cpu().numpy()


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


def extract(
    embedder: Embedder,
    utterances: Sequence[str],
    root: str | os.PathLike,
    store: EmbeddingStore | None = None,
    progress: bool = True,
    check: Callable[[], None] | None = None,
) -> EmbeddingSet:
    """Embed every utterance of a list once.

    Where there is a group of `torch.distributed`, its processes share the
    work, and all of them must make this call; each gets the whole result.

    Arguments
    ---------
    embedder : Embedder
        The encoder, and how it is used.
    utterances : sequence of str
        Unique names, paths relative to `root`; ``PATH@START-STOP`` is a part
        of a recording, in samples at its own rate.
    root : path
        Folder of the recordings.
    store : EmbeddingStore, optional
        Rows in it are not computed again; new ones are added.
    progress : bool
        Whether to show a progress bar on stderr.
    check : callable, optional
        Called between the batches. Raises SystemExit to leave; several
        processes leave together.

    Returns
    -------
    EmbeddingSet
        In the order of `utterances`.

    Raises
    ------
    AudioError
        Recordings cannot be used: the first ten by name. What a header shows
        is found before any is embedded, silence after all others are.
    StoreError
        The store is another encoder's.
    ValueError
        No utterance, or `encode` returns another shape.
    """
    utterances = tuple(dict.fromkeys(utterances))
    if not utterances:
        raise ValueError("No utterance to embed: is the trial list empty?")
    check = check or (lambda: None)
    known = store.load() if store else None
    if store:  # before another process adds its part
        wait_for_all()
    plan = _Plan(embedder, utterances, root, known, check)
    errors: dict[int, str] = {}
    bar = tqdm(
        total=sum(map(len, plan.batches)),
        unit="utt",
        desc="embed",
        disable=not progress or rank() > 0,
    )

    def as_set(one: Embedded) -> EmbeddingSet | None:
        bar.update(len(one.batch))
        errors.update(one.errors)
        return plan.as_set(one.rows)

    with (
        bar,
        embedder.embedding(plan.batches, plan.pieces, plan.name) as embedded,
    ):
        sets = map(as_set, embedded)
        collected = together(
            lambda: (
                _collect(sets, plan.most, check, embedder.device, store),
                errors,
            )
        )
    new = [part for part, _ in collected if part is not None]
    everything = merge([*([known] if known else []), *new])
    if store and new:
        if rank() == 0:
            store.save(everything)
        wait_for_all()
    found = {i: why for _, bad in collected for i, why in bad.items()}
    _raise_for([found[i] for i in sorted(found)], plan.n_new)
    return everything.renamed({name: name for name in utterances})


class _Plan:
    """Which recordings are embedded, in which batches, by this process."""

    def __init__(
        self,
        embedder: Embedder,
        utterances: Sequence[str],
        root: str | os.PathLike,
        known: EmbeddingSet | None,
        check: Callable[[], None],
    ):
        self.embedder, self.utterances = embedder, utterances
        self.parts = [
            Segment(*part_of(os.path.join(root, name))) for name in utterances
        ]
        self.planned: dict[int, list[Piece]] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            states = pool.map(file_state, [part.path for part in self.parts])
            self.files = np.array(list(states), np.int64)
            todo = _not_in(known, utterances, self.files)
            mine = todo[rank() :: n_processes()]
            found = together(lambda: self._look(pool, mine, check))
        self.n_new = len(todo)
        samples = dict(zip(todo, _in_turn(found, len(todo)), strict=True))
        self.seconds = {i: n / embedder.sample_rate for i, n in samples.items()}
        batches = embedder.batches(samples)
        self.most = math.ceil(len(batches) / n_processes())  # of one process
        self.batches = batches[rank() :: n_processes()]

    def _look(
        self,
        pool: ThreadPoolExecutor,
        mine: Sequence[int],
        check: Callable[[], None],
    ) -> list[tuple[int, str]]:
        """Samples by header, and what is wrong with a recording."""

        def look(i: int) -> tuple[int, str]:
            try:
                pieces = self.planned[i] = self.embedder.plan(self.parts[i])
            except AudioError as error:
                return 0, str(error)
            return sum(piece.samples for piece in pieces), ""

        found = []
        for one in pool.map(look, mine):
            check()
            found.append(one)
        return found

    def pieces(self, i: int) -> list[Piece]:
        """Of a recording, whose header another process may have read."""
        return self.planned.pop(i, None) or self.embedder.plan(self.parts[i])

    def name(self, i: int) -> str:
        """What a message calls a recording."""
        return f"'{self.parts[i].path}'"

    def as_set(self, rows: dict[int, np.ndarray]) -> EmbeddingSet | None:
        """What was embedded, by position, under its names."""
        if not rows:
            return None
        return EmbeddingSet(
            tuple(self.utterances[i] for i in rows),
            np.array(list(rows.values()), np.float32),
            np.array([self.seconds[i] for i in rows], np.float32),
            self.files[list(rows)],
        )


def length_batches(frames: Sequence[int], max_frames: int) -> list[list[int]]:
    """Group items of like length, longest first.

    Longest first, so that a batch that does not fit into memory fails at
    once, and the progress bar's guess errs on the safe side.

    Arguments
    ---------
    frames : sequence of int
        Length of each item.
    max_frames : int
        Bound on (items in a batch) x (its longest item).

    Returns
    -------
    list of list of int
        Indices; every item is in one batch.

    Example
    -------
    >>> length_batches([10, 30, 11, 29], max_frames=60)
    [[1, 3], [2, 0]]
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


def _not_in(
    known: EmbeddingSet | None, utterances: Sequence[str], files: np.ndarray
) -> list[int]:
    """Indices of the utterances that must be embedded."""
    rows = {} if known is None else {n: i for i, n in enumerate(known.ids)}
    return [
        i
        for i, name in enumerate(utterances)
        if name not in rows or (known.files[rows[name]] != files[i]).any()
    ]


def _in_turn(parts: list[list], n_recordings: int) -> list[int]:
    """Samples; every unusable file is named before the work."""
    found = [None] * n_recordings
    for first, part in enumerate(parts):
        found[first :: len(parts)] = part
    _raise_for([error for _, error in found if error], n_recordings)
    return [samples for samples, _ in found]


def _raise_for(errors: list[str], n_recordings: int) -> None:
    if errors:
        raise AudioError(
            f"{len(errors)} of {n_recordings} recordings cannot be used:\n"
            + first_ten(errors, "\n")
        )


def _collect(
    embedded: Iterator[EmbeddingSet | None],
    n_batches: int,
    check: Callable[[], None],
    device: str | torch.device,
    store: EmbeddingStore | None,
) -> EmbeddingSet | None:
    """Run through, keeping a part on disk every minute and at the end.

    `n_batches` is the same on all processes, one of which may have one less.
    """
    name = f"{rank()}-{os.getpid()}"
    done: list[EmbeddingSet] = []
    saved, last = 0, time.monotonic()

    def save() -> None:
        nonlocal saved, last
        if store and len(done) > saved:
            store.save_part(f"{name}-{saved:08d}", merge(done[saved:]))
        saved, last = len(done), time.monotonic()

    problem = None
    try:
        for _ in range(n_batches):
            try:
                check()
                done += filter(None, islice(embedded, 1))
            except (Exception, SystemExit) as error:
                problem = error
            leaves = int(isinstance(problem, SystemExit))
            if any(n for (n,) in all_numbers((leaves,), device)):
                break
            if time.monotonic() - last > _SECONDS_BETWEEN_PARTS:
                save()
    finally:
        save()
    if problem is not None:
        raise problem
    return merge(done)
