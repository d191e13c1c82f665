"""Batches that several processes share, each utterance once an epoch.

PyTorch's DistributedSampler repeats utterances until every process has as
many, or drops some, and SpeechBrain's wrapper deals whole batches. Here the
processes share every batch, so that a step of W processes with B utterances
each is the step of one process with W * B.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


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
        order = torch.randperm(self.n_items, generator=generator).tolist()
        for step in range(self.length):
            begin = step * self.joint_size
            last = step == self.length - 1
            end = None if last else begin + self.joint_size
            yield order[begin:end][self.rank :: self.world]


def shared_batches(
    n_items: int, batch_size: int, rank: int, world: int
) -> list[range]:
    """Batches in order, as many for each process; the last may be empty.

    Arguments
    ---------
    n_items : int
        Size of the dataset.
    batch_size : int
        Utterances of one process in one batch.
    rank, world : int
        This process, of so many.

    Returns
    -------
    list of range

    Example
    -------
    >>> [[list(b) for b in shared_batches(5, 2, r, 2)] for r in range(2)]
    [[[0, 2], [4]], [[1, 3], []]]
    """
    joint = batch_size * world
    return [
        range(n_items)[begin : begin + joint][rank::world]
        for begin in range(0, n_items, joint)
    ]
