"""Every code block of the README runs, in the order it is read."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import miniature
import pytest
import torch
from conftest import REPOSITORY
from hyperpyyaml import load_hyperpyyaml
from speechbrain.nnet.losses import AdditiveAngularMargin

from speechbrain_ram.cli.recipes import recipes

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
PROGRAM = "from speechbrain_ram.cli.main import main; main()"


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


COMMANDS = [line for text in blocks("bash") for line in text.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where a reader sits: a folder `recordings`, and two files."""
    home = tmp_path_factory.mktemp("home")
    for k, utterances in enumerate(miniature.voices(5, 4)):
        for i, samples in enumerate(utterances):
            name = f"recordings/speaker{k}/{i}.wav"
            miniature.write(home / name, samples)
    for name, source in (("first", "0/0"), ("second", "1/1")):
        shutil.copy(
            home / f"recordings/speaker{source}.wav", home / f"{name}.wav"
        )
    return home


def test_every_block_has_a_test():
    assert {name for name, _ in BLOCKS} == {"bash", "python", "diff"}
    assert README.count("```") == 2 * len(BLOCKS)


def test_two_commands_set_everything_up():
    lines = [line for line in COMMANDS if line.startswith("make")]
    assert lines == ["make demo", "make test"]
    for line in lines:
        # Both targets are run by hand and by CI; here: that they exist and
        # need nothing but the virtual environment.
        done = subprocess.run(
            [*line.split(), "--dry-run"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert ".venv/bin/python" in done.stdout


def test_your_own_recordings(home, monkeypatch):
    """Train, compare, embed: as it is written there, on little data."""
    monkeypatch.chdir(home)
    activate, install, train, compare = (
        shlex.split(line) for line in COMMANDS if not line.startswith("make")
    )
    assert activate == [".", ".venv/bin/activate"]
    assert install == ["pip", "install", "."]  # test_wheel.py does it
    tiny = "--channels [16,16,16,16] --number_of_epochs 1 --batch_size 4 "
    tiny += "--crop_seconds 0.5 --num_workers 0 --device cpu"
    for words, statuses in (([*train, *tiny.split()], [0]), (compare, [0, 1])):
        assert words[0] == "speechbrain-ram"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words[1:]],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
        )
        assert done.returncode in statuses, done.stderr[-2000:]
        assert "torchvision" not in done.stderr  # a warning of SpeechBrain's
    assert "score" in done.stdout
    (block,) = blocks("python")
    namespace = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["embeddings"].shape == (2, 512)


def test_every_recipe_is_named():
    table = README[README.index("## Recipes") : README.index("## Results")]
    assert set(re.findall(r"`([\w-]+)`", table)) == set(recipes())


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
