"""The wheel alone, away from the repository: it trains and verifies."""

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

SOURCES = ["speechbrain_ram", "recipes", "hparams"]
FILES = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]


def run(*command, cwd):
    """A command that knows nothing of the repository; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The programs of an environment with the wheel and what it needs."""
    version = importlib.metadata.version("setuptools").split(".")
    if tuple(map(int, version[:2])) < (70, 1):
        pytest.skip("setuptools is too old for a wheel: this test did NOT run")
    clone = tmp_path_factory.mktemp("clone")  # building leaves folders behind
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, clone / name, ignore=ignored)
    for name in FILES:
        shutil.copy(REPOSITORY / name, clone)
    pip = [sys.executable, "-m", "pip", "-q"]
    offline = ["--no-deps", "--no-index"]
    run(*pip, "wheel", ".", *offline, "--no-build-isolation", cwd=clone)
    (wheel,) = clone.glob("*.whl")

    # Everything else comes from the environment of these tests.
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    (own,) = home.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (own / "others.pth").write_text("\n".join(others))
    python = home / "bin" / "python"
    install = ["--python", python, "install", "--ignore-installed"]
    run(*pip, *install, *offline, wheel, cwd=home)
    code = "import speechbrain_ram; print(speechbrain_ram.__file__)"
    found = Path(run(python, "-c", code, cwd=home).strip())
    assert found == own / "speechbrain_ram" / "__init__.py"
    return home / "bin"


def test_it_trains_and_verifies(installed, tiny_corpus, tmp_path):
    command = installed / "speechbrain-ram"
    listed = run(command, "recipes", cwd=tmp_path)
    assert "\nvoxceleb-strong " in listed
    assert str(installed.parent) in listed.splitlines()[-1]

    corpus = tiny_corpus.train_root
    settings = {
        "corpus": corpus,
        "output_folder": "own",
        "device": "cpu",
        "channels": "[16,16,16,16]",
        "number_of_epochs": 1,
        "batch_size": 8,
        "crop_seconds": 0.5,
        "num_workers": 0,
    }
    options = [text for k, v in settings.items() for text in (f"--{k}", v)]
    said = run(command, "train", "own", *options, cwd=tmp_path)
    assert "EER after training" in said
    verification = {
        "encoder": "own/inference",
        "trials": "own/manifests/dev_trials.txt",
        "data_root": corpus,
        "output": "verified",
    }
    options = [text for k, v in verification.items() for text in (f"--{k}", v)]
    table = run(command, "verify", *options, cwd=tmp_path)
    assert "EER" in table
    assert (tmp_path / "verified" / "dev_trials" / "scores.txt").is_file()
    assert sorted(os.listdir(tmp_path)) == ["own", "verified"]


def test_a_recipe_brings_its_files(installed, tmp_path):
    """Its preparation finds the table that lies beside it."""
    speakers = REPOSITORY / "recipes" / "SpeechOcean762" / "speakers.tsv"
    for line in speakers.read_text().splitlines()[1:]:
        name = f"SPEAKER{line.split()[0]}"
        (tmp_path / "download" / "WAVE" / name).mkdir(parents=True)
    program = "speechbrain_ram.recipes.SpeechOcean762.prepare"
    python = installed / "python"
    said = run(python, "-m", program, "download", "data", cwd=tmp_path)
    assert said == "0 recordings, 38000 trials in 'data'\n"


def test_a_pin_that_python_3_10_cannot_have_says_so():
    """pip tries older and older versions of everything else, without end."""
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    looked_at = 0
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate({"python_version": "3.10"}):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.metadata(pin.name)
            if pin.specifier.contains(found["Version"]):
                needs = SpecifierSet(found["Requires-Python"] or "")
                assert needs.contains("3.10.13"), line
                looked_at += 1
    assert looked_at > 30
