"""Finding the recordings below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from speechbrain_ram.data.audio import AUDIO_EXTENSIONS
from speechbrain_ram.data.manifest import ManifestError


def find_recordings(
    data_root: str | os.PathLike,
    extensions: Sequence[str] = AUDIO_EXTENSIONS,
) -> list[str]:
    """List the recordings below a folder, sorted, links to folders followed.

    Hidden files and folders are passed over (``._00001.wav`` is a trace of a
    macOS archive, not a recording).

    Arguments
    ---------
    data_root : path
        The corpus folder.
    extensions : sequence of str
        File name endings that count, in lower case with the dot; upper-case
        endings in the corpus match too.

    Returns
    -------
    list of str
        Paths relative to `data_root`, with forward slashes.

    Raises
    ------
    ManifestError
        The folder is missing or holds no recording, or a file name cannot be
        written into a manifest.
    """
    root = Path(data_root)
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise ManifestError(
            f"The corpus folder '{root}' {state}. Is it spelled right, "
            "and is the disk mounted?"
        )
    endings = tuple(extensions)
    found = [
        name
        for name in _walk(root, "", set())
        if name.lower().endswith(endings)
    ]
    if not found:
        raise ManifestError(
            f"'{root}' holds no recordings: no file below it ends in one of "
            f"{', '.join(endings)}. Is the archive unpacked?"
        )
    for name in found:
        if "$" in name or "\n" in name or not name.isprintable():
            raise ManifestError(
                f"The file name {name!r} under '{root}' cannot go into a "
                "manifest: '$' and unprintable characters are not allowed "
                "(SpeechBrain takes '$' for a variable). Rename the file."
            )
    return sorted(found)


def _walk(folder: Path, prefix: str, above: set[tuple[int, int]]) -> Iterator:
    """Yield relative file paths; `above` guards against loops of links."""
    status = folder.stat()
    key = (status.st_dev, status.st_ino)
    if key in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(
                    Path(entry.path), f"{prefix}{entry.name}/", above | {key}
                )
            else:
                yield prefix + entry.name
