"""What the files of a checkpoint say, and whether they can be believed.

A checkpoint may come from anywhere. ``CKPT.yaml`` is read as plain data within
bounds, every file is compared with its checksum, and what the host's classes
have loaded is checked before training goes on with it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import ruamel.yaml
import torch
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.utils.checkpoints import METAFNAME, Checkpoint
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_ram.data.plain import read_yaml
from speechbrain_ram.utils import is_number, one_line

#: Of the folders; a reader refuses the numbers it does not know. Folders
#: without a number are SpeechBrain's own, which carry no checksums.
FORMAT = 1

#: By these the best checkpoint is chosen.
BEST_KEYS = ("EER", "error")

_CHUNK = 1 << 22  # bytes hashed at once
_DIRECTORY = 2**20  # bytes of an archive's names of tensors


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written."""


def write_meta(path: Path, meta: dict) -> None:
    """Write a ``CKPT.yaml`` that SpeechBrain reads, too."""
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    yaml.version = (1, 1)  # PyYAML's: floats need a point, 'on' is a truth
    yaml.default_flow_style = False
    text = io.StringIO()
    yaml.dump(meta, text)
    content = f"# yamllint disable\n{text.getvalue()}"
    path.write_text(content, encoding="utf-8")


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Describe a checkpoint folder, after checking every byte."""
    path = Path(path)
    place = path / METAFNAME
    try:
        meta = read_yaml(place)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(one_line(error)) from error
    if not isinstance(meta, dict):
        raise DamagedCheckpoint(f"'{place}' is damaged: it has no KEY: VALUE.")
    number = meta.get("format", 0)
    # Whatever a format changes, this stays: a flipped bit in the number
    # itself must not pass for another format.
    ours = number or "checksum" in meta or "files" in meta
    if ours and meta.get("checksum") != checksum_of_meta(meta):
        raise DamagedCheckpoint(f"'{place}' is damaged (another checksum).")
    if number not in (0, FORMAT):
        raise CheckpointError(
            f"'{path}' has format {str(number)[:80]}, this version of "
            f"speechbrain-ram reads formats up to {FORMAT}. Was it written by "
            "a newer one?"
        )
    _check_meta(place, meta)
    for name, written in meta.get("files", {}).items():
        file = path / name
        if not os.path.isfile(file):
            raise DamagedCheckpoint(f"'{file}' of a checkpoint is missing.")
        if checksum(file) != written:
            raise DamagedCheckpoint(
                f"'{file}' is damaged: it has {file.stat().st_size} bytes "
                "and another checksum than when it was written."
            )
    files = {each.stem: each for each in path.glob("*.ckpt")}
    for file in files.values():
        _check_file(file)
    return Checkpoint(path, meta, files)


def _check_file(file: Path) -> None:
    """Refuse what would inflate; what is no archive passes."""
    try:
        with open(file, "rb") as stream:
            if zipfile.is_zipfile(stream):
                check_archive(stream)
    except Exception as error:  # whatever the bytes bring about
        raise DamagedCheckpoint(f"'{file}' is damaged ({error}).") from error


def check_archive(file: BinaryIO, pickle: float = math.inf) -> None:
    """Raise for an archive of torch.save's that would fill the memory.

    torch.save compresses nothing; what is, may inflate a thousand times. Its
    directory is short, and so is a pickle of at most so many bytes.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(max(size - 42, 0))
    end = file.read()
    # Size of the directory: 4 bytes in the last record, and 8 in another one
    # that the 20 bytes before it lead to.
    directory = int.from_bytes(end[-10:-6], "little")
    if end[:4] == b"PK\6\7":
        file.seek(int.from_bytes(end[8:16], "little"))
        wide = int.from_bytes(file.read(56)[40:48], "little")
        directory = max(directory, wide)
    if end[-22:-18] != b"PK\5\6" or directory > _DIRECTORY:
        raise ValueError("torch.save wrote no such file")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        if entry.filename.endswith(".pkl") and entry.file_size > pickle:
            raise ValueError("its pickle is too long")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("it promises more than it holds")


def _check_meta(place: Path, meta: dict) -> None:
    """Refuse values of another kind than those that are written."""
    allowed = {
        "unixtime": (is_number, "a number"),
        "end-of-epoch": (lambda v: isinstance(v, bool), "True or False"),
        "files": (_are_names, "file names with their checksums"),
        "epoch": (is_count, "a whole number"),
        **dict.fromkeys(BEST_KEYS, (is_number, "a number")),
    }
    meta = {"unixtime": None, "end-of-epoch": None, **meta}  # are needed
    for name, (is_right, words) in allowed.items():
        if name in meta and not is_right(meta[name]):
            raise DamagedCheckpoint(
                f"'{place}' is damaged: {name} is {str(meta[name])[:80]!r}, "
                f"{words} is needed."
            )


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 to 2^53."""
    return is_number(value) and isinstance(value, int) and 0 <= value <= 2**53


def _are_names(files: Any) -> bool:
    """Whether all are names of files in the checkpoint's own folder."""
    return isinstance(files, dict) and all(
        isinstance(name, str)
        and isinstance(written, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\\0")
        for name, written in files.items()
    )


def checksum(file: Path) -> str:
    """128 bits of BLAKE2b over a file of any size."""
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_of_meta(meta: dict) -> str:
    """Of everything but itself; YAML keeps floats exactly."""
    rest = {str(key): value for key, value in meta.items() if key != "checksum"}
    try:
        text = json.dumps(rest, sort_keys=True, default=str)
    except TypeError:  # keys of several types, deeper inside
        return "none"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# -- What SpeechBrain's and PyTorch's own classes take from any file ----------


class AskedFiles(dict):
    """The files of a checkpoint; knows which one was asked for last."""

    last: str | None = None

    def __getitem__(self, name: str) -> Path:
        self.last = name
        return super().__getitem__(name)


def option_kinds(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The types of an optimiser's options, for :func:`check_loaded`."""
    return [
        {name: type(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]


def check_loaded(loaded: Any, kinds: list[dict] | None = None) -> None:
    """Raise a ValueError where a state is none that training leaves behind."""
    if isinstance(loaded, EpochCounter) and not is_count(loaded.current):
        raise ValueError(f"the epoch is {loaded.current}")
    if isinstance(loaded, SaveableDataLoader):
        skipped = loaded._speechbrain_recovery_skip_to
        if skipped is not None and not 0 <= skipped <= len(loaded):
            raise ValueError(f"{skipped} of {len(loaded)} batches are done")
    if isinstance(loaded, torch.optim.Optimizer):
        _check_optimizer(loaded, kinds)


def _check_optimizer(optimizer: torch.optim.Optimizer, kinds: Any) -> None:
    for group, expected in zip(optimizer.param_groups, kinds, strict=True):
        for name, kind in expected.items():
            value = group.get(name)
            if type(value) is not kind and not (
                is_number(value) and kind in (int, float)
            ):
                raise ValueError(f"its option {name} is {str(value)[:80]!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"its option {name} is {value}")
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, torch.Tensor):
            raise ValueError(f"it has no parameter {str(parameter)[:80]}")
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(parameter.shape)}"
                )
            if not value.isfinite().all():
                raise ValueError(f"{name} is not finite")
