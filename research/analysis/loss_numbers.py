"""The numbers of docs/loss-analysis.md, from the package's own losses.

Everything is float64 and computed by automatic differentiation of what
training runs; the formulas of the page are what the tests compare it with.
The target is class 0 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from speechbrain_ram.losses import make_objective

#: Name in tables and legends -> objective and form.
OBJECTIVES = {
    "softmax": ("softmax", "paper"),
    "AM": ("am", "paper"),
    "paper": ("ram", "paper"),
    "released": ("ram", "released"),
    "hinge": ("ram", "hinge"),
}
MARGIN, SCALE = 0.2, 30.0
VOXCELEB2 = 5994  # speakers of its development set, the paper's classes


def loss_and_gradient(
    name: str,
    cosines: torch.Tensor,
    margin: float = MARGIN,
    scale: float = SCALE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [N], and its derivative by the logits s c_j, [N, C].

    Arguments
    ---------
    name : str
        A key of OBJECTIVES.
    cosines : torch.Tensor
        Shape [N, C], float64, the target's first.
    margin, scale : float
        m and s; softmax takes no margin. For AM a margin below 0 is allowed.
    """
    objective, form = OBJECTIVES[name]
    one_hot = torch.zeros_like(cosines)
    one_hot[:, 0] = 1
    shift = 0.0
    if objective == "am" and margin < 0:  # the package refuses it, maths not
        margin, shift = 0.0, -margin
    loss_fn = make_objective(objective, margin, scale, form)
    cosines = cosines.detach().requires_grad_()
    logits = loss_fn(cosines + shift * one_hot, one_hot)
    loss = F.cross_entropy(
        logits, torch.zeros(len(cosines), dtype=torch.long), reduction="none"
    )
    (gradient,) = torch.autograd.grad(loss.sum(), cosines)
    return loss.detach(), gradient / scale


def crowd(n: int, spread: float = 0.1) -> torch.Tensor:
    """Cosines of n other classes: the quantiles of N(0, spread^2)."""
    steps = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.from_numpy(norm.ppf(steps.numpy())) * spread


def sample(
    target: float | torch.Tensor, others: float | torch.Tensor
) -> torch.Tensor:
    """Cosines [N, C] of samples that differ in the target's cosine only."""
    target = torch.as_tensor(target, dtype=torch.float64).reshape(-1, 1)
    others = torch.as_tensor(others, dtype=torch.float64).reshape(1, -1)
    return torch.cat([target, others.expand(len(target), -1)], dim=1)


def excess(
    cosines: torch.Tensor, margin: float = MARGIN, scale: float = SCALE
) -> torch.Tensor:
    """z_j = s (c_j - c_y + m) of the other classes, [N, C - 1]."""
    return scale * (cosines[:, 1:] - cosines[:, :1] + margin)


def truncated_am_gradient(
    cosines: torch.Tensor, margin: float, scale: float = SCALE
) -> torch.Tensor:
    """Gradient of AM over the violating classes, margin m - ln(C - V)/s.

    The page claims that this *is* the gradient of form ``paper``.
    """
    z = excess(cosines, margin, scale)
    violates = z > 0
    kept = 1 + (~violates).sum(dim=1, keepdim=True)  # C - V
    weight = torch.where(violates, z - kept.double().log(), -math.inf).exp()
    weight = weight / (1 + weight.sum(dim=1, keepdim=True))
    return torch.cat([-weight.sum(dim=1, keepdim=True), weight], dim=1)


def batch(
    n_classes: int, mean_target: float, n: int = 64, spread: float = 0.1
) -> torch.Tensor:
    """Random cosines [n, C]: targets about a mean, the others about 0."""
    generator = torch.Generator().manual_seed(1986)
    cosines = torch.randn(
        n, n_classes, generator=generator, dtype=torch.float64
    )
    cosines = cosines * spread
    cosines[:, 0] += mean_target
    return cosines.clamp(-1, 1)


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """|first - second| / |second|, over the whole batch."""
    return float((first - second).norm() / second.norm())


def nearest_am_margin(cosines: torch.Tensor, gradient: torch.Tensor) -> float:
    """The AM margin whose gradient is nearest to a given one."""

    def distance(margin: float) -> float:
        return difference(loss_and_gradient("AM", cosines, margin)[1], gradient)

    return float(minimize_scalar(distance, bounds=(-0.6, 1.2)).x)


# -- the tables -----------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def smallest_example() -> str:
    """One sample, all classes separated: where the three texts differ."""
    rows = []
    for n_classes in (2, VOXCELEB2):
        cosines = sample(0.4, torch.full((n_classes - 1,), 0.1))
        for name in ("AM", "paper", "released", "hinge"):
            loss, gradient = loss_and_gradient(name, cosines)
            pull = gradient[0, 0].abs()
            rows.append(
                [name, f"{n_classes:,}", f"{loss.abs()[0]:.4f}", f"{pull:.4f}"]
            )
    return markdown(["loss", "C", "value", "pull on the target"], rows)


def approximations() -> str:
    """Equations 8 and 11 against log(1 + x), and where real samples are."""
    rows = []
    for s, m, c_y, n_classes in (
        (1, 0.0, 1.0, 10),
        (1, 0.2, 1.0, VOXCELEB2),
        (30, 0.2, 0.9, VOXCELEB2),
        (30, 0.2, 0.7, VOXCELEB2),
        (30, 0.2, 0.6, VOXCELEB2),
        (30, 0.2, 0.5, VOXCELEB2),
        (30, 0.2, 0.3, VOXCELEB2),
    ):
        cosines = sample(c_y, crowd(n_classes - 1))
        x = float(excess(cosines, m, s).exp().sum())
        exact = float(loss_and_gradient("AM", cosines, m, s)[0])
        rows.append(
            [
                f"s = {s}, m = {m}, C = {n_classes:,}, c_y = {c_y}",
                f"{x:.3g}",
                f"{exact:.4g}",
                f"{x:.4g} ({_error(x, exact)})",
                f"{math.log(x):.4g} ({_error(math.log(x), exact)})",
            ]
        )
    return markdown(["sample", "x", "exact", "(8): x", "(11): ln x"], rows)


def _error(value: float, exact: float) -> str:
    """Relative, in percent where that says something."""
    error = 100 * (value / exact - 1)
    return f"{error:+.1f} %" if abs(error) < 1000 else "useless"


def easy_share() -> str:
    """Of AM's gradient mass, how much lands on satisfied classes."""
    margins = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7)
    rows = []
    for c_y in (0.3, 0.5, 0.7, 0.9):
        cosines = sample(c_y, crowd(VOXCELEB2 - 1))
        row = [f"c_y = {c_y}"]
        for margin in margins:
            gradient = loss_and_gradient("AM", cosines, margin)[1][0, 1:]
            easy = gradient[excess(cosines, margin)[0] <= 0].sum()
            share = 100 * float(easy / gradient.sum())
            row.append(f"{share:.0f} % of {float(gradient.sum()):.2g}")
        rows.append(row)
    return markdown(["", *(f"m = {m}" for m in margins)], rows)


def one_violator(n_classes: int) -> torch.Tensor:
    """c_y = 0.5, one class at z = 5 for m = 0.2, all others at cosine 0."""
    others = torch.zeros(n_classes - 1, dtype=torch.float64)
    others[0] = 0.5 - MARGIN + 5 / SCALE
    return sample(0.5, others)


def growth() -> str:
    """Floor and thinning from 10 to a million classes."""
    rows = []
    for n_classes in (10, 100, 1_000, VOXCELEB2, 100_000, 1_000_000):
        cells = [f"{n_classes:,}", f"{math.log(n_classes) / SCALE:.3f}"]
        best = sample(1.0, torch.full((n_classes - 1,), -1.0))
        for name in ("AM", "paper", "released", "hinge"):
            cells.append(f"{loss_and_gradient(name, best)[0].abs()[0]:.2g}")
        for name in ("AM", "paper", "released", "hinge"):
            gradient = loss_and_gradient(name, one_violator(n_classes))[1]
            cells.append(f"{float(gradient[0, 1]):.2g}")
        rows.append(cells)
    head = ["C", "ln(C)/s"]
    head += [f"floor {n}" for n in ("AM", "paper", "released", "hinge")]
    head += [f"pull {n}" for n in ("AM", "paper", "released", "hinge")]
    return markdown(head, rows)


def pulls(n_classes: int = 7205) -> str:
    """What an objective pulls with, in place of SpeechBrain's AAM."""
    rows = []
    for name, objective, form, margin in (
        ("AAM, m = 0.2", "aam", "paper", 0.2),
        ("AM, m = 0.2", "am", "paper", 0.2),
        ("Real-AAM `paper`, m = 0.2", "raam", "paper", 0.2),
        ("Real-AAM `released`, m = 0.2", "raam", "released", 0.2),
        ("Real-AAM `hinge`, m = 0.2", "raam", "hinge", 0.2),
        ("Real-AAM `paper`, m = 0.5", "raam", "paper", 0.5),
        ("RAM `paper`, m = 0.2", "ram", "paper", 0.2),
        ("RAM `released`, m = 0.2", "ram", "released", 0.2),
        ("RAM `hinge`, m = 0.2", "ram", "hinge", 0.2),
        ("RAM `paper`, m = 0.48", "ram", "paper", 0.48),
        ("RAM `paper`, m = 0.5", "ram", "paper", 0.5),
    ):
        loss_fn = make_objective(objective, margin, SCALE, form)
        row = [name]
        for target in (0.4, 0.5, 0.6, 0.7):
            cosines = batch(n_classes, 0.0)
            cosines[:, 0] = target
            row.append(f"{abs(mean_pull(loss_fn, cosines)):.4f}")
        rows.append(row)
    head = ["", *(f"c_y = {target}" for target in (0.4, 0.5, 0.6, 0.7))]
    return markdown(head, rows)


def mean_pull(loss_fn: torch.nn.Module, cosines: torch.Tensor) -> float:
    """Derivative of the mean loss by c_y, the target's first, over -s."""
    one_hot = torch.zeros_like(cosines)
    one_hot[:, 0] = 1
    cosines = cosines.detach().requires_grad_()
    targets = torch.zeros(len(cosines), dtype=torch.long)
    loss = F.cross_entropy(loss_fn(cosines, one_hot), targets)
    (gradient,) = torch.autograd.grad(loss, cosines)
    return -float(gradient[:, 0].sum()) / loss_fn.scale


def _tiny(value: float) -> str:
    """Rounding errors differ from machine to machine."""
    return "< 1e-10" if value < 1e-10 else f"{value:.0e}"


def conjecture() -> str:
    """Form ``paper`` at m against AM at m, at m - ln(C)/s, and exactly."""
    margin = 0.35
    rows = []
    for n_classes in (10, 125, 1000, VOXCELEB2):
        for mean_target in (0.0, 0.3, 0.5, 0.7):
            cosines = batch(n_classes, mean_target)
            paper = loss_and_gradient("paper", cosines, margin)[1]
            violating = (excess(cosines, margin) > 0).double().mean()
            shifted = margin - math.log(n_classes) / SCALE

            def am(m: float, cosines: torch.Tensor = cosines) -> torch.Tensor:
                return loss_and_gradient("AM", cosines, m)[1]

            exact = truncated_am_gradient(cosines, margin)
            rows.append(
                [
                    f"{n_classes:,}",
                    f"{mean_target}",
                    f"{100 * float(violating):.1f} %",
                    _tiny(difference(exact, paper)),
                    f"{100 * difference(am(margin), paper):.0f} %",
                    f"{100 * difference(am(shifted), paper):.0f} %",
                    f"{shifted:.2f}",
                    f"{nearest_am_margin(cosines, paper):.2f}",
                ]
            )
    return markdown(
        [
            "C",
            "mean c_y",
            "violating",
            "exact form",
            "AM at m",
            "AM at m - ln(C)/s",
            "m - ln(C)/s",
            "nearest AM margin",
        ],
        rows,
    )


def nobody_told_apart(n_classes: int = 125) -> str:
    """Loss where the target and all other classes stand at one angle."""
    angles = (120, 90, 60, 30, 0)
    angle = torch.tensor(angles, dtype=torch.float64).deg2rad()
    cosines = angle.cos().unsqueeze(1).repeat(1, n_classes)
    one_hot = torch.zeros_like(cosines)
    one_hot[:, 0] = 1
    targets = torch.zeros(len(angles), dtype=torch.long)
    rows = []
    for name, objective, margin in (
        ("AM", "am", 0.5),
        ("AAM", "aam", 0.2),
        ("AAM", "aam", 0.35),
        ("AAM", "aam", 0.5),
        ("AAM", "aam", 1.0),
        ("Real-AAM", "raam", 0.5),
    ):
        loss_fn = make_objective(objective, margin, SCALE)
        losses = F.cross_entropy(
            loss_fn(cosines, one_hot), targets, reduction="none"
        )
        rows.append([f"{name}, m = {margin}"])
        rows[-1] += [f"{loss:.1f}" for loss in losses.tolist()]
    return markdown(["", *(f"{a}°" for a in angles)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "smallest example": smallest_example,
    "approximations": approximations,
    "easy share": easy_share,
    "growth": growth,
    "conjecture": conjecture,
    "pulls": pulls,
    "nobody told apart": nobody_told_apart,
}
