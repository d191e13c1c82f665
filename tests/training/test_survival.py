"""Runs that are killed end as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import REPOSITORY, run_recipe
from survival import differences, output_of, train_in_process

from speechbrain_ram.cli import train as cli_train
from speechbrain_ram.data.dataset import CropDataset
from speechbrain_ram.training import robust_brain
from speechbrain_ram.training.checkpoints import SafeCheckpointer
from speechbrain_ram.training.leaving import Interrupted

SEED = 6
N_KILLS = 20
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory):
    """A run that nobody disturbs, and its events."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, events = train_in_process(tiny_corpus, folder)
    assert status == 0, output_of(folder)
    return folder, events


def kill_and_continue(corpus, whole, folder, **how):
    status, _ = train_in_process(corpus, folder, **how)
    assert status == KILLED, output_of(folder)
    how = {k: v for k, v in how.items() if k not in ("kill_at", "seconds")}
    status, _ = train_in_process(corpus, folder, **how)
    assert status == 0, output_of(folder)
    assert differences(whole, folder) == set()


def test_the_comparison_sees_another_seed(tiny_corpus, whole, tmp_path):
    status, _ = train_in_process(tiny_corpus, tmp_path / "run", seed=7)
    assert status == 0
    assert {"embedding_model", "optimizer", "log", "scores.txt"} <= differences(
        whole[0], tmp_path / "run"
    )


def test_the_same_seed_gives_the_same_run(tiny_corpus, whole, tmp_path):
    """Whether the main process reads the data or a worker."""
    status, _ = train_in_process(tiny_corpus, tmp_path / "run", num_workers=1)
    assert status == 0
    assert differences(whole[0], tmp_path / "run") == set()


# One moment of each kind, so that none is left to luck.
MOMENTS = {
    "a step": ("before optimizers_step", 0.6),
    "a validation": ("before evaluate_batch", 0.9),
    "a checkpoint": ("before fsync", 0.5),
    "the export": ("before export_inference", 0.0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_within(moment, tiny_corpus, whole, tmp_path):
    name, share = MOMENTS[moment]
    at = [i for i, event in enumerate(whole[1]) if event == name]
    kill_and_continue(
        tiny_corpus,
        whole[0],
        tmp_path / "run",
        kill_at=at[int(share * len(at))] + (moment == "the export"),
    )


@pytest.mark.slow
def test_a_run_killed_before_any_of_its_events(tiny_corpus, whole, tmp_path):
    """20 events of all kinds, drawn from a seed; a fresh run for each."""
    draw = random.Random(SEED)
    moments = draw.sample(range(len(whole[1])), N_KILLS)
    for moment in moments:
        print(f"killed at event {moment}, {whole[1][moment]}")
        kill_and_continue(
            tiny_corpus, whole[0], tmp_path / f"{moment}", kill_at=moment
        )


@pytest.mark.slow
def test_a_run_killed_at_any_time(tiny_corpus, whole, tmp_path):
    """20 moments of processor time, drawn from a seed, with a worker."""
    folder = tmp_path / "whole"
    low, high = 0.2, 1.0
    status, _ = train_in_process(tiny_corpus, folder, num_workers=1)
    assert status == 0, output_of(folder)
    assert differences(whole[0], folder) == set()
    # How long a run takes, found by killing one that never ends.
    while train_in_process(
        tiny_corpus, tmp_path / f"probe{high}", num_workers=1, seconds=high
    )[0]:
        high *= 1.3
    draw = random.Random(SEED)
    killed = 0
    for number in range(2 * N_KILLS):
        seconds = draw.uniform(low, high)
        run = tmp_path / f"{number}"
        how = {"num_workers": 1}
        status, events = train_in_process(
            tiny_corpus, run, seconds=seconds, **how
        )
        assert status in (0, KILLED), output_of(run)
        killed += status == KILLED
        last = events[-1] if events else "the start"
        print(f"killed after {seconds:.2f} s, {last}: {status}")
        status, _ = train_in_process(tiny_corpus, run, **how)
        assert status == 0, output_of(run)
        assert differences(whole[0], run) == set()
        shutil.rmtree(run)
        if killed == N_KILLS:
            return
    pytest.fail(f"only {killed} of {2 * N_KILLS} runs were killed")


@pytest.mark.slow
def test_a_run_killed_again_and_again(tiny_corpus, whole, tmp_path):
    """One run, killed 20 times on its way."""
    draw = random.Random(SEED)
    folder, killed = tmp_path / "run", 0
    while killed < N_KILLS:
        status, _ = train_in_process(
            tiny_corpus, folder, kill_at=draw.randrange(5, 60)
        )
        if status == 0:
            assert differences(whole[0], folder) == set()
            shutil.rmtree(folder)  # it got through: begin another one
            continue
        assert status == KILLED, output_of(folder)
        killed += 1
    status, _ = train_in_process(tiny_corpus, folder)
    assert status == 0
    assert differences(whole[0], folder) == set()


@pytest.mark.slow
def test_a_run_of_two_threads(tiny_corpus, tmp_path):
    """Twice the same, and the same after a kill, as with one thread."""
    runs = tmp_path / "whole", tmp_path / "again", tmp_path / "killed"
    for run in runs[:2]:
        status, events = train_in_process(tiny_corpus, run, threads=2)
        assert status == 0, output_of(run)
    assert differences(*runs[:2]) == set()
    steps = [i for i, each in enumerate(events) if each == "before fit_batch"]
    kill_and_continue(
        tiny_corpus, runs[0], runs[2], threads=2, kill_at=steps[-1]
    )


# -- asked to leave ---------------------------------------------------------

ASKED = [
    ("a step", signal.SIGTERM, 1),
    ("a validation", signal.SIGINT, 0),
    ("a checkpoint", signal.SIGINT, 0),
    ("the export", signal.SIGTERM, 0),
]


@pytest.mark.parametrize("moment, by, num_workers", ASKED)
def test_a_run_asked_to_leave(
    moment, by, num_workers, tiny_corpus, whole, tmp_path
):
    """By the signal to all its processes, as Ctrl-C and schedulers send."""
    name, share = MOMENTS[moment]
    at = [i for i, event in enumerate(whole[1]) if event == name]
    folder = tmp_path / "run"
    status, events = train_in_process(
        tiny_corpus,
        folder,
        kill_at=at[int(share * len(at))],
        by=by,
        num_workers=num_workers,
    )
    assert status == 75, output_of(folder)
    if moment != "the export":
        steps = events.count("after optimizers_step")
        newest = SafeCheckpointer(folder / "save").find_checkpoint()
        state = torch.load(newest.paramfiles["brain"], weights_only=True)
        assert state["optimizer_step"] == steps  # not one is lost
        assert f"{by.name} was received" in output_of(folder)
        assert "The same command goes on" in output_of(folder)
    status, _ = train_in_process(tiny_corpus, folder, num_workers=num_workers)
    assert status == 0, output_of(folder)
    assert differences(whole[0], folder) == set()


@pytest.mark.parametrize(
    "event, by, alone, num_workers",
    [
        ("before optimizers_step", signal.SIGTERM, False, 1),
        ("before optimizers_step", signal.SIGINT, False, 4),
        ("before optimizers_step", signal.SIGTERM, True, 4),
        ("before evaluate_batch", signal.SIGTERM, False, 1),
        ("before encode", signal.SIGTERM, False, 4),
    ],
)
def test_workers_do_not_keep_a_run_from_leaving(
    event, by, alone, num_workers, tiny_corpus, whole, tmp_path
):
    """A worker that ignored its run's signal would be waited for forever.

    Workers live from epoch to epoch.
    """
    at = [i for i, name in enumerate(whole[1]) if name == event]
    status, _ = train_in_process(
        tiny_corpus,
        tmp_path / "run",
        kill_at=at[-1 - (event == "before optimizers_step")],
        by=by,
        alone=alone,
        num_workers=num_workers,
        number_of_epochs=3,
    )
    left = time.time()
    assert status == 75, output_of(tmp_path / "run")
    newest = SafeCheckpointer(tmp_path / "run" / "save").find_checkpoint()
    assert left - newest.path.stat().st_mtime < 20  # 10 on an idle machine
    # Let go of at once, not after the 5 seconds that torch grants.
    assert "exited unexpectedly" not in output_of(tmp_path / "run")


def test_a_run_asked_to_leave_before_its_first_checkpoint(
    tiny_corpus, whole, tmp_path
):
    status, _ = train_in_process(
        tiny_corpus,
        tmp_path / "run",
        kill_at=whole[1].index("before encode"),
        by=signal.SIGTERM,
    )
    assert status == 75
    said = output_of(tmp_path / "run")
    assert "SIGTERM was received. There is no checkpoint yet: the same" in said


LOADING = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch": os.kill(os.getpid(), signal.{signal})
sys.meta_path.insert(0, Finder())
sys.argv = ["train_speaker_embeddings.py", "own", "--corpus", "nowhere"]
"""
PROGRAMS = {
    "speechbrain-ram train": "from speechbrain_ram.cli.main import main\n"
    "main(['train', *sys.argv[1:]])",
    "the script": "runpy.run_path(sys.argv[0], run_name='__main__')",
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_asked_to_leave_while_pytorch_is_imported(program, name):
    code = LOADING.format(signal=name) + PROGRAMS[program]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 75
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Exit status 75: {name} was received. Nothing is l")


def test_asked_to_leave_while_data_are_prepared(
    tiny_corpus, tmp_path, monkeypatch
):
    """The message says what the same command will do."""

    def find_run(*_):
        raise Interrupted("SIGINT was received")

    monkeypatch.setattr(cli_train, "find_run", find_run)
    for checkpoint, text in (
        (None, "no checkpoint yet"),
        ("CKPT+a", "goes on"),
    ):
        if checkpoint:
            (tmp_path / "run" / "save" / checkpoint).mkdir(parents=True)
        with pytest.raises(Interrupted) as asked:
            run_recipe(tiny_corpus, tmp_path / "run")
        said = asked.value.farewell()
        assert said.startswith("Exit status 75: SIGINT was received. ")
        assert text in said


# -- what is not kept -------------------------------------------------------


def test_another_number_of_threads_is_no_secret(
    tiny_corpus, interrupted, tmp_path
):
    shutil.copytree(interrupted, tmp_path / "run")
    status, _ = train_in_process(tiny_corpus, tmp_path / "run", threads=2)
    assert status == 0
    printed = output_of(tmp_path / "run")
    assert "begun with 1 threads and goes on with 2" in printed
    assert "OMP_NUM_THREADS=1" in printed


# -- controls: with a piece of state left out, the comparison must see it ---


@pytest.fixture(scope="module")
def interrupted(tiny_corpus, whole, tmp_path_factory):
    """A run that was killed in its second epoch, after a checkpoint."""
    steps = [i for i, e in enumerate(whole[1]) if e == "before fit_batch"]
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    status, _ = train_in_process(tiny_corpus, folder, kill_at=steps[-1])
    assert status == KILLED, output_of(folder)
    newest = SafeCheckpointer(folder / "save").find_checkpoint()
    assert not newest.meta["end-of-epoch"]
    return folder


# Each runs in the process of the run, so that no other test meets it.


def forget(*names):
    """Load everything but some recoverables."""
    load = SafeCheckpointer.load_checkpoint

    def partly(self, checkpoint):
        kept = self.recoverables
        self.recoverables = {k: v for k, v in kept.items() if k not in names}
        load(self, checkpoint)
        self.recoverables = kept

    SafeCheckpointer.load_checkpoint = partly


def forget_random_numbers():
    robust_brain.restore_random_state = lambda _: None


def forget_in_brain(*names):
    """Load the brain's state with parts set to nothing."""
    load = torch.load

    def partly(path, **kwargs):
        state = load(path, **kwargs)
        if str(path).endswith("brain.ckpt"):
            state.update({name: type(state[name])() for name in names})
            if "tally" in names:
                state["tally"] = robust_brain.Tally().__dict__
        return state

    torch.load = partly


def forget_epoch_of_crops():
    CropDataset.set_epoch = lambda *_: None


CONTROLS = {
    "nothing": (None, None),
    "sampler": (partial(forget, "dataloader-TRAIN"), "embedding_model"),
    "random numbers": (forget_random_numbers, "embedding_model"),
    "schedule": (
        partial(forget_in_brain, "step", "optimizer_step"),
        "embedding_model",
    ),
    "crops": (forget_epoch_of_crops, "embedding_model"),
    "optimiser": (partial(forget, "optimizer"), "embedding_model"),
    "epoch": (partial(forget, "epoch_counter"), "embedding_model"),
    "sums": (partial(forget_in_brain, "tally"), "log"),
    "log": (partial(forget_in_brain, "log"), "log"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_what_a_checkpoint_forgets_is_seen(
    control, tiny_corpus, whole, interrupted, tmp_path
):
    spoil, seen = CONTROLS[control]
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    status, _ = train_in_process(tiny_corpus, folder, spoil=spoil)
    assert status == 0, output_of(folder)
    found = differences(whole[0], folder)
    assert (seen in found) if seen else not found
    assert "OMP_NUM_THREADS" not in output_of(folder)


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(
    tiny_corpus, whole, tmp_path
):
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("cannot mount a small disk: this test did NOT run")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr} This test did NOT run")
    try:
        # What a run prints goes beside its folder: not to the small disk.
        (tmp_path / "run").symlink_to(disk, target_is_directory=True)
        status, _ = train_in_process(tiny_corpus, tmp_path / "run")
        assert status == 1
        said = output_of(tmp_path / "run")
        assert "the disk is full" in said and "MB free" in said
        assert "run the same command" in said
        more = ["mount", "-o", "remount,size=200m", str(disk)]
        subprocess.run(more, check=True)
        status, _ = train_in_process(tiny_corpus, tmp_path / "run")
        assert status == 0, output_of(tmp_path / "run")
        assert differences(whole[0], tmp_path / "run") == set()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
