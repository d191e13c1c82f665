"""What several processes tell each other; with one, nothing is sent."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

# Its functions take the group that exists when it is first imported as a
# default, and then hold it: that must be before there is one.
import torch.distributed.nn
from speechbrain.utils.distributed import (
    if_main_process,
    is_distributed_initialized,
)
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")


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
    return together(lambda: work() if if_main_process() else None)[0]


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


@dataclasses.dataclass
class Tally:
    """What the steps of an epoch add up to, on this process.

    Arguments
    ---------
    n_right : int or torch.Tensor
        Right answers; a tensor stays on its device until the end.
    n_seen : int
        Utterances.
    loss_sum : float
        Sum of their losses.
    n_steps : int
        Optimiser steps.
    grad_norm : float
        Sum of the gradients' norms, the same on all processes.
    """

    n_right: int | torch.Tensor = 0
    n_seen: int = 0
    loss_sum: float = 0.0
    n_steps: int = 0
    grad_norm: float = 0.0

    @property
    def loss(self) -> float:
        """The mean of the losses, NaN where there is none."""
        return self.loss_sum / self.n_seen if self.n_seen else math.nan

    @property
    def accuracy(self) -> float:
        """Right answers in percent."""
        return 100 * int(self.n_right) / max(self.n_seen, 1)

    def joint(self) -> Tally:
        """Give the sums over all processes, which must all call this."""
        mine = dataclasses.replace(self, n_right=int(self.n_right))
        total = Tally(n_steps=mine.n_steps, grad_norm=mine.grad_norm)
        for each in gathered(mine):
            total.n_right += each.n_right
            total.n_seen += each.n_seen
            total.loss_sum += each.loss_sum
        return total


@contextmanager
def without_ddp(modules: torch.nn.ModuleDict) -> Iterator[None]:
    """Call the modules inside DistributedDataParallel for a while.

    The wrapper sends buffers in every forward pass, in evaluation too, and
    would wait for processes that have nothing to evaluate.
    """
    wrapped = {
        name: module
        for name, module in modules.items()
        if isinstance(module, DistributedDataParallel)
    }
    modules.update({name: each.module for name, each in wrapped.items()})
    try:
        yield
    finally:
        modules.update(wrapped)


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
