#!/usr/bin/env python3
"""Train and verify each row of a table, and fill the table in.

    python recipes/sweep.py recipes/VoxCeleb/table1.yaml --output results/t1 \
        --voxceleb2 DIR --voxceleb1 DIR --sitw DIR

Every other option goes to the training of each row, such as --precision fp32.
`--launch "torchrun --nproc_per_node=4"` starts several processes. The same
command goes on where it was interrupted: a row that is finished is read, one
that is not continues from its checkpoint. OUTPUT/table.md is written again
after every row. `--rows 1 3` does these rows only, `--dry_run` prints the
commands.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from speechbrain_ram.corpora.atomic import atomic_writer
from speechbrain_ram.metrics import eer
from speechbrain_ram.scoring import read_scores

HERE = Path(__file__).resolve().parent
ASKED_TO_LEAVE = 75  # the status of a run that left with a checkpoint


def main(argv=None):
    """Do the rows in turn; the status of the first that does not finish."""
    options, passed_on = parse(argv)
    with open(options.table, encoding="utf-8") as file:
        plan = yaml.safe_load(file)
    folder = Path(options.table).parent
    output = Path(options.output)
    chosen = options.rows or range(1, len(plan["rows"]) + 1)
    for number in chosen:
        row = plan["rows"][number - 1]
        run = output / row["name"]
        steps = [training(plan, row, run, folder, options, passed_on)]
        lists = [each for each in plan["lists"] if wanted(each, passed_on)]
        for root in dict.fromkeys(each["root"] for each in lists):
            here = [each for each in lists if each["root"] == root]
            steps.append(verification(here, run, root, options, passed_on))
        for command, sign in steps:
            if sign.exists() and not options.dry_run:
                continue
            print(shlex.join(command), flush=True)
            if options.dry_run:
                continue
            status = subprocess.run(command).returncode
            if status:
                print(f"{row['name']}: status {status}", file=sys.stderr)
                return status
        if not options.dry_run:
            write_table(plan, output)
    return 0


def parse(argv):
    """Our options, and those of the training."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("table", help="plan of the table, a YAML")
    parser.add_argument("--output", required=True, help="folder for all runs")
    parser.add_argument("--rows", type=int, nargs="+", metavar="N")
    parser.add_argument("--launch", default=sys.executable, metavar="COMMAND")
    parser.add_argument("--verify_device", default="cpu", metavar="DEVICE")
    parser.add_argument("--dry_run", action="store_true")
    options, passed_on = parser.parse_known_args(argv)
    if len(passed_on) % 2 or any(
        not name.startswith("--") for name in passed_on[::2]
    ):
        parser.error(
            f"options of the training come in pairs, --name value, got: "
            f"{' '.join(passed_on)}"
        )
    return options, passed_on


def training(plan, row, run, folder, options, passed_on):
    """The command that trains a row, and the file that it ends with."""
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
    """The command that scores lists of one corpus, and its last file."""
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
    ]
    return command, scores_of(run, lists[-1])


def scores_of(run, each):
    return run / "verification" / Path(each["file"]).stem / "scores.txt"


def wanted(each, passed_on):
    """Whether the corpus of a list was given."""
    return f"--{each['root']}" in passed_on


def value_of(name, passed_on):
    return passed_on[passed_on.index(f"--{name}") + 1]


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
    for row in plan["rows"]:
        cells = []
        for each in plan["lists"]:
            file = scores_of(output / row["name"], each)
            rate = "-"
            if file.is_file():
                trials, scores = read_scores(file)
                rate = f"{eer(scores, trials.labels):.3f}"
            paper = row.get("paper", {}).get(each["name"])
            cells.append(rate if paper is None else f"{rate} ({paper:.3f})")
        margin = row["overrides"]["margin"]
        lines.append(
            f"| {row['objective']} | {margin:.2f} | {' | '.join(cells)} |"
        )
    with atomic_writer(output / "table.md") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
