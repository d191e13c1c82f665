"""One embedding per utterance: batches of like length, read ahead.

The encoder is any callable ``encode(wavs [B, T], lens [B]) -> [B, E]``.
Utterances are sorted by length and batched by the frames that a batch holds
with its padding, so that memory is bounded and little is padded. The result
is the same as one utterance at a time (to 1e-4), given an encoder that honours
relative lengths.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from speechbrain_ram.data.audio import Audio, AudioError, pad_waveforms
from speechbrain_ram.data.names import part_of
from speechbrain_ram.data.recordings import check_heard, check_length
from speechbrain_ram.utils import (
    ahead,
    all_numbers,
    atomic_path,
    in_threads,
    n_threads,
    together,
)

Encoder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Padding = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]

_THREADS = 4  # decode while the encoder computes
_CPU_FRAMES, _DEVICE_FRAMES = 200, 6000
_SECONDS_BETWEEN_PARTS = 60


def extract(
    encode: Encoder,
    utterances: Sequence[str],
    root: str | os.PathLike,
    sample_rate: int = 16000,
    max_frames_per_batch: int | None = None,
    hop: int | None = None,
    resample: bool = False,
    mixdown: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    store: EmbeddingStore | None = None,
    distributed: bool = False,
    pad: Padding | None = None,
    threads: int | None = None,
    check: Callable[[], None] | None = None,
) -> EmbeddingSet:
    """Embed every utterance once.

    Arguments
    ---------
    encode : callable
        `encode(wavs, lens)` with waveforms [B, T] float32 and relative
        lengths [B], returns embeddings [B, E].
    utterances : sequence of str
        Unique names, paths relative to `root`; ``PATH@START-STOP`` is a part
        of a recording, in samples at its own rate.
    root : path
        Folder of the recordings.
    sample_rate : int
        In Hz, what the encoder was trained on.
    max_frames_per_batch : int, optional
        Bound on frames of `hop` samples in a batch, padding included. An
        utterance longer than that is a batch of its own. By default 6000 on
        a GPU, and 200 on a CPU, whose caches a larger batch does not fit.
    hop : int, optional
        Samples from one feature frame to the next; 10 ms if not given.
    resample, mixdown : bool
        As for :class:`speechbrain_ram.data.audio.Audio`.
    device : str or torch.device
        Where `encode` wants its input.
    progress : bool
        Whether to show a progress bar on stderr.
    store : EmbeddingStore, optional
        Rows in it are not computed again; new ones are added.
    distributed : bool
        Share the work among the ranks of `torch.distributed`, all of which
        must make this call; every rank gets the whole result.
    pad : callable, optional
        Batches waveforms; given by front-ends that do not frame as the host's
        Fbank does (:meth:`speechbrain_ram.features.KaldiFbank.pad`).
    threads : int, optional
        How many batches are encoded at once. By default, on a CPU as many as
        PyTorch has threads, which then share nothing; on a GPU one. With 1,
        `encode` is never called by two threads at once.
    check : callable, optional
        Called between the batches. Raises SystemExit to leave; several ranks
        leave together.

    Returns
    -------
    EmbeddingSet
        In the order of `utterances`.

    Raises
    ------
    AudioError
        Recordings cannot be used: the first ten by name, before any is
        embedded.
    StoreError
        The store is another encoder's.
    ValueError
        No utterance, or `encode` returns another shape.
    """
    utterances = tuple(dict.fromkeys(utterances))
    if not utterances:
        raise ValueError("No utterance to embed: is the trial list empty?")
    hop = hop or sample_rate // 100
    pad = pad or partial(pad_waveforms, hop=hop)
    threads = n_threads(device, threads)
    if max_frames_per_batch is None:
        on_cpu = torch.device(device).type == "cpu"
        max_frames_per_batch = _CPU_FRAMES if on_cpu else _DEVICE_FRAMES
    check = check or (lambda: None)
    rank, world, run = 0, 1, lambda work: [work()]
    if distributed:
        rank, run = torch.distributed.get_rank(), together
        world = torch.distributed.get_world_size()
    parts = [part_of(os.path.join(root, name)) for name in utterances]
    audio = Audio(sample_rate, resample, mixdown)
    with ThreadPoolExecutor(_THREADS) as pool:
        known = store.load() if store else None
        if store and distributed:  # before another rank adds its part
            torch.distributed.barrier()
        paths = [path for path, *_ in parts]
        files = np.array(list(pool.map(_file_state, paths)), np.int64)
        todo = _not_in(known, utterances, files)
        mine = [parts[i] for i in todo[rank::world]]
        found = run(lambda: _look(pool, mine, audio, check))
        seconds = _durations(found, len(todo))
        frames = [int(s * sample_rate) // hop + 1 for s in seconds]
        batches = length_batches(frames, max_frames_per_batch)
        most = math.ceil(len(batches) / world)  # of one rank
        batches = batches[rank::world]

        def load(batch: list[int]) -> list[torch.Tensor]:
            return [
                check_heard(audio.read(*part), f"'{part[0]}'")
                for part in (parts[todo[i]] for i in batch)
            ]

        def embed(work) -> EmbeddingSet:
            batch, wavs = work
            padded, lens = pad(wavs)
            with torch.inference_mode():
                out = encode(padded.to(device), lens.to(device))
            if out.ndim != 2 or len(out) != len(batch):
                raise ValueError(
                    f"encode must return [{len(batch)}, E] for this batch, "
                    f"got {tuple(out.shape)}."
                )
            rows = [todo[i] for i in batch]
            return EmbeddingSet(
                tuple(utterances[row] for row in rows),
                out.float().cpu().numpy(),
                seconds[batch],
                files[rows],
            )

        waveforms = ahead(pool, load, batches, depth=threads + 3)
        work = zip(batches, waveforms, strict=True)
        bar = tqdm(
            total=sum(map(len, batches)),
            unit="utt",
            desc="embed",
            disable=not progress or rank > 0,
        )

        def any_leaves(mine: bool) -> bool:
            """Whether this rank does, or another."""
            if not distributed:
                return mine
            return any(n for (n,) in all_numbers((int(mine),), device))

        with (
            bar,
            closing(waveforms),
            closing(in_threads(embed, work, threads)) as embedded,
        ):
            name = f"{rank}-{os.getpid()}"
            collected = run(
                lambda: _collect(
                    embedded, most, check, any_leaves, bar, store, name
                )
            )
    new = [part for part in collected if part is not None]
    everything = merge([*([known] if known else []), *new])
    if store and new:
        if rank == 0:
            store.save(everything)
        if distributed:
            torch.distributed.barrier()
    row_of = {name: row for row, name in enumerate(everything.ids)}
    rows = [row_of[name] for name in utterances]
    return EmbeddingSet(
        utterances,
        everything.matrix[rows],
        everything.seconds[rows],
        everything.files[rows],
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


def _file_state(path: str) -> tuple[int, int]:
    """Size and time of a file; a missing one is reported with the others."""
    try:
        state = os.stat(path)
    except OSError:
        return -1, -1
    return state.st_size, state.st_mtime_ns


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


def _look(
    pool: ThreadPoolExecutor,
    parts: Sequence[tuple[str, int, int | None]],
    audio: Audio,
    check: Callable[[], None],
) -> list[tuple[float, str]]:
    """Seconds by header, and what is wrong with a recording."""

    def look(part: tuple[str, int, int | None]) -> tuple[float, str]:
        path, start, stop = part
        try:
            info = audio.info(path)
            audio.check(path, info.channels, info.sample_rate)
            if stop is not None and not start < stop <= info.frames:
                return 0.0, (
                    f"'{path}' has {info.frames} samples; there is no part "
                    f"from {start} to {stop}."
                )
            samples = (info.frames if stop is None else stop) - start
            check_length(samples / info.sample_rate, f"'{path}'")
            return samples / info.sample_rate, ""
        except AudioError as error:
            return 0.0, str(error)

    found = []
    for one in pool.map(look, parts):
        check()
        found.append(one)
    return found


def _durations(parts: list[list], n_paths: int) -> np.ndarray:
    """Seconds; every unusable file is named before the work."""
    found = [None] * n_paths
    for rank, part in enumerate(parts):
        found[rank :: len(parts)] = part
    errors = [error for _, error in found if error]
    if errors:
        more = f"\n... and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise AudioError(
            f"{len(errors)} of {n_paths} recordings cannot be used:\n"
            + "\n".join(errors[:10])
            + more
        )
    return np.array([duration for duration, _ in found], np.float32)


def _collect(
    embedded: Iterator[EmbeddingSet],
    n_batches: int,
    check: Callable[[], None],
    any_leaves: Callable[[bool], bool],
    bar: tqdm,
    store: EmbeddingStore | None,
    name: str,
) -> EmbeddingSet | None:
    """Run through, keeping a part on disk every minute and at the end.

    `n_batches` is the same on all ranks, one of which may have one less.
    """
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
                for batch in islice(embedded, 1):
                    done.append(batch)
                    bar.update(len(batch.ids))
            except (Exception, SystemExit) as error:
                problem = error
            if any_leaves(isinstance(problem, SystemExit)):
                break
            if time.monotonic() - last > _SECONDS_BETWEEN_PARTS:
                save()
    finally:
        save()
    if problem is not None:
        raise problem
    return merge(done)


# -- Embeddings on disk: one safetensors file that says whose it is -----------
#
# A store belongs to one encoder, by fingerprint, and is refused for another. It
# remembers size and modification time of each recording, so that a changed file
# is embedded again, as `make` and `rsync` would. While extraction runs, new
# rows go to small files in ``STORE.parts``; an interrupted run loses at most
# its last minute.

_FORMAT = "speechbrain-ram embeddings 1"


class StoreError(ValueError):
    """A store cannot be used; the message says why."""


@dataclass(frozen=True, eq=False)
class EmbeddingSet:
    """Recordings and their embeddings, row by row.

    Arguments
    ---------
    ids : tuple of str
        U unique utterance names.
    matrix : np.ndarray
        Shape [U, E] float32, not scaled.
    seconds : np.ndarray
        Shape [U] float32, durations.
    files : np.ndarray
        Shape [U, 2] int64, size in bytes and modification time in ns.
    """

    ids: tuple[str, ...]
    matrix: np.ndarray
    seconds: np.ndarray
    files: np.ndarray

    def renamed(self, places: Mapping[str, str]) -> EmbeddingSet:
        """Rows by other names: `places` gives each name's id here."""
        rows = {name: row for row, name in enumerate(self.ids)}
        index = [rows[place] for place in places.values()]
        arrays = (self.matrix, self.seconds, self.files)
        return EmbeddingSet(tuple(places), *(each[index] for each in arrays))


class EmbeddingStore:
    """Where the embeddings of one encoder are kept.

    Arguments
    ---------
    path : path
        The file, usually ``NAME.safetensors``; need not exist.
    fingerprint : str
        Of the encoder: changes when its weights or its front-end change.

    Example
    -------
    >>> store = EmbeddingStore(getfixture("tmp_path") / "e.safetensors", "x1")
    >>> store.load() is None
    True
    >>> row = EmbeddingSet(
    ...     ("a.wav",), np.zeros((1, 2)), np.ones(1), np.zeros((1, 2))
    ... )
    >>> store.save(row)
    >>> store.load().ids
    ('a.wav',)
    """

    def __init__(self, path: str | os.PathLike, fingerprint: str):
        self.path, self.fingerprint = Path(path), fingerprint
        self.parts = self.path.with_name(self.path.name + ".parts")

    def load(self) -> EmbeddingSet | None:
        """Everything stored, None if there is nothing.

        Raises
        ------
        StoreError
            The file is another encoder's, damaged, or something else.
        """
        paths = [self.path] if self.path.exists() else []
        if self.parts.is_dir():
            paths += sorted(self.parts.glob("*.safetensors"))
        return merge([self._read(path) for path in paths])

    def save(self, embeddings: EmbeddingSet) -> None:
        """Replace the store, and remove what an interrupted run left."""
        self._write(self.path, embeddings)
        shutil.rmtree(self.parts, ignore_errors=True)

    def save_part(self, name: str, embeddings: EmbeddingSet) -> None:
        """Keep some rows until :meth:`save`."""
        self._write(self.parts / f"{name}.safetensors", embeddings)

    def _write(self, path: Path, embeddings: EmbeddingSet) -> None:
        names = json.dumps(embeddings.ids).encode()
        with atomic_path(path) as temporary:
            save_file(
                {
                    "matrix": np.ascontiguousarray(
                        embeddings.matrix, np.float32
                    ),
                    "seconds": np.asarray(embeddings.seconds, np.float32),
                    "files": np.asarray(embeddings.files, np.int64),
                    "ids": np.frombuffer(names, np.uint8),
                },
                temporary,
                metadata={"format": _FORMAT, "fingerprint": self.fingerprint},
            )
            # safetensors makes files that only their owner can read
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)

    def _read(self, path: Path) -> EmbeddingSet:
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise StoreError(
                        f"'{path}' is not an embedding store. Name another "
                        "file, or delete it."
                    )
                if metadata.get("fingerprint") != self.fingerprint:
                    raise StoreError(
                        f"'{path}' holds the embeddings of another encoder "
                        f"(fingerprint {metadata.get('fingerprint'):.12}, "
                        f"this one is {self.fingerprint:.12}). Name another "
                        "file, or delete it to embed again."
                    )
                ids = tuple(json.loads(file.get_tensor("ids").tobytes()))
                return EmbeddingSet(
                    ids,
                    file.get_tensor("matrix"),
                    file.get_tensor("seconds"),
                    file.get_tensor("files"),
                )
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"'{path}' cannot be read as an embedding store: {error}. "
                "Delete it to embed again."
            ) from error


def merge(sets: Sequence[EmbeddingSet]) -> EmbeddingSet | None:
    """Join sets; of a name that is in several, the last row stays.

    Arguments
    ---------
    sets : sequence of EmbeddingSet
        Of one encoder.

    Returns
    -------
    EmbeddingSet or None
        None for no sets.
    """
    if len(sets) < 2:
        return sets[0] if sets else None
    names = [name for each in sets for name in each.ids]
    rows = {name: row for row, name in enumerate(names)}
    keep = list(rows.values())
    return EmbeddingSet(
        tuple(rows),
        np.concatenate([each.matrix for each in sets])[keep],
        np.concatenate([each.seconds for each in sets])[keep],
        np.concatenate([each.files for each in sets])[keep],
    )
