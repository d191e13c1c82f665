"""VoxCeleb2's m4a files to FLAC or WAV: in parallel, checked, resumable.

    python -m speechbrain_ram.corpora.convert vox2/dev/aac vox2_flac

Needs the extra ``m4a`` (PyAV, which brings its own FFmpeg). Every file is
decoded to its end, mixed down to mono and resampled to 16 kHz where it is not,
written under a temporary name, read back by its header, and renamed. A rerun
goes on where the last run ended; files that cannot be decoded are listed in
``OUTPUT/broken.txt`` and tried again the next time.

FLAC holds the same samples as WAV in about half the space.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from speechbrain_ram.audio import AudioError, audio_info
from speechbrain_ram.corpora.atomic import atomic_writer
from speechbrain_ram.corpora.find import find_recordings
from speechbrain_ram.corpora.guards import check_outside

_CHUNK = 64  # files a task
_FORMATS = {"flac": "FLAC", "wav": "WAV"}

# An encoder's padding aside, the decoded length is the container's; a file
# that ends early misses more. 0.1 s is two AAC frames at 22 kHz.
_TOLERANCE_SECONDS = 0.1


class Conversion(NamedTuple):
    """What a conversion came to.

    Arguments
    ---------
    converted : int
        Files written by this call.
    skipped : int
        Files that were there already.
    broken : list of str
        ``PATH: reason`` of those that cannot be decoded.
    """

    converted: int
    skipped: int
    broken: list[str]


def convert_tree(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str = "flac",
    extensions: Sequence[str] = (".m4a",),
    sample_rate: int = 16000,
    workers: int | None = None,
) -> Conversion:
    """Convert every recording below a folder to 16-bit mono files.

    Arguments
    ---------
    source : path
        Never written to.
    destination : path
        Gets the same folders and names, with another ending, and
        ``broken.txt`` when files cannot be decoded.
    to : str
        'flac' or 'wav'.
    extensions : sequence of str
        What to convert.
    sample_rate : int
        In Hz, of the new files.
    workers : int, optional
        Processes; one a processor by default.

    Returns
    -------
    Conversion

    Raises
    ------
    ManifestError
        The source is missing or has nothing to convert, or the destination
        lies within it.
    ImportError
        PyAV is not there.
    OSError
        The disk is full, or the destination cannot be written. What is
        complete stays, and a rerun continues.
    """
    import_av()
    if to not in _FORMATS:
        raise ValueError(f"to is '{to}', allowed are {', '.join(_FORMATS)}.")
    source, destination = Path(source), Path(destination)
    check_outside(destination, source)
    names = find_recordings(source, extensions)
    destination.mkdir(parents=True, exist_ok=True)
    chunks = [
        (str(source), str(destination), names[i : i + _CHUNK], to, sample_rate)
        for i in range(0, len(names), _CHUNK)
    ]
    counts = {"converted": 0, "skipped": 0}
    broken: list[str] = []
    with tqdm(total=len(names), desc="Converting", unit="file") as bar:
        for outcomes in _map(chunks, workers or os.cpu_count() or 1):
            for outcome in outcomes:
                if outcome in counts:
                    counts[outcome] += 1
                else:
                    broken.append(outcome)
            bar.update(len(outcomes))
            bar.set_postfix(broken=len(broken))
    listing = destination / "broken.txt"
    if broken:
        with atomic_writer(listing) as file:
            file.writelines(f"{line}\n" for line in broken)
    else:
        listing.unlink(missing_ok=True)
    return Conversion(counts["converted"], counts["skipped"], broken)


def _map(chunks: list, workers: int) -> Iterator[list[str]]:
    """Convert chunks in order, in processes where that pays."""
    if workers == 1 or len(chunks) == 1:
        yield from map(_convert_chunk, chunks)
        return
    # Spawned: a fork would copy locks of threads that torch has started.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield from pool.map(_convert_chunk, chunks)
    finally:  # after an error, what has not begun is not begun
        pool.shutdown(cancel_futures=True)


def import_av():
    """Import PyAV, or say how to get it."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "Reading m4a files needs PyAV: pip install 'speechbrain-ram[m4a]'"
        ) from error
    return av


def _convert_chunk(task: tuple) -> list[str]:
    """Convert some files; 'converted', 'skipped' or what is wrong of each."""
    source, destination, names, to, sample_rate = task
    outcomes = []
    for name in names:
        path = os.path.join(source, name)
        target = Path(destination, os.path.splitext(name)[0] + f".{to}")
        if _is_complete(target, sample_rate):
            outcomes.append("skipped")
            continue
        try:
            samples = decode(path, sample_rate)
        except AudioError as error:
            outcomes.append(f"{name}: {error}")
            continue
        _write_checked(target, samples, sample_rate, to)
        outcomes.append("converted")
    return outcomes


def _is_complete(path: Path, sample_rate: int) -> bool:
    """Whether an earlier run finished this file: it was renamed then."""
    try:
        return audio_info(path).sample_rate == sample_rate
    except AudioError:
        return False


def decode(path: str | os.PathLike, sample_rate: int = 16000) -> np.ndarray:
    """Decode a recording of any format that FFmpeg knows.

    Arguments
    ---------
    path : path
        The file.
    sample_rate : int
        In Hz, of the result.

    Returns
    -------
    np.ndarray
        Shape [samples], int16, mono.

    Raises
    ------
    AudioError
        Not audio, or damaged, or shorter than its container says.
    """
    av = import_av()
    pieces = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise AudioError(f"'{path}' has no audio stream.")
            stream = container.streams.audio[0]
            promised = None
            if stream.duration is not None:
                promised = float(stream.duration * stream.time_base)
            resampler = av.AudioResampler("s16", "mono", sample_rate)
            for frame in container.decode(stream):
                pieces += [f.to_ndarray()[0] for f in resampler.resample(frame)]
            pieces += [f.to_ndarray()[0] for f in resampler.resample(None)]
    except (av.FFmpegError, OSError) as error:
        raise AudioError(f"'{path}' cannot be decoded: {error}") from error
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    if len(samples) == 0:
        raise AudioError(f"'{path}' holds no samples.")
    seconds = len(samples) / sample_rate
    if promised is not None and seconds < promised - _TOLERANCE_SECONDS:
        raise AudioError(
            f"'{path}' is truncated: {promised:.2f} s are promised, "
            f"{seconds:.2f} s could be decoded."
        )
    return samples


def _write_checked(
    target: Path, samples: np.ndarray, sample_rate: int, to: str
) -> None:
    """Write, read the header back, rename; leave nothing half-written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            soundfile.write(
                temporary,
                samples,
                sample_rate,
                format=_FORMATS[to],
                subtype="PCM_16",
            )
            complete = audio_info(temporary).frames == len(samples)
        except (soundfile.SoundFileError, AudioError):
            complete = False  # libsndfile does not say why
        if not complete:
            raise OSError(
                errno.ENOSPC,
                "the file could not be written to its end, as when the disk "
                "is full or a quota is used up. Make room and run again: "
                "finished files are kept",
                str(target),
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when every file was converted."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_ram.corpora.convert",
        description="Convert a folder of m4a files to 16 kHz mono FLAC or WAV.",
    )
    parser.add_argument("source", help="folder with m4a files")
    parser.add_argument("destination", help="folder for the new files")
    parser.add_argument("--to", choices=sorted(_FORMATS), default="flac")
    parser.add_argument("--workers", type=int, help="processes")
    options = parser.parse_args(arguments)
    result = convert_tree(
        options.source,
        options.destination,
        to=options.to,
        workers=options.workers,
    )
    print(
        f"{result.converted} converted, {result.skipped} were there already, "
        f"{len(result.broken)} broken"
    )
    if result.broken:
        print(
            f"Broken files: {os.path.join(options.destination, 'broken.txt')}"
        )
    return 1 if result.broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
