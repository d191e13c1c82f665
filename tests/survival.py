"""Training runs in processes of their own, which are killed for real."""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import Checkpointer

# Children are forked from a process that has imported what they need and done
# nothing else: seconds are saved, and no thread is lost.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "survival",
        "torch._dynamo",  # by the optimiser
        "matplotlib.figure",  # by the report
        # Loader workers come from here, too. One that imported scipy itself
        # would have BLAS threads, which take signals, before its shield is up.
        "scipy.optimize",
    ]
)

SETTINGS = {
    "number_of_epochs": 2,
    "margin_end": 2,  # the validation's loss has the margin of its epoch
    "batch_size": 8,
    "ckpt_interval_minutes": 0,
}
OPTIONS = ("--ckpt_interval_steps", "2")


def train_in_process(
    corpus,
    folder,
    kill_at=None,
    seconds=None,
    by=signal.SIGKILL,
    alone=False,
    threads=1,
    spoil=None,
    **overrides,
):
    """Train in a process of its own, and kill it if asked to.

    `kill_at`: the number of the event before which it dies, `by` a signal to
    it and its workers, or to it `alone`. `seconds`: of processor time after
    which it is killed from here. `threads`: what two runs must share to be the
    same to the last bit. `spoil`: called in the process before it trains.
    Returns how it ended,
    minus the signal's number as always, and the events that it lived to see.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    events = folder.with_name(folder.name + ".events")
    events.unlink(missing_ok=True)
    arguments = (
        *(corpus, folder, events, kill_at, by, alone, threads, spoil),
        {**SETTINGS, **overrides},
    )
    process = PROCESSES.Process(target=_train, args=arguments)
    process.start()
    while seconds is not None and process.is_alive():
        if _processor_seconds(process.pid) >= seconds:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    process.join()
    seen = events.read_text().splitlines() if events.exists() else []
    return process.exitcode, seen


def train_in_processes(corpus, folder, n, watch=None, **overrides):
    """Train in `n` processes with gloo; returns how each ended.

    `watch(rank)` is called in each of them first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        PROCESSES.Process(
            target=_train_together,
            args=(corpus, folder, rank, n, port, watch, overrides),
        )
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=150)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def _train_together(corpus, folder, rank, n, port, watch, overrides):
    """As torchrun would start it."""
    import speechbrain as sb
    from conftest import run_recipe

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    _print_to(folder)
    faulthandler.dump_traceback_later(100)
    torch.set_num_threads(1)
    sb.utils.distributed.ddp_init_group({"distributed_backend": "gloo"})
    if watch is not None:
        watch(rank)
    run_recipe(corpus, folder, "--distributed_backend", "gloo", **overrides)


def output_of(folder):
    """What a run printed."""
    return folder.with_name(folder.name + ".output").read_text()


def _print_to(folder):
    output = folder.with_name(folder.name + ".output")
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _processor_seconds(pid):
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        ticks = sum(map(int, fields.split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def _train(
    corpus, folder, events, kill_at, by, alone, threads, spoil, overrides
):
    from conftest import run_recipe

    from speechbrain_ram.training.leaving import leave_on_signals

    _print_to(folder)
    torch.set_num_threads(threads)
    let_random_numbers_matter()
    if spoil is not None:
        spoil()
    os.setpgid(0, 0)
    leave_on_signals()
    count_events(events, kill_at, by, alone)
    run_recipe(corpus, folder, *OPTIONS, **overrides)


def let_random_numbers_matter():
    """Add noise from the global generator, as a dithered front-end does."""
    from speechbrain_ram.training.brain import SpeakerBrain

    forward = SpeakerBrain.compute_forward

    def noisy(self, batch, stage):
        if self.modules.training:
            waveforms = batch.to("cpu").sig.data
            waveforms += 1e-3 * torch.randn_like(waveforms)
        return forward(self, batch, stage)

    SpeakerBrain.compute_forward = noisy


def count_events(events, kill_at=None, by=signal.SIGKILL, alone=False):
    """Count what happens in a run; be killed before event `kill_at`."""
    from speechbrain.utils.train_logger import FileTrainLogger

    from speechbrain_ram.cli import train
    from speechbrain_ram.training.brain import SpeakerBrain
    from speechbrain_ram.training.checkpoints import SafeCheckpointer

    owner = os.getpid()
    log = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    count = 0

    def event(name):
        nonlocal count
        if os.getpid() != owner:  # a loader's worker
            return
        if count == kill_at:  # by another process, as schedulers do it
            whom = owner if alone else -owner
            command = f"kill -{int(by)} {whom}"
            subprocess.run(command, shell=True, start_new_session=True)
        os.write(log, f"{name}\n".encode())
        count += 1

    def watch(place, name):
        function = getattr(place, name)

        def watched(*args, **kwargs):
            event(f"before {name}")
            result = function(*args, **kwargs)
            event(f"after {name}")
            return result

        setattr(place, name, watched)

    watch(SpeakerBrain, "compute_forward")
    watch(SpeakerBrain, "optimizers_step")
    watch(SpeakerBrain, "fit_batch")
    watch(SpeakerBrain, "evaluate_batch")
    watch(SpeakerBrain, "encode")
    watch(FileTrainLogger, "log_stats")
    watch(SafeCheckpointer, "save_checkpoint")
    watch(SafeCheckpointer, "delete_checkpoints")
    watch(train, "export_inference")
    watch(torch, "save")
    watch(os, "fsync")
    watch(os, "replace")
    watch(Path, "rename")
    watch(shutil, "rmtree")


# -- comparing two runs -----------------------------------------------------


def differences(first, second):
    """Names of what differs between two finished runs, to the last bit."""
    return {
        name
        for name, one in fingerprint(first).items()
        if not same(one, fingerprint(second)[name])
    }


def fingerprint(run):
    """Everything that a finished run must give again."""
    checkpoints = Checkpointer(run / "save")
    newest = checkpoints.find_checkpoint()
    best = checkpoints.find_checkpoint(min_key="EER")
    parts = {}
    for file in newest.paramfiles.values():
        if file.stem == "run":  # of which no two have one name
            parts["run"] = json.loads(file.read_text())
            del parts["run"]["id"]
        elif "dataloader" not in file.name and "counter" not in file.name:
            parts[file.stem] = torch.load(file, weights_only=True)
        else:
            parts[file.stem] = file.read_text()
    parts["brain"]["log"] = without_speed(parts["brain"]["log"])
    changing = ("unixtime", "checksum", "files")
    for name, each in (("newest", newest), ("best", best)):
        parts[name] = {
            key: value
            for key, value in each.meta.items()
            if key not in changing
        }
    parts["best weights"] = torch.load(best.paramfiles["embedding_model"])
    parts["log"] = without_speed((run / "train_log.txt").read_text())
    for file in ("scores.txt", "inference/encoder.safetensors"):
        parts[file] = (run / file).read_bytes()
    return parts


def without_speed(log):
    """A log less the one number that cannot be the same twice."""
    return re.sub(r"utterances/s: [^,\s]*", "utterances/s", log)


def same(first, second):
    """Equal to the last bit, whatever the nesting."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same(first[key], second[key]) for key in first
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


if "pytest" not in sys.modules:
    # In the forkserver: what every child needs.
    import conftest  # noqa: F401
