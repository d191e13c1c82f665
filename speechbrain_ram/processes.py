"""What several processes tell each other; with one, nothing is sent."""

from __future__ import annotations

from typing import Any

import torch
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
