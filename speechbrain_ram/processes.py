"""What several processes tell each other; with one, nothing is sent."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


def n_processes() -> int:
    """How many processes train together.

    Example
    -------
    >>> n_processes()
    1
    """
    group = _group()
    return group.get_world_size() if group else 1


def _group():
    """`torch.distributed` where there is a group; torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return None
    return torch.distributed if torch.distributed.is_initialized() else None


def gathered(mine: Any) -> list:
    """Collect a picklable object of every process; all must call this.

    Arguments
    ---------
    mine : object
        Of this process.

    Returns
    -------
    list
        By rank.

    Example
    -------
    >>> gathered("a")
    ['a']
    """
    if n_processes() == 1:
        return [mine]
    everything = [None] * n_processes()
    _group().all_gather_object(everything, mine)
    return everything


def together(work: Callable[[], Result]) -> list[Result]:
    """Do a piece of work on every process; all must call this.

    An error on one process is an error on all of them, so that none waits
    for one that has left.

    Arguments
    ---------
    work : callable
        Its result, and what it raises, must be picklable.

    Returns
    -------
    list
        The results by rank.

    Example
    -------
    >>> together(lambda: 3)
    [3]
    """
    if n_processes() == 1:
        return [work()]
    mine = problem = None
    try:
        mine = work()
    except (Exception, SystemExit) as error:
        problem = error
    outcomes = gathered((mine, problem))
    for rank, (_, error) in enumerate(outcomes):
        if error is None:
            continue
        if not isinstance(error, SystemExit):  # its argument is the status
            error.args = (f"Rank {rank} failed: {error}",)
        raise error from problem
    return [result for result, _ in outcomes]


def of_rank_0(work: Callable[[], Result]) -> Result:
    """What `work` returns, or raises, on rank 0; all must call this.

    Arguments
    ---------
    work : callable
        Called on rank 0 only.

    Example
    -------
    >>> of_rank_0(lambda: "the first's word")
    "the first's word"
    """
    group = _group()
    first = not group or group.get_rank() == 0
    return together(lambda: work() if first else None)[0]


def all_numbers(
    mine: tuple[int, ...], device: str | torch.device = "cpu"
) -> list[tuple[int, ...]]:
    """Collect some whole numbers of every process, faster than objects.

    Arguments
    ---------
    mine : tuple of int
        Of this process, as many on each.
    device : str or torch.device
        Where the backend sends from.

    Returns
    -------
    list of tuple of int
        By rank.

    Example
    -------
    >>> all_numbers((1, 2))
    [(1, 2)]
    """
    if n_processes() == 1:
        return [mine]
    import torch

    tensor = torch.tensor(mine, device=device)
    parts = [torch.empty_like(tensor) for _ in range(n_processes())]
    torch.distributed.all_gather(parts, tensor)
    return [tuple(part.tolist()) for part in parts]


def leave_group() -> None:
    """Let go of the other processes, as the last thing of a script.

    Gloo's threads end with the last reference to the group. If Python ends
    before them, the process can abort when all its work is done, and torchrun
    takes that for a failure. Models in DistributedDataParallel refer to the
    group: they must be out of scope.

    Example
    -------
    >>> leave_group()  # one process: nothing to let go of
    """
    if group := _group():
        gc.collect()
        group.destroy_process_group()
