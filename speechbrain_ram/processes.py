"""What several processes tell each other; with one, nothing is sent."""

from __future__ import annotations

import gc
from typing import Any

import torch

# Its functions take the group that exists when it is first imported as a
# default, and then hold it: that must be before there is one.
import torch.distributed.nn
from speechbrain.utils.distributed import is_distributed_initialized


def n_processes() -> int:
    """How many processes train together.

    Example
    -------
    >>> n_processes()
    1
    """
    if not is_distributed_initialized():
        return 1
    return torch.distributed.get_world_size()


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
    torch.distributed.all_gather_object(everything, mine)
    return everything


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
    if is_distributed_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
