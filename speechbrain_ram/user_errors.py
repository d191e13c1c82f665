"""Errors that a user can mend, said in one line.

A wrong option, a file that is missing, a disk that is full: the message is
what helps, a traceback hides it. Every other error is a fault in a program
and keeps its traceback.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CLASSES = (ValueError, OSError, ImportError, MemoryError)

logger = logging.getLogger(__name__)


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise ArgumentTypeError(f"True or False is needed, got {text}")
    return text == "True"


#: For `argparse`: a switch that is typed as in a training, ``--mixdown True``,
#: or alone.
SWITCH: dict[str, Any] = {
    "nargs": "?",
    "type": _truth,
    "const": True,
    "default": False,
    "metavar": "True",
}


def is_user_error(error: BaseException) -> bool:
    """Whether a message of one line says all that a user needs.

    So are values, files, packages and memory, and all error classes of
    speechbrain_ram itself.
    """
    kind = type(error)
    ours = kind.__module__.split(".")[0] == __name__.split(".")[0]
    # By name: PyTorch takes seconds to import.
    gpu_memory = kind.__name__ == "OutOfMemoryError"
    return (
        isinstance(error, _CLASSES)
        or gpu_memory
        or (ours and isinstance(error, Exception))
    )


def one_line(error: BaseException) -> str:
    """Give the message of an error as one line.

    Example
    -------
    >>> one_line(FileNotFoundError(2, "No such file or directory", "a.wav"))
    "'a.wav': No such file or directory"
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"'{error.filename}': {error.strerror}"
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the program with one line and status 1 on a user's error.

    The traceback goes to the logger at level DEBUG: a training run has it in
    OUTPUT/log.txt.

    Arguments
    ---------
    program : str
        What the line begins with, such as 'verify_speakers.py'.
    """
    try:
        yield
    except Exception as error:
        if not is_user_error(error):
            raise
        logger.debug("Ends with an error:", exc_info=True)
        sys.exit(f"{program}: {one_line(error)}")
