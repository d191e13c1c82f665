"""Text files that are complete or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[TextIO]:
    """Open a text file that takes its name only when it is complete.

    Arguments
    ---------
    path : path
        The file to write; its folder is made where it is missing.

    Yields
    ------
    text file
        UTF-8, line ends as written. An exception inside the block leaves an
        older file of that name as it was.

    Example
    -------
    >>> path = getfixture("tmp_path") / "new" / "list.txt"
    >>> with atomic_writer(path) as file:
    ...     _ = file.write("one\\n")
    ...     path.exists()
    False
    >>> path.read_text()
    'one\\n'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 suits nobody
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
