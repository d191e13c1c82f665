"""What each system of a watched grid changes, beside the grid's baseline.

    python research/study/study_effects.py research/study/records/channels.jsonl

EER in % after the last epoch, means over seeds, on the dev speakers (the mean
of both halves) and on the other test set. Differences are paired: the same
draws of speakers for all systems, the same seeds. The intervals are of 95 %,
over speakers alone; the range tells how far seeds lie apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from study_plan import HALVES, Grid, Run, read_grid, read_records
from study_results import interval

HERE = Path(__file__).resolve().parent


def rates_of(record: Mapping) -> dict[str, np.ndarray]:
    """List -> EER and its bootstrap draws, [1 + replicates], of the end."""
    lists = {
        name: np.array([each["EER"], *each["draws"]])
        for name, each in record["trajectory"][-1]["lists"].items()
    }
    dev = np.mean([lists.pop(half) for half in HALVES], axis=0)
    return {"dev": dev, **lists}


def by_system(
    grid: Grid, records: Mapping[Run, Mapping]
) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """System -> seed -> :func:`rates_of`, in the grid's order."""
    found: dict[str, dict] = {system: {} for system in grid.systems}
    for run, record in records.items():
        found[run.system][run.seed] = rates_of(record)
    return {system: seeds for system, seeds in found.items() if seeds}


def difference(
    ours: Mapping[int, Mapping], base: Mapping[int, Mapping], name: str
) -> tuple[float, float, float]:
    """EER minus the baseline's on a list: value, low, high, by paired seeds."""
    seeds = sorted(set(ours) & set(base))
    change = np.mean([ours[s][name] - base[s][name] for s in seeds], axis=0)
    value = float(change[0])
    return value, *interval(value, change[1:])


def table(grid: Grid, records: Mapping[Run, Mapping]) -> str:
    """In Markdown."""
    systems = by_system(grid, records)
    base = systems[grid.baseline]
    names = list(next(iter(base.values())))
    head = ["system", "seeds"]
    for name in names:
        head += [f"{name}, EER %", f"minus {grid.baseline}", "range"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for system, seeds in systems.items():
        row = [system, str(len(seeds))]
        for name in names:
            values = [each[name][0] for each in seeds.values()]
            row.append(f"{np.mean(values):.2f}")
            paired = system != grid.baseline and set(seeds) & set(base)
            if paired:
                value, low, high = difference(seeds, base, name)
                row.append(f"{value:+.2f} [{low:+.2f}, {high:+.2f}]")
            else:
                row.append("")
            row.append(f"{min(values):.2f} to {max(values):.2f}")
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("--grid", type=Path, default=HERE / "channels.yaml")
    args = parser.parse_args(arguments)
    grid = read_grid(args.grid)
    records = read_records(args.records, grid)
    if grid.baseline not in {run.system for run in records}:
        parser.error(
            f"'{args.records}' has no finished run of '{grid.baseline}', "
            "which the others are compared with"
        )
    print(table(grid, records))


if __name__ == "__main__":
    sys.exit(main())
