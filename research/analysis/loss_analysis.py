#!/usr/bin/env python3
"""Section 2.2 of the paper as pictures and numbers; about a minute on a CPU.

    python research/analysis/loss_analysis.py [--output docs]

Prints the tables of docs/loss-analysis.md and writes its figures below
OUTPUT/figures. Needs the extra ``report`` (matplotlib), no data.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from loss_numbers import (
    MARGIN,
    OBJECTIVES,
    SCALE,
    TABLES,
    VOXCELEB2,
    batch,
    crowd,
    difference,
    excess,
    loss_and_gradient,
    one_violator,
    sample,
)

from speechbrain_ram.utils import atomic_path

# Told apart without colour: dashes, widths, markers.
STYLES = {
    "softmax": {"ls": ":", "color": "0.5", "lw": 2.0},
    "AM": {"ls": "-", "color": "black", "lw": 2.2},
    "paper": {"ls": "--", "color": "black", "marker": "o"},
    "released": {"ls": "-.", "color": "0.35", "marker": "s", "mfc": "white"},
    "hinge": {"ls": "-", "color": "0.35", "lw": 1.0, "marker": "^"},
}


def import_pyplot():
    """matplotlib, drawing to files."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            "matplotlib is missing: pip install 'speechbrain-ram[report]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "axes.grid": True,
            "grid.color": "0.9",
            "font.size": 9,
            "lines.linewidth": 1.4,
            "lines.markersize": 4.5,
            "legend.frameon": False,
            "legend.handlelength": 3.2,
        }
    )
    return plt


def save(figure, path: Path) -> None:
    """Write a PNG under a temporary name, then rename it."""
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print(f"wrote {path}, {path.stat().st_size // 1000} kB")


def draw(axes, x, curves: dict[str, torch.Tensor]) -> None:
    """One line a loss, with about eight markers each, not on one spot."""
    for i, (name, y) in enumerate(curves.items()):
        every = max(len(y) // 8, 1)
        axes.plot(
            x, y, label=name, markevery=(i * every // 5, every), **STYLES[name]
        )


def each_loss(cosines, margin=MARGIN, scale=SCALE):
    """Losses and pulls on the target, by name, [N] each."""
    losses, pulls = {}, {}
    for name in OBJECTIVES:
        loss, gradient = loss_and_gradient(name, cosines, margin, scale)
        losses[name], pulls[name] = loss, -gradient[:, 0]
    return losses, pulls


def over_settings(cosines, settings):
    """As `each_loss`, one sample under many pairs of margin and scale."""
    found = [each_loss(cosines, m, s) for m, s in settings]
    return tuple(
        {name: torch.cat([one[kind][name] for one in found]) for name in STYLES}
        for kind in (0, 1)
    )


def by_lead(plt, folder: Path) -> None:
    """One competitor comes near: loss, and the pull on the target."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True)
    lead = torch.linspace(-0.3, 0.8, 221, dtype=torch.float64)
    for column, n_classes in enumerate((2, VOXCELEB2)):
        # The competitor stands at 0.2, everybody else far away at -0.5.
        others = torch.full((n_classes - 1,), -0.5, dtype=torch.float64)
        others[0] = 0.2
        losses, pulls = each_loss(sample(0.2 + lead, others))
        draw(axes[0, column], lead, losses)
        draw(axes[1, column], lead, pulls)
        axes[0, column].set_title(f"C = {n_classes:,} classes")
        for row in axes[:, column]:
            row.axvline(MARGIN, color="0.7", lw=1)
        axes[1, column].set_xlabel(
            "lead of the target, $c_y - c_1$ (cosine)\nvertical line: m = 0.2"
        )
    axes[0, 0].set_ylabel("loss (nats)")
    axes[1, 0].set_ylabel("pull on the target (units of s)")
    axes[0, 0].legend()
    save(figure, folder / "loss-by-lead.png")


def by_margin_and_scale(plt, folder: Path) -> None:
    """Easy and hard sample as m and s change."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.6), sharey="row")
    others = crowd(VOXCELEB2 - 1)
    margins = torch.linspace(0, 0.8, 81).tolist()
    scales = torch.linspace(1, 60, 60).tolist()
    halves = (
        ("margin m (cosine), s = 30", margins, [(m, SCALE) for m in margins]),
        ("scale s, m = 0.2", scales, [(MARGIN, s) for s in scales]),
    )
    columns = iter(axes.T)
    for what, values, settings in halves:
        for title, c_y in (("easy", 0.75), ("hard", 0.35)):
            top, bottom = next(columns)
            losses, pulls = over_settings(sample(c_y, others), settings)
            draw(top, values, losses)
            draw(bottom, values, pulls)
            top.set_title(f"{title} sample, $c_y$ = {c_y}")
            bottom.set_xlabel(what)
            top.set_ylim(0, 22)
            bottom.set_ylim(-0.05, 3.05)
    axes[0, 0].set_ylabel("loss (nats)")
    axes[1, 0].set_ylabel("pull on the target (units of s)")
    axes[0, 0].legend()
    save(figure, folder / "loss-by-margin-and-scale.png")


def approximations(plt, folder: Path) -> None:
    """Equations 8 and 11 against log(1 + x)."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    x = torch.logspace(-2, 2, 201, dtype=torch.float64)
    exact = x.log1p()
    axes[0].plot(x, exact, "k-", lw=2.2, label="exact, ln(1 + x)")
    axes[0].plot(x, x, "k--", label="(8), x")
    axes[0].plot(x, x.log(), "k:", lw=2, label="(11), ln x")
    axes[0].set_ylim(-1, 5)
    axes[0].set_ylabel("loss (nats)")
    axes[1].plot(x, 100 * (x - exact) / exact, "k--", label="(8)")
    axes[1].plot(
        x, 100 * (x.log() - exact).abs() / exact, "k:", lw=2, label="(11)"
    )
    axes[1].axhline(10, color="0.7", lw=1)
    axes[1].set_yscale("log")
    axes[1].set_ylim(0.1, 1000)
    axes[1].set_ylabel("error (% of the exact loss)")
    for one in axes:
        one.set_xscale("log")
        one.set_xlabel(r"x = $e^{sm} \sum_j e^{-s(c_y - c_j)}$")
        one.legend()
    save(figure, folder / "loss-approximations.png")


def gradient_mass(plt, folder: Path) -> None:
    """Where the gradient lands: satisfied or violating classes."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    c_y = torch.linspace(0.1, 0.95, 86, dtype=torch.float64)
    cosines = sample(c_y, crowd(VOXCELEB2 - 1))
    easy = excess(cosines) <= 0
    gradient = loss_and_gradient("AM", cosines)[1][:, 1:]
    on_easy = (gradient * easy).sum(dim=1)
    on_hard = (gradient * ~easy).sum(dim=1)
    axes[0].stackplot(
        c_y,
        on_hard,
        on_easy,
        colors=["0.35", "0.8"],
        labels=["on violating classes", "on satisfied classes"],
    )
    axes[0].set_title("AM, m = 0.2")
    axes[0].set_ylabel("gradient on the others' logits")
    axes[0].set_ylim(0, 1.6)
    axes[0].legend(loc="upper right")
    draw(axes[1], c_y, each_loss(cosines)[1])
    axes[1].set_ylim(0, 1.6)
    axes[1].set_title("every loss, m = 0.2")
    axes[1].set_ylabel("pull on the target (units of s)")
    axes[1].legend()
    for one in axes:
        one.set_xlabel("target cosine $c_y$")
    save(figure, folder / "loss-gradient-mass.png")


def growth(plt, folder: Path) -> None:
    """Floor and thinning from 10 to a million classes."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    numbers = [round(10 ** (k / 4)) for k in range(4, 25)]
    floors = {name: [] for name in STYLES if name != "softmax"}
    pulls = {name: [] for name in floors}
    for n_classes in numbers:
        done = sample(0.7, torch.zeros(n_classes - 1))
        for name in floors:
            floors[name].append(loss_and_gradient(name, done)[0][0])
            gradient = loss_and_gradient(name, one_violator(n_classes))[1]
            pulls[name].append(gradient[0, 1])
    for one, curves in ((axes[0], floors), (axes[1], pulls)):
        draw(one, numbers, curves)
        one.set_xscale("log")
        one.set_xlabel("number of classes C")
    axes[0].set_title("all separated: $c_y$ = 0.7, others 0")
    axes[0].set_ylabel("loss (nats)")
    axes[0].legend()
    axes[1].set_title("one class violates by z = 5 (0.17 in cosine)")
    axes[1].set_ylabel("gradient on its logit")
    save(figure, folder / "loss-number-of-classes.png")


def conjecture(plt, folder: Path) -> None:
    """Form ``paper`` is AM at a smaller margin, with the tail cut off."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
    margin = 0.35
    lead = torch.linspace(-0.15, 0.6, 226, dtype=torch.float64)
    others = torch.full((VOXCELEB2 - 1,), -0.5, dtype=torch.float64)
    others[0] = 0.2
    cosines = sample(0.2 + lead, others)
    shifted = margin - math.log(VOXCELEB2) / SCALE
    for name, m, label in (
        ("AM", margin, "AM, m = 0.35"),
        ("AM", shifted, f"AM, m = 0.35 - ln(C)/s = {shifted:.2f}"),
        ("paper", margin, "paper, m = 0.35"),
    ):
        style = dict(STYLES[name])
        if m == shifted:
            style.update(color="0.6", lw=4)
        gradient = loss_and_gradient(name, cosines, m)[1][:, 1]
        axes[0].plot(lead, gradient, label=label, markevery=12, **style)
    axes[0].axvline(margin, color="0.7", lw=1)
    axes[0].set_xlabel("lead of the target (cosine); line: m, dead beyond")
    axes[0].set_ylabel("gradient on the competitor's logit")
    axes[0].set_title("C = 5,994, one competitor")
    axes[0].set_ylim(-0.05, 1.55)
    axes[0].legend(loc="upper left")
    means = torch.linspace(0, 0.9, 19).tolist()
    n_classes = 1000
    shares, at_m, at_shift = [], [], []
    for mean in means:
        cosines = batch(n_classes, mean)
        paper = loss_and_gradient("paper", cosines, margin)[1]
        shares.append(100 * (excess(cosines, margin) > 0).double().mean())
        for found, m in (
            (at_m, margin),
            (at_shift, margin - math.log(n_classes) / SCALE),
        ):
            am = loss_and_gradient("AM", cosines, m)[1]
            found.append(100 * difference(am, paper))
    axes[1].plot(shares, at_m, "k-s", mfc="white", label="AM at m")
    axes[1].plot(shares, at_shift, "k--o", label="AM at m - ln(C)/s")
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].set_xlim(0.1, 105)
    axes[1].set_ylim(0.1, 2000)
    axes[1].set_xlabel("non-targets that violate the margin (%)")
    axes[1].set_ylabel("gradient differs from paper's by (%)")
    axes[1].set_title("batches of 64, C = 1,000, m = 0.35")
    axes[1].legend()
    save(figure, folder / "loss-conjecture.png")


FIGURES = (
    by_lead,
    by_margin_and_scale,
    approximations,
    gradient_mass,
    growth,
    conjecture,
)


def main(output: Path) -> None:
    """Print the tables, draw the figures."""
    for title, table in TABLES.items():
        print(f"\n{title}\n\n{table()}")
    plt = import_pyplot()
    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:
        figure(plt, folder)
        plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("docs"))
    main(parser.parse_args().output)
