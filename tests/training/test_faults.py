"""What goes wrong with data and numbers while a run is training."""

import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, run_recipe
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.checkpoints import Checkpointer
from survival import differences

from speechbrain_ram.data import dataset as dataset_module
from speechbrain_ram.data.audio import Audio, AudioError
from speechbrain_ram.data.dataset import CropDataset
from speechbrain_ram.training import leaving, robust_brain
from speechbrain_ram.training.brain import SpeakerBrain
from speechbrain_ram.training.faults import (
    Batch,
    Fault,
    FaultError,
    FaultList,
    SkipUnreadable,
    WorkerError,
    is_full_shared_memory,
)
from speechbrain_ram.training.leaving import Interrupted
from speechbrain_ram.training.steps import NonFiniteError


class Flaky:
    """A dataset whose items fail so many times."""

    data_ids = ("a", "b")

    def __init__(self, failures):
        self.failures = failures
        self.tries = 0

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.tries += 1
        if self.tries <= self.failures:
            raise OSError("Input/output error")
        return index


def test_a_stutter_is_bridged():
    flaky = Flaky(2)
    assert SkipUnreadable(flaky, waits=(0, 0))[1] == 1
    assert flaky.tries == 3


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 3, 4), (5,)])
def test_batches_are_speechbrains(lengths):
    items = [{"id": str(n), "sig": torch.randn(n)} for n in lengths]
    ours, theirs = Batch(items).data, PaddedBatch(items)
    assert isinstance(ours, PaddedBatch) and ours.id == theirs.id
    for one, other in zip(ours.sig, theirs.sig, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def test_a_batch_of_which_nothing_can_be_read():
    batch = Batch([Fault("b", "gone")])
    assert batch.data is None and batch.faults == [Fault("b", "gone")]


def test_what_stays_broken_becomes_a_fault():
    flaky = Flaky(10)
    item = SkipUnreadable(flaky, waits=(0, 0))[1]
    assert item == Fault("b", "Input/output error") and flaky.tries == 3


def test_a_bug_is_no_fault():
    class Buggy(Flaky):
        def __getitem__(self, index):
            raise KeyError("spk_id")

    with pytest.raises(KeyError):
        SkipUnreadable(Buggy(0), waits=(0,))[0]


def test_faults_are_listed_and_counted_once(tmp_path):
    faults = FaultList(300, 0.02, tmp_path / "faults.txt")
    for _ in range(3):
        faults.add([Fault("a", "gone\nfor good"), Fault("b", "torn")])
        faults.check()
    listed = (tmp_path / "faults.txt").read_text()
    assert listed == "a\tgone for good\nb\ttorn\n"
    faults.add([Fault(f"{i}", f"{i}.wav is empty") for i in range(5)])
    with pytest.raises(FaultError) as caught:
        faults.check()
    assert re.search(
        "(?s)7 of 300 .*--max_fault_share 0.02 allows 6.* larger .*4.wav is",
        str(caught.value),
    )


@pytest.mark.parametrize(
    "total, share, allowed",
    [
        (51, 0.01, 5),  # one truncated file is 2 % of them
        (27, 0.1, 5),
        (8, 0.01, 2),
        (4, 0.01, 1),
        (3, 0.01, 0),  # never most of a tiny set
        (10_000, 0.01, 100),
        (100, 0.29, 29),
        (51, 0, 0),  # none is none
        (3, 1.0, 3),
    ],
)
def test_a_few_are_allowed_whatever_the_share(total, share, allowed):
    faults = FaultList(total, share)
    faults.add([Fault(str(i), "torn") for i in range(allowed)])
    faults.check()
    faults.add([Fault("one more", "torn")])
    if allowed < total:
        with pytest.raises(FaultError, match=f"allows {allowed}\\."):
            faults.check()


@pytest.mark.parametrize("share", [-0.1, 1.5, 5, float("nan")])
def test_a_share_is_no_percentage(share):
    with pytest.raises(ValueError, match="allowed is 0 to 1"):
        FaultList(10, share)


# -- recordings, in a run ----------------------------------------------------


@pytest.fixture
def vanishing(tiny_corpus, tmp_path, monkeypatch):
    """A corpus of which files go once training has begun."""
    folder = tmp_path / "corpus"
    shutil.copytree(tiny_corpus.train_root, folder)
    monkeypatch.setattr(robust_brain, "SkipUnreadable", impatient)

    def vanish(count):
        start = SpeakerBrain.on_fit_start

        def then_gone(self):
            start(self)
            for name in self.train_set.data_ids[:count]:
                os.unlink(folder / name)

        monkeypatch.setattr(SpeakerBrain, "on_fit_start", then_gone)
        return str(folder)

    return vanish


def impatient(dataset):
    return SkipUnreadable(dataset, waits=(0, 0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_vanished_file_is_skipped_and_listed(
    tiny_corpus, vanishing, tmp_path, num_workers
):
    run = run_recipe(
        tiny_corpus,
        tmp_path / "run",
        data_root=vanishing(2),
        max_fault_share=0.1,
        num_workers=num_workers,
    )
    listed = (run / "training_faults.txt").read_text().splitlines()
    assert len(listed) == 2 and all("does not exist" in x for x in listed)
    assert "train unreadable: 2" in (run / "train_log.txt").read_text()
    assert (run / "inference").is_dir()


def test_too_many_vanished_files_stop_training(
    tiny_corpus, vanishing, tmp_path
):
    with pytest.raises(FaultError, match=r"\d of 27 training utterances could"):
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            data_root=vanishing(9),
            max_fault_share=0.1,
        )


def test_a_disk_that_stutters_changes_nothing(
    tiny_corpus, tiny_run, tmp_path, monkeypatch
):
    """Every third read fails the first time: nothing is lost."""
    failures, count = set(), 0

    class Stuttering(Audio):
        def read(self, path, *args):
            nonlocal count
            count += 1
            if count % 3 == 0 and path not in failures:
                failures.add(path)
                raise AudioError(f"'{path}' cannot be read: Stale file handle.")
            return super().read(path, *args)

    monkeypatch.setattr(dataset_module, "Audio", Stuttering)
    monkeypatch.setattr(robust_brain, "SkipUnreadable", impatient)
    run = run_recipe(tiny_corpus, tmp_path / "run")
    assert len(failures) >= 8
    assert differences(tiny_run, run) == set()


def test_a_dead_worker_is_named(tiny_corpus, tmp_path, monkeypatch):
    parent = os.getpid()

    def killed(self, *args):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(CropDataset, "_read_crop", killed)
    with pytest.raises(
        WorkerError, match=r"pid.*memory.*num_workers.*There is no checkpoint"
    ):
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            num_workers=1,
            verify_untrained=False,
        )


def test_a_hanging_worker_is_not_waited_for(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(CropDataset, "_read_crop", lambda *_: time.sleep(60))
    monkeypatch.setattr(robust_brain, "_LOADER_TIMEOUT", 1)
    with pytest.raises(WorkerError, match="timed out after 1"):
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            num_workers=1,
            verify_untrained=False,
        )


# -- shared memory -----------------------------------------------------------


def test_dev_shm_is_not_the_disk(tiny_corpus, tmp_path, monkeypatch):
    """A worker's batch that found no room, as torch 2.11 words it."""

    def no_room(self, batch):
        raise RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\n"
            "RuntimeError: unable to allocate shared memory(shm) for file "
            "</torch_12_34_0>: Resource temporarily unavailable (11)"
        )

    monkeypatch.setattr(SpeakerBrain, "fit_batch", no_room)
    with pytest.raises(WorkerError, match="^/dev/shm is too.*--num_workers 0"):
        run_recipe(tiny_corpus, tmp_path / "run", verify_untrained=False)


@pytest.mark.parametrize(
    "text, yes",
    [
        ("unable to write to file </torch_1_2_0>: No space left (28)", True),
        ("worker (pid 5) is killed by signal: Bus error. ... shared memory", 1),
        (
            "unable to open shared memory object: Too many open files (24)",
            False,
        ),
        ("DataLoader worker (pid 5) is killed by signal: Killed.", False),
    ],
)
def test_errors_that_are_of_shared_memory(text, yes):
    assert is_full_shared_memory(RuntimeError(text)) == bool(yes)
    assert not is_full_shared_memory(OSError(errno.ENOSPC, "No space", "f"))


SMALL_SHM = """
import sys, torch
from speechbrain_ram.training.faults import Batch, is_full_shared_memory
class Set(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return {"id": str(i), "sig": torch.ones(90000)}
try:
    list(torch.utils.data.DataLoader(
        Set(), batch_size=4, num_workers=1, collate_fn=Batch, timeout=60))
except (OSError, RuntimeError) as error:
    print(is_full_shared_memory(error), type(error).__name__)
"""


@pytest.mark.parametrize(
    "size, error", [("4k", "OSError"), ("600k", "RuntimeError")]
)
def test_a_small_dev_shm_is_known_at_once(size, error):
    """Neither its semaphores nor its batches are mistaken for the disk."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    enter = ["unshare", "-rm", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*enter, mount], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a small /dev/shm: this test did NOT run")
    done = subprocess.run(
        [*enter, f'{mount} && exec "$0" -c "$1"', sys.executable, SMALL_SHM],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=REPOSITORY,
    )
    assert done.stdout.split() == ["True", error], done.stderr


# -- numbers -----------------------------------------------------------------


def spoil_steps(monkeypatch, values, what):
    """Put NaN into the features, or into the loss, of some steps (from 1)."""
    fit, objectives = SpeakerBrain.fit_batch, SpeakerBrain.compute_objectives
    count, value = 0, None

    def fit_batch(self, batch):
        nonlocal count, value
        count += 1
        value = values.get(count)
        if value and what == "features":
            batch.data.to("cpu").sig.data[0] = float(value)
        return fit(self, batch)

    def compute_objectives(self, cosines, batch, stage):
        loss = objectives(self, cosines, batch, stage)
        if value and what == "loss" and self.modules.training:
            return loss * float(value)
        return loss

    monkeypatch.setattr(SpeakerBrain, "fit_batch", fit_batch)
    monkeypatch.setattr(SpeakerBrain, "compute_objectives", compute_objectives)


@pytest.mark.parametrize(
    "what, value", [("features", "nan"), ("loss", "nan"), ("loss", "inf")]
)
def test_a_bad_step_leaves_no_trace(
    tiny_corpus, tmp_path, monkeypatch, what, value
):
    spoil_steps(monkeypatch, {2: value, 5: value}, what)
    skipped = []
    skip = SpeakerBrain._skip_step

    def watched(self, batch, loss):
        skip(self, batch, loss)
        state = self.modules.state_dict()
        assert all(x.isfinite().all() for x in state.values())
        skipped.append((self.step, self.optimizer_step))

    monkeypatch.setattr(SpeakerBrain, "_skip_step", watched)
    run = run_recipe(
        tiny_corpus, tmp_path / "run", verify_untrained=False, trials=None
    )
    assert skipped == [(2, 1), (1, 3)]  # of four in an epoch
    log = (run / "train_log.txt").read_text()
    assert "train skipped steps: 2" in log and "nan" not in log
    newest = Checkpointer(run / "save").find_checkpoint()
    state = torch.load(newest.paramfiles["embedding_model"])
    assert all(each.isfinite().all() for each in state.values())


def test_bad_steps_in_a_row_stop_training(tiny_corpus, tmp_path, monkeypatch):
    spoil_steps(monkeypatch, dict.fromkeys(range(4, 99), "nan"), "loss")
    with pytest.raises(NonFiniteError) as caught:
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            max_bad_steps=3,
            verify_untrained=False,
        )
    message = str(caught.value)
    assert "3 steps in a row (--max_bad_steps)" in message
    name = re.search(r"from checkpoint '(CKPT[^']*)'", message).group(1)
    good = torch.load(tmp_path / "run" / "save" / name / "embedding_model.ckpt")
    assert all(each.isfinite().all() for each in good.values())
    batch = message.rpartition("last batch: ")[2].split(", ")
    for utterance in batch:
        assert (tiny_corpus.train_root / utterance).is_file()
    assert len(batch) >= 8


def test_single_bad_steps_never_stop(tiny_corpus, tmp_path, monkeypatch):
    spoil_steps(monkeypatch, dict.fromkeys(range(1, 99, 2), "nan"), "loss")
    run = run_recipe(
        tiny_corpus,
        tmp_path / "run",
        max_bad_steps=2,
        verify_untrained=False,
        number_of_epochs=1,
        batch_size=4,
    )
    assert "train skipped steps: 4" in (run / "train_log.txt").read_text()


def test_a_bad_step_is_not_counted(tiny_corpus, tmp_path, monkeypatch):
    """Right answers, losses and diagnostics are those of the other steps."""
    spoil_steps(monkeypatch, dict.fromkeys((2, 3), "nan"), "loss")
    fit, counted = SpeakerBrain.fit_batch, []

    def fit_batch(self, batch):
        loss = fit(self, batch)
        tally = self.tally
        counted.append((tally.n_right, tally.n_seen, tally.loss_sum))
        for parts in (self.diagnostics.samples, self.diagnostics.classes):
            counted[-1] += (sum(bool(x.isfinite().all()) for x in parts),)
        return loss

    monkeypatch.setattr(SpeakerBrain, "fit_batch", fit_batch)
    run_recipe(
        tiny_corpus,
        tmp_path / "run",
        verify_untrained=False,
        trials=None,
        number_of_epochs=1,
    )
    first, second, third, fourth = counted
    assert first == second == third
    assert fourth[1] > first[1] and fourth[3:] == (2, 2)


def scale_gradients(monkeypatch, initial, spoiled):
    """Train with a scaler, as in fp16; `spoiled(scale)` makes NaN."""
    start, brains = SpeakerBrain.on_fit_start, []

    def on_fit_start(self):
        start(self)
        brains.append(self)
        self.scaler = torch.GradScaler("cpu", init_scale=initial)
        weight = self.modules["classifier"].weight
        weight.register_hook(
            lambda g: (
                g * float("nan") if spoiled(self.scaler.get_scale()) else g
            )
        )

    monkeypatch.setattr(SpeakerBrain, "on_fit_start", on_fit_start)
    return brains


def test_a_scaler_may_look_for_its_scale(tiny_corpus, tmp_path, monkeypatch):
    brains = scale_gradients(monkeypatch, 16.0, lambda scale: scale > 4)
    rates = []
    rate = SpeakerBrain.on_fit_batch_start

    def on_fit_batch_start(self, batch, should_step):
        rate(self, batch, should_step)
        rates.append(self.optimizer_step)

    monkeypatch.setattr(SpeakerBrain, "on_fit_batch_start", on_fit_batch_start)
    run = run_recipe(
        tiny_corpus,
        tmp_path / "run",
        verify_untrained=False,
        number_of_epochs=1,
        max_bad_steps=1,
    )
    assert rates == [0, 0, 0, 1]  # what the learning rate is a function of
    assert brains[0].optimizer_step == 2 and brains[0].scaler.get_scale() == 4
    log = (run / "train_log.txt").read_text()
    assert "train scaled down: 2" in log and "skipped" not in log


def test_a_scaler_does_not_hide_what_is_never_finite(
    tiny_corpus, tmp_path, monkeypatch
):
    """8, 4, 2 may be too large a scale; 1 is not."""
    brains = scale_gradients(monkeypatch, 8.0, lambda scale: True)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            verify_untrained=False,
            batch_size=4,
            max_bad_steps=3,
        )
    (brain,) = brains
    assert brain.n_scaled_down == brain.n_bad_steps == 3
    assert brain.optimizer_step == brain.tally.n_steps == 0
    assert brain.tally.n_seen == 0


def test_accumulation_does_not_hide_bad_gradients(
    tiny_corpus, tmp_path, monkeypatch
):
    """Every second step has only a loss, which is finite."""
    start = SpeakerBrain.on_fit_start

    def on_fit_start(self):
        start(self)
        weight = self.modules["classifier"].weight
        weight.register_hook(lambda grad: grad * float("nan"))

    monkeypatch.setattr(SpeakerBrain, "on_fit_start", on_fit_start)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            *("--grad_accumulation_factor", "2"),
            verify_untrained=False,
            batch_size=4,
            max_bad_steps=3,
        )


def test_the_bad_part_of_an_accumulated_step_is_named(
    tiny_corpus, tmp_path, monkeypatch, capsys
):
    """Its utterances, not those of the part that ends the step."""
    spoil_steps(monkeypatch, {3: "nan"}, "loss")
    seen, fit = [], SpeakerBrain.fit_batch

    def fit_batch(self, batch):
        seen.append(list(batch.data.id))
        return fit(self, batch)

    monkeypatch.setattr(SpeakerBrain, "fit_batch", fit_batch)
    run = run_recipe(
        tiny_corpus,
        tmp_path / "run",
        *("--grad_accumulation_factor", "2"),
        verify_untrained=False,
        trials=None,
        batch_size=4,
        number_of_epochs=1,
    )
    said = "".join(capsys.readouterr()).splitlines()
    (named,) = (line for line in said if "batch 3 has" in line)
    assert "has loss nan" in named and named.endswith(", ".join(seen[2]))
    log = (run / "train_log.txt").read_text()
    assert "train skipped steps: 1" in log and "loss: nan" not in log


# -- time --------------------------------------------------------------------


def test_max_hours_leaves_with_a_checkpoint(tiny_corpus, tiny_run, tmp_path):
    with pytest.raises(Interrupted, match="max_hours, 1e-09, is over") as left:
        run_recipe(tiny_corpus, tmp_path / "run", max_hours=1e-9)
    assert left.value.code == 75
    newest = Checkpointer(tmp_path / "run" / "save").find_checkpoint()
    assert not newest.meta["end-of-epoch"]
    run_recipe(tiny_corpus, tmp_path / "run")
    assert differences(tiny_run, tmp_path / "run") == set()


def test_another_process_is_told_why():
    told = pickle.loads(pickle.dumps(Interrupted("SIGTERM was received")))
    assert (str(told), told.code) == ("SIGTERM was received", 75)


def test_a_signal_that_arrives_twice_is_one(monkeypatch):
    """A scheduler's to all processes, and what torchrun makes of it."""
    now, ended = 100.0, []
    monkeypatch.setattr(leaving.time, "monotonic", lambda: now)
    stop = leaving.StopRequest()
    with stop.listening(), stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        now += 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason() == "SIGTERM was received"
        now += 2
        monkeypatch.setattr(signal, "raise_signal", ended.append)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_max_hours_below_zero(tiny_corpus, tmp_path):
    with pytest.raises(ValueError, match="max_hours is -1"):
        run_recipe(tiny_corpus, tmp_path / "run", max_hours=-1)
