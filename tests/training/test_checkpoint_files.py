"""Checkpoints from anywhere: every damage is one error that names it."""

import os
import pickle
import time

import pytest
import torch
import yaml
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_ram.training.checkpoint_files import (
    CheckpointError,
    DamagedCheckpoint,
    checksum_of_meta,
    read_checkpoint,
    write_meta,
)
from speechbrain_ram.training.checkpoints import SafeCheckpointer

META = {"unixtime": 1e9, "end-of-epoch": True}

#: 10^10 values in 500 bytes.
LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(10)
)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "CKPT+x"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "text, says",
    [
        (LAUGHS, "more than 10000 values"),
        ("a: &a [*a]", "within itself"),
        ("a: " + 60 * "[" + 60 * "]", "lists in lists"),
        ("a: " + 10**5 * "[", "lists in lists"),
        (10**6 * "#", "at most 262144 are read"),
        ("a: !!python/object/apply:os.getcwd []", "python/object/apply"),
        ("", "no KEY: VALUE"),
        ("[1, 2]", "no KEY: VALUE"),
        ("? [a]\n: 1", "unixtime is 'None'"),
        ("1: 2\na: 3", "unixtime is 'None'"),
        ("\0", "NUL byte"),
        ("\x1b[2J: 1", "not valid YAML"),
    ],
)
def test_text_that_is_no_description(folder, text, says):
    (folder / "CKPT.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(DamagedCheckpoint, match=f"CKPT.yaml.*{says}"):
        read_checkpoint(folder)
    assert time.monotonic() - began < 5


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "CKPT.yaml")
    with pytest.raises(DamagedCheckpoint, match="not a regular file"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("EER", "abc"),
        ("EER", float("nan")),
        ("EER", float("inf")),
        ("EER", True),
        ("EER", [1.0]),
        ("EER", 10**400),
        ("error", "1.5"),
        ("epoch", -1),
        ("epoch", 1.5),
        ("end-of-epoch", [True]),
        ("end-of-epoch", "yes"),
        ("end-of-epoch", None),
        ("unixtime", "1700000000.0"),
        ("unixtime", float("nan")),
        ("unixtime", None),
        ("files", ["model.ckpt"]),
        ("files", {"/etc/passwd": "0"}),
        ("files", {"../model.ckpt": "0"}),
        ("files", {"..": "0"}),
        ("files", {"": "0"}),
        ("files", {"a\\b": "0"}),
        ("files", {1: "0"}),
        ("files", {"model.ckpt": 7}),
        ("files", None),
    ],
)
@pytest.mark.parametrize("format_number", [0, 1])
def test_a_value_of_another_kind(folder, field, value, format_number):
    """Its checksum is right: somebody means it."""
    meta = {**META, "format": format_number, field: value}
    meta["checksum"] = checksum_of_meta(meta)
    write_meta(folder / "CKPT.yaml", meta)
    with pytest.raises(DamagedCheckpoint, match=f"CKPT.yaml'.* {field} is"):
        read_checkpoint(folder)


@pytest.mark.parametrize("number", ["one", [1], 1.5, -1, {"a": 1}])
def test_an_impossible_format(folder, number):
    meta = {**META, "format": number}
    meta["checksum"] = checksum_of_meta(meta)
    write_meta(folder / "CKPT.yaml", meta)
    with pytest.raises(CheckpointError, match="has format"):
        read_checkpoint(folder)


def test_values_come_back_as_they_were_written(folder):
    """By us and by PyYAML, which the host uses."""
    meta = {
        **META,
        "EER": 1e-05,
        "minDCF(0.01)": 1e22,
        "texts": ["yes", "1:30", "0123", "1_000", "2020-01-01", "on\n", "~"],
        "none": None,
        "files": {"x.ckpt": "12a5", "y.ckpt": "0" * 32},
    }
    meta["checksum"] = checksum_of_meta(meta)
    write_meta(folder / "CKPT.yaml", meta)
    assert yaml.safe_load((folder / "CKPT.yaml").read_text()) == meta
    with pytest.raises(DamagedCheckpoint, match="x.ckpt' of .* is missing"):
        read_checkpoint(folder)  # so the checksum of meta is right
    (folder / "CKPT.yaml").write_text(yaml.dump(meta))  # as before
    with pytest.raises(DamagedCheckpoint, match="x.ckpt' of .* is missing"):
        read_checkpoint(folder)


# -- states of the host's and torch's classes ------------------------------


class Bad:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.fixture
def objects():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    counter = EpochCounter(limit=9)
    counter.current = 1
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "counter": counter,
        "dataloader": SaveableDataLoader(range(8), batch_size=2),
    }


def spoilt(name, state):
    """What a damaged optimiser, or another part, may hold."""
    if name == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(7)
    elif name == "NaN":
        state["state"][0]["exp_avg"][0, 0] = float("nan")
    elif name == "parameter":
        state["state"]["x"] = {}
    elif name == "text":
        state["param_groups"][0]["weight_decay"] = "abc"
    elif name == "betas":
        state["param_groups"][0]["betas"] = 3
    elif name == "infinite":
        state["param_groups"][0]["eps"] = float("inf")
    elif name == "groups":
        state["param_groups"] = []
    elif name == "no groups":
        del state["param_groups"]
    return state


@pytest.mark.parametrize(
    "file, damage",
    [
        ("model", b""),
        ("model", b"no weights"),
        ("model", pickle.dumps(Bad())),
        ("model", [1]),
        ("optimizer", b"\x80"),
        ("optimizer", []),
        *[
            ("optimizer", name)
            for name in (
                *("shape", "NaN", "parameter", "text"),
                *("betas", "infinite", "groups", "no groups"),
            )
        ],
        ("counter", b""),
        ("counter", b"three"),
        ("counter", b"-3"),
        ("counter", b"9" * 5000),
        ("counter", b"9" * 30),
        ("counter", b"\xff"),
        ("dataloader", b"many"),
        ("dataloader", b"-1"),
        ("dataloader", b"99"),
        ("dataloader", b"\xff"),
    ],
)
def test_a_damaged_state_is_one_error(tmp_path, objects, file, damage):
    """In folders of SpeechBrain's own, which carry no checksums."""
    its = Checkpointer(tmp_path, objects)
    path = its.save_checkpoint(end_of_epoch=False).path / f"{file}.ckpt"
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    elif isinstance(damage, str):
        state = torch.load(path)
        torch.save(spoilt(damage, state), path)
    else:
        torch.save(damage, path)
    ours = SafeCheckpointer(tmp_path, objects)
    with pytest.raises(CheckpointError) as caught:
        ours.recover_if_possible()
    assert f"'{path}' is damaged" in str(caught.value)


def test_a_state_that_is_missing(tmp_path, objects):
    its = Checkpointer(tmp_path, objects)
    path = its.save_checkpoint().path
    (path / "optimizer.ckpt").unlink()
    with pytest.raises(CheckpointError, match="optimizer.ckpt' is missing"):
        SafeCheckpointer(tmp_path, objects).recover_if_possible()


def test_whole_states_are_taken(tmp_path, objects):
    its = Checkpointer(tmp_path, objects)
    its.save_checkpoint(end_of_epoch=False)
    before = objects["optimizer"].state_dict()
    objects["optimizer"].param_groups[0]["lr"] = 5
    assert SafeCheckpointer(tmp_path, objects).recover_if_possible()
    after = objects["optimizer"].state_dict()
    assert after["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("process", ["9" * 30, "\u00b2", "x", ""])
def test_a_leftover_of_no_process_is_swept(tmp_path, process):
    host = os.uname().nodename
    left = tmp_path / f".CKPT+x@{host}@{process}.part"
    left.mkdir()
    SafeCheckpointer(tmp_path, {}).save_checkpoint()
    assert not left.exists()
