"""One chunk of classes of the fused loss, in plain PyTorch.

:mod:`speechbrain_ram.training.fused` walks over the classes and keeps the sums;
these functions compute what happens inside a chunk. They take

x : [N, E]
    length-normalised embeddings
w, norm : [B, E], [B]
    the chunk's weights and their lengths
own : [N]
    the column of each sample's own class, -1 where it is in another chunk
logit : [N]
    each sample's target logit a, after the margin
z : [N, B]
    s c - a, and -inf at a sample's own class
"""

from __future__ import annotations

import torch


def rivals(z, form, seen):
    """Write into `seen` [4, N]: max z; how many z > 0; two sums.

    log sum e^z and log sum e^2z over the classes with a gradient.
    """
    above = z > 0
    pulling = z if form == "trivial" else z.masked_fill(~above, -torch.inf)
    seen[0] = z.amax(dim=1)
    seen[1] = above.sum(dim=1)
    seen[2] = pulling.logsumexp(dim=1)
    seen[3] = (2 * pulling).logsumexp(dim=1)


def log_sum_exp(z, own, logit, form):
    """log sum_j e^{g(z_ij)} over j != y, [N], and who violates, [B].

    Overwrites z.
    """
    violated = z.new_ones(z.shape[1], dtype=torch.bool)
    if form != "trivial":
        violated = z.amax(dim=0) > 0
    if form == "paper":
        z.clamp_(min=0)
    elif form == "released":
        z = torch.where(z > 0, z, -logit.unsqueeze(1))
    elif form == "hinge":
        z.clamp_(min=0)
        z += torch.log(-torch.expm1(-z))  # log(e^z - 1), without overflow
    fill_own(z, own, -torch.inf)
    return z.logsumexp(dim=1), violated


def gradient(x, w, norm, own, logit, loss, grad_loss, scale, form):
    """The gradient on the products x w^T, [N, B]; its sums.

    Also sum_j grad_loss_i p_ij, [N], where p_ij = e^{z_ij - loss_i} on
    violating classes, and sum_i gradient_ij c_ij, [B].
    """
    z = excess(x, w, norm, logit, scale)
    p = (z - loss.unsqueeze(1)).exp_()
    if form != "trivial":
        p.masked_fill_(z <= 0, 0)
    fill_own(p, own, 0)
    p *= grad_loss.unsqueeze(1)
    pull = p.sum(dim=1)
    p *= scale / norm
    cosines = z.add_(logit.unsqueeze(1)).div_(scale)
    return p, pull, cosines.mul_(p).sum(dim=0)


def excess(x, w, norm, logit, scale):
    """z = s c - a, [N, B]."""
    return (x @ w.t()).mul_(scale / norm).sub_(logit.unsqueeze(1))


def fill_own(matrix, own, value):
    """Set each row's own column, where there is one, without a host sync."""
    column = own.clamp(min=0).unsqueeze(1)
    kept = matrix.gather(1, column)
    filled = kept.masked_fill((own >= 0).unsqueeze(1), value)
    matrix.scatter_(1, column, filled)
