"""What the headers of many files say: in parallel, and remembered.

A cache beside the manifest keeps the result; a file is looked up there by its
path, size and time of change. A cache of another corpus folder or version, or
a damaged one, is not used, with a warning. What a caller does with headers
(its rate, its channels) is not in them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import soundfile
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

import speechbrain_ram
from speechbrain_ram.data.audio import Audio, AudioError
from speechbrain_ram.data.record import (
    RecordError,
    read_recorded,
    write_recorded,
)

logger = get_logger(__name__)

_CHUNK = 256  # files a task: handing over costs far less than reading


class Header(NamedTuple):
    """One file, as its header and its folder describe it."""

    size: int  # bytes
    mtime_ns: int  # of the last change
    frames: int  # samples a channel
    sample_rate: int
    channels: int
    verified: bool  # decoded to its end


@contextmanager
def many_objects() -> Iterator[None]:
    """Spare the garbage collector a million tuples, none of them in a cycle.

    It would go through all of them again and again while they become more.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_headers(
    data_root: str | os.PathLike,
    names: Sequence[str],
    cache: str | os.PathLike | None = None,
    verify: bool = False,
    workers: int | None = None,
) -> list[Header | AudioError]:
    """Read headers, or find what is wrong, in the order of `names`.

    Names are relative to `data_root` or absolute. `cache` is a file that is
    read first and written last, also when the reading is interrupted. `verify`
    decodes each file to its end, once. `workers` threads, by default 4 a
    processor, wait for a slow disk, or decode.
    """
    root = Path(data_root)
    known = _read_cache(cache, root) if cache else {}
    folder = os.fspath(root)

    def examine(chunk):
        return [
            _examine(os.path.join(folder, name), known.get(name), verify)
            for name in chunk
        ]

    chunks = [names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK)]
    headers: list[Header | AudioError] = []
    try:
        with (
            tqdm(total=len(names), desc="Headers", unit="file") as bar,
            ThreadPoolExecutor(workers or 4 * (os.cpu_count() or 1)) as pool,
        ):
            for result in pool.map(examine, chunks):
                headers.extend(result)
                bar.update(len(result))
    finally:  # an interrupted run keeps what it has read
        if cache:
            _write_cache(cache, root, names, headers, known)
    return headers


def _examine(
    path: str, known: Header | None, verify: bool
) -> Header | AudioError:
    """Look at one file, through the cache where it still holds."""
    try:
        if known is not None:
            status = os.stat(path)
            if known[:2] != (status.st_size, status.st_mtime_ns):
                known = None
        if known is None:
            known = _read_header(path)
        if verify and not known.verified:
            for _ in Audio(known.sample_rate, mixdown=True).windows(path):
                pass
            known = known._replace(verified=True)
        return known
    except AudioError as error:
        return error
    except (OSError, ValueError):
        try:  # the reader says what is wrong
            Audio().info(path)
        except AudioError as error:
            return error
        raise


def _read_header(path: str) -> Header:
    status = os.stat(path)
    info = Audio().info(path)
    return Header(
        status.st_size,
        status.st_mtime_ns,
        info.frames,
        info.sample_rate,
        info.channels,
        False,
    )


def _read_cache(path: str | os.PathLike, root: Path) -> dict[str, Header]:
    """Read the cache; a damaged or foreign one counts as empty."""
    kinds = (str, int, int, int, int, int, bool)
    try:
        rows = read_recorded(path, _made_with(root), *kinds) or []
        known = {name: Header(*values) for name, *values in rows}
        if not all(0 < n < 2**62 for h in known.values() for n in h[2:5]):
            raise RecordError("it has lengths, rates or channels below 1")
    except RecordError as error:
        logger.warning(f"The cache '{path}' is not used: {error}.")
        return {}
    return known


def _write_cache(path, root, names, headers, known) -> None:
    """Remember the headers read so far, and those known from before."""
    merged = dict(known)
    for name, header in zip(names, headers, strict=False):
        if isinstance(header, Header):
            merged[name] = header
        else:
            merged.pop(name, None)
    if merged == known:
        return
    rows = [(name, *header) for name, header in merged.items()]
    write_recorded(path, _made_with(root), rows)


def _made_with(root: Path) -> dict[str, str]:
    """The record of a cache: its corpus, and who read the headers."""
    return {
        "format": "speechbrain-ram headers 5",
        "data_root": str(root.resolve()),
        "speechbrain_ram": speechbrain_ram.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
    }
