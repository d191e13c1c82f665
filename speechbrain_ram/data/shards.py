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

import inspect
import io
import json
import os
import random
import shutil
import tarfile
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_ram.data.audio import read_audio
from speechbrain_ram.data.lengths import check_rate
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    check_outside,
    read_manifest,
    write_manifest,
)
from speechbrain_ram.data.record import (
    RecordError,
    checksum,
    read_recorded,
    write_recorded,
)
from speechbrain_ram.utils import ahead, atomic_path

_WAV_HEADER = 44  # bytes, of the plain PCM header that `wave` writes
_THREADS = 4
_AHEAD = 2 * _THREADS  # utterances decoded ahead, in memory


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

    Writes ``shard-000000.tar``, ... of about `shard_bytes`, a record beside
    each of what it was made from, and ``manifest.csv`` of all, whose path is
    returned. It holds the absolute path of `output_dir`: after moving the
    shards, pack again there, which only rewrites the manifest. A shard that is
    gone, or whose size is another, is made again. Other rows or settings than
    before are an error.
    """
    check_rate(sample_rate)
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
    tars = [output / f"shard-{i:06d}.tar" for i in range(len(shards))]
    made_with = [_made_with(shard, data_root, reading) for shard in shards]
    known = [
        _places(tar, record, len(shard))
        for tar, record, shard in zip(tars, made_with, shards, strict=True)
    ]
    if None in known:  # until the end, no manifest of what changes
        (output / "manifest.csv").unlink(missing_ok=True)
    bar = tqdm(total=len(rows), unit="utt", desc="pack", disable=not progress)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for tar, record, shard, places in zip(
            tars, made_with, shards, known, strict=True
        ):
            if places is None:
                places = _write_shard(tar, shard, data_root, reading, pool, bar)
                whole = (tar.stat().st_size, len(shard))
                write_recorded(_record_of(tar), record, [whole, *places])
            else:
                bar.update(len(shard))
            for row, (first, n) in zip(shard, places, strict=True):
                packed[row.id] = Utterance(
                    row.id, n / sample_rate, f"{tar}#{first}", 0, n, row.spk_id
                )
    write_manifest([packed[row.id] for row in rows], output / "manifest.csv")
    return output / "manifest.csv"


def prepare_shards(
    prepare: Callable[..., tuple[str, str]],
    data_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    shards: str | os.PathLike,
    sample_rate: int = 16000,
    **options,
) -> tuple[Path, str]:
    """Prepare a corpus and pack its training part: for the YAML's ``prepare``.

    Arguments
    ---------
    prepare : callable
        What the YAML called before: takes `output_dir`, returns the manifests
        of training and validation.
    data_root : path
        The corpus folder.
    output_dir : path
        Takes the manifests, the packed one too.
    shards : path
        Folder of the shards.
    sample_rate : int
        The rate in Hz that training needs, for both.
    **options
        As for :func:`pack_shards`.

    Returns
    -------
    tuple of path
        The packed manifest of training, the loose one of validation.
    """
    train_csv, valid_csv = at_rate(prepare, sample_rate)(output_dir=output_dir)
    packed = Path(output_dir) / "packed.csv"
    with atomic_path(packed) as temporary:
        shutil.copy(
            pack_shards(train_csv, data_root, shards, sample_rate, **options),
            temporary,
        )
    return packed, valid_csv


def at_rate(prepare: Callable, sample_rate: int) -> Callable:
    """A `prepare` for recordings of a rate, where it has that argument."""
    if "sample_rate" not in inspect.signature(prepare).parameters:
        return prepare
    return partial(prepare, sample_rate=sample_rate)


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


def _made_with(shard: list[Utterance], data_root, reading: dict) -> dict:
    """The record of a shard."""
    pieces = [(row.id, row.wav, row.start, row.stop) for row in shard]
    return {
        "format": "speechbrain-ram shard 2",
        "data_root": os.path.realpath(data_root),
        **reading,
        "list of utterances": checksum(json.dumps(pieces)),
        "list of speakers": checksum(json.dumps([r.spk_id for r in shard])),
    }


def _record_of(tar: Path) -> Path:
    return tar.with_suffix(".json")  # written last: the shard is whole


def _places(tar: Path, made_with: dict, n_rows: int) -> list | None:
    """Where samples begin in a finished shard, and how many; None without."""
    try:
        known = read_recorded(_record_of(tar), made_with, int, int)
        if known is None or not tar.exists():
            return None
        (size, n), *places = known or [(0, 0)]
        if not n == n_rows == len(places) or not all(
            0 <= first < first + 2 * length <= size for first, length in places
        ):
            raise RecordError("it is damaged (its samples are not in the tar)")
    except RecordError as error:
        raise ManifestError(
            f"'{tar}' cannot be kept: {error}. Each manifest, corpus and "
            "setting needs a folder of its own: choose another folder, or "
            "delete the shards in this one to pack them again."
        ) from error
    return places if tar.stat().st_size == size else None


def _write_shard(tar, shard, data_root, reading, pool, bar):
    """Write one tar file; the first byte and the number of all samples."""

    def load(row: Utterance) -> np.ndarray:
        waveform = read_audio(
            row.path(data_root), row.start, row.stop, **reading
        )
        samples = waveform.numpy()
        samples *= 32768
        np.clip(samples.round(out=samples), -32768, 32767, out=samples)
        return samples.astype("<i2")

    places = []
    with (
        atomic_path(tar) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as file,
    ):
        loaded = ahead(pool, load, shard, _AHEAD)
        for number, (row, samples) in enumerate(
            zip(shard, loaded, strict=True)
        ):
            first = file.offset + tarfile.BLOCKSIZE + _WAV_HEADER
            places.append((first, len(samples)))
            wav = _wav(samples, reading["sample_rate"])
            _add(file, f"{number:08d}.wav", wav)
            label = {"id": row.id, "spk_id": row.spk_id}
            _add(file, f"{number:08d}.json", json.dumps(label).encode())
            bar.update()
    return places


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
