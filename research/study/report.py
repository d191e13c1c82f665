#!/usr/bin/env python3
"""Table and figures of a study, from its lines of JSON alone.

    python research/study/report.py research/study/records/cpu.jsonl \
        [--grid research/study/cpu.yaml] [--output docs]

Prints the table, and writes OUTPUT/figures/study-*.png. Of a grid that watches
its trainings (long.yaml), it prints what they wear, and writes
OUTPUT/figures/GRID-epochs.png. Figures need the extra ``report`` (matplotlib).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from study_plan import Grid, Run, read_grid, read_records
from study_results import difference, interval, table
from study_wear import BOTH, course, seeds_of, wear_table

from speechbrain_ram.utils import atomic_path

# Told apart without colour.
MARKERS = "os^vDP*X"
DASHES = ("-", "--", "-.", ":")
# Of Okabe and Ito, apart for all kinds of colour vision.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
COLOURS += ("#56b4e9", "#7f7f7f")


def curve(grid: Grid, records: Mapping[Run, Mapping], system: str):
    """Margins, and for each the EERs of its seeds, means of both halves."""
    margins = grid.margins_of(system)
    values = [
        np.array(
            [
                np.mean(list(records[run]["EER"].values()))
                for seed in grid.final_seeds
                if (run := grid.run(system, margin, seed)) in records
            ]
        )
        for margin in margins
    ]
    return np.array(margins), values


def draw_curve(axes, x, values, number: int, label: str) -> None:
    """Mean over seeds, with a bar from the lowest to the highest."""
    mean = np.array([v.mean() for v in values])
    low = mean - [v.min() for v in values]
    high = [v.max() for v in values] - mean
    axes.errorbar(
        x,
        mean,
        [low, high],
        label=label,
        color=COLOURS[number % 8],
        ls=DASHES[number % 4],
        marker=MARKERS[number % 8],
        ms=5,
        capsize=3,
        lw=1.2,
    )


def margins_figure(plt, grid: Grid, records: Mapping[Run, Mapping]):
    """EER against the margin, one line a system, angles on the right."""
    figure, panels = plt.subplots(
        1, 2, figsize=(8.5, 4.2), sharey=True, layout="constrained"
    )
    for number, (system, settings) in enumerate(grid.systems.items()):
        x, values = curve(grid, records, system)
        if settings["objective"] == "softmax":
            level = values[0].mean()
            for axes in panels:
                axes.axhline(level, color="0.5", ls=":", label=system)
            continue
        axes = panels[int("aam" in settings["objective"])]
        # Bars at the same margin stand side by side.
        beside = x + 0.008 * (len(axes.containers) - 1.5)
        draw_curve(axes, beside, values, number, system)
    for axes, unit in zip(panels, ("cosine", "radians"), strict=True):
        axes.set_yscale("log")
        axes.set_xlabel(f"margin m ({unit})")
        axes.legend(fontsize=8)
    ticks = [5, 6, 7, 8, 10, 15, 20, 30, 40]
    panels[0].set_yticks(ticks, ticks)
    for axes in panels:
        axes.minorticks_off()
    panels[0].set_ylabel("EER (%), mean of both halves")
    return figure


def difference_figure(plt, grid: Grid, records: Mapping[Run, Mapping]):
    """Differences from the baseline with their intervals."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    others = [s for s in grid.systems if s != grid.baseline]
    for row, system in enumerate(others):
        shift, draws = difference(grid, records, system)
        low, high = interval(shift, draws)
        axes.plot([low, high], [row, row], "k-", lw=1.2)
        axes.plot(shift, row, "ko")
    axes.axvline(0, color="0.6", lw=1)
    axes.set_yticks(range(len(others)), others)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"EER minus {grid.baseline}'s, at chosen margins (points); < 0 better"
    )
    return figure


def shift_figure(plt, grid: Grid, records: Mapping[Run, Mapping]):
    """Does equation 12 act like AM at m - ln(C)/s?"""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    number = 0
    for system, settings in grid.systems.items():
        kind = settings["objective"], settings.get("form", "paper")
        x, values = curve(grid, records, system)
        if kind == ("ram", "paper"):
            classes = next(iter(records.values()))["classes"]
            shift = math.log(classes) / grid.scale
            draw_curve(axes, x, values, 1, f"{system}, at m")
            label = f"{system}, at m - ln({classes})/s = m - {shift:.2f}"
            draw_curve(axes, x - shift, values, 2, label)
        elif kind[0] == "am":
            draw_curve(axes, x, values, number, system)
    axes.set_xlabel("margin (cosine)")
    axes.set_ylabel("EER (%), mean of both halves")
    axes.legend(fontsize=8)
    return figure


def epochs_figure(plt, grid: Grid, records: Mapping[Run, Mapping]):
    """EER against the epoch on every list: mean of the seeds, and a band."""
    courses = {
        system: course(grid, records, system, seeds)
        for system in grid.systems
        if (seeds := seeds_of(grid, records, system))
    }
    names = list(dict.fromkeys(n for c in courses.values() for n in c.lists))
    figure, panels = plt.subplots(
        1,
        len(names or [BOTH]),
        figsize=(8.5, 4.2),
        layout="constrained",
        squeeze=False,
    )
    for axes, name in zip(panels[0], names, strict=False):
        for number, system in enumerate(grid.systems):
            if system not in courses or name not in courses[system].lists:
                continue
            one = courses[system]
            value = one.over(name)
            look = {"color": COLOURS[number % 8], "ls": DASHES[number % 4]}
            label = f"{system} ({len(value)})"
            axes.plot(one.epochs, value.mean(axis=0), label=label, **look)
            low, high = value.min(axis=0), value.max(axis=0)
            axes.fill_between(
                one.epochs, low, high, color=look["color"], alpha=0.12, lw=0
            )
        axes.set_title(name)
        axes.set_xlabel("epoch")
        axes.set_ylabel("EER (%)")
        axes.legend(fontsize=8, title="system (seeds)", title_fontsize=8)
    return figure


FIGURES = {
    "study-margins": margins_figure,
    "study-differences": difference_figure,
    "study-shift": shift_figure,
}


def write_figures(
    grid: Grid,
    records: Mapping[Run, Mapping],
    folder: Path,
    figures: Mapping[str, Callable] = FIGURES,
) -> None:
    """PNG files, each renamed into place when whole."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            "matplotlib is missing: pip install 'speechbrain-ram[report]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        figure = draw(plt, grid, records)
        with atomic_path(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        plt.close(figure)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("--grid", type=Path, help="the YAML of that name")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    args = parser.parse_args()
    beside = Path(__file__).parent / f"{args.records.stem}.yaml"
    grid_file = args.grid or beside
    grid = read_grid(grid_file)
    records = read_records(args.records, grid)
    figures = FIGURES
    if grid.watch_every:
        print(wear_table(grid, records))
        figures = {f"{grid_file.stem}-epochs": epochs_figure}
    else:
        try:
            print(table(grid, records))
        except ValueError as error:
            raise SystemExit(str(error)) from error
    write_figures(grid, records, args.output / "figures", figures)


if __name__ == "__main__":
    main()
