"""The reproductions in docs/host-issues.md still show what they say.

When one fails here, SpeechBrain may have mended it: take it out.
"""

import contextlib
import io
import json
import re

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
