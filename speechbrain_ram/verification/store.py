"""Embeddings on disk: one safetensors file that says whose it is.

A store belongs to one encoder, by fingerprint, and is refused for another, or
where its checksum does not fit its content. It remembers place, size and
modification time of each recording, so that a changed file is embedded again,
as `make` and `rsync` would, and a file of the same name in another corpus, too;
a corpus that was moved is embedded again. While extraction runs, new rows go
to small files in ``STORE.parts``; an interrupted run loses at most its last
minute.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from speechbrain_ram.data.plain import parse_json
from speechbrain_ram.data.record import check, checksum, seal
from speechbrain_ram.utils import atomic_path

_FORMAT = "speechbrain-ram embeddings 2"
# type and number of dimensions of each array
_KINDS = {
    "ids": ("U8", 1),
    "matrix": ("F32", 2),
    "seconds": ("F32", 1),
    "files": ("I64", 2),
}


class StoreError(ValueError):
    """A store cannot be used; the message says why."""


@dataclass(frozen=True, eq=False)
class EmbeddingSet:
    """Recordings, each named once, and their embeddings, row by row."""

    ids: tuple[str, ...]
    matrix: np.ndarray  # [U, E] float32, not scaled
    seconds: np.ndarray  # [U] float32
    files: np.ndarray  # [U, 3] int64, of :func:`file_state`

    def __post_init__(self) -> None:
        shapes = [np.shape(x) for x in (self.matrix, self.seconds, self.files)]
        rows = len(set(self.ids))
        if shapes != [(rows, *shapes[0][-1:]), (rows,), (rows, 3)]:
            raise StoreError(
                f"{rows} recordings need a matrix [{rows}, E], seconds "
                f"[{rows}] and files [{rows}, 3]; here are {len(self.ids)} ids "
                f"and the shapes {shapes}. Is the matrix transposed?"
            )

    def renamed(self, places: Mapping[str, str]) -> EmbeddingSet:
        """Rows by other names: `places` gives each name's id here."""
        rows = {name: row for row, name in enumerate(self.ids)}
        index = [rows[place] for place in places.values()]
        arrays = (self.matrix, self.seconds, self.files)
        return EmbeddingSet(tuple(places), *(each[index] for each in arrays))


class EmbeddingStore:
    """Where the embeddings of one encoder are kept, usually NAME.safetensors.

    The file need not exist. The fingerprint changes with the encoder's weights
    and its front-end.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: str):
        self.path = Path(path)
        self.made_with = {"format": _FORMAT, "encoder": fingerprint}
        self.parts = self.path.with_name(self.path.name + ".parts")

    def load(self) -> EmbeddingSet | None:
        """Everything stored, None if there is nothing."""
        paths = [self.path] if os.path.lexists(self.path) else []
        if self.parts.is_dir():
            paths += sorted(self.parts.glob("*.safetensors"))
        return merge([self._read(path) for path in paths])

    def save(self, embeddings: EmbeddingSet) -> None:
        """Replace the store, and remove what an interrupted run left."""
        self._write(self.path, embeddings)
        shutil.rmtree(self.parts, ignore_errors=True)

    def save_part(self, name: str, embeddings: EmbeddingSet) -> None:
        """Keep some rows until :meth:`save`."""
        self._write(self.parts / f"{name}.safetensors", embeddings)

    def _write(self, path: Path, embeddings: EmbeddingSet) -> None:
        names = json.dumps(embeddings.ids).encode()
        arrays = {
            "ids": np.frombuffer(names, np.uint8),
            "matrix": np.ascontiguousarray(embeddings.matrix, np.float32),
            "seconds": np.ascontiguousarray(embeddings.seconds, np.float32),
            "files": np.ascontiguousarray(embeddings.files, np.int64),
        }
        record = seal(self.made_with, *_content(arrays))
        with atomic_path(path) as temporary:
            save_file(arrays, temporary, metadata={"record": record})

    def _read(self, path: Path) -> EmbeddingSet:
        try:
            if not path.is_file():
                raise StoreError("it is not a regular file")
            with safe_open(path, framework="numpy") as file:
                record = (file.metadata() or {}).get("record", "")
                _check_shapes({name: file.get_slice(name) for name in _KINDS})
                arrays = {name: file.get_tensor(name) for name in _KINDS}
            check(record, self.made_with, *_content(arrays))
            ids = parse_json(arrays.pop("ids").tobytes(), "ids")
            if not isinstance(ids, list) or not {*map(type, ids)} <= {str}:
                raise StoreError("its ids are not a list of names")
            found = EmbeddingSet(tuple(ids), **arrays)
            bad = np.flatnonzero(~np.isfinite(found.matrix).all(axis=1))
            if bad.size:
                raise StoreError(
                    f"the embedding of {ids[bad[0]]!r:.200} is NaN or infinite"
                )
            return found
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise StoreError(
                f"'{path}' cannot be used as a store of embeddings: {error}. "
                "Name another file, or delete it to embed again."
            ) from error


def _check_shapes(parts: Mapping) -> None:
    """Refuse arrays of other types or sizes before any is read."""
    shapes = {name: part.get_shape() for name, part in parts.items()}
    for name, part in parts.items():
        found = part.get_dtype(), len(shapes[name])
        if found != _KINDS[name]:
            raise StoreError(f"its {name} are {found[0]} {shapes[name]}")
    rows, size = shapes["matrix"]
    if not 0 < size <= 2**16 or rows > shapes["ids"][0]:
        raise StoreError(
            f"its matrix is {shapes['matrix']}, for {shapes['ids'][0]} bytes "
            "of names"
        )


def file_state(path: str | os.PathLike) -> tuple[int, int, int]:
    """Size, modification time in ns, and 63 bits that stand for the place.

    A missing file is reported with others, when all are looked at.
    """
    try:
        state = os.stat(path)
    except OSError:
        return -1, -1, -1
    place = int(checksum(os.fsencode(os.path.realpath(path))), 16) >> 65
    return state.st_size, state.st_mtime_ns, place


def _content(arrays: Mapping[str, np.ndarray]) -> Iterator[str | memoryview]:
    """What the checksum of a store is of."""
    for name, array in arrays.items():
        yield f"{name} {array.dtype} {array.shape}"
        yield array.reshape(-1).view(np.uint8).data


def merge(sets: Sequence[EmbeddingSet]) -> EmbeddingSet | None:
    """Join sets of one encoder; of a name in several, the last row stays."""
    if len(sets) < 2:
        return sets[0] if sets else None
    names = [name for each in sets for name in each.ids]
    rows = {name: row for row, name in enumerate(names)}
    keep = list(rows.values())
    return EmbeddingSet(
        tuple(rows),
        np.concatenate([each.matrix for each in sets])[keep],
        np.concatenate([each.seconds for each in sets])[keep],
        np.concatenate([each.files for each in sets])[keep],
    )
