"""The fused classifier with its classes spread over the ranks.

Data parallelism copies the classifier to every GPU, which ends where one GPU
is full: 10 million speakers of 512 dimensions are 20 GB of weights, as much
of gradients and twice that of Adam's moments. Here each rank holds a slice of
the classes (as partial FC does, An et al., 2021, but with all classes, hence
exact). A step gathers every rank's embeddings and labels, each rank compares
all of them with its own classes, and three vectors of one number a sample
are summed: the target's cosine, the log-sum-exp, the pull on the target.
``docs/many-speakers.md`` has the arithmetic.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from speechbrain_ram.fused import (
    FusedMarginClassifier,
    check_labels,
    margin_losses,
)


class ClassParallelClassifier(FusedMarginClassifier):
    """One rank's slice of a :class:`FusedMarginClassifier`.

    Rank r of W holds the classes from r C // W up to (r + 1) C // W. Its
    ``forward`` returns the mean loss over the samples of all ranks, the same
    number on each. The gradient on the weights is complete; the one on the
    embeddings is W times that of the mean, because DistributedDataParallel,
    which wraps the encoder, divides by W. The classifier itself must not be
    wrapped: its weights differ from rank to rank.

    Arguments
    ---------
    input_size, out_neurons, loss_fn, chunk_size, impl
        As :class:`FusedMarginClassifier`; out_neurons counts the classes of
        all ranks.
    group : torch.distributed.ProcessGroup
        The ranks; by default, all.

    Raises
    ------
    RuntimeError
        No process group was initialised.
    ValueError
        Fewer classes than ranks; in ``forward``, no targets, or labels out
        of range.
    """

    def __init__(
        self,
        input_size: int,
        out_neurons: int,
        loss_fn: torch.nn.Module,
        chunk_size: int | None = None,
        impl: str = "torch",
        group: dist.ProcessGroup | None = None,
    ):
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised. Is the script started "
                "by torchrun? One process needs FusedMarginClassifier only."
            )
        group = group if group is not None else dist.group.WORLD
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        if out_neurons < 2 * world:
            raise ValueError(
                f"out_neurons is {out_neurons} for {world} ranks, allowed is "
                "2 or more classes a rank."
            )
        start = rank * out_neurons // world
        stop = (rank + 1) * out_neurons // world
        super().__init__(input_size, stop - start, loss_fn, chunk_size, impl)
        self.n_classes = out_neurons
        self.first_class = start
        self.group = group
        # Ranks often share a seed, but must not share their classes.
        generator = torch.Generator()
        generator.manual_seed(int(torch.randint(2**31, ())) + rank)
        bound = (6 / (input_size + out_neurons)) ** 0.5  # Classifier's
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)

    def forward(
        self, embeddings: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mean loss over the samples of all ranks.

        Arguments
        ---------
        embeddings : torch.Tensor
            This rank's, shape [N, 1, E] or [N, E]; N may differ by rank.
        targets : torch.Tensor
            Class indices in [0, out_neurons), shape [N, 1] or [N].

        Returns
        -------
        torch.Tensor
            A scalar.
        """
        if targets is None:
            raise ValueError(
                "targets are needed: no rank holds the cosines of all "
                "classes. Verify with the embeddings, or export the weights "
                "of gather_weight()."
            )
        labels = targets.reshape(-1).long()
        if labels.device.type == "cpu":
            check_labels(labels, self.n_classes)
        embeddings = embeddings.reshape(len(labels), -1)
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            embeddings = F.normalize(embeddings)
            embeddings = _GatherSamples.apply(embeddings, self.group)
            return margin_losses(
                embeddings,
                self.weight,
                torch.cat(_gather(labels, self.group)),
                self.loss_fn,
                self.chunk_size,
                self.impl,
                self.first_class,
                self.group,
            ).mean()

    @torch.no_grad()
    def gather_weight(self) -> torch.Tensor:
        """All classes' weights, [out_neurons, E], for a ``classifier.ckpt``.

        Every rank must call it and gets the whole matrix.
        """
        return torch.cat(_gather(self.weight.detach(), self.group))


class _GatherSamples(torch.autograd.Function):
    """[N_r, E] of each rank -> [sum N_r, E]; each rank's slice gets gradients.

    A rank sees only its own classes, so gradients are summed over the ranks.
    """

    @staticmethod
    def forward(ctx, x, group):
        parts = _gather(x, group)
        rank = dist.get_rank(group)
        ctx.start = sum(len(part) for part in parts[:rank])
        ctx.length, ctx.group = len(x), group
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        mine = grad[ctx.start : ctx.start + ctx.length]
        return mine * dist.get_world_size(ctx.group), None


def _gather(tensor, group):
    """Each rank's tensor; they may differ in length, so ask that first."""
    world = dist.get_world_size(group)
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(world)]
    dist.all_gather(lengths, length, group=group)
    lengths = torch.cat(lengths).tolist()
    padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
