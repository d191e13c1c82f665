"""The page on the training log says what the log holds, and what runs had."""

import json
import re

from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "training-log.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
ONLY_WITH_FAULTS = {"train skipped steps", "train unreadable"}


def rows(section):
    """The cells of a section's table, by their first one."""
    found = re.findall(r"^\| `(.*?)` \| (.*) \|$", SECTIONS[section], re.M)
    return {name: cells.split(" | ") for name, cells in found}


def test_every_field_is_explained_and_no_other(tiny_run):
    log = (tiny_run / "train_log.txt").read_text()
    logged = set(re.findall(r"(?:^|, | - )([a-z][^:,]*): ", log, re.M))
    assert set(rows("The fields")) == logged | ONLY_WITH_FAULTS


def test_the_values_are_those_of_the_records():
    lines = (REPOSITORY / "research/study/records/cpu.jsonl").read_text()
    sides = ([], [])
    for record in map(json.loads, lines.splitlines()):
        eer = sum(record["EER"].values()) / len(record["EER"])
        if not 9 <= eer <= 15:
            sides[eer > 15].append(record["training"])
    page = " ".join(PAGE.split())
    low, high = map(len, sides)
    said = f"runs, {low} came below 9 % EER and {high} stayed above 15 %"
    assert said in page
    for name, cells in rows("What healthy values look like").items():
        for runs, cell in zip(sides, cells, strict=True):
            values = [run[name] for run in runs if name in run]
            assert cell == f"{min(values):.3g} to {max(values):.3g}", name
