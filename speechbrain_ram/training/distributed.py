"""An epoch's sums over processes, and modules without their wrapper."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Imported before there is a group: its functions would take one as a default,
# and hold it.
import torch.distributed.nn
import torch.distributed.nn.functional as differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from speechbrain_ram.utils import gathered, n_processes


@dataclasses.dataclass
class Tally:
    """What the steps of an epoch add up to, on this process.

    `loss_sum` is over utterances, `grad_norm` over steps and the same on all
    processes.
    """

    n_right: int = 0
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
        return 100 * self.n_right / max(self.n_seen, 1)

    def joint(self) -> Tally:
        """Give the sums over all processes, which must all call this."""
        total = Tally(n_steps=self.n_steps, grad_norm=self.grad_norm)
        for each in gathered(self):
            total.n_right += each.n_right
            total.n_seen += each.n_seen
            total.loss_sum += each.loss_sum
        return total


@contextmanager
def without_ddp(modules: torch.nn.ModuleDict) -> Iterator[None]:
    """Call the modules inside DistributedDataParallel for a while.

    The wrapper sends buffers in evaluation too, and would wait for processes
    that have nothing to evaluate.
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


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    module = getattr(module, "module", module)
    return getattr(module, "_orig_mod", module)


# -- The state of every random generator that training may draw from ----------


def random_state() -> dict:
    """The state of Python's, numpy's and torch's generators.

    Numbers and tensors only, for ``torch.load(weights_only=True)``.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict) -> None:
    """Set every generator to a state from :func:`random_state`."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# -- Batches that several processes share, each utterance once an epoch -------
#
# PyTorch's DistributedSampler repeats utterances until every process has as
# many, or drops some, and SpeechBrain's wrapper deals whole batches. Here the
# processes share every batch, so that a step of W processes with B utterances
# each is the step of one process with W * B.


class JointBatchSampler(Sampler):
    """Shuffled batches as a function of (seed, epoch) alone.

    The order is the one of SpeechBrain's ReproducibleRandomSampler. The last
    batch is shorter; where it would leave a process with fewer than two
    utterances, which batch normalisation needs, it joins the one before it.

    Arguments
    ---------
    n_items : int
        Size of the dataset.
    batch_size : int
        Utterances of one process in one batch.
    seed : int
        Of the order.
    rank, world : int
        This process, of so many.

    Example
    -------
    >>> sampler = JointBatchSampler(9, batch_size=4)
    >>> [len(batch) for batch in sampler]
    [4, 5]
    >>> shares = [JointBatchSampler(11, 2, 0, r, 2) for r in range(2)]
    >>> sorted(i for share in shares for batch in share for i in batch)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    """

    def __init__(
        self,
        n_items: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size < 1 or n_items < 2 * world:
            raise ValueError(
                f"{n_items} utterances in batches of {batch_size} for {world} "
                "processes: every process needs two utterances or more."
            )
        self.n_items = n_items
        self.joint_size = batch_size * world
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        full, rest = divmod(n_items, self.joint_size)
        self.length = max(full + (rest >= 2 * world), 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.n_items, generator=generator)
        for step in range(self.length):
            begin = step * self.joint_size
            last = step == self.length - 1
            end = None if last else begin + self.joint_size
            yield order[begin:end][self.rank :: self.world].tolist()


def shared_batches(
    n_items: int, batch_size: int, rank: int, world: int
) -> list[range]:
    """Batches in order, as many for each process; the last may be empty."""
    joint = batch_size * world
    return [
        range(n_items)[begin : begin + joint][rank::world]
        for begin in range(0, n_items, joint)
    ]


# -- Batch normalisation over all processes, on CPUs too ----------------------
#
# ``torch.nn.SyncBatchNorm`` refuses CPU tensors, and SpeechBrain converts every
# model to it as soon as there are several processes. This one computes mean and
# variance over the joint batch with two differentiable sums, which gloo has.


class CPUSyncBatchNorm(_NormBase):
    """Batch normalisation whose statistics are those of the joint batch.

    Input [B, C, ...] of any number of dimensions. Parameters, buffers and
    their names are those of the layer that it replaces. It does not inherit
    from torch's classes, which SpeechBrain would convert.
    """

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Normalise a batch [B, C, ...] of this process."""
        if not self.training:
            return functional.batch_norm(
                batch,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                eps=self.eps,
            )
        dims = [0, *range(2, batch.dim())]
        shape = [1, -1] + [1] * (batch.dim() - 2)
        half = batch.dtype in (torch.bfloat16, torch.float16)
        values = batch.float() if half else batch
        ones = values.new_full((1,), values.numel() / values.size(1))
        sums = torch.cat([values.sum(dims), ones])
        sums = differentiable.all_reduce(sums)
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        # Of the deviations, not of the squares: no cancellation.
        deviations = values - mean.view(shape)
        variance = differentiable.all_reduce((deviations**2).sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        out = deviations * scale.view(shape) + self.bias.view(shape)
        return out.to(batch.dtype)


def sync_batch_norm(module: torch.nn.Module) -> torch.nn.Module:
    """Replace every batch normalisation of a module by the one above.

    In place, unless the module is itself a batch normalisation.
    """
    if isinstance(module, _BatchNorm):
        new = CPUSyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine
        )
        new.load_state_dict(module.state_dict())
        return new.to(module.running_mean)  # its device and number type
    for name, child in module.named_children():
        setattr(module, name, sync_batch_norm(child))
    return module


def wrap(
    modules: torch.nn.ModuleDict,
    device: torch.device | str,
    joint_statistics: bool,
    find_unused_parameters: bool = False,
) -> None:
    """Put what is trained into DistributedDataParallel, in place.

    As SpeechBrain does, but that CPUs have a joint batch normalisation too,
    that it can be left out, and that buffers are not sent in every forward
    pass: joint statistics are the same on all processes as it is.
    """
    on_cpu = torch.device(device).type == "cpu"
    for name, module in modules.items():
        if joint_statistics and on_cpu:
            module = sync_batch_norm(module)
        elif joint_statistics:
            module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
        if any(each.requires_grad for each in module.parameters()):
            module = DistributedDataParallel(
                module,
                device_ids=None if on_cpu else [device],
                broadcast_buffers=False,
                find_unused_parameters=find_unused_parameters,
            )
        modules[name] = module


def average_buffers(modules: torch.nn.ModuleDict) -> None:
    """Give all processes the mean of their running statistics."""
    if n_processes() == 1:
        return
    floats = [b for b in modules.buffers() if b.is_floating_point()]
    for buffer in floats:
        torch.distributed.all_reduce(buffer)
        buffer /= n_processes()
