"""Every code block of the README runs, in the order it is read."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, run_recipe
from hyperpyyaml import load_hyperpyyaml
from speechbrain.nnet.losses import AdditiveAngularMargin

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
RUN = "results/synthetic_ram_m0.3_1986"


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture(scope="module")
def home(tiny_corpus, tiny_run, tmp_path_factory):
    """What a reader has after `make demo`, in small, and two recordings."""
    home = tmp_path_factory.mktemp("home")
    corpus = home / "results" / "synthetic"
    shutil.copytree(tiny_corpus.trials.parent, corpus)
    shutil.copytree(tiny_run, home / RUN)
    first, second = sorted((corpus / "test").rglob("*.wav"))[:2]
    shutil.copy(first, home / "first.wav")
    shutil.copy(second, home / "second.wav")
    return home


def test_every_block_has_a_test():
    assert {name for name, _ in BLOCKS} <= {"bash", "python", "diff"}
    assert README.count("```") == 2 * len(BLOCKS)


def test_python_blocks(home, monkeypatch):
    monkeypatch.chdir(home)
    namespace = {}
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        for text in blocks("python"):
            with contextlib.redirect_stdout(sys.stderr):
                exec(compile(text, "README.md", "exec"), namespace)
        assert torch.are_deterministic_algorithms_enabled()
    finally:  # as other tests expect it
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert namespace["embeddings"].shape == (2, 512)
    assert -1 <= float(namespace["score"]) <= 1


COMMANDS = [
    line for text in blocks("bash") for line in text.strip().splitlines()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line, home, tiny_corpus, tmp_path):
    program, *words = shlex.split(line)
    if program == "make":
        # The recipes of both targets are run by hand and by CI; here: that
        # they exist and need nothing but the virtual environment.
        done = subprocess.run(
            ["make", "--dry-run", *words],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert ".venv/bin/python" in done.stdout
    elif words[0] == "train_speaker_embeddings.py":
        recipe, options, overrides = REPOSITORY / words[1], [], {}
        for name, value in zip(words[2::2], words[3::2], strict=True):
            if name == "--precision":
                options += [name, value]
            else:
                overrides[name[2:]] = value
        for name, value in overrides.items():
            with contextlib.suppress(ValueError):
                overrides[name] = float(value)
        overrides = {"number_of_epochs": 1, **overrides}
        if "seed" in overrides:
            overrides["seed"] = int(overrides["seed"])
        run = run_recipe(
            tiny_corpus,
            tmp_path / "run",
            *options,
            recipe=recipe,
            verify_untrained=False,
            **overrides,
        )
        assert (run / "inference" / "hyperparams.yaml").is_file()
    else:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, REPOSITORY / words[0], *words[1:]],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]


def test_the_change_pulls_like_what_it_replaces():
    """As in SpeechBrain's recipes: 7,205 classes, scale 30."""
    (diff,) = blocks("diff")
    lines = diff.splitlines()
    before, after = (
        "\n".join(line[1:] for line in lines if line[0] in (" ", sign))
        for sign in "-+"
    )
    costs = [load_hyperpyyaml(text)["compute_cost"] for text in (before, after)]
    assert type(costs[0].loss_fn) is AdditiveAngularMargin
    assert (costs[0].loss_fn.margin, costs[0].loss_fn.scale) == (0.2, 30)
    others = 0.1 * torch.randn(64, 7205, dtype=torch.float64)
    for target in (0.3, 0.4, 0.5, 0.6, 0.7):
        old, new = (pull(each, others, target) for each in costs)
        assert abs(new - old) < 0.1, (target, old, new)
    assert pull(costs[0], others, 0.6) > 0.6  # there is something to replace


def pull(cost, others, target):
    """Derivative of the loss by the target's cosine, in units of the scale."""
    cosines = others.clone()
    cosines[:, 0] = target
    cosines.requires_grad_()
    loss = cost(cosines[:, None], torch.zeros(len(cosines), 1).long())
    (gradient,) = torch.autograd.grad(loss, cosines)
    return -float(gradient[:, 0].sum()) / cost.loss_fn.scale
