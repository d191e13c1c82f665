#!/usr/bin/env python3
"""Draw the learning curve of a run from its log.

python recipes/plot_training.py OUTPUT_FOLDER curve.png
"""

import argparse
import math
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from speechbrain_ram.utils import one_line_errors


def read_log(log: Path) -> list[dict[str, float]]:
    """One dictionary an epoch: what SpeechBrain's FileTrainLogger wrote."""
    epochs = []
    for line in log.read_text(encoding="utf-8").splitlines():
        pairs = re.findall(r"([\w()./ ]+?): ([-+.\de]+)(?:,|$| -)", line)
        epochs.append({name.strip(): float(value) for name, value in pairs})
    return epochs


def plot(epochs: list[dict[str, float]], picture: Path) -> None:
    """Loss and classification above, EER below, over the epochs."""
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(6, 5), constrained_layout=True
    )
    for name, style in (("train loss", "-"), ("valid loss", "--")):
        known = [e for e in epochs if name in e]
        above.plot(
            [e["epoch"] for e in known],
            [e[name] for e in known],
            style,
            color="black",
            label=name.replace("valid", "validation"),
        )
    floors = [
        e["train loss"] - e["train above_floor"]
        for e in epochs
        if "train above_floor" in e
    ]
    if floors:  # ln C for equation 12, next to 0 for the other objectives
        # The log rounds both numbers to 0.01 or so.
        floor = max(0.0, sum(floors) / len(floors))
        above.axhline(
            floor,
            color="0.5",
            linestyle=":",
            label=f"least possible loss, {floor:.1f}",
        )
    above.set_ylabel("loss (nats)")
    _legend_over(above)
    rates = []
    for name, marker in (("valid error", ""), ("valid EER", "o")):
        known = [e for e in epochs if name in e]
        rates += [e[name] for e in known if e[name] > 0]
        below.plot(
            [e["epoch"] for e in known],
            [e[name] for e in known],
            marker=marker,
            label={
                "valid error": "classification error, validation",
                "valid EER": "EER, development trials",
            }[name],
        )
    below.set_yscale("log")
    if rates:
        ticks = _ticks(min(rates), max(rates))
        below.set_yticks(ticks)
        below.set_ylim(ticks[0] / 1.05, ticks[-1] * 1.05)
    below.yaxis.set_major_formatter("{x:g}")
    below.yaxis.set_minor_formatter(NullFormatter())
    below.set_ylabel("%")
    below.set_xlabel("epoch")
    below.grid(True, which="both", alpha=0.3)
    _legend_over(below)
    figure.savefig(picture, dpi=120)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, from below `low` to above `high`."""
    steps = (1, 2, 5) if high > 10 * low else (1, 2, 3, 5, 7)
    first, last = (math.floor(math.log10(each)) for each in (low, high))
    grid = [
        float(f"{step}e{power}")
        for power in range(first, last + 2)
        for step in steps
    ]
    begin = max(i for i, each in enumerate(grid) if each <= low)
    end = min(i for i, each in enumerate(grid) if each >= high)
    return grid[begin : end + 1]


def _legend_over(axes) -> None:
    """Above the axes, where it hides no curve."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
        fontsize="small",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_folder", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    with one_line_errors(Path(__file__).name):
        log = read_log(arguments.output_folder / "train_log.txt")
        plot(log, arguments.picture)
