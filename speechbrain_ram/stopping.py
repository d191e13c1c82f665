"""Leaving in order: signals and time budgets.

SIGTERM and SIGINT (Ctrl-C) while training let the running step end, have a
checkpoint written, and leave with exit status 75, sysexits' EX_TEMPFAIL: 'run
the same command again'. A second signal ends the process at once, as it would
have without this file.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Exit status of a run that was asked to leave, and can be continued.
INTERRUPTED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_WORKER_GRACE = 60  # seconds


class Interrupted(SystemExit):
    """Training leaves early, with everything on the disk.

    A SystemExit with status 75, so that a script needs no handling of it.
    """

    def __init__(self, reason: str):
        super().__init__(INTERRUPTED)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


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
        """Once; the second signal finds the system's own handler."""
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


def leave_on_signals() -> None:
    """Make SIGTERM and SIGINT leave at once, with the same exit status.

    For the time before and after training, when there is nothing to save.
    """
    for each in _SIGNALS:
        signal.signal(each, _leave)


def _leave(number: int, frame) -> None:
    raise Interrupted(f"{signal.Signals(number).name} was received")


def let_worker_outlive_signals(worker: int) -> None:
    """Keep a loader worker working while the run leaves in order.

    Ctrl-C, and most batch systems, signal every process of a run. A worker
    that obeyed at once would make the training step fail that was to be
    ended. For `worker_init_fn` of a DataLoader.

    Arguments
    ---------
    worker : int
        Its number, not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent ends its workers by SIGTERM, too, if they do not end alone.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKER_GRACE))
