"""One utterance a core, instead of several cores on one utterance.

PyTorch splits each operation among the cores. On one utterance they are so
small that the cores wait for each other; on utterances of their own they do
not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def n_threads(device: str | torch.device, asked: int | None = None) -> int:
    """How many threads should compute.

    Arguments
    ---------
    device : str or torch.device
        Where the computing is done.
    asked : int, optional
        What the caller wants; by default, on a CPU as many as PyTorch uses
        for one operation, elsewhere one.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        Fewer than one was asked for.

    Example
    -------
    >>> n_threads("cuda:0"), n_threads("cpu", 3)
    (1, 3)
    """
    if asked is None:
        import torch

        on_cpu = torch.device(device).type == "cpu"
        return torch.get_num_threads() if on_cpu else 1
    if asked < 1:
        raise ValueError(f"threads is {asked}, allowed is 1 or more.")
    return asked


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """`map`, in order, where each call has a core to itself.

    Arguments
    ---------
    work : callable
        May be called by several threads at once. PyTorch's own threads are
        one in each of them.
    items : iterable
        Taken only a few ahead of the results.
    threads : int
        With 1, this is `map`.

    Returns
    -------
    iterator
        Of results. The first error ends it.

    Example
    -------
    >>> list(in_threads(abs, [-2, 1, -3], threads=2))
    [2, 1, 3]
    """
    if threads == 1:
        yield from map(work, items)
        return
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        threads, initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        with pool:
            yield from ahead(pool, work, items, depth=threads + 1)
    finally:
        torch.set_num_threads(before)  # new threads would start with 1


def ahead(
    pool: Executor,
    work: Callable[[Item], Result],
    items: Iterable[Item],
    depth: int = 4,
) -> Iterator[Result]:
    """`map` that works at most `depth` items ahead of the consumer."""
    todo = iter(items)
    waiting = [pool.submit(work, item) for item in islice(todo, depth)]
    try:
        while waiting:
            done = waiting.pop(0).result()
            waiting += [pool.submit(work, item) for item in islice(todo, 1)]
            yield done
    finally:  # where the consumer left early
        for one in waiting:
            one.cancel()
