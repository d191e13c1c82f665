"""Losses that go beyond the paper, tried in beyond.yaml and long_5994.yaml.

Each is a ``loss_fn`` as in ``speechbrain_ram.losses``, whose notation holds:
a is the target's logit after the margin, z_j how far class j breaks into it.
"""

from __future__ import annotations

import math

import torch

from speechbrain_ram.losses import RealAdditiveMargin

# Far below every logit, finite; as in speechbrain_ram.losses.
_DROPPED = 1e4


class OfManyClasses(RealAdditiveMargin):
    """A real margin whose gradient is that among `n_classes` classes.

    Those that the corpus lacks are satisfied throughout: with `paper` each
    adds 1 inside the logarithm, which thins the gradient of the others. The
    loss is lower than with so many classes by log(1 + the classes lacking).

    Arguments
    ---------
    margin, scale :
        As for :class:`speechbrain_ram.losses.RealAdditiveMargin`, form
        `paper`: only that one knows how many classes there are.
    n_classes : int
        At least as many as there are.

    Example
    -------
    >>> cosines = torch.tensor([[0.5, 0.1, 0.6]])
    >>> one_hot = torch.tensor([[1.0, 0.0, 0.0]])
    >>> OfManyClasses(0.2, 30, n_classes=3)(cosines, one_hot)
    tensor([[ 9.,  9., 18.]])
    """

    def __init__(self, margin: float, scale: float, n_classes: int):
        super().__init__(margin, scale, "paper")
        self.n_classes = n_classes

    def beyond_margin(self, logits, one_hot):
        """Logits [N, C] whose cross-entropy has the loss's gradient."""
        lacking = self.n_classes - logits.shape[1]
        logits = super().beyond_margin(logits, one_hot)
        return logits - math.log1p(lacking) * (1 - one_hot)


class WithClassesAtZero(torch.nn.Module):
    """A margin loss as among `n_classes` classes, the others at cosine 0.

    Those that the corpus lacks stand at right angles to every utterance, as
    nearly all classes do in many dimensions: each adds e^0 beside e^a inside
    the logarithm. `released` sets satisfied classes to that logit anyway.

    Arguments
    ---------
    loss_fn : torch.nn.Module
        As for :class:`speechbrain_ram.losses.RealMargin`, real or not.
    n_classes : int
        At least as many as there are.

    Example
    -------
    >>> cosines = torch.tensor([[0.5, 0.1]])
    >>> loss_fn = WithClassesAtZero(RealAdditiveMargin(0.2, 30, "released"), 3)
    >>> loss_fn(cosines, torch.tensor([[1.0, 0.0]]))  # log(e^0 + e^0)
    tensor([[9.0000, 0.6931]])
    """

    def __init__(self, loss_fn: torch.nn.Module, n_classes: int):
        super().__init__()
        self.loss_fn = loss_fn
        self.margin, self.scale = loss_fn.margin, loss_fn.scale
        self.n_classes = n_classes

    def forward(self, outputs, targets):
        """Logits [N, C] whose cross-entropy is the loss."""
        logits = self.loss_fn(outputs, targets)
        others = logits.shape[1] - 1
        lacking = self.n_classes - 1 - others
        if not others or not lacking:
            return logits
        # Shared out evenly: only the sum over the others matters.
        share = logits.new_tensor(lacking / others).log()
        return torch.where(targets > 0, logits, torch.logaddexp(logits, share))


class SoftEdgeMargin(RealAdditiveMargin):
    """`hinge` with a soft edge: log(1 + sum_j (e^{edge(z_j)} - 1)).

    edge(z) = log(1 + e^{sharpness z}) / sharpness. With sharpness 1 this is
    AM-Softmax, with more it comes near `hinge`.

    Arguments
    ---------
    margin, scale :
        As for :class:`speechbrain_ram.losses.RealAdditiveMargin`.
    sharpness : float
        At least 1.

    Example
    -------
    >>> cosines = torch.tensor([[0.5, 0.1, 0.6]])
    >>> one_hot = torch.tensor([[1.0, 0.0, 0.0]])
    >>> SoftEdgeMargin(0.2, 30, sharpness=1)(cosines, one_hot)
    tensor([[ 9.,  3., 18.]])
    """

    def __init__(self, margin: float, scale: float, sharpness: float):
        super().__init__(margin, scale, "hinge")
        self.sharpness = sharpness

    def beyond_margin(self, logits, one_hot):
        """Logits [N, C] whose cross-entropy is the loss."""
        target = (logits * one_hot).sum(dim=1, keepdim=True)
        # Further inside, a class has no weight that float32 could hold.
        z = (logits - target).clamp(min=-80 / self.sharpness)
        edge = torch.nn.functional.softplus(
            z, beta=self.sharpness, threshold=80
        )
        weight = edge + torch.log(-torch.expm1(-edge))  # log(e^edge - 1)
        return torch.where(one_hot > 0, logits, target + weight)


class HardestOnly(RealAdditiveMargin):
    """`hinge` on the `hardest` classes of each sample alone.

    Arguments
    ---------
    margin, scale :
        As for :class:`speechbrain_ram.losses.RealAdditiveMargin`.
    hardest : int
        How many of the other classes count.

    Example
    -------
    >>> cosines = torch.tensor([[0.5, 0.4, 0.6]])
    >>> one_hot = torch.tensor([[1.0, 0.0, 0.0]])
    >>> logits = HardestOnly(0.2, 30, hardest=1)(cosines, one_hot)
    >>> logits.argmin()  # class 1 violates the margin too
    tensor(1)
    """

    def __init__(self, margin: float, scale: float, hardest: int):
        super().__init__(margin, scale, "hinge")
        self.hardest = hardest

    def beyond_margin(self, logits, one_hot):
        """Logits [N, C] whose cross-entropy is the loss."""
        logits = super().beyond_margin(logits, one_hot)
        others = logits.detach() - 4 * _DROPPED * one_hot
        # The target comes last: with fewer others, all are kept.
        count = min(self.hardest, logits.shape[1])
        least = others.topk(count, dim=1).values[:, -1:]
        kept = (one_hot > 0) | (others >= least)
        target = (logits * one_hot).sum(dim=1, keepdim=True)
        return torch.where(kept, logits, target - _DROPPED)
