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
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from speechbrain_ram.data.plain import JSON_BYTES, limited_text, parse_json
from speechbrain_ram.utils import atomic_writer

_LIMIT = 2**29  # bytes read: headers of six million recordings
_ROWS = 32  # a line, which then is below JSON_BYTES with the longest paths


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
        found = parse_json(record[:JSON_BYTES], "record")
        values, sums = dict(found["made_with"]), found["checksum"]
        mine = checksum(json.dumps(values), *content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RecordError(
            "it has no record of what it was made from, so it is something "
            "else, or was written by an older version"
        ) from error
    if mine != sums:
        raise RecordError(
            "it is damaged, its content is not what was written (another "
            "checksum)"
        )
    for name in {**made_with, **values}:
        there, here = values.get(name), made_with.get(name)
        if there != here:
            raise RecordError(
                f"it was made with another {name:.80} ({there!s:.200}; now it "
                f"is {here!s:.200})"
            )


def write_recorded(
    path: str | os.PathLike,
    made_with: Mapping[str, Any],
    rows: Sequence[Sequence],
) -> None:
    """Write rows of numbers and strings below the line of their record."""
    text = "".join(
        f"{json.dumps(rows[i : i + _ROWS])}\n"
        for i in range(0, len(rows), _ROWS)
    )
    with atomic_writer(path) as file:
        file.write(f"{seal(made_with, text)}\n{text}")


def read_recorded(
    path: str | os.PathLike, made_with: Mapping[str, Any], *kinds: type
) -> list[list] | None:
    """What :func:`write_recorded` wrote; None if there is no such file.

    Each row must hold one value of each of the kinds, such as ``str, int``.
    """
    try:
        text = limited_text(path, _LIMIT)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RecordError(f"it is damaged ({error})") from error
    record, _, text = text.partition("\n")
    check(record, made_with, text)
    rows, wanted = [], list(kinds)
    for number, line in enumerate(re.finditer("[^\n]+", text), 2):
        try:
            if line.end() - line.start() > JSON_BYTES:
                raise ValueError("the line is too long")
            block = parse_json(line[0], path)
            for row in block if isinstance(block, list) else [block]:
                if not isinstance(row, list) or [*map(type, row)] != wanted:
                    raise ValueError(f"{reprlib.repr(row)} is not a row")
                rows.append(row)
        except ValueError as error:
            message = f"it is damaged (line {number}: {error})"
            raise RecordError(message) from error
    return rows
