"""One embedding per utterance: batches of like length, read ahead.

The encoder is any callable ``encode(wavs [B, T], lens [B]) -> [B, E]``.
Utterances are sorted by length and batched by the frames that a batch holds
with its padding, so that memory is bounded and little is padded. The result
is the same as one utterance at a time (to 1e-4), given an encoder that honours
relative lengths.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from speechbrain_ram.data.audio import (
    AudioError,
    audio_info,
    pad_waveforms,
    read_audio,
)
from speechbrain_ram.data.names import part_of
from speechbrain_ram.processes import all_numbers, together
from speechbrain_ram.threads import ahead, in_threads, n_threads
from speechbrain_ram.verification.embedding_store import (
    EmbeddingSet,
    EmbeddingStore,
    merge,
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
        As for :func:`speechbrain_ram.data.audio.read_audio`.
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
    reading = {
        "sample_rate": sample_rate,
        "resample": resample,
        "mixdown": mixdown,
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        known = store.load() if store else None
        if store and distributed:  # before another rank adds its part
            torch.distributed.barrier()
        paths = [path for path, *_ in parts]
        files = np.array(list(pool.map(_file_state, paths)), np.int64)
        todo = _not_in(known, utterances, files)
        mine = [parts[i] for i in todo[rank::world]]
        found = run(lambda: _look(pool, mine, reading, check))
        seconds = _durations(found, len(todo))
        frames = [int(s * sample_rate) // hop + 1 for s in seconds]
        batches = length_batches(frames, max_frames_per_batch)
        most = math.ceil(len(batches) / world)  # of one rank
        batches = batches[rank::world]

        def load(batch: list[int]) -> list[torch.Tensor]:
            return [read_audio(*parts[todo[i]], **reading) for i in batch]

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
    reading: dict,
    check: Callable[[], None],
) -> list[tuple[float, str]]:
    """Seconds by header, and what is wrong with a recording."""

    def look(part: tuple[str, int, int | None]) -> tuple[float, str]:
        path, start, stop = part
        try:
            info = audio_info(path)
            if stop is not None and not start < stop <= info.frames:
                return 0.0, (
                    f"'{path}' has {info.frames} samples; there is no part "
                    f"from {start} to {stop}."
                )
            rate, channels = info.sample_rate, info.channels
            if (rate, channels) != (reading["sample_rate"], 1):
                read_audio(path, stop=1, **reading)  # says what is wrong
            if stop is not None:
                return (stop - start) / rate, ""
            return info.duration, ""
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
