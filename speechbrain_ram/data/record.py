"""What a file was made from, and whether it is whole: one record for all.

Stores of embeddings, shards and caches of headers are made once and used for
months, while corpora, encoders and settings change. Each carries a record: the
values that it was made with, and a checksum of them and of its content. It is
used only where its values are those that it would be made with now.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechbrain_ram.utils import atomic_writer


class RecordError(ValueError):
    """A file was made with other values, or is damaged: half a sentence."""


def checksum(*parts: str | bytes | memoryview) -> str:
    """128 bits of BLAKE2b over some parts and over where they end."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = memoryview(part.encode() if isinstance(part, str) else part)
        digest.update(part.nbytes.to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def seal(made_with: Mapping[str, Any], *content: str | bytes) -> str:
    """The record of a file, one line of JSON.

    `made_with` are JSON values under the names that messages use, `content` is
    what the file holds besides.
    """
    sums = checksum(json.dumps(made_with), *content)
    return json.dumps({"made_with": made_with, "checksum": sums})


def check(
    record: str, made_with: Mapping[str, Any], *content: str | bytes
) -> None:
    """Raise a RecordError unless a record is of these values and content."""
    try:
        found = json.loads(record)
        values, sums = dict(found["made_with"]), found["checksum"]
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(
            "it has no record of what it was made from, so it is something "
            "else, or was written by an older version"
        ) from error
    if checksum(json.dumps(values), *content) != sums:
        raise RecordError(
            "it is damaged, its content is not what was written (another "
            "checksum)"
        )
    for name in {**made_with, **values}:
        there, here = values.get(name), made_with.get(name)
        if there != here:
            raise RecordError(
                f"it was made with another {name} ({there}; now it is {here})"
            )


def write_recorded(
    path: str | os.PathLike, made_with: Mapping[str, Any], content: Any
) -> None:
    """Write what JSON can hold, below the line of its record."""
    text = json.dumps(content)
    with atomic_writer(path) as file:
        file.write(f"{seal(made_with, text)}\n{text}")


def read_recorded(
    path: str | os.PathLike, made_with: Mapping[str, Any]
) -> Any | None:
    """What :func:`write_recorded` wrote; None if there is no such file."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    record, _, text = content.decode(errors="replace").partition("\n")
    check(record, made_with, text)
    return json.loads(text)
