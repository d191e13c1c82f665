"""The pages: every link leads somewhere, and their commands and code run."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata

import pytest
import torch
import yaml
from conftest import REPOSITORY

PAGES = sorted(
    path.relative_to(REPOSITORY)
    for pattern in ("*.md", "docs/*.md", "recipes/*/*.md", "research/*/*.md")
    for path in REPOSITORY.glob(pattern)
)
RUN = "results/synthetic_ram_m0.3_1986"


def text_of(page):
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page, language):
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, text_of(page), re.M | re.S)


def links(page):
    """Where a page's links and pictures lead to, outside of its code."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(page):
    """The headings, as GitHub turns them into anchors."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text_of(page), re.M):
        kept = [
            letter
            for letter in heading.lower().strip()
            if letter in " -_" or unicodedata.category(letter)[0] in "LN"
        ]
        found.add("".join(kept).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / place if place else page
        target = (REPOSITORY / target).resolve()
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page} links to {link}"


def test_the_readme_links_every_page():
    linked = {link.partition("#")[0] for link in links("README.md")}
    for page in PAGES:
        if page.parts[0] == "docs":
            assert str(page) in linked


@pytest.fixture(scope="module")
def home(tiny_corpus, tiny_run, tmp_path_factory):
    """What a reader has after `make demo`, in small, and two recordings."""
    home = tmp_path_factory.mktemp("home")
    corpus = home / "results" / "synthetic"
    shutil.copytree(tiny_corpus.trials.parent, corpus)
    shutil.copytree(tiny_run, home / RUN)
    (home / "ENCODER").symlink_to(home / RUN / "inference")
    first, second = sorted((corpus / "test").rglob("*.wav"))[:2]
    shutil.copy(first, home / "a.wav")
    shutil.copy(second, home / "b.wav")
    return home


@pytest.mark.parametrize(
    "page, of, name",
    [
        ("docs/use.md", "SpeakerRecognition", "same"),
        ("docs/evaluation.md", "threshold_at_far", "result"),
        ("docs/robust-training.md", "use_deterministic_algorithms", "torch"),
    ],
)
def test_code(page, of, name, home, monkeypatch):
    (text,) = (each for each in blocks(page, "python") if of in each)
    monkeypatch.chdir(home)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    namespace = {}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(text, page, "exec"), namespace)
        asked = torch.are_deterministic_algorithms_enabled()
        assert asked == (of == "use_deterministic_algorithms")
    finally:  # as other tests expect it
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert name in namespace


def test_the_command_of_the_page_on_verification(home):
    (line,) = blocks("docs/evaluation.md", "bash")
    python, script, *words = shlex.split(line)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, REPOSITORY / script, *words],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (scores,) = (home / "results" / "verification").rglob("scores.txt")
    assert len(scores.read_text().splitlines()) > 1


@pytest.mark.parametrize(
    "plan", ["VoxCeleb/table1.yaml", "CNCeleb/table2.yaml"]
)
def test_the_evidence_has_the_papers_numbers(plan):
    page = text_of("docs/evidence.md")
    plan = yaml.safe_load(text_of(f"recipes/{plan}"))
    for row in plan["rows"]:
        if "paper" in row:
            line = [row["objective"], f"{row['overrides']['margin']:.2f}"]
            for each in plan["lists"]:
                if each["name"] in row["paper"]:
                    line.append(f"{row['paper'][each['name']]:.3f}")
            assert f"\n| {' | '.join(line)} |\n" in page
