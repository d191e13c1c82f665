"""Checkpoints are whole or not there, and damage is named."""

import errno
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_ram.training.checkpoint_files import checksum_of_meta
from speechbrain_ram.training.checkpoints import (
    CheckpointError,
    DamagedCheckpoint,
    SafeCheckpointer,
    read_checkpoint,
)


@pytest.fixture
def model():
    return torch.nn.Linear(30, 20)


@pytest.fixture
def checkpointer(model, tmp_path):
    return SafeCheckpointer(tmp_path / "save", {"model": model})


def set_to(model, value):
    torch.nn.init.constant_(model.weight, value)


def again(checkpointer):
    """As another process sees the folder."""
    return SafeCheckpointer(
        checkpointer.checkpoints_dir, checkpointer.recoverables
    )


def flip_a_bit(file, position):
    data = bytearray(file.read_bytes())
    data[position % len(data)] ^= 1 << (position % 8)
    file.write_bytes(data)


def test_speechbrain_reads_ours_and_we_read_its(model, tmp_path):
    set_to(model, 1)
    ours = SafeCheckpointer(tmp_path / "ours", {"model": model})
    ours.save_checkpoint(meta={"EER": 2.5})
    its = Checkpointer(tmp_path / "its", {"model": model})
    its.save_checkpoint(meta={"EER": 2.5})
    for reader, folder in ((Checkpointer, "ours"), (SafeCheckpointer, "its")):
        set_to(model, 0)
        found = reader(tmp_path / folder, {"model": model})
        assert found.recover_if_possible(min_key="EER").meta["EER"] == 2.5
        assert (model.weight == 1).all()


def test_every_flipped_bit_is_found(checkpointer):
    """400 faults: one bit in any file of a checkpoint, CKPT.yaml too."""
    path = checkpointer.save_checkpoint(meta={"EER": 12.25}).path
    # Comments and the spelling of numbers aside, which carry nothing.
    written = read_checkpoint(path)
    draw, unseen = random.Random(0), 0
    for _ in range(400):
        file = draw.choice(sorted(path.iterdir()))
        intact = file.read_bytes()
        flip_a_bit(file, draw.randrange(len(intact)))
        try:
            found = read_checkpoint(path)
        except CheckpointError:
            pass
        else:
            assert file.name == "CKPT.yaml"
            assert found.meta == written.meta
            unseen += 1
        file.write_bytes(intact)
    assert unseen < 60  # of the comment line and the like


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "meta", "empty"])
def test_a_damaged_checkpoint_is_named_and_skipped(
    checkpointer, model, damage, caplog
):
    set_to(model, 1)
    checkpointer.save_checkpoint()
    set_to(model, 2)
    newest = checkpointer.save_checkpoint().path
    file = newest / ("CKPT.yaml" if damage == "meta" else "model.ckpt")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "remove":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        flip_a_bit(file, file.stat().st_size // 2)
    set_to(model, 0)
    again(checkpointer).recover_if_possible()
    assert (model.weight == 1).all()
    assert str(file) in caplog.text and "skipped" in caplog.text
    assert newest.is_dir()  # left for a person to look at
    with pytest.raises(DamagedCheckpoint, match=newest.name[:4]):
        read_checkpoint(newest)


def test_no_whole_checkpoint_is_an_error_not_a_new_beginning(checkpointer):
    for _ in range(2):
        path = checkpointer.save_checkpoint().path
        flip_a_bit(path / "model.ckpt", 200)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        again(checkpointer).recover_if_possible()


def test_a_newer_format_is_refused(checkpointer):
    path = checkpointer.save_checkpoint().path
    meta = yaml.safe_load((path / "CKPT.yaml").read_text())
    meta["format"] = 2
    meta["checksum"] = checksum_of_meta(meta)
    (path / "CKPT.yaml").write_text(yaml.dump(meta))
    with pytest.raises(CheckpointError, match="format 2, this version"):
        again(checkpointer).list_checkpoints()


KILLED_WHILE_WRITING = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from speechbrain_ram.training.checkpoints import SafeCheckpointer

model = torch.nn.Linear(30, 20)
files = {f"part{i}": model for i in range(4)}
first, folder = Path(sys.argv[1]), Path(sys.argv[2])
SafeCheckpointer(first, files).save_checkpoint(meta={"which": "whole"})
for moment in range(100):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(first, folder)
    checkpointer = SafeCheckpointer(folder, files)
    child = os.fork()
    if child == 0:
        count = 0
        def watch(place, name):
            function = getattr(place, name)
            def watched(*args, **kwargs):
                global count
                count += 1
                if count > moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            setattr(place, name, watched)
        for place, name in (
            (torch, "save"), (os, "fsync"), (Path, "rename"),
            (Path, "write_text"), (os, "makedirs"),
        ):
            watch(place, name)
        checkpointer.save_and_keep_only(meta={"which": "new"})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = SafeCheckpointer(folder, files)
    newest = found.recover_if_possible()
    assert newest is not None and not found._damaged, moment
    if status == 0:
        assert newest.meta["which"] == "new"
        print("killed", moment)
        sys.exit()
"""


def test_killed_at_every_call_that_writes(tmp_path):
    """SIGKILL before each single call that touches the disk."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", KILLED_WHILE_WRITING),
            *(str(tmp_path / "first"), str(tmp_path / "save")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 10
    left = [each.name for each in (tmp_path / "save").iterdir()]
    assert all(name.startswith("CKPT") for name in left), left


def test_a_checkpoint_that_was_cut_short_is_not_there(model, tmp_path):
    """SpeechBrain's own lists it: docs/host-issues/01-cut-short.py."""

    def dies(obj, path):
        raise KeyboardInterrupt

    ours = SafeCheckpointer(tmp_path, {"model": model})
    ours.add_recoverable("second", model, custom_save_hook=dies)
    with pytest.raises(KeyboardInterrupt):
        ours.save_checkpoint()
    assert again(ours).list_checkpoints() == []


# -- pruning ---------------------------------------------------------------


def metas(checkpointer, key):
    return [
        each.meta.get(key) for each in again(checkpointer).find_checkpoints()
    ]


def test_newest_one_before_and_best_are_kept(checkpointer):
    for value in (5.0, 3.0, 4.0, 6.0, 7.0):
        checkpointer.save_and_keep_only(meta={"EER": value}, min_keys=["EER"])
    assert metas(checkpointer, "EER") == [7.0, 6.0, 3.0]


def test_nothing_is_pruned_before_the_new_one_is_there(
    checkpointer, monkeypatch
):
    for value in (5.0, 3.0, 4.0):
        checkpointer.save_and_keep_only(meta={"EER": value}, min_keys=["EER"])
    before = metas(checkpointer, "EER")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("speechbrain_ram.training.checkpoints._sync", full)
    with pytest.raises(CheckpointError, match="is intact"):
        checkpointer.save_and_keep_only(meta={"EER": 1.0}, min_keys=["EER"])
    assert metas(checkpointer, "EER") == before


def test_a_clock_set_back_does_not_hide_the_newest(checkpointer, monkeypatch):
    checkpointer.save_checkpoint(meta={"which": 1})
    monkeypatch.setattr("time.time", lambda: 1e9)
    checkpointer.save_checkpoint(meta={"which": 2})
    assert metas(checkpointer, "which") == [2, 1]


def test_a_name_of_ones_own_may_be_written_again(checkpointer):
    checkpointer.save_checkpoint(name="mine", meta={"which": 1})
    checkpointer.save_checkpoint(name="mine", meta={"which": 2})
    assert metas(checkpointer, "which") == [2]


def test_num_to_keep_below_zero(checkpointer):
    with pytest.raises(ValueError, match="num_to_keep is -1"):
        checkpointer.delete_checkpoints(num_to_keep=-1)


def test_defaults_do_not_grow(checkpointer):
    for _ in range(3):
        checkpointer.save_and_keep_only()
    assert len(metas(checkpointer, "x")) == 2
    checkpointer.save_and_keep_only(keep_recent=False)
    assert len(metas(checkpointer, "x")) == 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT])
def test_only_a_full_disk_is_called_full(checkpointer, monkeypatch, number):
    checkpointer.save_checkpoint()

    def fails(*_):
        raise OSError(number, "something else")

    monkeypatch.setattr("speechbrain_ram.training.checkpoints._sync", fails)
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        checkpointer.save_checkpoint()
    assert "is full" not in str(caught.value)


def test_a_folder_that_is_deleted_meanwhile(checkpointer, monkeypatch):
    folder = checkpointer.checkpoints_dir

    def deleted(*_):
        shutil.rmtree(folder)
        raise FileNotFoundError(errno.ENOENT, "No such file", str(folder))

    monkeypatch.setattr("speechbrain_ram.training.checkpoints._sync", deleted)
    with pytest.raises(CheckpointError, match="Was it deleted or moved"):
        checkpointer.save_checkpoint()


# -- a full disk -----------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("cannot mount a small disk: this test did NOT run")
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr} This test did NOT run")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_intact(small_disk):
    model = torch.nn.Linear(100, 1000)  # 0.4 MB
    checkpointer = SafeCheckpointer(small_disk / "save", {"model": model})
    for value in range(1, 30):
        set_to(model, value)
        try:
            checkpointer.save_checkpoint(meta={"which": value})
        except CheckpointError as error:
            assert "MB free" in str(error) and "is intact" in str(error)
            assert "run the same command" in str(error)
            break
    else:
        pytest.fail("the disk was never full")
    assert value > 2
    again(checkpointer).recover_if_possible()
    assert (model.weight == value - 1).all()
    assert not list((small_disk / "save").glob(".*"))  # room is given back
