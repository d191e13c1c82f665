"""One chunk of classes of the fused loss, and the targets, in plain PyTorch.

:mod:`speechbrain_ram.training.fused` walks over the classes and keeps the sums;
these functions compute what happens inside a chunk. They take

x : [N, E]
    length-normalised embeddings
w, norm : [B K, E], [B K]
    the rows of the chunk's B classes, K each, and their lengths
own : [N]
    the column of each sample's own class, -1 where it is in another chunk
logit : [N]
    each sample's target logit a, after the margin
z : [N, B]
    s c - a, and -inf at a sample's own class
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_NORM_FLOOR = 1e-12  # F.normalize's, so that a zero row means the same here


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


def gradient(x, w, norm, own, logit, loss, grad_loss, scale, form, centers):
    """The gradient on the products x w^T, [N, B K]; its sums.

    Also sum_j grad_loss_i p_ij, [N], where p_ij = e^{z_ij - loss_i} on
    violating classes, and sum_i gradient_ij c_ij, [B K].
    """
    of_rows = excess(x, w, norm, logit, scale)
    z, row = nearest(of_rows, centers)
    p = (z - loss.unsqueeze(1)).exp_()
    if form != "trivial":
        p.masked_fill_(z <= 0, 0)
    fill_own(p, own, 0)
    p *= grad_loss.unsqueeze(1)
    pull = p.sum(dim=1)
    if row is not None:
        p = torch.zeros_like(of_rows).scatter_(1, row, p)
    p *= scale / norm
    cosines = of_rows.add_(logit.unsqueeze(1)).div_(scale)
    return p, pull, cosines.mul_(p).sum(dim=0)


def nearest(of_rows, centers):
    """Largest of each class's `centers` columns, [N, B], and where it is.

    The places are None where classes have one row.
    """
    if centers == 1:
        return of_rows, None
    largest, which = of_rows.unflatten(1, (-1, centers)).max(dim=2)
    first = torch.arange(0, of_rows.shape[1], centers, device=of_rows.device)
    return largest, which.add_(first)


def excess(x, w, norm, logit, scale):
    """s c - a of each row, [N, B K]: z, where classes have one row."""
    return (x @ w.t()).mul_(scale / norm).sub_(logit.unsqueeze(1))


def fill_own(matrix, own, value):
    """Set each row's own column, where there is one, without a host sync."""
    column = own.clamp(min=0).unsqueeze(1)
    kept = matrix.gather(1, column)
    filled = kept.masked_fill((own >= 0).unsqueeze(1), value)
    matrix.scatter_(1, column, filled)


def own_column(ids, labels):
    """Where each label stands in the sorted class ids, -1 if nowhere."""
    column = torch.searchsorted(ids, labels).clamp_(max=len(ids) - 1)
    return torch.where(ids[column] == labels, column, -1)


def class_ids(rows, labels):
    """Class indices of a block, which is a slice or already a tensor."""
    if isinstance(rows, slice):
        return torch.arange(rows.start, rows.stop, device=labels.device)
    return rows


def slices(length, chunk):
    """Blocks of `chunk` classes, the last one perhaps shorter."""
    return [
        slice(start, min(start + chunk, length))
        for start in range(0, length, chunk)
    ]


def sub_centers_of(weight):
    """K of weights [C, E] or [C, K, E]."""
    return weight.shape[1] if weight.ndim == 3 else 1


def target_rows(x, weight, labels):
    """The row of the flat weights that is the label's nearest to x, [N]."""
    centers = sub_centers_of(weight)
    if centers == 1:
        return labels
    rows = F.normalize(weight[labels].to(x.dtype), dim=2)  # [N, K, E]
    which = (rows @ x.unsqueeze(2)).squeeze(2).argmax(dim=1)
    return labels * centers + which


def target_units(flat, target, dtype):
    """Directions of the targets' rows, [N, E], and their lengths, [N, 1]."""
    rows = flat[target].to(dtype)
    norm = lengths(rows).unsqueeze(1)
    return rows / norm, norm


def lengths(w):
    """Lengths of the rows in the last dimension, above 0."""
    return torch.linalg.vector_norm(w, dim=-1).clamp(min=_NORM_FLOOR)


def target_logit(loss_fn, cosine):
    """a(c_y) and its derivative: the loss_fn of a target without rivals."""
    with torch.enable_grad():
        cosine = cosine.detach().unsqueeze(1).requires_grad_()
        logit = loss_fn(cosine, torch.ones_like(cosine))
        (slope,) = torch.autograd.grad(logit.sum(), cosine)
    return logit.detach().squeeze(1), slope.squeeze(1)
