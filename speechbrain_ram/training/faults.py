"""Recordings that fail while training: try again, skip, count, stop.

A disk that stutters must not end a run of days, and a disk that is gone must
not train on what little is left. :class:`SkipUnreadable` stands around a
dataset in the loader's workers; :class:`FaultList` counts in the main process.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch, PaddedData
from speechbrain.utils.data_utils import batch_pad_right
from speechbrain.utils.logger import get_logger

from speechbrain_ram.data.audio import AudioError, as_floats
from speechbrain_ram.training.checkpoints import CheckpointError, is_full_disk
from speechbrain_ram.utils import atomic_writer, first_ten, n_processes

logger = get_logger(__name__)

WAITS = (0.1, 0.5)  # seconds before the second and the third try

#: So many unreadable utterances, up to a quarter of the set, never stop a
#: training: 1 % of 51 utterances would be less than one.
FEW = 5


class FaultError(AudioError):
    """Too many recordings cannot be read; the message names ten of them."""


class WorkerError(RuntimeError):
    """A process that loads data died, or hangs."""


@dataclass(frozen=True)
class Fault:
    """What stands in a batch for an utterance that could not be read."""

    id: str
    message: str


class SkipUnreadable(torch.utils.data.Dataset):
    """A dataset whose unreadable items are :class:`Fault` objects.

    Unreadable is what raises AudioError or OSError in every try; `waits` are
    the seconds before each further one. What a file stores as 16-bit samples
    goes to :class:`Batch` so.
    """

    def __init__(self, dataset, waits: Sequence[float] = WAITS):
        self.dataset = dataset
        self.waits = waits
        self.item = getattr(dataset, "as_stored", dataset.__getitem__)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for wait in (*self.waits, None):
            try:
                return self.item(index)
            except (AudioError, OSError) as error:
                message = str(error)
            if wait is not None:
                time.sleep(wait)
        return Fault(self.dataset.data_ids[index], message)


class Padded(PaddedBatch):
    """SpeechBrain's, whose 16-bit samples become float32 on the device."""

    def to(self, *args, **kwargs) -> Padded:
        """Move, then convert."""
        super().to(*args, **kwargs)
        for name, value in vars(self).items():
            if isinstance(value, PaddedData):
                floats = value._replace(data=as_floats(value.data))
                setattr(self, name, floats)
        return self


class Batch:
    """Collates what could be read (None if nothing), carries what could not."""

    def __init__(self, items: list):
        self.faults = [item for item in items if isinstance(item, Fault)]
        good = [item for item in items if not isinstance(item, Fault)]
        self.data = Padded(good, padding_func=stack) if good else None

    def pin_memory(self) -> Batch:
        """For the loader's `pin_memory`."""
        if self.data is not None:
            self.data.pin_memory()
        return self


def stack(values: Sequence[torch.Tensor], **padding):
    """SpeechBrain's ``batch_pad_right``, 10 times faster for equal lengths."""
    if len({value.dtype for value in values}) > 1:
        values = [as_floats(value) for value in values]
    if len({value.shape for value in values}) > 1:
        batch, lengths = batch_pad_right(values, **padding)
    else:
        batch, lengths = torch.stack(list(values)), torch.ones(len(values))
    if torch.utils.data.get_worker_info() is not None:
        # Here, where an error reaches the main process: left to the queue
        # that sends it, it would be printed and the batch waited for.
        batch.share_memory_()
        lengths.share_memory_()
    return batch, lengths


def is_full_shared_memory(error: BaseException) -> bool:
    """Whether /dev/shm has no room for the loader's workers.

    A worker's batch that finds no room is a RuntimeError of torch, or a bus
    error that ends the worker; a queue that finds none is an OSError like that
    of a full disk, told apart by its traceback.
    """
    text = str(error)
    if "Too many open files" in text:
        return False
    if "shared memory" in text or "</torch_" in text:
        return True
    return is_full_disk(error) and any(
        "multiprocessing" in frame.filename
        for frame in traceback.extract_tb(error.__traceback__)
    )


def explained(error: Exception, goes_on: str) -> Exception:
    """What a failed training says, in plain words, and how it `goes_on`."""
    text = str(error)
    if is_full_shared_memory(error):
        return WorkerError(
            "/dev/shm is too small for what the loader's workers hand over. "
            "Try --num_workers 0, or give it more room (docker run --shm-size "
            f"8g). {goes_on} ({text.strip().splitlines()[-1]})"
        )
    if is_full_disk(error):
        return CheckpointError(f"the disk is full: {error}. {goes_on}")
    if "DataLoader worker" in text or "DataLoader timed out" in text:
        return WorkerError(
            f"a process that loads data died or hangs: {text} The system "
            "kills what takes too much memory; try a lower --num_workers. "
            + goes_on
        )
    if n_processes() > 1 and "onnection" in text:
        return RuntimeError(f"another process died: {text} {goes_on}")
    return error


class FaultList:
    """The utterances that could not be read, and when they are too many.

    Training stops above `max_share`, in [0, 1], of `total`; a few (`FEW`) are
    always allowed, but none with 0. `path` lists them, ``ID<tab>message``.
    """

    def __init__(
        self,
        total: int,
        max_share: float,
        path: str | os.PathLike | None = None,
        what: str = "training",
    ):
        if not 0 <= max_share <= 1:
            raise ValueError(
                f"--max_fault_share is {max_share}, allowed is 0 to 1: it is "
                "the share of utterances that may fail, not percent."
            )
        self.total = total
        self.max_share = max_share
        self.path = None if path is None else Path(path)
        self.what = what
        self.messages: dict[str, str] = {}

    @property
    def allowed(self) -> int:
        """How many utterances may fail."""
        if self.max_share == 0:
            return 0
        few = min(FEW, self.total // 4)
        return max(math.floor(self.max_share * self.total + 1e-9), few)

    def add(self, faults: Sequence[Fault]) -> None:
        """Note the faults of a batch; an utterance counts once."""
        new = [fault for fault in faults if fault.id not in self.messages]
        for fault in new:
            self.messages[fault.id] = fault.message
            logger.warning("Skipped '%s': %s", fault.id, fault.message)
        if new:
            self._write()

    def check(self) -> None:
        """Raise a FaultError where more are missing than are allowed."""
        if len(self.messages) <= self.allowed:
            return
        raise FaultError(
            f"{len(self.messages)} of {self.total} {self.what} utterances "
            f"could not be read; --max_fault_share {self.max_share} allows "
            f"{self.allowed}. Is the disk there, and whole? If it is, a larger "
            "share goes on without them.\n"
            + first_ten(list(self.messages.values()), "\n")
        )

    def restore(self, messages: dict[str, str]) -> None:
        """Continue the list of an interrupted run."""
        self.messages = dict(messages)
        self._write()

    def _write(self) -> None:
        if self.path is not None and self.messages:
            with atomic_writer(self.path) as file:
                for name, message in self.messages.items():
                    line = " ".join(message.split())
                    file.write(f"{name}\t{line}\n")


# -- Workers that outlive signals, and end with the run ------------------------

_WORKER_GRACE = 5  # seconds to end in


def let_worker_outlive_signals(worker: int) -> None:
    """Let only the run end a loader worker; a ``worker_init_fn``.

    Ctrl-C, and most batch systems, signal every process of a run. A worker
    that obeyed would make the training step fail that was to be ended. The
    run ends its workers by SIGTERM, too: who sent it tells the two apart.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: torch's handler stays
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    run = multiprocessing.parent_process().pid
    threading.Thread(target=_end_when_told, args=(run,), daemon=True).start()


def _end_when_told(run: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)  # at once; a worker has nothing to save


@contextmanager
def ending_workers() -> Iterator[None]:
    """End the loader workers that the block started, however it ends."""
    before = multiprocessing.active_children()
    try:
        yield
    finally:
        workers = [
            child
            for child in multiprocessing.active_children()
            if child.daemon and child not in before
        ]
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(_WORKER_GRACE)
