"""What each addition of channels.yaml buys, from the records alone.

    python research/study/study_effects.py research/study/records/channels.jsonl

A system is named after its additions. The effect of one is the mean EER of the
trainings that have it minus the mean of those that have not: each other
addition is in half of either, so that it cancels, but for what two of them do
together. Standard errors come from the seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from study_plan import HALVES, Run, read_grid, read_records

HERE = Path(__file__).resolve().parent


def error_rates(record: Mapping) -> dict[str, float]:
    """EER in % of the last epoch: on the dev speakers, and on other lists."""
    lists = record["trajectory"][-1]["lists"]
    found = {"dev": float(np.mean([lists[half]["EER"] for half in HALVES]))}
    return found | {
        name: each["EER"] for name, each in lists.items() if name not in HALVES
    }


def additions_of(system: str) -> set[str]:
    """The words of its name."""
    return set(system.split()) - {"plain"}


def effects(
    records: Mapping[Run, Mapping],
) -> dict[str, dict[str, tuple[float, float]]]:
    """Addition -> list -> (effect, standard error), in points of EER.

    The error is NaN where no system has two seeds.
    """
    rates = {run: error_rates(record) for run, record in records.items()}
    systems = sorted({run.system for run in rates})
    names = sorted(set().union(*map(additions_of, systems)))
    found: dict[str, dict[str, tuple[float, float]]] = {n: {} for n in names}
    for each in next(iter(rates.values())):
        by_system = {
            s: [r[each] for run, r in rates.items() if run.system == s]
            for s in systems
        }
        spread = [np.var(v, ddof=1) for v in by_system.values() if len(v) > 1]
        variance = np.mean(spread) if spread else np.nan
        for name in names:
            sides = [
                [
                    v
                    for s, v in by_system.items()
                    if (name in additions_of(s)) == w
                ]
                for w in (True, False)
            ]
            means = [np.mean([np.mean(v) for v in side]) for side in sides]
            error = np.sqrt(
                sum(
                    np.sum([variance / len(v) for v in side]) / len(side) ** 2
                    for side in sides
                )
            )
            found[name][each] = (float(means[0] - means[1]), float(error))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("--grid", type=Path, default=HERE / "channels.yaml")
    args = parser.parse_args(arguments)
    records = read_records(args.records, read_grid(args.grid))
    if not records:
        parser.error(f"'{args.records}' has no finished run of this grid")
    lists = list(error_rates(next(iter(records.values()))))
    print("| training | seed | " + " | ".join(lists) + " |")
    print("| --- | ---: |" + " ---: |" * len(lists))
    for run, record in records.items():
        rates = " | ".join(f"{v:.2f}" for v in error_rates(record).values())
        print(f"| {run.system} | {run.seed} | {rates} |")
    print("\n| addition | " + " | ".join(lists) + " |")
    print("| --- |" + " ---: |" * len(lists))
    for name, each in effects(records).items():
        cells = " | ".join(f"{v:+.2f} ± {e:.2f}" for v, e in each.values())
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    sys.exit(main())
