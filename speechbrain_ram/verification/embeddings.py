"""One embedding per utterance of a list, by one process or several."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from tqdm import tqdm

from speechbrain_ram.data.audio import AudioError
from speechbrain_ram.data.names import part_of
from speechbrain_ram.data.recordings import Piece, Segment
from speechbrain_ram.utils import (
    all_numbers,
    first_ten,
    n_processes,
    rank,
    together,
    wait_for_all,
)
from speechbrain_ram.verification.embedder import Embedded, Embedder
from speechbrain_ram.verification.store import (
    EmbeddingSet,
    EmbeddingStore,
    file_state,
    merge,
)

_THREADS = 4  # look at headers at once
_SECONDS_BETWEEN_PARTS = 60


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
        Paths relative to `root`; ``PATH@START-STOP`` is a part of a
        recording, in samples at its own rate.
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
                _collect(sets, plan.most, check, store),
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
            if any(n for (n,) in all_numbers((leaves,))):
                break
            if time.monotonic() - last > _SECONDS_BETWEEN_PARTS:
                save()
    finally:
        save()
    if problem is not None:
        raise problem
    return merge(done)
