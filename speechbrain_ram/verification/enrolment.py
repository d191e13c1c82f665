"""Who is enrolled: one file of speaker models, searched by exact cosine.

The file is an SQLite database, so that a thousand enrolments need no
rewriting of the whole, a crash leaves the last whole state, and two processes
that enrol at once wait for each other instead of losing one's work. (SQLite's
locks need a local disk; do not share the file over NFS.) Opening one executes
nothing that the file contains: a file with any other table, view or trigger is
refused, and all rows are checked before one is used.

A speaker's model is the average of the length-normalised embeddings of all
enrolled recordings; a score is the cosine between it and a test embedding.
"""

from __future__ import annotations

import os
import reprlib
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from speechbrain_ram.data.record import RecordError, check, checksum, seal
from speechbrain_ram.verification.gates import (
    EnrolmentError,
    checked_name,
    is_name,
    misfits,
    refuse_misfits,
)
from speechbrain_ram.verification.scores import unit_length

_FORMAT = "speechbrain-ram enrolment 2"
_APPLICATION_ID = 0x53425232  # 'SBR2' in the file's header
# The state is a random number that every write replaces, whoever writes: what
# was read is still true only while it is the same.
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS record (seal TEXT NOT NULL, state BLOB)",
    "CREATE TABLE IF NOT EXISTS speakers (name TEXT PRIMARY KEY, recordings "
    "INTEGER NOT NULL, total BLOB NOT NULL, checksum TEXT NOT NULL)",
    *(
        f"CREATE TRIGGER IF NOT EXISTS after_{event} AFTER {event} ON speakers "
        "BEGIN UPDATE record SET state = randomblob(16); END"
        for event in ("insert", "update", "delete")
    ),
)
_OBJECTS = (
    "SELECT type, name, tbl_name, sql FROM sqlite_master "
    "ORDER BY type, name LIMIT 10"
)
_MARKS = ("application_id", "schema_version")  # 0 in an empty file
# A stranger's file is read within bounds, however it is made.
_SETTINGS = (
    "trusted_schema = OFF",
    "cell_size_check = ON",
    "cache_size = -8000",
)
_SECONDS = 60  # of one use, waiting for others not counted
_BYTES = 2**16  # of a row, besides its vector


@dataclass(frozen=True)
class Match:
    """One candidate of a search, with its cosine."""

    name: str
    score: float


class EnrolmentDatabase:
    """Speaker models in one file, for the encoder of this fingerprint.

    The file is created when the first speaker is enrolled, in a folder that
    exists. `timeout` is how many seconds to wait for another process that
    writes.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fingerprint: str,
        embedding_dim: int,
        timeout: float = 30.0,
    ) -> None:
        self.path = Path(path)
        self.made_with = {
            "format": _FORMAT,
            "encoder": fingerprint,
            "number of dimensions": embedding_dim,
        }
        self.embedding_dim = embedding_dim
        self.timeout = timeout
        self._cache: tuple[bytes, list[str], np.ndarray] | None = None
        self._checked: bytes | None = None  # the state that all rows had then
        if os.path.lexists(self.path):
            with self._opened():
                pass  # says now, not at the first search, what is wrong

    def enrol(
        self, name: str, embeddings: np.ndarray, agreement: float = -1.0
    ) -> int:
        """Add recordings [N, E] or [E] to one speaker, as :meth:`enrol_many`
        does.
        """
        return self.enrol_many({name: embeddings}, agreement)[name]

    def enrol_many(
        self,
        recordings: Mapping[str, np.ndarray],
        agreement: float = -1.0,
        called: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, int]:
        """Add recordings to speakers' models: to all of them or, if it fails,
        none.

        It fails where a recording has a cosine below `agreement` with the
        others of its speaker, see :func:`.gates.misfits`; `called` is what the
        message calls the recordings. Returns how many each model now averages.
        """
        units = {
            checked_name(name): self._units(embeddings, f"Of '{name}', ")
            for name, embeddings in recordings.items()
        }
        for name, rows in units.items():
            if len(rows) == 0:
                raise EnrolmentError(f"No recording to enrol '{name}' with.")
        if not self.path.parent.is_dir():
            raise EnrolmentError(
                f"'{self.path.parent}' is not a folder, so '{self.path.name}' "
                "cannot be created in it."
            )
        if not os.path.lexists(self.path):
            self._added(None, units, agreement, called)  # fails without a file
        with self._opened("IMMEDIATE") as connection:
            models = self._added(connection, units, agreement, called)
            connection.executemany(
                "INSERT OR REPLACE INTO speakers VALUES (?, ?, ?, ?)", models
            )
        return {name: count for name, count, *_ in models}

    def _added(self, connection, units, agreement, called) -> list[tuple]:
        """Rows of the speakers with these recordings added, or an error."""
        models, wrong = [], {}
        for name, rows in units.items():
            count, total = 0, np.zeros(self.embedding_dim, np.float32)
            query = "SELECT * FROM speakers WHERE name = ?"
            known = connection and connection.execute(query, [name]).fetchone()
            if known:
                count, total = known[1], self._total(*known)
            wrong[name] = misfits(rows, agreement, total if count else None)
            count, total = count + len(rows), total + rows.sum(axis=0)
            if not _is_model(total[None], count):
                raise EnrolmentError(
                    f"'{name}' cannot be enrolled: the embeddings cancel "
                    "each other, their mean is zero or nearly so. Are "
                    "they of one speaker? Nobody was enrolled."
                )
            total = total.astype("<f4").tobytes()
            models.append(
                (name, count, total, checksum(name, str(count), total))
            )
        refuse_misfits(wrong, agreement, called or {})
        return models

    def remove(self, name: str) -> None:
        """Forget an enrolled speaker."""
        if not os.path.lexists(self.path):
            self._place([], name)  # and no file is made
        with self._opened("IMMEDIATE") as connection:
            cursor = connection.execute(
                "DELETE FROM speakers WHERE name = ?", [name]
            )
            if cursor.rowcount == 0:
                self._place([], name)

    def speakers(self) -> dict[str, int]:
        """Enrolled speakers and how many recordings made each model."""
        if not os.path.lexists(self.path):
            return {}
        with self._opened() as connection:
            return dict(
                connection.execute(
                    "SELECT name, recordings FROM speakers ORDER BY name"
                )
            )

    def identify(self, embedding: np.ndarray, top: int = 5) -> list[Match]:
        """The `top` models closest to one recording's embedding, best first.

        Names break ties, so that there is one answer.
        """
        if top < 1:
            raise EnrolmentError(f"top is {top}, 1 or more is needed.")
        names, models = self.models()
        if not names:
            raise EnrolmentError(
                f"Nobody is enrolled in '{self.path}' yet. Is it the right "
                "database?"
            )
        scores = models @ self._units(embedding)[0]
        top = min(top, len(names))
        # Everything as good as the last that fits, then exact order: the
        # names are sorted, and a stable sort keeps them so within ties.
        least = np.partition(scores, -top)[-top]
        candidates = np.flatnonzero(scores >= least)
        order = np.argsort(-scores[candidates], kind="stable")[:top]
        return [
            Match(names[i], float(np.clip(scores[i], -1.0, 1.0)))
            for i in candidates[order]
        ]

    def nearest(self, name: str) -> Match | None:
        """The other speaker whose model is closest to this one's, if any."""
        names, models = self.models()
        model = models[self._place(names, name)]
        others = [m for m in self.identify(model, top=2) if m.name != name]
        return others[0] if others else None

    def score(self, name: str, embedding: np.ndarray) -> float:
        """Cosine between a recording and one enrolled speaker."""
        names, models = self.models()
        model = models[self._place(names, name)]
        return float(np.clip(model @ self._units(embedding)[0], -1.0, 1.0))

    def models(self) -> tuple[list[str], np.ndarray]:
        """Sorted names, and unit vectors [S, E]; read again only after a
        write.
        """
        if not os.path.lexists(self.path):
            return [], np.zeros((0, self.embedding_dim), np.float32)
        with self._opened() as connection:
            if self._cache is None or self._cache[0] != self._checked:
                self._check_rows(connection)
        return self._cache[1:]

    def _place(self, names: list[str], name: str) -> int:
        if name not in names:
            raise EnrolmentError(
                f"Nobody called '{name}' is enrolled in '{self.path}'."
            )
        return names.index(name)

    def _units(self, embeddings: np.ndarray, whose: str = "") -> np.ndarray:
        """Length-normalise, after checking what came in."""
        with np.errstate(over="ignore"):  # infinite, which is refused below
            embeddings = np.atleast_2d(np.asarray(embeddings, np.float32))
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            raise EnrolmentError(
                f"Embeddings of shape {embeddings.shape} do not fit a "
                f"database of {self.embedding_dim} dimensions."
            )
        try:
            return unit_length(embeddings)
        except ValueError as error:
            raise EnrolmentError(f"{whose}{error}") from None

    @contextmanager
    def _opened(self, kind: str = ""):
        """One transaction on the checked file; SQLite's errors in words."""
        self._check_file()
        ends = time.monotonic() + self.timeout + _SECONDS
        try:
            with closing(
                sqlite3.connect(
                    os.path.abspath(self.path),  # not SQLite's ':memory:'
                    timeout=self.timeout,
                    isolation_level=None,
                )
            ) as connection:
                if hasattr(connection, "setlimit"):  # from Python 3.11 on
                    most = _BYTES + 4 * self.embedding_dim
                    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, most)
                connection.set_progress_handler(
                    lambda: time.monotonic() > ends, 10_000
                )
                # of bytes that are not UTF-8 comes what no name may hold
                connection.text_factory = partial(
                    str, encoding="utf-8", errors="surrogateescape"
                )
                for setting in _SETTINGS:
                    connection.execute(f"PRAGMA {setting}")
                self._create(connection)
                connection.execute(f"BEGIN {kind}")
                state = self._check(connection)
                if state != self._checked:
                    self._check_rows(connection)
                yield connection
                state = self._state(connection)
                connection.execute("COMMIT")  # closing takes back the rest
                self._checked = state
        except sqlite3.OperationalError as error:
            raise EnrolmentError(
                f"'{self.path}' cannot be used now: {error}. Another process "
                f"may be writing for over {self.timeout:g} s, or the file or "
                "its folder is read-only, or the file is damaged."
            ) from error
        except (
            sqlite3.DatabaseError,
            MemoryError,
            UnicodeDecodeError,  # of a name in SQLite's own message
        ) as error:
            raise EnrolmentError(
                f"'{self.path}' is not an enrolment database, or is damaged: "
                f"{error}."
            ) from error

    def _check_file(self) -> None:
        """Refuse what SQLite would overwrite, or mix with other files."""
        if not os.path.lexists(self.path):
            return
        problem = None
        if not self.path.is_file():
            problem = "it is a folder, a device or a link to nothing"
        else:
            try:
                with open(self.path, "rb") as file:
                    start = file.read(20)
            except OSError as error:
                raise EnrolmentError(
                    f"'{self.path}' cannot be read: {error.strerror}."
                ) from error
            if start and start[:16] != b"SQLite format 3\0":
                problem = "it does not begin as one"
            # 2 says that SQLite's write-ahead log is in use; we never use it
            elif start[18:] != b"\2\2" and os.path.lexists(f"{self.path}-wal"):
                problem = f"'{self.path}-wal' beside it belongs to another file"
        if problem:
            raise EnrolmentError(
                f"'{self.path}' is not an enrolment database: {problem}."
            )

    def _create(self, connection: sqlite3.Connection) -> None:
        """Make the tables of an empty file."""
        if any(_number(connection, name) for name in _MARKS):
            return
        # A model of 512 dimensions fills half of SQLite's usual page and
        # wastes the other half.
        connection.execute("PRAGMA page_size = 16384")
        # Two processes may get here at once: the second changes nothing.
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute(
            "INSERT INTO record SELECT ?, randomblob(16) "
            "WHERE NOT EXISTS (SELECT * FROM record)",
            [seal(self.made_with)],
        )
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute("COMMIT")

    def _check(self, connection: sqlite3.Connection) -> bytes:
        """Refuse what is not ours, before any of it is used; its state.

        A view or a column of another definition may stand for gigabytes or
        never end, and a trigger may change other rows.
        """
        if _number(connection, "application_id") != _APPLICATION_ID:
            raise EnrolmentError(
                f"'{self.path}' is an SQLite file, but not an enrolment "
                "database, or one of an older version. Enrol anew in a new "
                "file."
            )
        if connection.execute(_OBJECTS).fetchall() != _known_objects():
            raise self._damaged("it holds other tables, views or triggers")
        rows = connection.execute("SELECT * FROM record LIMIT 2").fetchall()
        if [tuple(map(type, row)) for row in rows] != [(str, bytes)]:
            raise self._damaged("the record of the encoder is another one")
        try:
            check(rows[0][0], self.made_with)
        except (RecordError, UnicodeError) as error:
            raise EnrolmentError(
                f"'{self.path}' cannot be used: {error}. Embeddings of two "
                "encoders cannot be compared: enrol anew in a new file."
            ) from error
        return rows[0][1]

    def _check_rows(self, connection: sqlite3.Connection) -> None:
        """Check the whole file, and keep the models of all speakers."""
        ((found,),) = connection.execute("PRAGMA integrity_check(1)")
        if found != "ok":
            raise self._damaged(str(found))
        ((n,),) = connection.execute("SELECT count(*) FROM speakers")
        totals = np.empty((n, self.embedding_dim), np.float32)
        names, counts = [], []
        rows = connection.execute("SELECT * FROM speakers ORDER BY name")
        for i, row in enumerate(rows):
            totals[i] = self._total(*row)
            names.append(row[0])
            counts.append(row[1])
        wrong = np.flatnonzero(~_is_model(totals, np.array(counts)))
        if wrong.size:
            raise self._damaged(
                f"the model of {names[wrong[0]]!r} is not the sum of "
                f"{counts[wrong[0]]} unit vectors"
            )
        self._checked = self._state(connection)
        self._cache = (self._checked, names, self._units(totals))

    def _total(self, name, recordings, total, sums) -> np.ndarray:
        """The sum of unit vectors in a row, if the row is what was written."""
        if not is_name(name):
            raise self._damaged(f"{reprlib.repr(name)} is not a name")
        if (
            type(recordings) is not int
            or not 0 < recordings < 2**31
            or type(total) is not bytes
            or len(total) != 4 * self.embedding_dim
            or checksum(name, str(recordings), total) != sums
        ):
            raise self._damaged(
                f"the model of {name!r} is not what was written (another "
                "checksum)"
            )
        return np.frombuffer(total, "<f4")

    def _state(self, connection: sqlite3.Connection) -> bytes:
        return connection.execute("SELECT state FROM record").fetchone()[0]

    def _damaged(self, why: str) -> EnrolmentError:
        return EnrolmentError(
            f"'{self.path}' is damaged: {why}. Restore the file from a copy, "
            "or enrol anew in a new one."
        )


@cache
def _known_objects() -> list[tuple]:
    """What an enrolment database holds, in SQLite's own words."""
    with closing(sqlite3.connect(":memory:")) as ours:
        for statement in _SCHEMA:
            ours.execute(statement)
        return ours.execute(_OBJECTS).fetchall()


def _number(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _is_model(totals: np.ndarray, counts: np.ndarray | int) -> np.ndarray:
    """Whether each of [N, E] has the length that a sum of unit vectors has."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("ne,ne->n", totals, totals))
    return (1e-3 * counts <= lengths) & (lengths <= 1.001 * counts)
