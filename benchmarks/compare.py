"""Run the quick benchmarks and say what moved since the committed tables.

    python benchmarks/compare.py [--update]

Compares medians and quartiles with those in ``benchmarks/results/quick``; on
another machine it takes out by how much the whole table moved. It fails
nothing. With --update the new tables replace those they are compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
COMMITTED = HERE / "results" / "quick"
SCRIPTS = ("bench_loss", "bench_step", "bench_loader", "bench_extraction")

#: Rounds of one run scatter less than two runs do: below this, it is noise.
NOISE = 0.10


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="keep the tables")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for script in SCRIPTS:
            print(f"== {script} --quick", flush=True)
            done = subprocess.run(
                [
                    sys.executable,
                    str(HERE / f"{script}.py"),
                    "--quick",
                    "--output",
                    folder,
                ],
                # One thread: CPU time, which other programs hardly disturb.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            if done.returncode:
                print(f"{script} did not finish ({done.returncode})")
        for now in sorted(Path(folder).glob("*.json")):
            print(f"\n== {now.stem}")
            committed = COMMITTED / now.name
            if committed.exists():
                lines = moved(load(committed), load(now))
                print("\n".join(lines) or "nothing moved by more than noise")
            else:
                print("no committed table yet")
        if args.update:
            shutil.copytree(folder, COMMITTED, dirs_exist_ok=True)
            print(f"\nkept in {COMMITTED}")
    print(f"\n{time.perf_counter() - started:.0f} s")


def load(path: Path) -> dict:
    """A table's numbers."""
    return json.loads(path.read_text(encoding="utf-8"))


def moved(before: dict, now: dict) -> list[str]:
    """Lines on what is slower or faster by more than noise.

    A measurement moved when its quartiles and the committed ones are apart,
    and the medians differ by more than 10 %; on another machine, after all
    are divided by their median ratio.

    Arguments
    ---------
    before, now : dict
        What ``Table.write`` wrote as JSON.

    Returns
    -------
    list of str
        One line a measurement that both have and that moved.

    Example
    -------
    >>> def table(low, median, high):
    ...     row = {"low": low, "median": median, "high": high}
    ...     return {"machine": "x", "numbers": {"step": row}}
    >>> moved(table(1.0, 1.1, 1.2), table(1.1, 1.3, 1.4))
    []
    >>> moved(table(1.0, 1.1, 1.2), table(1.5, 1.65, 1.7))
    ['slower 1.50 x  step: 1.1 s -> 1.65 s']
    """
    lines, pace = [], 1.0
    pairs = {
        key: (before["numbers"][key], new)
        for key, new in now["numbers"].items()
        if key in before["numbers"]
    }
    if pairs and before["machine"] != now["machine"]:
        pace = statistics.median(
            new["median"] / old["median"] for old, new in pairs.values()
        )
        lines.append(
            f"another machine: {before['machine']} -> {now['machine']}; it "
            f"takes {pace:.2f} x the time, which is taken out below"
        )
    for key, (old, new) in pairs.items():
        low, median, high = (new[k] / pace for k in ("low", "median", "high"))
        apart = low > old["high"] or high < old["low"]
        ratio = median / old["median"]
        if apart and not 1 - NOISE < ratio < 1 + NOISE:
            word = "slower" if ratio > 1 else "faster"
            times = max(ratio, 1 / ratio)
            lines.append(
                f"{word} {times:.2f} x  {key}: {old['median']:.3g} s -> "
                f"{new['median']:.3g} s"
            )
    return lines


if __name__ == "__main__":
    main()
