"""One chunk of classes of the fused loss, in plain PyTorch.

:mod:`speechbrain_ram.training.fused` walks over the classes and keeps the sums; what
happens inside a chunk is in these two functions. Both take

x : [N, E]
    length-normalised embeddings
w, norm : [B, E], [B]
    the chunk's weights and their lengths
own : [N]
    the column of each sample's own class, -1 where it is in another chunk
logit : [N]
    each sample's target logit a, after the margin
"""

from __future__ import annotations

import torch


def log_sum_exp(x, w, norm, own, logit, scale, form):
    """log sum_j e^{g(z_ij)} over j != y, [N], and who violates, [B]."""
    z = _excess(x, w, norm, logit, scale)
    if form == "trivial":
        violated = torch.ones_like(norm, dtype=torch.bool)
    else:
        _fill_own(z, own, -torch.inf)
        violated = z.amax(dim=0) > 0
    if form == "paper":
        z.clamp_(min=0)
    elif form == "released":
        z = torch.where(z > 0, z, -logit.unsqueeze(1))
    elif form == "hinge":
        z.clamp_(min=0)
        z += torch.log(-torch.expm1(-z))  # log(e^z - 1), without overflow
    _fill_own(z, own, -torch.inf)
    return z.logsumexp(dim=1), violated


def gradient(x, w, norm, own, logit, loss, grad_loss, scale, form):
    """The gradient on the products x w^T, [N, B]; its sums.

    Also sum_j grad_loss_i p_ij, [N], where p_ij = e^{z_ij - loss_i} on
    violating classes, and sum_i gradient_ij c_ij, [B].
    """
    z = _excess(x, w, norm, logit, scale)
    p = (z - loss.unsqueeze(1)).exp_()
    if form != "trivial":
        p.masked_fill_(z <= 0, 0)
    _fill_own(p, own, 0)
    p *= grad_loss.unsqueeze(1)
    pull = p.sum(dim=1)
    p *= scale / norm
    cosines = z.add_(logit.unsqueeze(1)).div_(scale)
    return p, pull, cosines.mul_(p).sum(dim=0)


def _excess(x, w, norm, logit, scale):
    """z = s c - a, [N, B]."""
    return (x @ w.t()).mul_(scale / norm).sub_(logit.unsqueeze(1))


def _fill_own(matrix, own, value):
    """Set each row's own column, where there is one, without a host sync."""
    column = own.clamp(min=0).unsqueeze(1)
    kept = matrix.gather(1, column)
    filled = kept.masked_fill((own >= 0).unsqueeze(1), value)
    matrix.scatter_(1, column, filled)
