"""Who is enrolled: one file of speaker models, searched by exact cosine.

The file is an SQLite database, so that a thousand enrolments need no
rewriting of the whole, a crash leaves the last whole state, and two processes
that enrol at once wait for each other instead of losing one's work. (SQLite's
locks need a local disk; do not share the file over NFS.) Opening one executes
nothing that the file contains.

A speaker's model is the average of the length-normalised embeddings of all
enrolled recordings; a score is the cosine between it and a test embedding.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechbrain_ram.data.record import RecordError, check, checksum, seal
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


class EnrolmentError(ValueError):
    """The database or what is put into it is wrong; the message says why."""


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
        if self.path.exists():
            with self._connection():
                pass  # says now, not at the first search, what is wrong

    def enrol(self, name: str, embeddings: np.ndarray) -> int:
        """Add recordings [N, E] or [E] to one speaker, as :meth:`enrol_many`
        does.
        """
        return self.enrol_many({name: embeddings})[name]

    def enrol_many(
        self, recordings: Mapping[str, np.ndarray]
    ) -> dict[str, int]:
        """Add recordings to speakers' models: to all of them or, if it fails,
        none.

        Returns how many recordings each model now averages.
        """
        units = {
            _checked_name(name): self._units(np.atleast_2d(embeddings))
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
        counts = {}
        with self._connection() as connection, _transaction(connection):
            for name, rows in units.items():
                count, total = 0, np.zeros(self.embedding_dim, np.float32)
                known = connection.execute(
                    "SELECT * FROM speakers WHERE name = ?", [name]
                ).fetchall()
                if known:
                    count, total = known[0][1], self._vectors(known)[0]
                counts[name] = count + len(rows)
                total = (total + rows.sum(axis=0)).astype("<f4").tobytes()
                sums = checksum(name, str(counts[name]), total)
                connection.execute(
                    "INSERT OR REPLACE INTO speakers VALUES (?, ?, ?, ?)",
                    [name, counts[name], total, sums],
                )
        return counts

    def remove(self, name: str) -> None:
        """Forget an enrolled speaker."""
        with self._connection() as connection, _transaction(connection):
            cursor = connection.execute(
                "DELETE FROM speakers WHERE name = ?", [name]
            )
            if cursor.rowcount == 0:
                raise EnrolmentError(
                    f"Nobody called '{name}' is enrolled in '{self.path}'."
                )

    def speakers(self) -> dict[str, int]:
        """Enrolled speakers and how many recordings made each model."""
        if not self.path.exists():
            return {}
        with self._connection() as connection:
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
        scores = models @ self._units(np.atleast_2d(embedding))[0]
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

    def score(self, name: str, embedding: np.ndarray) -> float:
        """Cosine between a recording and one enrolled speaker."""
        names, models = self.models()
        if name not in names:
            raise EnrolmentError(
                f"Nobody called '{name}' is enrolled in '{self.path}'."
            )
        unit = self._units(np.atleast_2d(embedding))[0]
        return float(np.clip(models[names.index(name)] @ unit, -1.0, 1.0))

    def models(self) -> tuple[list[str], np.ndarray]:
        """Sorted names, and unit vectors [S, E]; read again only after a
        write.
        """
        if not self.path.exists():
            return [], np.zeros((0, self.embedding_dim), np.float32)
        with self._connection() as connection:
            (state,) = connection.execute("SELECT state FROM record").fetchone()
            if self._cache is None or self._cache[0] != state:
                rows = connection.execute(
                    "SELECT * FROM speakers ORDER BY name"
                ).fetchall()
                models = self._units(self._vectors(rows))
                self._cache = (state, [row[0] for row in rows], models)
        return self._cache[1], self._cache[2]

    def _units(self, embeddings: np.ndarray) -> np.ndarray:
        """Length-normalise, after checking what came in."""
        embeddings = np.asarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            raise EnrolmentError(
                f"Embeddings of shape {embeddings.shape} do not fit a "
                f"database of {self.embedding_dim} dimensions."
            )
        try:
            return unit_length(embeddings)
        except ValueError as error:
            raise EnrolmentError(str(error)) from None

    def _vectors(self, rows: list[tuple]) -> np.ndarray:
        """The sums of whole rows of `speakers`, [N, E]."""
        for name, recordings, total, sums in rows:
            if checksum(name, str(recordings), total) != sums:
                raise EnrolmentError(
                    f"'{self.path}' is damaged: the model of {name!r} is not "
                    "what was written (another checksum). Restore the file "
                    "from a copy, or enrol anew in a new one."
                )
        totals = np.frombuffer(b"".join(row[2] for row in rows), "<f4")
        return totals.reshape(-1, self.embedding_dim)

    @contextmanager
    def _connection(self):
        """Open the file, checked, with SQLite's errors put into words."""
        try:
            with closing(
                sqlite3.connect(
                    self.path, timeout=self.timeout, isolation_level=None
                )
            ) as connection:
                connection.execute("PRAGMA trusted_schema = OFF")
                self._check(connection)
                yield connection
        except sqlite3.OperationalError as error:
            raise EnrolmentError(
                f"'{self.path}' cannot be used now: {error}. Another process "
                f"may be writing for over {self.timeout:g} s, or the file or "
                "its folder is read-only."
            ) from error
        except sqlite3.DatabaseError as error:
            raise EnrolmentError(
                f"'{self.path}' is not an enrolment database: {error}."
            ) from error

    def _check(self, connection: sqlite3.Connection) -> None:
        """Create an empty file's tables; refuse what is not ours."""

        def number(name: str) -> int:
            return connection.execute(f"PRAGMA {name}").fetchone()[0]

        if number("application_id") == 0 and number("schema_version") == 0:
            # A model of 512 dimensions fills half of SQLite's usual page and
            # wastes the other half.
            connection.execute("PRAGMA page_size = 16384")
            # Two processes may get here at once: the second changes nothing.
            with _transaction(connection):
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute(
                    "INSERT INTO record SELECT ?, randomblob(16) "
                    "WHERE NOT EXISTS (SELECT * FROM record)",
                    [seal(self.made_with)],
                )
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        if number("application_id") != _APPLICATION_ID:
            raise EnrolmentError(
                f"'{self.path}' is an SQLite file, but not an enrolment "
                "database, or one of an older version. Enrol anew in a new "
                "file."
            )
        (record,) = connection.execute("SELECT seal FROM record").fetchone()
        try:
            check(record, self.made_with)
        except RecordError as error:
            raise EnrolmentError(
                f"'{self.path}' cannot be used: {error}. Embeddings of two "
                "encoders cannot be compared: enrol anew in a new file."
            ) from error


def _checked_name(name: str) -> str:
    if not name or name != name.strip() or not name.isprintable():
        raise EnrolmentError(
            f"{name!r} is not a name for a speaker: one printable line "
            "without spaces around it is needed."
        )
    return name


@contextmanager
def _transaction(connection: sqlite3.Connection):
    """Take the write lock at once, so that read-then-write cannot be raced."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
