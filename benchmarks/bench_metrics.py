"""EER and minDCF: exact and fast at any size, beside SpeechBrain's.

    OMP_NUM_THREADS=1 python benchmarks/bench_metrics.py [--quick]

Scores are float32, one trial in ten is a target. SpeechBrain's minDCF makes a
matrix of thresholds by scores, so both run together only up to 10,000 trials.
The memory that it takes is computed from its source: 2 K - 1 thresholds by
the larger class, once as float32 and once as bool.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tracemalloc

import numpy as np
import torch
from harness import Table, alternate
from speechbrain.utils.metric_stats import EER, minDCF

from speechbrain_ram.verification.metrics import error_curve, evaluate

SIZES = [1_000, 3_000, 10_000, 37_611, 100_000, 600_000, 3_500_000, 10_000_000]
TOGETHER = 10_000  # trials up to which SpeechBrain's are run
GOALS = {600_000: 0.3, 10_000_000: 6.0}  # seconds
MEMORY_GOAL = 12  # times the score array


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small lists")
    parser.add_argument("--output", help="folder of the table")
    args = parser.parse_args()
    sizes = [n for n in SIZES if n <= 10_000] if args.quick else SIZES
    table = Table(
        "metrics",
        "EER and minDCF of one list",
        "Median seconds of EER and minDCF(0.01) together, float32 scores, a "
        "tenth of them targets; `theirs` are SpeechBrain's, `evaluate` adds "
        "two priors and min Cllr. Memory is the peak of new arrays over the "
        "size of the scores. `-`: not run, it does not fit: beside it what "
        "its matrices would take.",
        [
            "trials",
            "theirs s",
            "ours s",
            "theirs / ours",
            "evaluate s",
            "memory / scores",
            "theirs, memory",
            "goal",
        ],
        args.output,
    )
    ours_by_size = {}
    for n in sizes:
        scores, labels = trials(n)
        positive = torch.from_numpy(scores[labels == 1])
        negative = torch.from_numpy(scores[labels == 0])

        def ours(scores=scores, labels=labels):
            curve = error_curve(scores, labels)
            return curve.eer(), curve.min_dcf(0.01)

        def theirs(positive=positive, negative=negative):
            return EER(positive, negative), minDCF(positive, negative)

        cases = {
            "ours": ours,
            "evaluate": lambda s=scores, y=labels: evaluate(s, y),
        }
        if n <= TOGETHER:
            cases["theirs"] = theirs
            check(ours(), theirs(), len(positive))
        rounds = 3 if n == TOGETHER or n > 1e6 else 7
        seconds = alternate(cases, rounds)
        median = {k: statistics.median(v) for k, v in seconds.items()}
        ours_by_size[n] = median["ours"]
        for name, values in seconds.items():
            table.note(f"{name} N={n}", values)
        memory = peak(ours) / scores.nbytes
        goals = []
        if n in GOALS:
            goals.append(met(median["ours"] < GOALS[n], f"< {GOALS[n]:g} s"))
        if n == 10_000:
            ratio = median["theirs"] / median["ours"]
            goals.append(met(ratio >= 100, "100 times faster"))
        if n >= 600_000:
            goals.append(met(memory < MEMORY_GOAL, f"< {MEMORY_GOAL} scores"))
        distinct = len(np.unique(scores))
        needed = (2 * distinct - 1) * len(negative) * (4 + 1)
        table.add(
            f"{n:,}",
            f"{median['theirs']:.3g}" if "theirs" in median else "-",
            f"{median['ours']:.3g}",
            f"{median['theirs'] / median['ours']:.0f}"
            if "theirs" in median
            else "-",
            f"{median['evaluate']:.3g}",
            f"{memory:.1f}",
            f"{needed / 1e9:,.1f} GB",
            "; ".join(goals),
        )
    table.about += " " + growth(ours_by_size)
    table.write()


def trials(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two overlapping Gaussians, and labels."""
    rng = np.random.default_rng(n)
    labels = (np.arange(n) % 10 == 0).astype(np.int8)
    return rng.standard_normal(n, np.float32) + 3 * labels, labels


def check(ours, theirs, n_target: int) -> None:
    """Both must tell the same: theirs to one target's share, unnormalised."""
    (rate, _), (cost, _) = ours
    (their_rate, _), (their_cost, _) = theirs
    assert abs(rate / 100 - their_rate) <= 1 / n_target, (rate, their_rate)
    assert math.isclose(cost, min(their_cost / 0.01, 1), rel_tol=1e-4)


def peak(run) -> int:
    """Bytes of new arrays at the peak; NumPy reports them to tracemalloc."""
    tracemalloc.start()
    run()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def met(reached: bool, goal: str) -> str:
    """A goal and whether it was reached."""
    return f"{goal}: {'met' if reached else 'MISSED'}"


def growth(seconds: dict[int, float]) -> str:
    """The exponent of a power law through the sizes from 10,000 on."""
    sizes = np.array([n for n in seconds if n >= 10_000])
    if len(sizes) < 3:
        return ""
    values = np.array([seconds[n] for n in sizes])
    exponent, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    ratio = values / (sizes * np.log2(sizes))
    return (
        f"Growth of ours, fitted from {sizes[0]:,} to {sizes[-1]:,} trials: "
        f"seconds ~ N^{exponent:.2f} (quadratic would be N^2); per N log2 N "
        f"{1e9 * ratio.min():.2f} to {1e9 * ratio.max():.2f} ns."
    )


if __name__ == "__main__":
    main()
