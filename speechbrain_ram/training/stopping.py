"""Leaving in order: signals and time budgets.

SIGTERM and SIGINT (Ctrl-C) while training let the running step end, have a
checkpoint written, and leave with exit status 75, sysexits' EX_TEMPFAIL: 'run
the same command again'. A second signal, two seconds later or more, ends the
process at once, as it would have without this file.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Exit status of a run that was asked to leave, and can be continued.
INTERRUPTED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_WORKER_GRACE = 5  # seconds to end in
_HANDED_ON = 2  # seconds in which one signal may arrive twice


class Interrupted(SystemExit):
    """Training leaves early, with everything on the disk.

    A SystemExit with status 75, so that a script needs no handling of it.
    `told` says that the log has the reason already.
    """

    told = False

    def __init__(self, reason: str):
        super().__init__(reason)  # not the status: a pickled copy has this
        self.code = INTERRUPTED


class StopRequest:
    """Whether training shall leave, and why.

    Arguments
    ---------
    max_hours : float, optional
        Leave so long after this object was made. None or 0: never.

    Example
    -------
    >>> stop = StopRequest(max_hours=1e-9)
    >>> stop.reason()
    'max_hours, 1e-09, is over'
    """

    def __init__(self, max_hours: float | None = None):
        if max_hours is not None and max_hours < 0:
            raise ValueError(
                f"max_hours is {max_hours}; it must be above 0, or 0 for none."
            )
        self.max_hours = max_hours
        self.started = time.monotonic()
        self.signal: str | None = None
        self._signalled = 0.0  # when

    def reason(self) -> str | None:
        """Why to leave, None if there is no reason."""
        if self.signal:
            return f"{self.signal} was received"
        hours = (time.monotonic() - self.started) / 3600
        if self.max_hours and hours > self.max_hours:
            return f"max_hours, {self.max_hours}, is over"
        return None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of dying of them, in the main thread only."""
        before = {}
        try:
            for each in _SIGNALS:
                before[each] = signal.signal(each, self._note)
        except ValueError:  # not the main thread: the caller has the signals
            yield
            return
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _note(self, number: int, frame) -> None:
        """Once; a second signal ends the process, as without this class.

        Where a scheduler signals all processes, torchrun hands its own signal
        on to the others: that is the first one still.
        """
        if self.signal is None:
            self.signal = signal.Signals(number).name
            self._signalled = time.monotonic()
        elif time.monotonic() - self._signalled > _HANDED_ON:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def leave_on_signals() -> None:
    """Make SIGTERM and SIGINT leave at once, with the same exit status.

    For the time before and after training, when there is nothing to save.
    """
    for each in _SIGNALS:
        signal.signal(each, _leave)


def _leave(number: int, frame) -> None:
    raise Interrupted(f"{signal.Signals(number).name} was received")


def let_worker_outlive_signals(worker: int) -> None:
    """Let the run alone end a loader worker.

    Ctrl-C, and most batch systems, signal every process of a run. A worker
    that obeyed would make the training step fail that was to be ended. The
    run ends its workers by SIGTERM, too: who sent it tells the two apart. For
    `worker_init_fn` of a DataLoader.

    Arguments
    ---------
    worker : int
        Its number, not used.
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
