"""What the records say: chosen margins, error rates, intervals, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from study_plan import (
    HALVES,
    METRICS,
    Grid,
    Run,
    chosen_margins,
    mean_over,
    missing,
    search_runs,
)


@dataclass(frozen=True)
class Result:
    """A system at its chosen margins.

    Arguments
    ---------
    chosen : dict
        Half -> the margin reported on it.
    n_seeds : int
        Seeds that are there for both margins.
    value : dict
        Metric -> mean over halves and seeds.
    by_seed : np.ndarray
        EER of each seed, mean over halves, shape [seeds].
    draws : dict
        Metric -> replicates, shape [B].
    """

    chosen: dict[str, float]
    n_seeds: int
    value: dict[str, float]
    by_seed: np.ndarray
    draws: dict[str, np.ndarray]


def finished_seeds(
    grid: Grid, records: Mapping[Run, Mapping], system: str
) -> tuple[int, ...]:
    """The first final seeds, as far as all chosen margins are there."""
    margins = set(chosen_margins(grid, records, system).values())
    seeds: tuple[int, ...] = ()
    for seed in grid.final_seeds:
        if missing([grid.run(system, m, seed) for m in margins], records):
            break
        seeds += (seed,)
    return seeds


def drawn_seeds(replicates: int, n_seeds: int) -> np.ndarray:
    """Which seeds a replicate takes, the same in each call: [B, seeds]."""
    picks = np.random.default_rng(0).random((replicates, n_seeds))
    return (picks * n_seeds).astype(int)


def result(
    grid: Grid,
    records: Mapping[Run, Mapping],
    system: str,
    seeds: Sequence[int] | None = None,
    draw_seeds: bool = True,
) -> Result:
    """Cross-over result of a system with these or all seeds; see README.md.

    A replicate takes speakers by chance, and seeds too unless told otherwise,
    both with replacement, and the same for all systems.
    """
    chosen = chosen_margins(grid, records, system)
    if seeds is None:
        seeds = finished_seeds(grid, records, system)
    n_seeds = len(seeds)
    runs = {
        half: [grid.run(system, m, seed) for seed in seeds]
        for half, m in chosen.items()
    }
    picks = drawn_seeds(grid.replicates, n_seeds)
    if not draw_seeds:
        picks[:] = range(n_seeds)
    value, draws = {}, {}
    for metric in METRICS:
        value[metric] = np.mean(
            [mean_over(records, runs[half], half, metric) for half in HALVES]
        )
        by_half = []
        for half in HALVES:
            table = np.array(
                [records[run]["draws"][metric][half] for run in runs[half]]
            )  # [seeds, B]
            columns = np.arange(grid.replicates)[:, None]
            by_half.append(table[picks, columns].mean(axis=1))
        draws[metric] = np.mean(by_half, axis=0)
    by_seed = np.mean(
        [[records[r]["EER"][half] for r in runs[half]] for half in HALVES],
        axis=0,
    )
    return Result(chosen, n_seeds, value, by_seed, draws)


def interval(value: float, draws: np.ndarray) -> tuple[float, float]:
    """95 %, the basic bootstrap of verification/bootstrap.py."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return min(2 * value - high, value), max(2 * value - low, value)


def difference(
    grid: Grid,
    records: Mapping[Run, Mapping],
    system: str,
    draw_seeds: bool = True,
) -> tuple[float, np.ndarray]:
    """EER minus the baseline's, of the seeds that both have, and its draws."""
    names = system, grid.baseline
    seeds = min((finished_seeds(grid, records, n) for n in names), key=len)
    one, other = (
        result(grid, records, name, seeds, draw_seeds) for name in names
    )
    value = one.value["EER"] - other.value["EER"]
    return value, one.draws["EER"] - other.draws["EER"]


def luck(records: Mapping[Run, Mapping]) -> tuple[float, int]:
    """Correlation of EER with the last training loss, among like runs.

    Both as deviations from the mean over the seeds of a system and margin.
    Also returns the number of runs: 0 where each stands alone.
    """
    like: dict[tuple, list] = {}
    for run, record in records.items():
        eer = np.mean(list(record["EER"].values()))
        pair = eer, record["training"]["train loss"]
        like.setdefault((run.system, run.margin), []).append(pair)
    apart = [
        np.array(v) - np.mean(v, axis=0) for v in like.values() if len(v) > 1
    ]
    if not apart:
        return np.nan, 0
    first, second = np.concatenate(apart).T
    return float(np.corrcoef(first, second)[0, 1]), len(first)


def at_edge(grid: Grid, system: str, margin: float) -> bool:
    """Whether a better margin may lie outside of the grid."""
    margins = grid.margins_of(system)
    return len(margins) > 1 and margin in (min(margins), max(margins))


def table(grid: Grid, records: Mapping[Run, Mapping]) -> str:
    """The Markdown table.

    Raises
    ------
    ValueError
        The search is not finished.
    """
    left = missing(search_runs(grid), records)
    if left:
        raise ValueError(
            f"{len(left)} runs of the search are missing, the first is "
            f"{left[0].name}. Is run.py still at work, or was the grid changed?"
        )
    results = {s: result(grid, records, s) for s in grid.systems}
    lines = [
        "| system | margin on A, B | seeds | EER % | of single seeds | "
        f"minDCF(0.01) | EER minus {grid.baseline}'s | if only speakers vary |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    edge = False
    for system, one in results.items():
        margins = []
        for half in HALVES:
            mark = at_edge(grid, system, one.chosen[half])
            edge |= mark
            margins.append(f"{one.chosen[half]:g}" + "\\*" * mark)
        cells = [system]
        cells.append(", ".join(margins) if any(one.chosen.values()) else "")
        cells.append(str(one.n_seeds))
        for metric, digits, worst in zip(
            METRICS, (2, 3), (100, 1), strict=True
        ):
            low, high = np.clip(
                interval(one.value[metric], one.draws[metric]), 0, worst
            )
            cells.append(
                f"{one.value[metric]:.{digits}f} "
                f"[{low:.{digits}f}, {high:.{digits}f}]"
            )
        low, high = one.by_seed.min(), one.by_seed.max()
        cells.insert(-1, f"{low:.1f} to {high:.1f}")
        if system == grid.baseline:
            cells += ["", ""]
        else:
            for draw_seeds in (True, False):
                shift, draws = difference(grid, records, system, draw_seeds)
                low, high = interval(shift, draws)
                span = f"[{low:+.2f}, {high:+.2f}]"
                cells.append(f"{shift:+.2f} {span}" if draw_seeds else span)
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    if edge:
        text += (
            "\n\n\\* at the edge of the grid: a better margin may lie beyond."
        )
    hours = sum(r["cpu_seconds"] for r in records.values()) / 3600
    text += f"\n\n{len(records)} runs, {hours:.1f} CPU hours."
    correlation, n_runs = luck(records)
    if n_runs:
        text += (
            " Among runs that differ in the seed alone, EER and the last "
            f"training loss correlate by {correlation:.2f} ({n_runs} runs)."
        )
    return text
