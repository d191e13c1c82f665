"""JSON and YAML of others as plain data: nothing in it is executed.

Size, depth and number of values are bounded, so that no file of somebody
else's takes minutes or gigabytes to read. YAML counts with its aliases
expanded: ten lines of ``&b [*a, *a, ...]`` are billions of values.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import ruamel.yaml
from ruamel.yaml import events

from speechbrain_ram.data.names import read_text

#: The longest YAML read, in bytes: the description of an encoder has 1,000,
#: the hyperparams.yaml of a run 10,000. Its parser needs 10 us a character.
YAML_BYTES = 2**18
#: The longest JSON read where nothing else is said, in bytes.
JSON_BYTES = 2**20
_VALUES = 10_000  # in one YAML, with aliases expanded
_DEPTH = 40  # lists in lists

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped one


class PlainError(ValueError):
    """A file is not the plain data that it should be; names the file."""


def limited_text(path: str | os.PathLike, limit: int) -> str:
    """The text of a regular file of at most so many bytes.

    A missing file is an OSError; a pipe or device, which may never end, a
    longer file, and what is not UTF-8 are ValueErrors.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise PlainError(f"'{path}' is not a regular file.")
    if size > limit:
        raise PlainError(
            f"'{path}' has {size} bytes; at most {limit} are read here. Is "
            "it the right file, and is it damaged?"
        )
    return read_text(path)


def read_json(path: str | os.PathLike, limit: int = JSON_BYTES) -> Any:
    """What a JSON file says; raises as :func:`limited_text` does."""
    return parse_json(limited_text(path, limit), path)


def parse_json(text: str | bytes, name: object) -> Any:
    """What JSON of this file's name says; NaN and infinity are none."""
    try:
        value = json.loads(text, parse_constant=_no_number)
        if isinstance(text, bytes):
            text = text.decode("latin-1")
        if _SURROGATE.search(text):
            # Half a character is not text; a byte of a file's name may be.
            names = json.dumps(value, ensure_ascii=False)
            names.encode(errors="surrogateescape")
        return value
    except (ValueError, RecursionError, MemoryError) as error:
        raise PlainError(
            f"'{name}' is not valid JSON ({_reason(error)}). Is it damaged?"
        ) from error


def read_yaml(
    path: str | os.PathLike, reader: ruamel.yaml.YAML | None = None
) -> Any:
    """What a YAML file says; tags are errors, but for another ``reader``."""
    return parse_yaml(limited_text(path, YAML_BYTES), path, reader)


def parse_yaml(
    text: str, name: object, reader: ruamel.yaml.YAML | None = None
) -> Any:
    """What YAML of this file's name says.

    Another ``reader`` may keep tags; what it returns must not be executed.
    """
    if len(text) > YAML_BYTES:
        raise PlainError(
            f"'{name}' has {len(text)} characters; at most {YAML_BYTES} are "
            "read here. Is it damaged?"
        )
    try:
        _check_size(text)
        reader = reader or ruamel.yaml.YAML(typ="safe", pure=True)
        return reader.load(text)
    except Exception as error:  # the parser has bugs of any type
        raise PlainError(
            f"'{name}' is not valid YAML ({_reason(error)}). Is it damaged?"
        ) from error


def _check_size(text: str) -> None:
    """Raise a ValueError for YAML that is too deep or becomes too large."""
    expanded: dict[str, int] = {}  # values below an anchor
    opened: list[tuple[str | None, int]] = []  # anchors around this place
    count = 0
    reader = ruamel.yaml.YAML(typ="safe", pure=True)
    for event in reader.parse(text):
        if isinstance(event, events.AliasEvent):
            if event.anchor not in expanded:
                raise ValueError(
                    f"*{event.anchor} stands within itself, or for nothing"
                )
            count += expanded[event.anchor]
        elif isinstance(event, events.CollectionStartEvent):
            opened.append((event.anchor, count))
            count += 1
        elif isinstance(event, events.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                expanded[anchor] = count - before
        elif isinstance(event, events.ScalarEvent):
            event.value.encode()  # half a character is not text
            count += 1
            if event.anchor:
                expanded[event.anchor] = 1
        if len(opened) > _DEPTH:
            raise ValueError(f"lists in lists, more than {_DEPTH} deep")
        if count > _VALUES:
            raise ValueError(f"more than {_VALUES} values")


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")


def _reason(error: BaseException) -> str:
    """The first line of an error, short, with the line of the text."""
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f", line {mark.line + 1}"
    lines = str(problem).splitlines() or [type(error).__name__]
    return lines[0][:200] + where
