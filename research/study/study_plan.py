"""What the study runs, what is done, and which margins were chosen.

A *run* is one training: system, margin, seed. Its *record* is one line of
JSON. The plan is a function of the grid and of the records alone, so that a
study goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

#: The evaluation speakers' two halves.
HALVES = ("A", "B")
METRICS = ("EER", "minDCF(0.01)")


@dataclass(frozen=True)
class Run:
    """One training.

    Arguments
    ---------
    system : str
        Name in the grid.
    objective, form : str
        As for ``speechbrain_ram.losses.make_objective``.
    margin : float
        0 for softmax.
    seed : int
    """

    system: str
    objective: str
    form: str
    margin: float
    seed: int

    @property
    def name(self) -> str:
        """For folders and logs."""
        system = self.system.replace(" ", "-")
        return f"{system}_m{self.margin:g}_s{self.seed}"


@dataclass(frozen=True)
class Grid:
    """A study's YAML; see cpu.yaml for what each key means."""

    recipe: Path
    settings: dict[str, Any]
    options: tuple[str, ...]
    workers: int
    threads: int
    scale: float
    margins: tuple[float, ...]
    systems: dict[str, dict[str, Any]]
    baseline: str
    search_seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    replicates: int
    utterances_per_second: float
    overhead_seconds: float
    training_utterances: int
    watch_every: int = 0  # epochs, see study_watch.py; 0 watches none
    utterances: int = 0  # of each training speaker, the first; 0 is all

    @property
    def fingerprint(self) -> str:
        """Of all that changes a result: records of another are not ours."""
        what = [self.recipe.name, self.settings, self.options, self.scale]
        what.append(self.replicates)
        what += [self.utterances] * bool(self.utterances)
        text = json.dumps(what, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def run(self, system: str, margin: float, seed: int) -> Run:
        """Make one run of a system."""
        settings = self.systems[system]
        form = settings.get("form", "paper")
        return Run(system, settings["objective"], form, margin, seed)

    def margins_of(self, system: str) -> tuple[float, ...]:
        """Margins to try: softmax has none, a system may name its own."""
        if self.systems[system]["objective"] == "softmax":
            return (0.0,)
        return tuple(self.systems[system].get("margins", self.margins))

    def overrides_of(self, system: str) -> dict[str, Any]:
        """Keys of the recipe that a system sets besides its objective."""
        return self.systems[system].get("overrides", {})

    def hours(self, n_runs: int, seconds: float | None = None) -> float:
        """Hours for so many runs, of so many seconds each if known."""
        if seconds is None:
            utterances = (
                self.settings["number_of_epochs"] * self.training_utterances
            )
            seconds = utterances / self.utterances_per_second
            seconds += self.overhead_seconds
        return n_runs * seconds / self.workers / 3600


def read_grid(path: str | os.PathLike) -> Grid:
    """Read and check a grid.

    Raises
    ------
    ValueError
        Unknown or missing keys, in the grid or a system, a baseline that is
        no system, or search seeds that are not among the final ones.
    """
    path = Path(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    while "like" in content:  # a grid beside this one has the other keys
        beside = path.with_name(content.pop("like"))
        content = yaml.safe_load(beside.read_text(encoding="utf-8")) | content
    known, given = {f.name for f in fields(Grid)}, set(content)
    needed = {f.name for f in fields(Grid) if f.default is MISSING}
    if not needed <= given <= known:
        raise ValueError(
            f"'{path}': missing keys {sorted(needed - given)}, unknown keys "
            f"{sorted(given - known)}. cpu.yaml and long.yaml show them all."
        )
    for key in ("options", "margins", "search_seeds", "final_seeds"):
        content[key] = tuple(content[key])
    content["recipe"] = (path.parent / content["recipe"]).resolve()
    grid = Grid(**content)
    allowed = {"objective", "form", "margins", "overrides"}
    for name, settings in grid.systems.items():
        if not set(settings) <= allowed:
            raise ValueError(
                f"'{path}': system {name!r} has the keys {sorted(settings)}, "
                f"allowed are {', '.join(sorted(allowed))}."
            )
        if grid.watch_every and len(grid.margins_of(name)) > 1:
            raise ValueError(
                f"'{path}': system {name!r} has the margins "
                f"{grid.margins_of(name)}, where trainings are watched "
                "(watch_every) one is allowed. Give it `margins: [...]`."
            )
    if grid.baseline not in grid.systems:
        raise ValueError(
            f"'{path}': baseline is {grid.baseline!r}, allowed are "
            f"{', '.join(grid.systems)}."
        )
    if not set(grid.search_seeds) <= set(grid.final_seeds):
        raise ValueError(
            f"'{path}': search_seeds {grid.search_seeds} must be among "
            f"final_seeds {grid.final_seeds}, so that no run is wasted."
        )
    return grid


# -- records --------------------------------------------------------------


def run_of(record: Mapping[str, Any]) -> Run:
    """The run that a record is of."""
    return Run(**{key: record[key] for key in Run.__dataclass_fields__})


def read_records(
    path: str | os.PathLike, grid: Grid
) -> dict[Run, dict[str, Any]]:
    """Read the finished runs of this grid's systems.

    A last line without an end is what a power cut leaves: it is passed over.

    Raises
    ------
    ValueError
        Another line is no record.
    """
    path = Path(path)
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    records = {}
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            run = run_of(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{path}', line {number} is not a record: {line[:80]!r}. Was "
                "the file edited?"
            ) from error
        ours = record["grid"] == grid.fingerprint
        if ours and run.system in grid.systems:
            records[run] = record
    return records


def append_record(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Add one line, on the disk when this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # cut off in the middle of a line
                text = path.read_bytes()
                os.truncate(path, text.rfind(b"\n") + 1)
        line = json.dumps(record, separators=(",", ":")) + "\n"
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


# -- the plan -------------------------------------------------------------


def search_runs(grid: Grid) -> list[Run]:
    """All margins with the search seeds; one seed is finished first."""
    return [
        grid.run(system, margin, seed)
        for seed in grid.search_seeds
        for system in grid.systems
        for margin in grid.margins_of(system)
    ]


def mean_over(
    records: Mapping[Run, Mapping],
    runs: Iterable[Run],
    half: str,
    metric: str = "EER",
) -> float:
    """Mean of a metric over runs, on one half of the speakers."""
    values = [records[run][metric][half] for run in runs]
    return sum(values) / len(values)


def chosen_margins(
    grid: Grid, records: Mapping[Run, Mapping], system: str
) -> dict[str, float]:
    """For each half, the margin of the lowest EER **on the other half**.

    The key is the half that the margin is reported on. Means over the search
    seeds; of equal margins the smallest.
    """

    def mean_eer(margin: float, half: str) -> float:
        runs = [grid.run(system, margin, seed) for seed in grid.search_seeds]
        return mean_over(records, runs, half)

    margins = grid.margins_of(system)
    return {
        reported: min(margins, key=lambda m: mean_eer(m, chooses))
        for reported, chooses in zip(HALVES, reversed(HALVES), strict=True)
    }


def final_runs(grid: Grid, records: Mapping[Run, Mapping]) -> list[Run]:
    """The chosen margins with all final seeds."""
    return [
        grid.run(system, margin, seed)
        for seed in grid.final_seeds
        for system in grid.systems
        for margin in sorted(
            set(chosen_margins(grid, records, system).values())
        )
    ]


def missing(runs: Sequence[Run], records: Mapping[Run, Mapping]) -> list[Run]:
    """Those without a record."""
    return [run for run in runs if run not in records]
