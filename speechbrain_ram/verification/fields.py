"""Large text files of one trial a line, as columns of fields."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice

import numpy as np
import pandas as pd

from speechbrain_ram.data.names import TextError, check_text

_CHUNK = 100_000  # lines per step: bounds the memory that strings take
_LINE = 2**24  # bytes: a model's line may name 100,000 utterances
_SHOWN = 200  # characters of a bad line that a message shows


class TrialError(ValueError):
    """A trial list cannot be used; the message says where and why."""


class UniqueNames:
    """Strings -> unique strings and int32 codes, chunk by chunk."""

    def __init__(self):
        self.ids: dict[str, int] = {}
        self._codes: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """Append an array of strings, dtype object."""
        codes, unique = pd.factorize(values)
        known = (self.ids.setdefault(u, len(self.ids)) for u in unique)
        table = np.fromiter(known, np.int32, len(unique))
        self._codes.append(table[codes])

    def finish(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The unique strings in order of appearance, and all codes."""
        return tuple(self.ids), np.concatenate(self._codes)


class FieldReader:
    """Large text files of a fixed number of fields; blank lines are skipped.

    Spaces and tabs separate them. Where the tabs of any line give the right
    number of fields, tabs alone separate every line that holds one. Files are
    read fast, in chunks; only when something is wrong the file is read again
    slowly, to say in which line. `problem` takes one line as {name: text} and
    returns what is wrong with it ("has ...") or None; `expected` ends the error
    message.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        names: Sequence[str],
        problem: Callable[[dict[str, str]], str | None],
        expected: str,
    ):
        self.path, self.names = path, tuple(names)
        self.problem, self.expected = problem, expected

    def chunks(self) -> Iterator[dict[str, np.ndarray]]:
        """Arrays of strings (dtype object) by field, some lines at a time."""
        check_list(self.path)
        if self._by_tabs:
            yield from self._chunks_by_tabs()
            return
        empty = True
        try:
            _, _, first = next(lines_of(self.path), (0, "", []))
            if len(first) > len(self.names):
                raise self.first_bad_line()  # pandas only warns
            # dtype=object, because the category type would read the name
            # 00012 as the number 12; the extra column catches long lines
            with pd.read_csv(
                self.path,
                sep=r"\s+",
                header=None,
                names=[*self.names, "too many"],
                index_col=False,
                dtype=object,
                na_filter=False,
                quoting=csv.QUOTE_NONE,
                encoding="utf-8",
                compression=None,
                chunksize=_CHUNK,
            ) as reader:
                for chunk in reader:
                    empty = empty and chunk.empty
                    fields = {n: chunk[n].to_numpy() for n in self.names}
                    too_short = (fields[self.names[-1]] == "").any()
                    if too_short or (chunk["too many"] != "").any():
                        raise self.first_bad_line()
                    yield fields
        except pd.errors.ParserError as error:
            raise self.first_bad_line() from error
        if empty:
            raise TrialError(f"The file '{self.path}' holds no trials.")

    @cached_property
    def _by_tabs(self) -> bool:
        """Whether only tabs separate fields, so that names may hold spaces."""
        if not (_holds(self.path, b"\t") and _holds(self.path, b" ")):
            return False
        return any(
            "\t" in line and len(fields) == len(self.names)
            for _, line, fields in lines_of(self.path, True)
        )

    def _chunks_by_tabs(self) -> Iterator[dict[str, np.ndarray]]:
        """As :meth:`chunks`; pandas knows one separator a file."""
        rows = (fields for _, _, fields in lines_of(self.path, True))
        while chunk := list(islice(rows, _CHUNK)):
            if any(len(fields) != len(self.names) for fields in chunk):
                raise self.first_bad_line()
            columns = np.array(chunk, dtype=object).T
            yield dict(zip(self.names, columns, strict=True))

    def first_bad_line(self) -> TrialError:
        """The error that names the first line that is wrong."""
        template = " ".join(name.upper() for name in self.names)
        for number, line, fields in lines_of(self.path, self._by_tabs):
            if len(fields) != len(self.names):
                problem = f"has {len(fields)} fields"
                if self._by_tabs and "\t" in line:
                    problem += " between tabs"
                elif len(fields) > len(self.names):
                    problem += " (tabs must stand between names with spaces)"
            else:
                problem = self.problem(
                    dict(zip(self.names, fields, strict=True))
                )
            if problem:
                return TrialError(
                    f"'{self.path}', line {number}: '{line:.{_SHOWN}}' "
                    f"{problem:.{_SHOWN}}; "
                    f"expected was '{template}' with {self.expected}"
                )
        return TrialError(f"'{self.path}' cannot be read as '{template}'.")


def separator(names: Iterable[str]) -> str:
    """What goes between the fields of a list: a tab where names hold spaces."""
    names = tuple(names)
    bad = [n for n in names if not n or re.search(r"[\t\r\n]", n)]
    if bad:
        raise TrialError(
            f"{bad[0]!r} cannot stand in a list, which has tabs or spaces "
            "between names and a line for each trial. Rename the recording."
        )
    return "\t" if any(" " in name for name in names) else " "


def check_list(path: str | os.PathLike) -> None:
    """Raise a TrialError for a list that is missing or not text."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise TrialError(f"The list '{path}' is not a regular file.")
        _check_lines(path)
        check_text(path)
    except TextError as error:
        raise TrialError(str(error)) from error
    except FileNotFoundError as error:
        raise TrialError(f"The list '{path}' does not exist.") from error
    except OSError as error:
        raise TrialError(
            f"The list '{path}' cannot be read: {error.strerror}."
        ) from error


def _check_lines(path: str | os.PathLike) -> None:
    """Raise a TrialError for a line that would fill the memory."""
    length = 0
    with open(path, "rb") as file:
        for block in iter(partial(file.read, 1 << 20), b""):
            end = max(block.rfind(b"\n"), block.rfind(b"\r"))
            length = len(block) - 1 - end + (length if end < 0 else 0)
            if length > _LINE:
                raise TrialError(
                    f"'{path}' has a line of over {_LINE} bytes. Is it a list?"
                )


def _holds(path: str | os.PathLike, byte: bytes) -> bool:
    with open(path, "rb") as file:
        return any(
            byte in block for block in iter(partial(file.read, 1 << 20), b"")
        )


def lines_of(
    path: str | os.PathLike, by_tabs: bool = False
) -> Iterator[tuple[int, str, list[str]]]:
    """Number, text and fields of each line that is not blank."""
    # as pandas splits; str.split would at any Unicode space
    between_spaces = re.compile(r"[^ \t\n]+").findall
    between_tabs = re.compile(r"[^\t\n]+").findall
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip(" \t\n"):
                tabs = by_tabs and "\t" in line
                split = between_tabs if tabs else between_spaces
                yield number, line.strip(" \n"), split(line)
