"""What a long training costs: EER against the epoch, and the wear.

Of a grid with `watch_every`, with as many records as there are. Wear is the
EER of the last epoch minus that of the picked one. A half's epoch is picked by
the other half, that of any other list by the mean of both, so that no list
judges an epoch that it picked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from study_plan import HALVES, Grid, Run
from study_results import drawn_seeds, interval

#: The name of both halves together.
BOTH = "both halves"


@dataclass(frozen=True)
class Course:
    """One system over the epochs that were looked at.

    Arguments
    ---------
    epochs : tuple of int
    value : dict
        List -> EER, shape [seeds, epochs].
    draws : dict
        List -> replicates of it, shape [seeds, epochs, B].
    """

    epochs: tuple[int, ...]
    value: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]

    @property
    def lists(self) -> list[str]:
        """Both halves together, then the other lists."""
        return [BOTH, *(name for name in self.value if name not in HALVES)]

    def over(self, name: str) -> np.ndarray:
        """EER on a list, or the mean of both halves, shape [seeds, epochs]."""
        if name == BOTH:
            return np.mean([self.value[half] for half in HALVES], axis=0)
        return self.value[name]

    def picked(self, name: str) -> np.ndarray:
        """Position of the epoch to report on this list, shape [seeds].

        Of equal ones the first.
        """
        others = {half: HALVES[1 - i] for i, half in enumerate(HALVES)}
        return self.over(others.get(name, BOTH)).argmin(axis=1)

    def end(self, name: str, last: bool) -> tuple[np.ndarray, np.ndarray]:
        """EER of the last or the picked epoch, and its replicates.

        Shapes [seeds] and [seeds, B].
        """
        if name == BOTH:
            ends = [self.end(half, last) for half in HALVES]
            value, draws = zip(*ends, strict=True)
            return np.mean(value, axis=0), np.mean(draws, axis=0)
        seeds = np.arange(len(self.value[name]))
        where = -1 if last else self.picked(name)
        return self.value[name][seeds, where], self.draws[name][seeds, where]


def seeds_of(
    grid: Grid, records: Mapping[Run, Mapping], *systems: str
) -> list[int]:
    """The seeds that all these systems were trained with."""
    return [
        seed
        for seed in grid.final_seeds
        if all(run_of(grid, system, seed) in records for system in systems)
    ]


def run_of(grid: Grid, system: str, seed: int) -> Run:
    """A system of a watched grid has one margin."""
    return grid.run(system, grid.margins_of(system)[0], seed)


def course(
    grid: Grid,
    records: Mapping[Run, Mapping],
    system: str,
    seeds: Sequence[int],
) -> Course:
    """A system with these seeds, on the lists that all of them have."""
    paths = [
        records[run_of(grid, system, seed)]["trajectory"] for seed in seeds
    ]
    known = [set(point["lists"]) for path in paths for point in path]
    names = sorted(set.intersection(*known))

    def gathered(key: str) -> dict[str, np.ndarray]:
        return {
            name: np.array(
                [[point["lists"][name][key] for point in p] for p in paths]
            )
            for name in names
        }

    epochs = tuple(point["epoch"] for point in paths[0])
    return Course(epochs, gathered("EER"), gathered("draws"))


def mean_and_draws(
    value: np.ndarray, draws: np.ndarray
) -> tuple[float, np.ndarray]:
    """Mean over seeds, and replicates that draw seeds too, shape [B]."""
    n_seeds, replicates = draws.shape
    picks = drawn_seeds(replicates, n_seeds)
    drawn = draws.T[np.arange(replicates)[:, None], picks]
    return float(value.mean()), drawn.mean(axis=1)


def wear(one: Course, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Last minus picked on a list: [seeds], and replicates [seeds, B]."""
    (last, last_draws), (picked, picked_draws) = (
        one.end(name, at_last) for at_last in (True, False)
    )
    return last - picked, last_draws - picked_draws


def more_wear(
    grid: Grid, records: Mapping[Run, Mapping], system: str, name: str
) -> tuple[float, np.ndarray]:
    """Wear minus the baseline's, of the seeds that both have, and draws.

    Raises
    ------
    ValueError
        No seed is of both.
    """
    seeds = seeds_of(grid, records, system, grid.baseline)
    if not seeds:
        raise ValueError(f"no seed is of {system!r} and {grid.baseline!r}.")
    values, draws = zip(
        *(
            mean_and_draws(*wear(course(grid, records, each, seeds), name))
            for each in (system, grid.baseline)
        ),
        strict=True,
    )
    return values[0] - values[1], draws[0] - draws[1]


def with_interval(value: float, draws: np.ndarray, sign: str = "") -> str:
    """Such as '+0.12 [-0.30, +0.51]'."""
    low, high = interval(value, draws)
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def row(
    grid: Grid, records: Mapping[Run, Mapping], system: str, name: str
) -> str:
    """One line of the table of a list."""
    seeds = seeds_of(grid, records, system)
    margin = f"{grid.margins_of(system)[0]:g}"
    cells = [system, margin, str(len(seeds)), *[""] * 6]
    one = course(grid, records, system, seeds) if seeds else None
    if one is not None and name in one.lists:
        halves = HALVES if name == BOTH else [name]
        picks = np.concatenate([one.picked(half) for half in halves])
        first, final = (one.epochs[i] for i in (picks.min(), picks.max()))
        cells[3] = f"{first} to {final}" if first < final else f"{first}"
        cells[4] = f"{one.over(name).min(axis=1).mean():.2f}"
        cells[5] = f"{one.end(name, last=False)[0].mean():.2f}"
        cells[6] = with_interval(*mean_and_draws(*one.end(name, last=True)))
        cells[7] = with_interval(*mean_and_draws(*wear(one, name)), "+")
        both = seeds_of(grid, records, system, grid.baseline)
        if system != grid.baseline and both:
            cells[8] = with_interval(
                *more_wear(grid, records, system, name), "+"
            )
    return "| " + " | ".join(cells) + " |"


def wear_table(grid: Grid, records: Mapping[Run, Mapping]) -> str:
    """Markdown: one table for each list, with what is there."""
    parts = []
    names = list(
        dict.fromkeys(
            name
            for system in grid.systems
            if (seeds := seeds_of(grid, records, system))
            for name in course(grid, records, system, seeds).lists
        )
    )
    for name in names:
        lines = [
            f"EER in percent, {name}:",
            "",
            "| system | margin | seeds | picked epoch | lowest | picked | last "
            f"| wear | wear minus {grid.baseline}'s |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [row(grid, records, system, name) for system in grid.systems]
        parts.append("\n".join(lines))
    hours = sum(r["cpu_seconds"] for r in records.values()) / 3600
    runs = len(grid.systems) * len(grid.final_seeds)
    parts.append(
        f"{len(records)} of {runs} runs are done, {hours:.1f} CPU hours."
    )
    return "\n\n".join(parts)
