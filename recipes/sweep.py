#!/usr/bin/env python3
"""Train and verify each row of a table, and fill the table in.

    python recipes/sweep.py recipes/VoxCeleb/table1.yaml --output results/t1 \
        --voxceleb2 DIR --voxceleb1 DIR --sitw DIR

Every other option goes to the training of each row, such as --precision fp32.
`--launch "torchrun --nproc_per_node=4"` starts several processes. The same
command goes on where it was interrupted: a row that is finished is read, one
that is not continues from its checkpoint. OUTPUT/table.md is written again
after every row; below the table, the development lists choose a margin for each
objective, whose results the other lists tell. `--rows 1 3` does these rows
only, `--dry_run` prints the commands.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from speechbrain_ram.utils import atomic_writer, one_line_errors
from speechbrain_ram.verification.metrics import eer
from speechbrain_ram.verification.scores import read_scores

HERE = Path(__file__).resolve().parent


def main(argv=None):
    """Do the rows in turn; the status of the first that does not finish."""
    options, passed_on = parse(argv)
    with open(options.table, encoding="utf-8") as file:
        plan = yaml.safe_load(file)
    folder = Path(options.table).parent
    output = Path(options.output)
    every = range(1, len(plan["rows"]) + 1)
    chosen = options.rows or every
    for number in chosen:
        if number not in every:
            raise ValueError(
                f"--rows has {number}, '{options.table}' has the rows 1 to "
                f"{len(every)}. They are counted from 1."
            )
    for number in chosen:
        row = plan["rows"][number - 1]
        run = output / row["name"]
        status = do(
            training(plan, row, run, folder, options, passed_on),
            options.dry_run,
        )
        for root in dict.fromkeys(each["root"] for each in plan["lists"]):
            lists = [
                each
                for each in plan["lists"]
                if each["root"] == root
                and wanted(each, run, options, passed_on)
            ]
            if lists and not status:
                status = do(
                    verification(lists, run, root, options, passed_on),
                    options.dry_run,
                )
        if status:
            print(f"{row['name']}: status {status}", file=sys.stderr)
            return status
        if not options.dry_run:
            write_table(plan, output)
    return 0


def do(step, dry_run):
    """Run a command whose last file is not there yet; its status."""
    command, last_file = step
    if last_file.exists() and not dry_run:
        return 0
    print(shlex.join(command), flush=True)
    return 0 if dry_run else subprocess.run(command).returncode


def parse(argv):
    """Our options, and those of the training."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("table", help="plan of the table, a YAML")
    parser.add_argument("--output", required=True, help="folder for all runs")
    parser.add_argument("--rows", type=int, nargs="+", metavar="N")
    parser.add_argument("--launch", default=sys.executable, metavar="COMMAND")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--verify_device", default=gpu, metavar="DEVICE")
    parser.add_argument("--dry_run", action="store_true")
    options, passed_on = parser.parse_known_args(argv)
    if len(passed_on) % 2 or any(
        text.startswith("--") != (i % 2 == 0)
        for i, text in enumerate(passed_on)
    ):
        parser.error(
            f"options of the training come in pairs, --name value, got: "
            f"{' '.join(passed_on)}"
        )
    return options, passed_on


def training(plan, row, run, folder, options, passed_on):
    """The command that trains a row and the file that it ends with."""
    overrides = [
        text
        for name, value in row["overrides"].items()
        for text in (f"--{name}", str(value))
    ]
    command = [
        *shlex.split(options.launch),
        str(HERE.parent / "train_speaker_embeddings.py"),
        str(folder / plan["hparams"]),
        "--output_folder",
        str(run),
        *overrides,
        *passed_on,
    ]
    return command, run / "inference" / "encoder.json"


def verification(lists, run, root, options, passed_on):
    """The command that scores lists of one corpus and its last file."""
    output = run / "verification"
    command = [
        sys.executable,
        str(HERE.parent / "verify_speakers.py"),
        "--encoder",
        str(run / "inference"),
        "--trials",
        *(str(run / "manifests" / each["file"]) for each in lists),
        "--data_root",
        value_of(root, passed_on),
        "--device",
        options.verify_device,
        "--store",
        str(output / f"embeddings_{root}.safetensors"),
        "--output",
        str(output),
        *(
            f"--{name}"
            for name in ("resample", "mixdown")
            if value_of(name, passed_on) == "True"
        ),
    ]
    return command, scores_of(run, lists[-1])


def scores_of(run, each):
    return run / "verification" / Path(each["file"]).stem / "scores.txt"


def wanted(each, run, options, passed_on):
    """Whether the corpus of a list was given, and the list prepared."""
    there = (run / "manifests" / each["file"]).is_file()
    return value_of(each["root"], passed_on) and (there or options.dry_run)


def value_of(name, passed_on):
    """What the training is told by --name, or None."""
    return dict(zip(passed_on[::2], passed_on[1::2], strict=True)).get(
        f"--{name}"
    )


def write_table(plan, output):
    """Write what is known; the paper's numbers in brackets."""
    names = [each["name"] for each in plan["lists"]]
    lines = [
        f"# {plan['title']}",
        "",
        "EER in percent, in brackets the paper's.",
        "",
        f"| objective | m | {' | '.join(names)} |",
        f"| --- | ---: |{' ---: |' * len(names)}",
    ]
    rates = [read_rates(plan, output / row["name"]) for row in plan["rows"]]
    for row, known in zip(plan["rows"], rates, strict=True):
        cells = []
        for name in names:
            cell = f"{known[name]:.3f}" if name in known else "-"
            paper = row.get("paper", {}).get(name)
            cells.append(cell if paper is None else f"{cell} ({paper:.3f})")
        margin = row["overrides"]["margin"]
        lines.append(
            f"| {row['objective']} | {margin:.2f} | {' | '.join(cells)} |"
        )
    lines += choices(plan, rates)
    with atomic_writer(output / "table.md") as file:
        file.write("\n".join(lines) + "\n")


def read_rates(plan, run):
    """EER in percent of each list that a run was verified on."""
    rates = {}
    for each in plan["lists"]:
        file = scores_of(run, each)
        if file.is_file():
            trials, scores = read_scores(file)
            rates[each["name"]] = eer(scores, trials.labels)
    return rates


def choices(plan, rates):
    """Of each objective the margin that a development list chooses."""
    lines = []
    for each in plan["lists"]:
        for objective in dict.fromkeys(r["objective"] for r in plan["rows"]):
            rivals = [
                (known[each["name"]], row["overrides"]["margin"], known)
                for row, known in zip(plan["rows"], rates, strict=True)
                if row["objective"] == objective and each["name"] in known
            ]
            judges = each.get("chooses_for", [])
            if not rivals or not judges:
                continue
            _, margin, known = min(rivals, key=lambda rival: rival[:2])
            results = ", ".join(
                f"{judge} {known[judge]:.3f}"
                for judge in judges
                if judge in known
            )
            lines.append(
                f"| {objective} | {each['name']} | {margin:.2f} "
                f"of {len(rivals)} | {results} |"
            )
    if not lines:
        return []
    head = ["| objective | chosen by | m | EER |", "| --- | --- | ---: | --- |"]
    return ["", *head, *lines]


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        raise SystemExit(main())
