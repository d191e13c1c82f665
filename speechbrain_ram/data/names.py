"""Text and names as people hand them in."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path


class TextError(ValueError):
    """A file is not text in UTF-8."""


def read_text(path: str | os.PathLike) -> str:
    """Read a list or a table of a user; a TextError unless it is UTF-8."""
    return _decode(Path(path).read_bytes(), path, 1)


def check_text(path: str | os.PathLike) -> None:
    """Raise as :func:`read_text` does, for files of any size."""
    line = 1
    with open(path, "rb") as file:
        # to the end of a line, where no character is cut
        while block := file.read(1 << 20) + file.readline():
            _decode(block, path, line)
            line += block.count(b"\n")


def _decode(content: bytes, path: str | os.PathLike, line: int) -> str:
    """The text of what begins at a line of a file."""
    try:
        text = content.decode("utf-8-sig")
        place, what = content.find(b"\0"), "a NUL byte"
    except UnicodeDecodeError as error:
        # the decoder counts from behind a byte order mark
        place = error.start + len(content) - len(error.object)
        text, what = "", f"byte 0x{content[place]:02x}"
    if place >= 0:
        line += content.count(b"\n", 0, place)
        raise TextError(
            f"'{path}', line {line}: not text in UTF-8 ({what}). Is it in "
            "Latin-1 or UTF-16? Save it as UTF-8."
        )
    return text


def same_letters(name: str) -> str:
    """A name without what nobody sees: Unicode's form, spaces at its ends."""
    return unicodedata.normalize("NFC", name.replace("\xa0", " ")).strip()


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that differ only in what nobody sees, if there are such."""
    seen: dict[str, str] = {}
    for name in dict.fromkeys(names):
        other = seen.setdefault(same_letters(name), name)
        if other != name:
            return other, name
    return None


def nearly(root: str | os.PathLike, name: str) -> str | None:
    """A path that is there and differs from `name` only in case, in Unicode's
    form or in spaces at the ends of its parts.
    """
    found = "/" if os.path.isabs(name) else ""
    for part in filter(None, name.split("/")):
        folder = os.path.join(root, found)
        if not os.path.exists(os.path.join(folder, part)):
            try:
                entries = os.listdir(folder)
            except OSError:
                return None
            key = same_letters(part).casefold()
            twins = [e for e in entries if same_letters(e).casefold() == key]
            if not twins:
                return None
            part = min(twins)
        found = os.path.join(found, part)
    return None if found == os.path.normpath(name) else found


def missing_hint(
    root: str | os.PathLike, missing: list[str], otherwise: str = ""
) -> str:
    """What to add to a message about missing files: if none is nearly there,
    `otherwise`.
    """
    for name in missing[:3]:
        name = part_of(name)[0]
        twin = nearly(root, name)
        if twin is not None:
            return (
                f" But {twin!r} is there: it differs from {name!r} only in "
                "case, in Unicode's form or in spaces."
            )
    return otherwise if missing else ""


_PART = re.compile(r"(.+)@([0-9]{1,15})-([0-9]{1,15})")


def part_name(path: str, start: int, stop: int) -> str:
    """What a part of a recording is called in manifests and lists."""
    return f"{path}@{start}-{stop}"


def part_of(name: str) -> tuple[str, int, int | None]:
    """Path and bounds, in samples, of what :func:`part_name` names."""
    found = _PART.fullmatch(name)
    if found is None or os.path.exists(name):
        return name, 0, None
    return found[1], int(found[2]), int(found[3])


def session_of(name: str) -> str:
    """The session of an utterance: its folder, or the recording of a part."""
    path, _, stop = part_of(name)
    return os.path.dirname(path) if stop is None else path
