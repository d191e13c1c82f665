"""Files that are complete or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write a file under, which then takes its own.

    Arguments
    ---------
    path : path
        The file to write; its folder is made where it is missing.

    Yields
    ------
    Path
        In the same folder, hidden, different for each caller, ending in
        `.tmp`: say the format where it would be taken from the ending. The
        block writes the whole file. An exception inside the block leaves an
        older file of that name as it was, and nothing else.

    Example
    -------
    >>> path = getfixture("tmp_path") / "new" / "one"
    >>> with atomic_path(path) as temporary:
    ...     _ = temporary.write_bytes(b"1")
    ...     path.exists()
    False
    >>> path.read_bytes()
    b'1'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[TextIO]:
    """As :func:`atomic_path`, with a text file open for writing.

    Arguments
    ---------
    path : path
        The file to write.

    Yields
    ------
    text file
        UTF-8, line ends as written.

    Example
    -------
    >>> path = getfixture("tmp_path") / "list.txt"
    >>> with atomic_writer(path) as file:
    ...     _ = file.write("one\\n")
    >>> path.read_text()
    'one\\n'
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        yield file
