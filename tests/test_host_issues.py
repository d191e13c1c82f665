"""The reproductions in docs/host-issues.md still show what they say.

When one fails here, SpeechBrain may have mended it: take it out.
"""

import contextlib
import importlib
import io
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import REPOSITORY
from survival import PROCESSES

DOCUMENT = REPOSITORY / "docs" / "host-issues.md"


def blocks():
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_blocks(results):
    """In a process of their own: they change SpeechBrain and the clock."""
    import time

    found, clock = [], time.time
    for block in blocks():
        printed, error = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            try:
                exec(block, {"__name__": "block"})
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
        time.time = clock
        found.append((printed.getvalue().strip(), error))
    results.write_text(json.dumps(found))


def test_reproductions_show_what_they_say(tmp_path):
    process = PROCESSES.Process(
        target=run_blocks, args=(tmp_path / "results.json",)
    )
    process.start()
    process.join()
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == len(blocks()) == 13
    for block, (printed, error) in zip(blocks(), results, strict=True):
        said = re.search(r"(?:print\(.*\)|\(\))  # (.*)", block).group(1)
        assert said in (printed, error), block


def test_the_page_names_the_version_that_was_tried():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"SpeechBrain {version('speechbrain')} has" in text


def run_mended(reproduction, diff, results):
    """In a process of its own: the reproduction after the entry's change."""
    place, before, after = re.fullmatch(
        r"--- a/(\S+)\.py\n-(.*\n)\+(.*\n)", diff
    ).groups()
    module = importlib.import_module(place.replace("/", "."))
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(before) == 1
    exec(source.replace(before, after), module.__dict__)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(reproduction, {"__name__": "block"})
    except Exception as problem:
        printed.write(f"{type(problem).__name__}: {problem}")
    results.write_text(printed.getvalue())


@pytest.mark.parametrize(
    "number, expected", [(3, "0"), (6, "RuntimeError: Loading checkpoint")]
)
def test_a_change_of_one_line_mends_it(number, expected, tmp_path):
    text = DOCUMENT.read_text(encoding="utf-8")
    entry = text.split(f"\n## {number}. ")[1].split("\n## ")[0]
    (reproduction,) = re.findall(r"```python\n(.*?)```", entry, re.DOTALL)
    (diff,) = re.findall(r"```diff\n(.*?)```", entry, re.DOTALL)
    results = tmp_path / "results.txt"
    process = PROCESSES.Process(
        target=run_mended, args=(reproduction, diff, results)
    )
    process.start()
    process.join()
    assert results.read_text().startswith(expected)


def test_every_change_is_tried():
    assert DOCUMENT.read_text(encoding="utf-8").count("```diff") == 2
