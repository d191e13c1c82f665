"""Shards: a corpus as a few large tar files, for network disks.

A million small files are slow to list, open and copy. A shard is a tar file
of about 1 GB whose members are ``NUMBER.wav``, 16-bit PCM at the rate that
training needs, and ``NUMBER.json`` with ID and speaker: what webdataset reads,
utterances in random order, so that shards can also be streamed.

Training here does not stream. The packed manifest says at which byte of which
shard the samples of an utterance begin, ``/shards/shard-000002.tar#51756``,
so that a random crop is one read of exactly its bytes, without decoding. IDs
and order are the loose manifest's: batches and crops are the same, sample by
sample (16-bit sources; others are rounded to 16 bits), with any number of
workers and ranks and after any interruption.

    speechbrain-ram pack train.csv CORPUS OUTPUT
"""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_ram.data.audio import read_audio
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    check_outside,
    read_manifest,
    write_manifest,
)

_WAV_HEADER = 44  # bytes, of the plain PCM header that `wave` writes
_THREADS = 4
_BATCH = 64  # utterances decoded ahead, in memory


def pack_shards(
    manifest: str | os.PathLike,
    data_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
    shard_bytes: int = 1_000_000_000,
    seed: int = 1986,
    progress: bool = True,
) -> Path:
    """Pack the utterances of a manifest; an interrupted call can be repeated.

    Arguments
    ---------
    manifest : path
        Of the loose recordings.
    data_root : path
        Their folder, in which nothing is written.
    output_dir : path
        For ``shard-000000.tar``, ..., a manifest beside each, and
        ``manifest.csv`` of all.
    sample_rate : int
        In Hz, of the packed samples.
    resample, mixdown : bool
        As for :func:`speechbrain_ram.data.audio.read_audio`.
    shard_bytes : int
        About the size of a shard: as many utterances as the durations in the
        manifest say will fit.
    seed : int
        Of the order of the utterances in the shards.
    progress : bool
        Whether to show a progress bar on stderr.

    Returns
    -------
    Path
        The packed manifest. It holds the absolute path of `output_dir`: after
        moving the shards, pack again there, which only rewrites the manifest.

    Raises
    ------
    ManifestError
        A bad manifest, shards of another manifest or another setting in
        `output_dir`, or an `output_dir` inside the corpus.
    AudioError
        A recording cannot be used.
    """
    check_outside(output_dir, data_root)
    output = Path(output_dir).absolute()
    output.mkdir(parents=True, exist_ok=True)
    rows = read_manifest(manifest)
    shards = _assign(rows, sample_rate, shard_bytes, seed)
    packed: dict[str, Utterance] = {}
    reading = {
        "sample_rate": sample_rate,
        "resample": resample,
        "mixdown": mixdown,
    }
    bar = tqdm(total=len(rows), unit="utt", desc="pack", disable=not progress)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for number, shard in enumerate(shards):
            tar = output / f"shard-{number:06d}.tar"
            listing = tar.with_suffix(".csv")  # written last: shard is whole
            if listing.exists():
                done = _moved_here(read_manifest(listing), tar)
                _check_same(shard, done, listing)
                bar.update(len(done))
            else:
                done = _write_shard(tar, shard, data_root, reading, pool, bar)
            write_manifest(done, listing)
            packed.update((row.id, row) for row in done)
    write_manifest([packed[row.id] for row in rows], output / "manifest.csv")
    return output / "manifest.csv"


def prepare_shards(
    prepare: Callable[[], tuple[str, str]],
    data_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    **options,
) -> tuple[Path, str]:
    """Prepare a corpus and pack its training part: for the YAML's ``prepare``.

    Arguments
    ---------
    prepare : callable
        What the YAML called before: returns the manifests of training and
        validation.
    data_root, output_dir, **options
        As for :func:`pack_shards`.

    Returns
    -------
    tuple of path
        The packed manifest of training, the loose one of validation.
    """
    train_csv, valid_csv = prepare()
    return pack_shards(train_csv, data_root, output_dir, **options), valid_csv


def _assign(rows, sample_rate, shard_bytes, seed) -> list[list[Utterance]]:
    """Random order, cut where a shard is full; a function of its arguments."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    shards, size = [[]], 0
    for row in order:
        bytes_of_row = round(2 * sample_rate * row.duration) + 2048  # headers
        if shards[-1] and size + bytes_of_row > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += bytes_of_row
    return shards


def _write_shard(tar, shard, data_root, reading, pool, bar):
    """Write one tar file under a temporary name; its rows."""

    def load(row: Utterance) -> np.ndarray:
        waveform = read_audio(
            row.path(data_root), row.start, row.stop, **reading
        )
        samples = (waveform.numpy() * 32768).round().clip(-32768, 32767)
        return samples.astype("<i2")

    rate = reading["sample_rate"]
    temporary = tar.with_suffix(".tmp")
    done = []
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as file:
        for number, row in enumerate(shard):
            if number % _BATCH == 0:
                loaded = pool.map(load, shard[number : number + _BATCH])
            samples = next(loaded)
            first = file.offset + tarfile.BLOCKSIZE + _WAV_HEADER
            _add(file, f"{number:08d}.wav", _wav(samples, rate))
            label = {"id": row.id, "spk_id": row.spk_id}
            _add(file, f"{number:08d}.json", json.dumps(label).encode())
            done.append(
                Utterance(
                    row.id,
                    len(samples) / rate,
                    f"{tar}#{first}",
                    0,
                    len(samples),
                    row.spk_id,
                )
            )
            bar.update()
    os.replace(temporary, tar)
    return done


def _wav(samples: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def _add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member that is the same whoever packs it, and when."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def _moved_here(rows: list[Utterance], tar: Path) -> list[Utterance]:
    """A finished shard's rows, whose folder may have been another."""
    return [
        row._replace(wav=f"{tar}#{row.wav.rpartition('#')[2]}") for row in rows
    ]


def _check_same(expected, found, listing) -> None:
    if [row.id for row in expected] != [row.id for row in found]:
        raise ManifestError(
            f"'{listing}' lists other utterances than the {len(expected)} "
            "that belong into this shard. Shards of another manifest, seed "
            "or size are in the folder: choose another one."
        )
