"""The reproductions in docs/host-issues still show what their page says.

When one fails here, SpeechBrain may have mended it: correct the page.
"""

import re
import runpy
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPOSITORY

SCRIPT = runpy.run_path(str(REPOSITORY / "docs" / "host-issues" / "run.py"))
PAGE = (REPOSITORY / "docs" / "host-issues.md").read_text(encoding="utf-8")
NO_PATCH = {"12-uneven-shares.py"}
needs_patch = pytest.mark.skipif(
    shutil.which("patch") is None, reason="no `patch`: nothing was patched"
)


def test_the_installed_version_has_them_all():
    tried = re.findall(r"\d+\.\d+\.\d+", PAGE.split("have")[0])
    assert version("speechbrain") in tried
    shown = SCRIPT["run"]()
    assert len(shown) == 14
    for name, what in shown.items():
        assert what.startswith("still there: "), (name, what)
        assert ", expected " in what


def test_the_page_has_every_reproduction_and_its_patch():
    patches = {path.stem for path in SCRIPT["PATCHES"]}
    for path in SCRIPT["FILES"]:
        assert f"](host-issues/{path.name})" in PAGE
        linked = f"](host-issues/{path.stem}.patch)" in PAGE
        assert linked == (path.stem in patches), path.name
        assert linked == (path.name not in NO_PATCH), path.name


@needs_patch
@pytest.mark.parametrize("patch", SCRIPT["PATCHES"], ids=lambda path: path.stem)
def test_each_patch_applies_alone(patch):
    (installed,) = find_spec("speechbrain").submodule_search_locations
    SCRIPT["apply"](patch, Path(installed).parent, "--dry-run")


@needs_patch
@pytest.mark.slow
def test_the_patches_mend_what_is_shown(tmp_path):
    SCRIPT["patched"](tmp_path)
    results = SCRIPT["run"](tmp_path)
    there = {name for name, what in results.items() if what != "mended"}
    assert there == NO_PATCH, results
