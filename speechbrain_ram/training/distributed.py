"""An epoch's sums over processes, and modules without their wrapper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Its functions take the group that exists when it is first imported as a
# default, and then hold it: that must be before there is one.
import torch.distributed.nn
from torch.nn.parallel import DistributedDataParallel

from speechbrain_ram.processes import gathered


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
