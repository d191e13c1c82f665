"""Scoring and score normalisation of a list, beside SpeechBrain's loop.

    OMP_NUM_THREADS=1 python benchmarks/bench_scoring.py [--quick]
    ... bench_scoring.py --wespeaker CHECKOUT

The size of VoxCeleb1-E: 145,000 utterances, 600,000 trials, a cohort of
6,000 speakers; random embeddings of 512 dimensions. SpeechBrain's VoxCeleb
recipe compares both sides of every trial with the whole cohort, one trial
after the other; that loop is timed on a sample of trials and extrapolated.
WeSpeaker's `get_mean_std`, of a checkout of theirs, does a whole list at once;
the scores that its loop makes of it, line by line, are one expression here.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import Table, alternate, wespeaker_importable

from speechbrain_ram.verification.scores import (
    normalise,
    score_trials,
    trial_vectors,
    unit_length,
)
from speechbrain_ram.verification.trials import TrialList, read_trials

DIM, TOP = 512, 300
FULL = {"utterances": 145_000, "trials": 600_000, "cohort": 6_000}
BESIDE = {"utterances": 40_000, "trials": 200_000, "cohort": 6_000}
QUICK = {"utterances": 5_000, "trials": 20_000, "cohort": 1_000}
GOALS = {
    "cosine": 3.0,
    "as-norm1": 60.0,
    "as-norm2": 60.0,
}  # seconds on two cores
MEMORY_GOAL = 3e9


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small list")
    parser.add_argument("--output", help="folder of the table")
    parser.add_argument("--wespeaker", metavar="CHECKOUT", help="of theirs")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size, beside = (QUICK, QUICK) if args.quick else (FULL, BESIDE)
    if args.wespeaker:
        wespeaker_importable(args.wespeaker)
    if args.peak:
        data = world(beside if args.wespeaker else size)
        if args.peak == "wespeaker":
            wespeaker(*data)
        else:
            run(args.peak, *data)
        print(resident_peak())
        return
    table = Table(
        "scoring",
        "Scores of one list",
        f"{size['trials']:,} trials over {size['utterances']:,} utterances, "
        f"cohort of {size['cohort']:,}, top {TOP}, {DIM} dimensions, random "
        "embeddings. Ours: a whole list after loading, median of 3 (as-norm2 "
        "and s-norm: once); normalisation includes the cosines. `theirs`: "
        "SpeechBrain's loop over single trials, timed on a sample by turns "
        "with ours and EXTRAPOLATED to the list. Peak memory is that of a "
        "whole process, with the embeddings and libraries in it.",
        [
            "step",
            "theirs s (extrapolated)",
            "ours s",
            "theirs / ours",
            "peak memory",
            "goal",
        ],
        args.output,
    )
    trials, matrix, cohort = world(size)
    if args.wespeaker:
        beside_wespeaker(table, args, beside)
    sample = np.random.default_rng(1).integers(0, len(trials), 2000)
    steps = {
        "cosine": (2000, None, 3),
        "as-norm1": (20, TOP, 3),
        "as-norm2": (20, TOP, 1),
        "s-norm": (20, None, 1),
    }
    for step, (count, top, rounds) in steps.items():
        chosen = sample[:count]
        cases = {
            "ours": lambda step=step: run(step, trials, matrix, cohort),
            "theirs": lambda step=step, chosen=chosen, top=top: loop(
                step, trials, matrix, cohort, chosen, top
            ),
        }
        if step == "as-norm2":  # SpeechBrain has no such thing
            del cases["theirs"]
        else:
            compare(step, trials, matrix, cohort, chosen, top)
        seconds = alternate(cases, rounds, warmup=0)
        ours = statistics.median(seconds["ours"])
        table.note(f"{step} ours", seconds["ours"])
        theirs = None
        if "theirs" in seconds:
            table.note(f"{step} theirs, sample", seconds["theirs"])
            theirs = statistics.median(seconds["theirs"])
            theirs *= len(trials) / count
        memory = in_a_process_of_its_own(step, args.quick)
        goals = []
        if step in GOALS and not args.quick:
            reached = ours < GOALS[step]
            goals.append(f"< {GOALS[step]:g} s: {verdict(reached)}")
            goals.append(f"< 3 GB: {verdict(memory < MEMORY_GOAL)}")
        table.add(
            step,
            f"{theirs:,.0f}" if theirs else "-",
            f"{ours:.2f}",
            f"{theirs / ours:,.0f}" if theirs else "-",
            f"{memory / 1e9:.2f} GB",
            "; ".join(goals),
        )
    read_and_score(table, 100_000 if args.quick else 3_500_000)
    table.write()


def world(size) -> tuple[TrialList, np.ndarray, np.ndarray]:
    """A trial list, embeddings, and a cohort of unit vectors."""
    rng = np.random.default_rng(0)
    names = tuple(f"id{i // 40}/{i}.wav" for i in range(size["utterances"]))
    enrol, test = rng.integers(0, len(names), (2, size["trials"]))
    trials = TrialList(
        names, names, enrol, test, rng.integers(0, 2, len(enrol))
    )
    matrix = rng.standard_normal((len(names), DIM), dtype=np.float32)
    cohort = rng.standard_normal((size["cohort"], DIM), dtype=np.float32)
    return trials, matrix, unit_length(cohort)


def run(step, trials, matrix, cohort) -> np.ndarray:
    """Ours, from embeddings to scores."""
    if step == "cosine":
        return score_trials(trials, trials.enrol_ids, matrix)
    sides = trial_vectors(trials, trials.enrol_ids, matrix)
    return normalise(
        sides.cosines(),
        sides.vectors,
        sides.enrol,
        sides.test,
        cohort,
        step,
        TOP,
    )


def loop(step, trials, matrix, cohort, chosen, top) -> list[float]:
    """What SpeechBrain's verification script does for every trial."""
    similarity = torch.nn.CosineSimilarity(dim=-1, eps=1e-6)
    others = torch.from_numpy(cohort)[:, None]  # [C, 1, E]
    found = []
    for i in chosen:
        enrol = torch.from_numpy(matrix[trials.enrol[i]])[None, None]
        test = torch.from_numpy(matrix[trials.test[i]])[None, None]
        score = similarity(enrol, test)[0]
        if step != "cosine":
            sides = []
            for side in (enrol, test):
                repeated = side.repeat(len(others), 1, 1)
                against = similarity(repeated, others)
                if top is not None:
                    against = torch.topk(against, k=top, dim=0)[0]
                sides.append((score - against.mean()) / against.std())
            score = 0.5 * (sides[0] + sides[1])
        found.append(float(score))
    return found


def compare(step, trials, matrix, cohort, chosen, top) -> None:
    """Both must say the same; its deviation is of the sample (ddof 1)."""
    part = TrialList(
        trials.enrol_ids,
        trials.test_ids,
        trials.enrol[chosen],
        trials.test[chosen],
        trials.labels[chosen],
    )
    ours = run(step, part, matrix, cohort)
    theirs = np.array(loop(step, trials, matrix, cohort, chosen, top))
    if step != "cosine":
        n = len(cohort) if top is None else top
        theirs *= np.sqrt(n / (n - 1))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def wespeaker(trials, matrix, cohort) -> np.ndarray:
    """Adaptive s-norm by WeSpeaker's function, from embeddings to scores."""
    from wespeaker.bin.score_norm import get_mean_std

    sides = []
    unit = unit_length(matrix)
    cosines = (unit[trials.enrol] * unit[trials.test]).sum(axis=1)
    for side in (trials.enrol, trials.test):
        used, where = np.unique(side, return_inverse=True)
        mean, deviation = get_mean_std(matrix[used], cohort, TOP)
        sides.append((cosines - mean[where]) / deviation[where])
    return 0.5 * (sides[0] + sides[1])


def beside_wespeaker(table, args, size) -> None:
    """Whole lists by turns, the same numbers, the memory of each."""
    data = world(size)
    cases = {
        "as-norm1": lambda: run("as-norm1", *data),
        "wespeaker": lambda: wespeaker(*data),
    }
    ours, theirs = (case() for case in cases.values())
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    seconds = alternate(cases, 3, warmup=0)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    memory = [
        in_a_process_of_its_own(name, args.quick, args.wespeaker)
        for name in cases
    ]
    for name, each in seconds.items():
        table.note(f"beside WeSpeaker, {name}", each)
    table.add(
        f"as-norm1 of {size['trials']:,} trials over {size['utterances']:,} "
        "utterances; theirs is WeSpeaker's",
        f"{middle['wespeaker']:.2f} (measured)",
        f"{middle['as-norm1']:.2f}",
        f"{middle['wespeaker'] / middle['as-norm1']:.2f}",
        " / ".join(f"{each / 1e9:.2f} GB" for each in memory) + " (theirs)",
        "",
    )


def read_and_score(table: Table, n: int) -> None:
    """The largest public list, CN-Celeb's: read it, score it."""
    rng = np.random.default_rng(0)
    enrol, test = rng.integers(0, 196, n), rng.integers(0, 17_777, n)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trials.lst"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(
                f"id{800 + e:05d}-enroll test/id{800 + t % 200:05d}-singing-"
                f"{t // 200:02d}-001.wav {int(e == t % 200)}\n"
                for e, t in zip(enrol.tolist(), test.tolist(), strict=True)
            )
        trials = read_trials(path, "cnceleb")
        matrix = rng.standard_normal(
            (len(trials.utterances), DIM), dtype=np.float32
        )
        seconds = alternate(
            {
                "read": lambda: read_trials(path, "cnceleb"),
                "score": lambda: score_trials(
                    trials, trials.utterances, matrix
                ),
            },
            rounds=3,
            warmup=0,
        )
    for name, verb in (("read", "read"), ("score", "score")):
        table.note(f"CN-Celeb {name} N={n}", seconds[name])
        table.add(
            f"{verb} {n:,} trials as CN-Celeb's",
            "-",
            f"{statistics.median(seconds[name]):.2f}",
            "-",
            "",
            "",
        )


def verdict(reached: bool) -> str:
    """How a goal is reported."""
    return "met" if reached else "MISSED"


def in_a_process_of_its_own(
    step: str, quick: bool, checkout: str | None = None
) -> int:
    """Peak memory in bytes of one run of ours, or of WeSpeaker's."""
    command = [sys.executable, __file__, "--peak", step]
    if checkout:
        command += ["--wespeaker", checkout]
    done = subprocess.run(
        command + ["--quick"] * quick,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def resident_peak() -> int:
    """Bytes of memory that Linux counted for this process at its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


if __name__ == "__main__":
    main()
