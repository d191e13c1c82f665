"""Several processes do what one does."""

import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from survival import differences, output_of, train_in_processes

from speechbrain_ram.training.checkpoints import SafeCheckpointer
from speechbrain_ram.training.distributed import (
    JointBatchSampler,
    random_state,
    restore_random_state,
    shared_batches,
    sync_batch_norm,
)
from speechbrain_ram.utils import leave_group


@given(
    n_items=st.integers(2, 300),
    batch_size=st.integers(1, 40),
    world=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_every_utterance_once_an_epoch(n_items, batch_size, world, epoch):
    if n_items < 2 * world:
        with pytest.raises(ValueError, match="two utterances or more"):
            JointBatchSampler(n_items, batch_size, 3, 0, world)
        return
    shares = [
        JointBatchSampler(n_items, batch_size, 3, rank, world)
        for rank in range(world)
    ]
    whole = JointBatchSampler(n_items, batch_size * world, 3)
    for each in (*shares, whole):
        each.set_epoch(epoch)
    steps = [list(share) for share in shares]
    assert {len(each) for each in steps} == {len(shares[0])}
    seen = [item for share in steps for batch in share for item in batch]
    assert sorted(seen) == list(range(n_items))
    assert all(len(batch) >= 1 for share in steps for batch in share)
    if batch_size >= 2:
        assert all(len(batch) >= 2 for share in steps for batch in share)
    if n_items % (batch_size * world) in (0, *range(2 * world, 1000)):
        # The joint batches are those of one process.
        for step, joint in enumerate(whole):
            parts = [item for share in steps for item in share[step]]
            assert sorted(parts) == sorted(joint)


def test_validation_is_shared_in_order():
    shares = [shared_batches(5, 2, rank, 2) for rank in range(2)]
    assert [[list(batch) for batch in share] for share in shares] == [
        [[0, 2], [4]],
        [[1, 3], []],  # as many batches
    ]


def test_every_generator_goes_on_where_it_was():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    state = random_state()
    first = draw()
    restore_random_state(state)
    assert draw() == first != draw()


def test_the_order_is_speechbrains():
    from speechbrain.dataio.sampler import ReproducibleRandomSampler

    theirs = ReproducibleRandomSampler(range(20), seed=5)
    ours = JointBatchSampler(20, 4, seed=5)
    for epoch in (1, 2):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert [i for batch in ours for i in batch] == list(theirs)


# -- batch normalisation over two processes ----------------------------------


def _normalise(rank, port, folder, uneven):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    _normalise_part(rank, folder, uneven)
    leave_group()


def _normalise_part(rank, folder, uneven):
    layer, values, weights = _layer_and_values()
    layer = sync_batch_norm(layer)
    part = slice(0, uneven) if rank == 0 else slice(uneven, None)
    mine = values[part].clone().requires_grad_()
    out = layer(mine)
    (out * weights[part]).sum().backward()
    torch.save(
        {
            "out": out.detach(),
            "grad": mine.grad,
            "weight grad": layer.weight.grad,
            **layer.state_dict(),
        },
        folder / f"{rank}.pt",
    )


def _layer_and_values():
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(3)
    torch.nn.init.uniform_(layer.weight, 0.5, 2)
    # Far from zero: squares would cancel.
    return layer, 100 + torch.randn(8, 3, 5, 4), torch.randn(8, 3, 5, 4)


@pytest.mark.parametrize("uneven", [4, 1])
def test_statistics_are_those_of_the_joint_batch(tmp_path, uneven):
    from survival import PROCESSES

    port = free_port()
    processes = [
        PROCESSES.Process(target=_normalise, args=(r, port, tmp_path, uneven))
        for r in range(2)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(timeout=120)
        assert each.exitcode == 0
    layer, values, weights = _layer_and_values()
    values.requires_grad_()
    out = layer(values)
    (out * weights).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    close(torch.cat([part["out"] for part in parts]), out, 1e-4)
    close(torch.cat([part["grad"] for part in parts]), values.grad, 1e-4)
    close(sum(part["weight grad"] for part in parts), layer.weight.grad, 1e-4)
    for name, value in layer.state_dict().items():
        for part in parts:
            close(part[name], value, 1e-5)


def close(found, expected, tolerance):
    error = (found - expected).abs().max() / expected.abs().max().clip(1e-3)
    assert error <= tolerance, f"{error} > {tolerance}"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# -- a run -------------------------------------------------------------------

N_UTTERANCES = 27
#: One joint batch of 14 and 13.
TOGETHER = {"batch_size": 14, "number_of_epochs": 2, "verify_every": 2}


def first_gradients(notes, rank):
    """Write the gradients of the first step, in double precision; leave.

    In single precision the first layer's would show the rounding of 34
    layers, 1e-3, and nothing else.
    """
    from speechbrain_ram.training.brain import SpeakerBrain

    wrap = SpeakerBrain._wrap_distributed

    def double(module, inputs):
        return (inputs[0].double(), *inputs[1:])

    def wrap_double(self):
        for name in ("embedding_model", "classifier"):
            self.modules[name].double().register_forward_pre_hook(double)
        wrap(self)

    def keep(self):
        grads = {
            name.replace("module.", ""): p.grad
            for name, p in self.modules.named_parameters()
        }
        torch.save(grads, notes / f"grad{rank}")
        os._exit(0)

    notes.mkdir(exist_ok=True)
    SpeakerBrain._wrap_distributed = wrap_double
    SpeakerBrain.optimizers_step = keep


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def keep_names(notes, rank):
    """Note who is seen, and what is written."""
    import sys

    from speechbrain_ram.training.brain import SpeakerBrain

    fit = SpeakerBrain.fit_batch

    def note(self, batch):
        with open(notes / f"seen{rank}", "a") as file:
            epoch = self.hparams.epoch_counter.current
            file.writelines(f"{epoch} {name}\n" for name in batch.data.id)
        return fit(self, batch)

    SpeakerBrain.fit_batch = note
    evaluate = SpeakerBrain.evaluate_batch

    def note_validated(self, batch, stage):
        with open(notes / f"validated{rank}", "a") as file:
            names = batch.data.id if batch.data is not None else []
            file.writelines(f"{name}\n" for name in names)
        return evaluate(self, batch, stage)

    SpeakerBrain.evaluate_batch = note_validated

    def on_write(event, arguments):
        if event == "open" and "/two/" in str(arguments[0]):
            if isinstance(arguments[1], str) and set(arguments[1]) & set("wax"):
                record(f"open {arguments[0]}")
        elif event in CHANGES and "/two" in str(arguments[0]):
            record(f"{event} {arguments[0]}")

    def record(what):
        os.write(written, f"{what}\n".encode())

    notes.mkdir(exist_ok=True)
    written = os.open(notes / f"written{rank}", os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(on_write)


@pytest.fixture(scope="module")
def two(tiny_corpus, tmp_path_factory):
    """A run of two processes."""
    folder = tmp_path_factory.mktemp("together") / "two"
    watch = functools.partial(keep_names, folder.parent / "notes")
    statuses = train_in_processes(tiny_corpus, folder, 2, watch, **TOGETHER)
    assert statuses == [0, 0], output_of(folder)
    return folder


def test_gradients_are_those_of_the_joint_batch(tiny_corpus, tmp_path):
    """27 utterances by one process, and 14 and 13 by two."""
    for n in (1, 2):
        watch = functools.partial(first_gradients, tmp_path / f"{n}")
        settings = {**TOGETHER, "batch_size": 28 // n}
        settings["verify_untrained"] = False
        folder = tmp_path / f"run{n}"
        statuses = train_in_processes(tiny_corpus, folder, n, watch, **settings)
        assert set(statuses) == {0}, output_of(folder)
    one = torch.load(tmp_path / "1" / "grad0")
    for rank in range(2):
        two = torch.load(tmp_path / "2" / f"grad{rank}")
        assert two.keys() == one.keys()
        largest = max(each.abs().max() for each in one.values())
        for name, grad in two.items():
            error = (grad - one[name]).abs().max() / largest
            assert error <= 1e-5, f"{name}: {error}"


def statistics(notes, rank):
    """Write the running statistics before and after they are averaged."""
    from speechbrain_ram.training import robust_brain

    average = robust_brain.average_buffers

    def keep(modules):
        states = []
        for change in (lambda modules: None, average):
            change(modules)
            encoder = modules["embedding_model"].module
            norms = [m for m in encoder.modules() if hasattr(m, "running_var")]
            states.append([each.running_var.clone() for each in norms])
            kinds = {type(each).__name__ for each in norms}
        torch.save([*states, sorted(kinds)], notes / f"{rank}")

    notes.mkdir(exist_ok=True)
    robust_brain.average_buffers = keep


def test_statistics_of_each_process_are_averaged(tiny_corpus, tmp_path):
    """--sync_batch_norm False: nothing is sent within the network."""
    statuses = train_in_processes(
        tiny_corpus,
        tmp_path / "two",
        2,
        functools.partial(statistics, tmp_path / "notes"),
        **{**TOGETHER, "number_of_epochs": 1, "verify_untrained": False},
        sync_batch_norm=False,
    )
    assert statuses == [0, 0], output_of(tmp_path / "two")
    first, second = (torch.load(tmp_path / "notes" / f"{r}") for r in range(2))
    assert first[2] == second[2] == ["BatchNorm1d", "BatchNorm2d"]
    for a, b, mean, same in zip(
        first[0], second[0], first[1], second[1], strict=True
    ):
        assert not torch.equal(a, b)
        close(mean, (a + b) / 2, 1e-6)
        assert torch.equal(mean, same)


def test_every_utterance_is_seen_once_by_one_of_them(two, tiny_corpus):
    seen = []
    for rank in range(2):
        lines = (two.parent / "notes" / f"seen{rank}").read_text().splitlines()
        assert len(lines) == 2 * (14 - rank)
        seen += lines
    assert len(set(seen)) == len(seen) == 2 * N_UTTERANCES


def test_only_rank_0_writes(two):
    first, second = (
        (two.parent / "notes" / f"written{rank}").read_text().splitlines()
        for rank in range(2)
    )
    assert len(first) > 20
    # The constructor of SpeechBrain's Checkpointer, where rank 0 is slower.
    assert set(second) <= {f"os.mkdir {two}", f"os.mkdir {two / 'save'}"}


def test_the_log_counts_both_halves(two):
    line = (two / "train_log.txt").read_text().splitlines()[1]
    accuracy = float(re.search("train accuracy: ([^,]*)", line).group(1))
    assert round(accuracy * N_UTTERANCES / 100, 1).is_integer()


def test_extraction_in_parts_gives_the_same_scores(two, tiny_corpus, tmp_path):
    """The finished run, scored and exported again by one process."""
    shutil.copytree(two, tmp_path / "one")
    (tmp_path / "one" / "scores.txt").unlink()
    # With one thread, as the two had: another number rounds otherwise.
    whole = {**TOGETHER, "batch_size": 2 * TOGETHER["batch_size"]}
    statuses = train_in_processes(tiny_corpus, tmp_path / "one", 1, **whole)
    assert statuses == [0], output_of(tmp_path / "one")
    assert differences(two, tmp_path / "one") <= {"brain"}


# -- what they agree on ------------------------------------------------------


def test_each_validates_its_share(two):
    notes = [two.parent / "notes" / f"validated{rank}" for rank in range(2)]
    shares = [note.read_text().splitlines() for note in notes]
    assert [len(share) for share in shares] == [2 * 2, 2 * 1]  # two epochs
    assert len(set(shares[0] + shares[1])) == 3


def test_validation_has_the_numbers_of_one_process(tiny_corpus, tmp_path):
    """Of weights that hardly move: training would enlarge rounding errors."""
    metas = []
    for n in (1, 2):
        run = tmp_path / f"{n}"
        settings = {"number_of_epochs": 1, "verify_untrained": False}
        # Three utterances in joint batches of 2: the last has no second share.
        settings |= {"lr": 1e-9, "batch_size": 2 // n}
        statuses = train_in_processes(tiny_corpus, run, n, **settings)
        assert set(statuses) == {0}, output_of(run)
        metas.append(SafeCheckpointer(run / "save").find_checkpoint().meta)
    for name in ("loss", "error", "EER", "minDCF(0.01)"):
        assert metas[1][name] == pytest.approx(metas[0][name], rel=1e-4), name


def test_what_rank_0_finds_wrong_is_said_by_all(tiny_corpus, tmp_path):
    run = tmp_path / "run"
    wrong = {**TOGETHER, "data_root": str(tmp_path / "nowhere")}
    statuses = train_in_processes(tiny_corpus, run, 2, **wrong)
    assert statuses == [1, 1], output_of(run)
    said = re.findall("ManifestError: Rank 0 failed: .*nowhere", output_of(run))
    assert len(said) == 2, output_of(run)


def signal_while_preparing(rank):
    """Send SIGTERM to rank 0, which alone prepares data."""
    from speechbrain_ram.cli import train
    from speechbrain_ram.training.leaving import leave_on_signals

    def find_run(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    train.find_run = find_run
    leave_on_signals()


def test_a_signal_while_data_are_prepared(tiny_corpus, tmp_path):
    run = tmp_path / "run"
    statuses = train_in_processes(
        tiny_corpus, run, 2, signal_while_preparing, **TOGETHER
    )
    assert statuses == [75, 75], output_of(run)


def numbers(run, name):
    log = (run / "train_log.txt").read_text()
    return [float(each) for each in re.findall(f"{name}: ([^,\\s]*)", log)]


def lose_a_share(rank):
    """Rank 1 can read nothing of the validation set."""
    from speechbrain_ram.data import dataset
    from speechbrain_ram.data.audio import AudioError
    from speechbrain_ram.training import robust_brain
    from speechbrain_ram.training.faults import SkipUnreadable

    read = dataset.CropDataset._read_crop

    def unreadable(self, name, *args):
        if rank == 1 and not self.random_crops:
            raise AudioError(f"'{name}' cannot be read.")
        return read(self, name, *args)

    dataset.CropDataset._read_crop = unreadable
    robust_brain.SkipUnreadable = functools.partial(
        SkipUnreadable, waits=(0, 0)
    )


def test_nothing_to_validate_on_one_of_them(tiny_corpus, tmp_path):
    folder = tmp_path / "run"
    settings = {**TOGETHER, "max_fault_share": 1.0, "number_of_epochs": 1}
    statuses = train_in_processes(
        tiny_corpus, folder, 2, lose_a_share, **settings
    )
    assert statuses == [0, 0], output_of(folder)
    listed = (folder / "validation_faults.txt").read_text()
    assert listed.count("cannot be read") == 1  # rank 0 was told
    assert numbers(folder, "valid error")[0] in (0, 50, 100)  # of two


def hide_from_the_second(listing_only, rank):
    """A shared disk whose news are late."""
    from pathlib import Path

    from speechbrain_ram.training.checkpoints import SafeCheckpointer

    if rank == 0:
        return
    SafeCheckpointer.list_checkpoints = lambda self: []
    if not listing_only:
        exists = Path.is_file
        Path.is_file = lambda path: path.name != "CKPT.yaml" and exists(path)


def test_rank_0_says_which_checkpoint(two, tiny_corpus, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    hide = functools.partial(hide_from_the_second, True)
    statuses = train_in_processes(tiny_corpus, run, 2, hide, **TOGETHER)
    assert statuses == [0, 0], output_of(run)
    assert differences(two, run) == set()


def test_a_checkpoint_that_one_does_not_see(two, tiny_corpus, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    hide = functools.partial(hide_from_the_second, False)
    statuses = train_in_processes(tiny_corpus, run, 2, hide, **TOGETHER)
    assert statuses == [1, 1], output_of(run)
    assert "Rank 1 failed: it does not see" in output_of(run)
    assert "a disk that all machines share" in output_of(run)


def signal_the_second(name, since, rank):
    """Send SIGTERM to rank 1 in its first call of a method since another."""
    from speechbrain_ram.training.brain import SpeakerBrain

    called = set()

    def watch(each):
        method = getattr(SpeakerBrain, each)

        def watched(self, *args, **kwargs):
            first = name not in called and (since is None or since in called)
            if each == since or first:
                called.add(each)
            if each == name and first and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return method(self, *args, **kwargs)

        setattr(SpeakerBrain, each, watched)

    for each in {name, since} - {None}:
        watch(each)


@pytest.mark.parametrize(
    "name, since, epochs_done",
    [
        ("encode", None, None),  # of the untrained encoder
        ("evaluate_batch", None, 0),
        ("encode", "evaluate_batch", 0),
        ("fit_batch", "evaluate_batch", 1),
        ("encode", "load_best", 2),  # after training
    ],
)
def test_a_signal_to_one_is_a_signal_to_all(
    tiny_corpus, tmp_path, name, since, epochs_done
):
    run = tmp_path / "run"
    watch = functools.partial(signal_the_second, name, since)
    settings = {**TOGETHER, "verify_every": 1}
    begun = time.monotonic()
    statuses = train_in_processes(tiny_corpus, run, 2, watch, **settings)
    assert statuses == [75, 75], output_of(run)
    assert time.monotonic() - begun < 60
    assert "another process died" not in output_of(run)
    logged = re.findall(r"^epoch: [1-9]", read_log(run), re.MULTILINE)
    assert len(logged) == (epochs_done or 0)
    assert bool(list(run.glob("save/CKPT*"))) == (epochs_done is not None)


def read_log(run):
    log = run / "train_log.txt"
    return log.read_text() if log.exists() else ""


# -- torchrun ----------------------------------------------------------------


#: The recipe for real speech, on the tiny corpus.
REAL_SPEECH = REPOSITORY / "recipes/SpeechOcean762/hparams/ram_resnet34.yaml"


def torchrun(corpus, folder, *options, **overrides):
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(options or ("--standalone", "--nproc_per_node=2")),
        *(REPOSITORY / "train_speaker_embeddings.py", REAL_SPEECH),
        *("--device", "cpu", "--distributed_backend", "gloo"),
        *("--noprogressbar", "--ckpt_interval_steps", "1"),
    ]
    values = {
        "ckpt_interval_minutes": 0,
        "data_folder": corpus.train_root,
        "data_root": corpus.train_root,
        "trials": corpus.trials,
        "trials_root": corpus.test_root,
        "precision": "fp32",
        "output_folder": folder,
        "channels": "[16, 16, 16, 16]",
        "crop_seconds": 0.5,
        "num_workers": 0,
        "verify_untrained": False,
        **TOGETHER,
        **overrides,
    }
    for key, value in values.items():
        command += [f"--{key}", value]
    return subprocess.Popen(
        [str(each) for each in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
    )


def children(pid):
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(each) for each in listed.stdout.split()]


def wait_for(folder, pattern, process):
    end = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_the_rerun_goes_on(
    tiny_corpus, tmp_path
):
    whole = tmp_path / "whole"
    job = torchrun(tiny_corpus, whole)
    output = job.communicate(timeout=600)[0]
    assert job.returncode == 0, output
    folder = tmp_path / "killed"
    job = torchrun(tiny_corpus, folder)
    wait_for(folder, "save/CKPT*", job)
    os.kill(children(job.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    output = job.communicate(timeout=600)[0]
    assert time.monotonic() - killed < 60
    assert job.returncode != 0
    said = "another process died" in output and "SIGKILL" in output
    assert said, output
    job = torchrun(tiny_corpus, folder)
    output = job.communicate(timeout=600)[0]
    assert job.returncode == 0, output
    assert differences(whole, folder) == set()


@pytest.mark.slow
def test_sigterm_to_torchrun_writes_a_checkpoint(tiny_corpus, tmp_path):
    folder = tmp_path / "run"
    job = torchrun(tiny_corpus, folder, number_of_epochs=200)
    wait_for(folder, "save/CKPT*", job)
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=120)[0]
    assert output.count("SIGTERM was received") == 1
    assert "goes on from checkpoint 'CKPT" in output


@pytest.mark.slow
def test_two_nodes_are_the_same_command(tiny_corpus, tmp_path):
    """Two agents that meet by rendezvous, as on two machines."""
    whole = tmp_path / "whole"
    job = torchrun(tiny_corpus, whole)
    output = job.communicate(timeout=600)[0]
    assert job.returncode == 0, output
    meeting = (
        *("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"),
        *(f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"),
    )
    folder = tmp_path / "nodes"
    jobs = [torchrun(tiny_corpus, folder, *meeting) for _ in range(2)]
    for job in jobs:
        output = job.communicate(timeout=600)[0]
        assert job.returncode == 0, output
    assert differences(whole, folder) == set()
