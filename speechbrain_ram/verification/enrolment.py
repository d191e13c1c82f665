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

#: Written into every file; a reader refuses the numbers it does not know.
FORMAT = 1
_APPLICATION_ID = 0x53424152  # 'SBRA' in the file's header
_SCHEMA = """
CREATE TABLE IF NOT EXISTS encoder (
    fingerprint TEXT NOT NULL, embedding_dim INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS speakers (
    name TEXT PRIMARY KEY, recordings INTEGER NOT NULL, total BLOB NOT NULL);
"""


class EnrolmentError(ValueError):
    """The database or what is put into it is wrong; the message says why."""


@dataclass(frozen=True)
class Match:
    """One candidate of a search.

    Arguments
    ---------
    name : str
        The enrolled speaker.
    score : float
        Cosine in [-1, 1], higher is more alike.
    """

    name: str
    score: float


class EnrolmentDatabase:
    """Speaker models in one file, for one encoder.

    Arguments
    ---------
    path : path
        The file. It is created when the first speaker is enrolled, in a
        folder that exists.
    fingerprint : str
        Identifies the encoder; embeddings of two encoders never mix.
    embedding_dim : int
        Size of its embeddings.
    timeout : float
        Seconds to wait for another process that is writing.

    Raises
    ------
    EnrolmentError
        Not such a database, of another format number, or filled by another
        encoder.

    Example
    -------
    >>> path = getfixture("tmp_path") / "speakers.db"
    >>> database = EnrolmentDatabase(path, fingerprint="f00d", embedding_dim=3)
    >>> database.enroll("ada", np.eye(3)[:2])
    2
    >>> database.enroll("bob", np.eye(3)[2:])
    1
    >>> best = database.identify(np.array([1.0, 0.0, 0.0]), top=1)[0]
    >>> best.name, round(best.score, 4)
    ('ada', 0.7071)
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fingerprint: str,
        embedding_dim: int,
        timeout: float = 30.0,
    ) -> None:
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.embedding_dim = embedding_dim
        self.timeout = timeout
        self._cache: tuple[tuple, list[str], np.ndarray] | None = None
        if self.path.exists():
            with self._connection():
                pass  # says now, not at the first search, what is wrong

    def enroll(self, name: str, embeddings: np.ndarray) -> int:
        """Add recordings to a speaker's model, a new one if need be.

        Arguments
        ---------
        name : str
            Any text of one line.
        embeddings : np.ndarray
            Shape [N, E] or [E]; their lengths do not matter.

        Returns
        -------
        int
            Recordings that the speaker's model now averages.
        """
        return self.enroll_many({name: embeddings})[name]

    def enroll_many(
        self, recordings: Mapping[str, np.ndarray]
    ) -> dict[str, int]:
        """Add to the models of several speakers: all of them or, if it fails,
        none.

        Arguments
        ---------
        recordings : mapping of str to np.ndarray
            Embeddings of each speaker, shape [N, E] or [E].

        Returns
        -------
        dict of str to int
            Recordings that each model now averages.
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
                row = connection.execute(
                    "SELECT recordings, total FROM speakers WHERE name = ?",
                    [name],
                ).fetchone()
                if row is not None:
                    count, total = row[0], self._vectors(row[1])[0]
                counts[name] = count + len(rows)
                total = (total + rows.sum(axis=0)).astype("<f4")
                connection.execute(
                    "INSERT OR REPLACE INTO speakers VALUES (?, ?, ?)",
                    [name, counts[name], total.tobytes()],
                )
        return counts

    def remove(self, name: str) -> None:
        """Forget a speaker.

        Arguments
        ---------
        name : str
            An enrolled speaker; another one raises EnrolmentError.
        """
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
        """Search all models for the speakers of one recording.

        Arguments
        ---------
        embedding : np.ndarray
            Shape [E].
        top : int
            How many candidates to return at most.

        Returns
        -------
        list of Match
            Best first; names break ties, so that the answer is one.
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
        """All speaker models, read again only after somebody wrote.

        Returns
        -------
        tuple of list of str and np.ndarray
            Names in sorted order, and unit vectors of shape [S, E], float32.
        """
        if not self.path.exists():
            return [], np.zeros((0, self.embedding_dim), np.float32)
        with self._connection() as connection:
            # Bytes 24 to 27 of the file count the writing transactions, and
            # the inode tells a replaced file.
            stamp = (os.stat(self.path).st_ino, _change_counter(self.path))
            if self._cache is None or self._cache[0] != stamp:
                rows = connection.execute(
                    "SELECT name, total FROM speakers ORDER BY name"
                ).fetchall()
                totals = self._vectors(b"".join(row[1] for row in rows))
                models = self._units(totals)
                self._cache = (stamp, [row[0] for row in rows], models)
        return self._cache[1], self._cache[2]

    def _units(self, embeddings: np.ndarray) -> np.ndarray:
        """Length-normalise, after checking what came in."""
        embeddings = np.asarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            raise EnrolmentError(
                f"Embeddings of shape {embeddings.shape} do not fit a "
                f"database of {self.embedding_dim} dimensions."
            )
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or (lengths == 0).any():
            raise EnrolmentError(
                "An embedding is zero, NaN or infinite. Is it of silence?"
            )
        return embeddings / lengths

    def _vectors(self, blob: bytes) -> np.ndarray:
        """Read vectors back, [N, E]."""
        if len(blob) % (4 * self.embedding_dim):
            raise EnrolmentError(
                f"'{self.path}' holds a speaker model of a wrong size. It is "
                "damaged: restore it from a copy, or enrol anew."
            )
        return np.frombuffer(blob, "<f4").reshape(-1, self.embedding_dim)

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
                for statement in _SCHEMA.strip().split(";")[:-1]:
                    connection.execute(statement)
                connection.execute(
                    "INSERT INTO encoder SELECT ?, ? "
                    "WHERE NOT EXISTS (SELECT * FROM encoder)",
                    [self.fingerprint, self.embedding_dim],
                )
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
        if number("application_id") != _APPLICATION_ID:
            raise EnrolmentError(
                f"'{self.path}' is an SQLite file, but no enrolment database."
            )
        if number("user_version") != FORMAT:
            raise EnrolmentError(
                f"'{self.path}' has format {number('user_version')}, this "
                f"version of speechbrain-ram reads format {FORMAT}. Was it "
                "written by a newer version?"
            )
        theirs = connection.execute("SELECT * FROM encoder").fetchone()
        if theirs != (self.fingerprint, self.embedding_dim):
            raise EnrolmentError(
                f"'{self.path}' was filled by another encoder (fingerprint "
                f"{theirs[0]}, {theirs[1]} dimensions) than this one "
                f"({self.fingerprint}, {self.embedding_dim}). Embeddings of "
                "two encoders cannot be compared: enrol anew in a new file."
            )


def _checked_name(name: str) -> str:
    if not name or name != name.strip() or not name.isprintable():
        raise EnrolmentError(
            f"{name!r} is no name for a speaker: one printable line without "
            "spaces around it is needed."
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


def _change_counter(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(24)
        return file.read(4)
