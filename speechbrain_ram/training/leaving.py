"""Leaving in order: signals and time budgets.

SIGTERM and SIGINT (Ctrl-C) while training let the running step end, have a
checkpoint written, and leave with exit status 75, sysexits' EX_TEMPFAIL: 'run
the same command again'. A second signal, two seconds later or more, ends the
process at once, as it would have without this file. Without PyTorch, so that
signals are heeded while it is imported.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Exit status of a run that was asked to leave, and can be continued.
INTERRUPTED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HANDED_ON = 2  # seconds in which one signal may arrive twice


class Interrupted(SystemExit):
    """Training leaves early with status 75, with everything on the disk.

    `told` says that the log has the reason already, `goes_on` what the same
    command will do.
    """

    told = False
    goes_on = "Nothing is lost: run the same command again."

    def __init__(self, reason: str):
        super().__init__(reason)  # not the status: a pickled copy has this
        self.code = INTERRUPTED

    def farewell(self) -> str:
        """The last line of the program."""
        return f"Exit status {self.code}: {self}. {self.goes_on}"


class StopRequest:
    """Whether training shall leave, and why.

    `max_hours` count from when this object is made; None or 0 is never.
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
        """A second signal ends the process, as without this class.

        torchrun hands a scheduler's signal on to processes that have it
        already: within two seconds it is still the first one.
        """
        if self.signal is None:
            self.signal = signal.Signals(number).name
            self._signalled = time.monotonic()
        elif time.monotonic() - self._signalled > _HANDED_ON:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def leave_on_signals() -> None:
    """Make SIGTERM and SIGINT raise Interrupted: there is nothing to save."""
    for each in _SIGNALS:
        signal.signal(each, _leave)


def _leave(number: int, frame) -> None:
    raise Interrupted(f"{signal.Signals(number).name} was received")


def leave_while_loading() -> None:
    """Make SIGTERM and SIGINT end the process, with status 75 and a message.

    For while PyTorch is imported, where an exception may go astray.
    """
    for each in _SIGNALS:
        signal.signal(each, _end)


def _end(number: int, frame) -> None:
    asked = Interrupted(f"{signal.Signals(number).name} was received")
    os.write(2, f"{asked.farewell()}\n".encode())
    os._exit(INTERRUPTED)
