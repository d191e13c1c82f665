"""DET curves and score histograms, ready for a paper.

Needs matplotlib: ``pip install "speechbrain-ram[report]"``. Pictures are 3.5
inches wide, one column of a conference paper, and each is written as PNG and
as PDF. Colours are those of Okabe & Ito, which people with colour blindness
can tell apart; line styles differ too, for print without colour.
"""

from __future__ import annotations

import logging
import os
import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import ndtri

from speechbrain_ram.utils import atomic_path, needs_extra
from speechbrain_ram.verification.metrics import ErrorCurve, error_curve

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("s", "^", "D", "v", "P")
# Ticks of a DET axis in percent. Those named first are labelled first, the
# others where there is room.
# fmt: off
_TICKS = (
    1, 10, 0.1, 0.01, 0.001, 50, 5, 0.5, 0.05, 0.005, 90, 20, 2, 0.2, 0.02,
    0.002, 99, 40, 30, 60, 80, 70, 95, 98,
)
# fmt: on
_STEP = 0.015  # probits between the points of a curve that are drawn
_FEW = 30  # Doddington's rule: fewer errors than this say little about a rate
_STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,  # text stays text: some conferences refuse type 3
}


def det_plot(
    path: str | os.PathLike,
    systems: Mapping[str, tuple[np.ndarray, np.ndarray]],
    p_targets: Sequence[float] = (0.01, 0.05),
) -> None:
    """Draw DET curves of systems, name -> (scores, labels), to .png and .pdf.

    The circle on the diagonal is the EER, the other marks are where minDCF is
    reached. Where a rate rests on fewer than 30 errors the curve is thin and
    pale (Doddington's rule of 30).
    """
    curves = {
        name: error_curve(*trials).corners() for name, trials in systems.items()
    }
    low, high = _det_range(list(curves.values()), p_targets)
    with _style():
        figure, axes = _figure(3.5, 4)
        axes.plot([-9, 9], [-9, 9], color="0.75", linewidth=0.6, zorder=1)
        for i, (name, curve) in enumerate(curves.items()):
            _draw_curve(axes, i, name, curve)
        for k, p in enumerate(p_targets):
            _draw_marks(axes, k, p, list(curves.values()), low, high)
        for axis in (axes.xaxis, axes.yaxis):
            _rate_axis(axis, low, high)
        limits = ndtri(np.array([low, high]) / 100)
        axes.set_xlim(*limits)
        axes.set_ylim(*limits)
        axes.set_aspect("equal")
        axes.grid(color="0.9", linewidth=0.5, which="both")
        axes.set_axisbelow(True)
        axes.set_xlabel("False alarm rate (%)")
        axes.set_ylabel("Miss rate (%)")
        _legend(figure)
        for _ in range(3):  # the height at which the room for axes is square
            figure.draw_without_rendering()
            room = axes.get_position(original=True)
            width, height = figure.get_size_inches()
            figure.set_figheight(
                height + room.width * width - room.height * height
            )
        _save(figure, path)


def histogram(
    path: str | os.PathLike,
    scores: np.ndarray,
    labels: np.ndarray,
    thresholds: Mapping[str, float],
    xlabel: str = "Score",
) -> None:
    """Draw densities of target and non-target scores, to .png and .pdf.

    `thresholds` become vertical lines by name; infinite ones are left out.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    bins = _bins(scores)
    with _style():
        figure, axes = _figure(3.5, 2.4)
        for value, name, colour in (
            (0, "non-target", _COLOURS[1]),
            (1, "target", _COLOURS[0]),
        ):
            part = scores[labels == value]
            density, _ = np.histogram(part, bins, density=True)
            axes.stairs(
                density,
                bins,
                fill=True,
                color=colour,
                alpha=0.35,
                label=f"{name} ({len(part):,})",
            )
            axes.stairs(density, bins, color=colour, linewidth=0.8)
        finite = {n: t for n, t in thresholds.items() if np.isfinite(t)}
        for (name, threshold), style in zip(
            finite.items(), ("-", "--", ":", "-."), strict=False
        ):
            axes.axvline(
                threshold,
                color="0.2",
                linestyle=style,
                linewidth=0.9,
                label=f"{name}: {threshold:.3g}",
            )
        axes.set_xlim(bins[0], bins[-1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("Density")
        axes.spines[["top", "right"]].set_visible(False)
        _legend(figure)
        _save(figure, path)


def _legend(figure) -> None:
    """Above the axes, in two columns if they are narrow enough."""
    for columns in (2, 1):
        legend = figure.legend(
            loc="outside upper center", ncols=columns, frameon=False
        )
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width:
            break
        if columns > 1:
            legend.remove()


def _plain(name: str) -> str:
    """A name as a label: no mathematics in it, not hidden, not too wide."""
    name = "\n".join(textwrap.wrap(name, 45))
    return re.sub("^_", "\u200b_", name).replace("$", r"\$")


def _draw_curve(axes, i: int, name: str, curve: ErrorCurve) -> None:
    """One system's curve and its EER."""
    colour, style = _COLOURS[i % 6], _STYLES[i % 4]
    # finite ends, outside of every range that is shown
    x = np.clip(ndtri(curve.fpr), -9, 9)
    y = np.clip(ndtri(curve.fnr), -9, 9)
    enough = (curve.misses >= _FEW) & (curve.false_alarms >= _FEW)
    # Steps too small to be seen would make dashes ragged and files large.
    steps = np.abs(np.diff(x)) + np.abs(np.diff(y))
    cell = np.floor(np.append(0, np.cumsum(steps)) / _STEP)
    keep = np.append(True, np.diff(cell) > 0)
    keep[:-1] |= steps > _STEP
    keep[-1] = True
    x, y, enough = x[keep], y[keep], enough[keep]
    # a pale point next to a full one belongs to both lines
    few = ~enough
    few[:-1] |= few[1:]
    few[1:] |= ~enough[:-1]
    axes.plot(
        np.where(few, x, np.nan),
        y,
        linestyle=style,
        color=colour,
        alpha=0.4,
        linewidth=0.7,
    )
    axes.plot(
        np.where(enough, x, np.nan),
        y,
        linestyle=style,
        color=colour,
        # with spaces at which it is not broken
        label=_plain(f"{name} (EER\u00a0{curve.eer()[0]:.2f}\u00a0%)"),
        zorder=3,
    )
    middle = ndtri(curve.eer()[0] / 100)
    axes.plot(
        middle,
        middle,
        "o",
        color=colour,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=5,
    )


def _draw_marks(
    axes,
    k: int,
    p_target: float,
    curves: Sequence[ErrorCurve],
    low: float,
    high: float,
) -> None:
    """Where minDCF is reached; in the legend if one is within the axes."""
    marker = {
        "marker": _MARKERS[k % len(_MARKERS)],
        "linestyle": "",
        "markerfacecolor": "white",
        "markersize": 4,
    }
    seen = False
    for i, curve in enumerate(curves):
        fpr, fnr = _min_dcf_rates(curve, p_target)
        if low <= 100 * fpr <= high and low <= 100 * fnr <= high:
            seen = True
            axes.plot(
                ndtri(fpr),
                ndtri(fnr),
                color=_COLOURS[i % 6],
                zorder=4,
                **marker,
            )
    if seen:
        axes.plot([], [], color="0.3", label=f"minDCF({p_target:g})", **marker)


def _min_dcf_rates(curve: ErrorCurve, p_target: float) -> tuple[float, float]:
    """False-alarm and miss rate where minDCF is reached."""
    at = np.searchsorted(curve.thresholds, curve.min_dcf(p_target)[1])
    return float(curve.fpr[at]), float(curve.fnr[at])


def _det_range(
    curves: Sequence[ErrorCurve], p_targets: Sequence[float]
) -> tuple[float, float]:
    """Ticks in percent between which the EERs and most marks lie."""
    low, high = 0.01, 0.3
    for curve in curves:
        rate = curve.eer()[0] / 100
        lowest = rate / 10
        for p in p_targets:
            fpr, fnr = _min_dcf_rates(curve, p)
            if fpr > 0 and fnr <= 0.75:  # others would cost half of the axis
                lowest, high = min(lowest, fpr / 2), max(high, 1.15 * fnr)
        # nothing below one trial's share
        low = min(low, max(lowest, 1 / max(curve.n_target, curve.n_nontarget)))
        high = max(high, min(2 * rate, 0.99))
    return (
        max(t for t in _TICKS if t <= max(100 * low, min(_TICKS))),
        min(t for t in _TICKS if t >= min(100 * high, max(_TICKS))),
    )


def _rate_axis(axis, low: float, high: float) -> None:
    """Ticks at round percentages; labels where they do not collide."""
    span = ndtri(high / 100) - ndtri(low / 100)
    labelled: list[float] = []
    bare: list[float] = []
    for tick in (t for t in _TICKS if low <= t <= high):
        at = ndtri(tick / 100)
        room = min((abs(at - ndtri(t / 100)) for t in labelled), default=span)
        (labelled if room >= span / 13 else bare).append(tick)
    axis.set_ticks(
        ndtri(np.array(labelled) / 100), [f"{t:g}" for t in labelled]
    )
    axis.set_ticks(ndtri(np.array(bare) / 100), minor=True)


def _bins(scores: np.ndarray) -> np.ndarray:
    """About 80 equal bins; whole steps wide where scores are rounded."""
    distinct = np.unique(scores)
    width = (distinct[-1] - distinct[0]) / 80
    if len(distinct) == 1:
        return distinct[0] + np.array([-0.5, 0.5])
    if len(distinct) < len(scores) / 10:  # else some bins hold a value more
        step = np.diff(distinct).min()
        width = step * max(1, round(width / step))
        return np.arange(distinct[0] - step / 2, distinct[-1] + width, width)
    return np.linspace(distinct[0], distinct[-1], 81)


def _figure(width: float, height: float):
    """A figure of its own, outside of pyplot's state, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def _style():
    """The context in which everything is drawn."""
    with needs_extra("A report", "report"):
        import matplotlib
    return matplotlib.rc_context(_STYLE)


def _save(figure, path: str | os.PathLike) -> None:
    """Write PNG and PDF under temporary names, then rename them."""
    # it tells every glyph it embeds to whoever logs at level INFO
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    for ending in ("png", "pdf"):
        with atomic_path(f"{path}.{ending}") as temporary:
            figure.savefig(temporary, format=ending, dpi=300)
