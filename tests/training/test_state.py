"""What a checkpoint may set in a brain."""

import copy

import pytest
import torch

from speechbrain_ram.training.brain import SpeakerBrain
from speechbrain_ram.training.checkpoint_files import CheckpointError
from speechbrain_ram.training.distributed import random_state
from speechbrain_ram.training.state import read_state

STATE = {
    "step": 3,
    "avg_train_loss": 1.5,
    "optimizer_step": 3,
    "n_bad_steps": 0,
    "bad_in_a_row": 0,
    "n_scaled_down": 0,
    "tally": {
        "n_right": 1,
        "n_seen": 4,
        "loss_sum": 2.5,
        "n_steps": 3,
        "grad_norm": 0.5,
    },
    "faults": {"a": "gone"},
    "joint_batch": 4,
    "threads": 1,
    "random": [random_state()],
    "kept": {
        "rate": 0.1,
        "untrained": {"EER": 30.0},
        "diagnosed": {
            "samples": torch.zeros(6, 4),
            "classes": torch.zeros(4),
            "n_classes": 7,
        },
    },
    "log": "epoch: 1\n",
}
KEPT = SpeakerBrain.kept_attributes


@pytest.fixture
def file(tmp_path):
    return tmp_path / "brain.ckpt"


def test_a_whole_state_comes_back_for_each_rank(file):
    torch.save({**STATE, "random": [random_state(), random_state()]}, file)
    before = random_state()
    for rank in (0, 1, 7):
        state = read_state(file, KEPT, rank)
        assert state["kept"]["rate"] == 0.1 and state["tally"]["n_seen"] == 4
        assert state["random"].keys() == before.keys()
    assert torch.equal(random_state()["torch"], before["torch"])
    torch.save({**STATE, "kept": {}, "log": None}, file)
    assert read_state(file, KEPT, 0)["kept"] == {}


@pytest.mark.parametrize(
    "name, value",
    [
        ("step", -1),
        ("step", "3"),
        ("step", True),
        ("optimizer_step", 1.5),
        ("n_bad_steps", None),
        ("avg_train_loss", "1"),
        ("tally", {}),
        ("tally", {**STATE["tally"], "n_seen": -1}),
        ("tally", {**STATE["tally"], "loss_sum": "2"}),
        ("tally", {**STATE["tally"], "more": 1}),
        ("faults", ["a"]),
        ("faults", {"a": 1}),
        ("joint_batch", "4"),
        ("threads", None),
        ("random", []),
        ("random", {}),
        ("random", [7]),
        ("random", [{}]),
        ("random", [{**random_state(), "torch": torch.zeros(3)}]),
        ("random", [{**random_state(), "python": (3, [1, 2], None)}]),
        ("random", [{**random_state(), "numpy": ([], 9, 0, 0.0)}]),
        ("kept", []),
        ("kept", {"rate": "0.1"}),
        ("kept", {"rate": float("nan")}),
        ("kept", {"untrained": [1]}),
        ("kept", {"untrained": {"EER": "30"}}),
        ("kept", {"diagnosed": {}}),
        ("kept", {"diagnosed": {**STATE["kept"]["diagnosed"], "samples": 3}}),
        (
            "kept",
            {
                "diagnosed": {
                    **STATE["kept"]["diagnosed"],
                    "samples": torch.zeros(5, 4),
                }
            },
        ),
        ("kept", {"modules": {}}),
        ("kept", {"fit": 1}),
        ("kept", {1: 2}),
        ("log", 7),
    ],
)
def test_nothing_else_is_set(file, name, value):
    torch.save({**copy.deepcopy(STATE), name: value}, file)
    before = random_state()
    with pytest.raises(CheckpointError, match=f"'{file}'"):
        read_state(file, KEPT, 0)
    assert torch.equal(random_state()["torch"], before["torch"])
    assert random_state()["python"] == before["python"]


@pytest.mark.parametrize("name", STATE)
def test_what_is_missing_is_named(file, name):
    torch.save({k: v for k, v in STATE.items() if k != name}, file)
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_state(file, KEPT, 0)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no keys"),
        ("[1]", "no keys"),
        ("step: 3", "avg_train_loss is missing"),
        ("step: x\navg_train_loss: 1.0", "step is x"),
        ("step: !!python/name:os.x\navg_train_loss: 1.0", "not valid YAML"),
    ],
)
def test_speechbrains_own_state(file, text, says):
    file.write_text("step: 3\navg_train_loss: 1.0\n")
    assert read_state(file, KEPT, 0)["optimizer_step"] == 3
    file.write_text(text)
    with pytest.raises((CheckpointError, ValueError), match=says):
        read_state(file, KEPT, 0)
