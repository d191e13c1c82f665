#!/usr/bin/env python3
"""Train and evaluate what a grid names; one line of JSON for each run.

    python research/study/run.py DATA_FOLDER [--grid research/study/cpu.yaml]

DATA_FOLDER holds train/ and dev/, folders of speakers, and may hold
speakers.tsv. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from study_judge import judge, write_study_trials
from study_plan import (
    Grid,
    Run,
    append_record,
    final_runs,
    missing,
    read_grid,
    read_records,
    search_runs,
)
from study_watch import CHECKPOINTER, lists_of, read_watched
from tqdm import tqdm

import speechbrain_ram
from speechbrain_ram.data.manifest import find_recordings, read_manifest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCRIPT = ROOT / "train_speaker_embeddings.py"

#: What a launcher gets: command, log file, threads. Returns CPU seconds.
Launcher = Callable[[Sequence[str], Path, int], float]

_running: set[subprocess.Popen] = set()


# -- one run --------------------------------------------------------------


def command_of(
    grid: Grid, run: Run, data_folder: Path, trials: Path, output: Path
) -> list[str]:
    """The command line that trains a run."""
    checkpointer = {}
    if grid.watch_every:
        every = grid.watch_every
        checkpointer["checkpointer"] = CHECKPOINTER.format(every=every)
    settings = {
        "data_folder": str(data_folder),
        "output_folder": str(output),
        "objective": run.objective,
        "form": run.form,
        "margin": run.margin,
        "scale": grid.scale,
        "seed": run.seed,
        # The trials are scored once, by the last epoch: nothing is chosen.
        "trials": str(trials),
        "verify_every": 1_000_000,
        "verify_untrained": False,
        **grid.settings,
        **grid.overrides_of(run.system),
        **checkpointer,
    }
    command = [sys.executable, str(SCRIPT), str(grid.recipe)]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    return [*command, "--noprogressbar", *grid.options]


def watch_command_of(
    grid: Grid,
    data_folder: Path,
    trials: Path,
    output: Path,
    also: Path | None,
) -> list[str]:
    """The command line that looks at what a watched training left."""
    command = [sys.executable, str(HERE / "study_watch.py")]
    command += [str(output), str(data_folder), str(trials)]
    command += ["--every", str(grid.watch_every)]
    command += ["--replicates", str(grid.replicates)]
    return command + (["--also", str(also)] if also else [])


def launch(command: Sequence[str], log: Path, threads: int) -> float:
    """Run a command to its end; returns the CPU seconds that it took.

    Raises
    ------
    RuntimeError
        It failed; the message ends with what it said last.
    """
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(path),  # study_variants
    }
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment
        )
        _running.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        _running.discard(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace")[-600:]
        raise RuntimeError(
            f"status {process.returncode}, see '{log}': ...{last}"
        )
    return usage.ru_utime + usage.ru_stime


def epochs_of(train_log: Path) -> list[dict[str, float]]:
    """The numbers of each line of the training log, by name."""
    lines = train_log.read_text(encoding="utf-8").strip().split("\n")
    number = re.compile(r"(\w[^:,]*): ([-+.\deE]+|nan|inf)(?:,| - |$)")
    return [
        {name: float(value) for name, value in number.findall(line)}
        for line in lines
    ]


def portable(command: Sequence[str], data_folder: Path, work: Path) -> str:
    """A command as it is recorded, without this machine's folders."""
    text = " ".join(command)
    for folder, name in ((data_folder, "DATA_FOLDER"), (work, "WORK")):
        text = text.replace(str(folder), name)
    return text.replace(f"{ROOT}{os.sep}", "")


def git_state() -> str:
    """The commit, with a + where files other than records differ from it."""
    changed = ["status", "--porcelain", "-uno", ":/", ":(exclude)records"]
    state = []
    for arguments in (["rev-parse", "HEAD"], changed):
        answer = subprocess.run(
            ["git", "-C", str(HERE), *arguments], capture_output=True, text=True
        )
        if answer.returncode:
            return "unknown"
        state.append(answer.stdout.strip())
    return state[0] + ("+" if state[1] else "")


def versions() -> dict[str, str]:
    """Of what decides a result."""
    return {
        "speechbrain_ram": speechbrain_ram.__version__,
        "torch": torch.__version__,
        "torchaudio": torchaudio.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def finish_run(
    grid: Grid,
    run: Run,
    data_folder: Path,
    work: Path,
    half_of: dict[str, str],
    launcher: Launcher,
    keep: bool,
    also: Path | None = None,
) -> dict[str, Any]:
    """Train, evaluate, tidy up; returns the record."""
    output = work / run.name
    output.mkdir(parents=True, exist_ok=True)
    trials = work / "trials.txt"
    command = command_of(grid, run, data_folder, trials, output)
    started = time.perf_counter()
    log = output / "output.txt"
    cpu_seconds = launcher(command, log, grid.threads)
    epochs = epochs_of(output / "train_log.txt")
    trajectory = {}
    if grid.watch_every:
        watch = watch_command_of(grid, data_folder, trials, output, also)
        cpu_seconds += launcher(watch, log, grid.threads)
        training = {int(each["epoch"]): each for each in epochs}
        trajectory["trajectory"] = [
            {**each, "training": training[each["epoch"]]}
            for each in read_watched(output)
        ]
    seconds = time.perf_counter() - started
    manifest = read_manifest(output / "manifests" / "train.csv")
    record = {
        "grid": grid.fingerprint,
        **{key: getattr(run, key) for key in Run.__dataclass_fields__},
        "scale": grid.scale,
        "classes": len({row.spk_id for row in manifest}),
        **judge(output / "scores.txt", half_of, grid.replicates),
        "training": epochs[-1],
        **trajectory,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "versions": versions(),
        "commit": git_state(),
        "command": portable(command[1:], data_folder, work),
    }
    if not keep:
        for folder in ("save", "inference", "watched"):
            shutil.rmtree(output / folder, ignore_errors=True)
        (output / "scores.txt").unlink()
    return record


# -- the study ------------------------------------------------------------


def thinned(data_folder: Path, target: Path, utterances: int) -> Path:
    """Link a corpus with so many utterances a training speaker; 0 is all."""
    if not utterances:
        return data_folder
    shutil.rmtree(target, ignore_errors=True)
    (target / "train").mkdir(parents=True)
    for each in data_folder.iterdir():
        if each.name != "train":
            (target / each.name).symlink_to(each)
    for speaker in (data_folder / "train").iterdir():
        folder = target / "train" / speaker.name
        folder.mkdir()
        for recording in find_recordings(speaker)[:utterances]:
            path = folder / recording
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(speaker / recording)
    return target


@contextmanager
def stopping(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Leave at a signal: trainings write a checkpoint, none is begun."""
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_running):
            process.terminate()
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def run_study(
    grid: Grid,
    data_folder: Path,
    records_file: Path,
    work: Path,
    launcher: Launcher = launch,
    keep: bool = False,
    also: Path | None = None,
) -> list[str]:
    """Do all that is missing; returns what failed, which may be tried again."""
    work.mkdir(parents=True, exist_ok=True)
    data_folder = thinned(data_folder, work / "corpus", grid.utterances)
    half_of = write_study_trials(data_folder, work / "trials.txt")
    if grid.watch_every:  # not after hours of training
        lists_of(data_folder, work / "trials.txt", also)
    failures: list[str] = []
    for stage in ("search", "final"):
        records = read_records(records_file, grid)
        runs = search_runs(grid)
        if stage == "final":
            if failures:  # a choice from half of the runs would be another
                break
            runs = final_runs(grid, records)
        todo = missing(runs, records)
        with ThreadPoolExecutor(grid.workers) as pool, stopping(pool):
            futures = {
                pool.submit(
                    finish_run,
                    grid,
                    run,
                    data_folder,
                    work,
                    half_of,
                    launcher,
                    keep,
                    also,
                ): run
                for run in todo
            }
            bar = tqdm(as_completed(futures), stage, len(todo), unit="run")
            for future in bar:
                run = futures[future]
                try:
                    record = future.result()
                except (RuntimeError, OSError, ValueError) as error:
                    failures.append(f"{run.name}: {error}")
                    tqdm.write(f"FAILED {failures[-1]}", file=sys.stderr)
                    continue
                append_record(records_file, record)
                tqdm.write(f"{run.name}: EER {json.dumps(record['EER'])} %")
    return failures


def plan_text(grid: Grid, records: dict) -> str:
    """What is left, and for how long."""
    search = missing(search_runs(grid), records)
    if search:
        with_margin = sum(len(grid.margins_of(s)) > 1 for s in grid.systems)
        chosen = len(grid.systems) + with_margin  # two margins at most
        seeds = len(grid.final_seeds) - len(grid.search_seeds)
        final, most = chosen * seeds, "at most "
    else:
        final, most = len(missing(final_runs(grid, records), records)), ""
    spent = [r["cpu_seconds"] / grid.threads for r in records.values()]
    each = float(np.median(spent)) if spent else None
    hours = grid.hours(len(search) + final, each)
    return (
        f"{len(records)} runs are done; {len(search)} to search, {most}{final} "
        f"more for the chosen margins: {most}{hours:.1f} hours with "
        f"{grid.workers} at a time."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("--grid", type=Path, default=HERE / "cpu.yaml")
    parser.add_argument("--records", type=Path, help="records/GRID.jsonl")
    parser.add_argument("--work", type=Path, help="results/study/GRID")
    parser.add_argument(
        "--also",
        type=Path,
        default=os.environ.get("ALNUM70") or None,
        help="another test set to watch trainings with, a folder with "
        "trials.txt (default: the environment variable ALNUM70)",
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument(
        "--keep", action="store_true", help="checkpoints, encoders and scores"
    )
    args = parser.parse_args(arguments)
    grid = read_grid(args.grid)
    name = args.grid.stem
    records_file = args.records or HERE / "records" / f"{name}.jsonl"
    print(plan_text(grid, read_records(records_file, grid)))
    if args.dry_run:
        return 0
    try:
        failures = run_study(
            grid,
            args.data_folder.resolve(),
            records_file,
            (args.work or Path("results") / "study" / name).resolve(),
            keep=args.keep,
            also=args.also and args.also.resolve(),
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
