"""One chunk of classes of the fused loss, as Triton kernels for CUDA.

Same two functions, arguments and results as
:mod:`speechbrain_ram.fused_torch`. There, a chunk's logits go through memory
about ten times, once for every elementwise step, which on a GPU takes longer
than the product that made them. Here one kernel makes a tile of cosines and
reduces it before it leaves the chip; only the gradient of the products is
written out, once, for the two matrix products that cuBLAS does best.

Tiles write their partial sums side by side, no atomics: results do not change
from run to run. These kernels were tested in Triton's interpreter
(``TRITON_INTERPRET=1``) on a CPU and have not yet run on a GPU; that is why
``impl="torch"`` is the default.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# No register spills for compute capability 9.0, by ptxas; not yet timed.
_TILE_N, _TILE_B, _TILE_E = 128, 128, 32
_WARPS = 8


def log_sum_exp(x, w, norm, own, logit, scale, form):
    """log sum_j e^{g(z_ij)} over j != y, [N], and who violates, [B]."""
    x, w, grid = _prepare(x, w)
    log_sums = x.new_empty(len(x), grid[1])
    violated = norm.new_empty(grid[0], len(w), dtype=torch.int8)
    _log_sum_exp_kernel[grid](
        x, w, norm, own, logit, log_sums, violated,
        len(x), len(w), grid[1], scale,
        E=x.shape[1], FORM=form, PRECISION=_precision(),
        TN=_TILE_N, TB=_TILE_B, TE=_TILE_E, num_warps=_WARPS,
    )  # fmt: skip
    return log_sums.logsumexp(dim=1), violated.any(dim=0)


def gradient(x, w, norm, own, logit, loss, grad_loss, scale, form):
    """The gradient on the products x w^T, [N, B]; its sums."""
    x, w, grid = _prepare(x, w)
    grad_dot = x.new_empty(len(x), len(w))
    pull = x.new_empty(len(x), grid[1])
    radial = x.new_empty(grid[0], len(w))
    _gradient_kernel[grid](
        x, w, norm, own, logit, loss, grad_loss.contiguous(),
        grad_dot, pull, radial,
        len(x), len(w), grid[1], scale,
        E=x.shape[1], FORM=form, PRECISION=_precision(),
        TN=_TILE_N, TB=_TILE_B, TE=_TILE_E, num_warps=_WARPS,
    )  # fmt: skip
    return grad_dot, pull.sum(dim=1), radial.sum(dim=0)


def _prepare(x, w):
    if x.dtype != torch.float32:
        raise TypeError(
            f"impl='triton' computes in float32, got {x.dtype}; "
            "impl='torch' takes float64."
        )
    grid = (triton.cdiv(len(x), _TILE_N), triton.cdiv(len(w), _TILE_B))
    return x.contiguous(), w.contiguous(), grid


def _precision():
    """Tensor cores only where the user let PyTorch use them too."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def _excess(
    x_ptr, w_ptr, norm_ptr, own_ptr, logit_ptr, n, b, scale,
    E: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TB: tl.constexpr, TE: tl.constexpr,
):  # fmt: skip
    """A tile of z = s c - a [TN, TB], its target logits and its rivals."""
    rows = tl.program_id(0) * TN + tl.arange(0, TN)
    columns = tl.program_id(1) * TB + tl.arange(0, TB)
    row_in, column_in = rows < n, columns < b
    # An index [rows, E] can pass 2^31 for a few million classes.
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * E
    w_rows = w_ptr + columns.to(tl.int64)[:, None] * E
    dot = tl.zeros((TN, TB), dtype=tl.float32)
    for start in range(0, E, TE):
        inner = start + tl.arange(0, TE)
        inner_in = (inner < E)[None, :]
        x = tl.load(x_rows + inner[None, :], row_in[:, None] & inner_in, 0.0)
        w = tl.load(w_rows + inner[None, :], column_in[:, None] & inner_in, 0.0)
        dot = tl.dot(x, tl.trans(w), dot, input_precision=PRECISION)
    norm = tl.load(norm_ptr + columns, column_in, 1.0)
    logit = tl.load(logit_ptr + rows, row_in, 0.0)
    own = tl.load(own_ptr + rows, row_in, -1)
    rival = row_in[:, None] & column_in[None, :]
    rival = rival & (own[:, None] != columns[None, :])
    z = dot * (scale / norm)[None, :] - logit[:, None]
    return z, norm, logit, rival, rows, columns, row_in, column_in


@triton.jit
def _log_sum_exp_kernel(
    x_ptr, w_ptr, norm_ptr, own_ptr, logit_ptr, log_sum_ptr, violated_ptr,
    n, b, tiles, scale,
    E: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TB: tl.constexpr, TE: tl.constexpr,
):  # fmt: skip
    z, _, logit, rival, rows, columns, row_in, column_in = _excess(
        x_ptr, w_ptr, norm_ptr, own_ptr, logit_ptr, n, b, scale,
        E, PRECISION, TN, TB, TE,
    )  # fmt: skip
    violates = rival
    weight = tl.full((TN, TB), 1.0, tl.float32)
    if FORM != "trivial":
        violates = rival & (z > 0)
    if FORM == "paper":
        z = tl.maximum(z, 0.0)
    elif FORM == "released":
        z = tl.where(z > 0, z, -logit[:, None])
    elif FORM == "hinge":
        z = tl.maximum(z, 0.0)
        # 1 - e^-z; the series where the subtraction would cancel.
        series = z * (1 - z / 2 * (1 - z / 3 * (1 - z / 4 * (1 - z / 5))))
        weight = tl.where(z < 0.1, series, 1 - tl.exp(-z))
    z = tl.where(rival, z, -1e30)  # exp() of the own column could overflow
    largest = tl.max(z, 1)
    terms = tl.where(rival, weight * tl.exp(z - largest[:, None]), 0.0)
    total = tl.sum(terms, 1)
    log_sum = largest + tl.log(tl.maximum(total, 1e-38))
    log_sum = tl.where(total > 0, log_sum, float("-inf"))
    tile = rows.to(tl.int64) * tiles + tl.program_id(1)
    tl.store(log_sum_ptr + tile, log_sum, row_in)
    any_violates = tl.max(violates.to(tl.int32), 0).to(tl.int8)
    place = tl.program_id(0).to(tl.int64) * b + columns
    tl.store(violated_ptr + place, any_violates, column_in)


@triton.jit
def _gradient_kernel(
    x_ptr, w_ptr, norm_ptr, own_ptr, logit_ptr, loss_ptr, grad_ptr,
    grad_dot_ptr, pull_ptr, radial_ptr,
    n, b, tiles, scale,
    E: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TB: tl.constexpr, TE: tl.constexpr,
):  # fmt: skip
    z, norm, logit, rival, rows, columns, row_in, column_in = _excess(
        x_ptr, w_ptr, norm_ptr, own_ptr, logit_ptr, n, b, scale,
        E, PRECISION, TN, TB, TE,
    )  # fmt: skip
    counts = rival
    if FORM != "trivial":
        counts = rival & (z > 0)
    loss = tl.load(loss_ptr + rows, row_in, 0.0)
    grad_loss = tl.load(grad_ptr + rows, row_in, 0.0)
    # Masked before exp(): z - loss can be large on the sample's own column.
    p = tl.exp(tl.where(counts, z - loss[:, None], -1e30)) * grad_loss[:, None]
    tile = rows.to(tl.int64) * tiles + tl.program_id(1)
    tl.store(pull_ptr + tile, tl.sum(p, 1), row_in)
    grad_dot = p * (scale / norm)[None, :]
    radial = tl.sum(grad_dot * ((z + logit[:, None]) / scale), 0)
    place = tl.program_id(0).to(tl.int64) * b + columns
    tl.store(radial_ptr + place, radial, column_in)
    out = rows.to(tl.int64)[:, None] * b + columns[None, :]
    tl.store(grad_dot_ptr + out, grad_dot, row_in[:, None] & column_in[None, :])
