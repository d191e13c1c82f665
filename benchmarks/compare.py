"""Run the quick benchmarks and say what moved since the committed tables.

    python benchmarks/compare.py

Compares medians with the quartiles in ``benchmarks/results/*.json``. It fails
nothing: another machine, or a busy one, moves everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("bench_loss", "bench_step", "bench_loader", "bench_extraction")

#: Rounds of one run scatter less than two runs do: below this, it is noise.
NOISE = 0.10


def main() -> None:
    """Run, compare, print."""
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
            committed = HERE / "results" / now.name
            if committed.exists():
                lines = moved(load(committed), load(now))
                print("\n".join(lines) or "nothing moved by more than noise")
            else:
                print("no committed table yet")
    print(f"\n{time.perf_counter() - started:.0f} s")


def load(path: Path) -> dict:
    """A table's numbers."""
    return json.loads(path.read_text(encoding="utf-8"))


def moved(before: dict, now: dict) -> list[str]:
    """Lines on what is slower or faster by more than noise.

    A measurement moved when its quartiles and the committed ones are apart,
    and the medians differ by more than 10 %.

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
    lines = []
    if before["machine"] != now["machine"]:
        lines.append(
            f"another machine: {before['machine']} -> {now['machine']}"
        )
    for key, new in now["numbers"].items():
        old = before["numbers"].get(key)
        if old is None:
            continue
        apart = new["low"] > old["high"] or new["high"] < old["low"]
        ratio = new["median"] / old["median"]
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
