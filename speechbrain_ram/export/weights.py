"""Weights of others: tensors within bounds; nothing in a file is executed."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

import safetensors.torch
import torch

from speechbrain_ram.export.limits import EncoderError
from speechbrain_ram.training.checkpoint_files import check_archive

_FILE = 2**31  # bytes, at most: twice the largest network
_HEADER = 2**20  # bytes of names and shapes
_PICKLE = 2**20  # the same in a *.ckpt


def read_safetensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            size = int.from_bytes(file.read(8), "little")
        if size > _HEADER:
            raise ValueError(f"its header has {size} bytes")
        return safetensors.torch.load_file(path)
    except Exception as error:  # whatever the bytes bring about
        raise EncoderError(
            f"'{path}' cannot be read: {first_line(error)}. Was it copied "
            "whole?"
        ) from error


def read_state(
    path: str | os.PathLike, under: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """The tensors of a ``*.ckpt``, as torch.save writes the state of a module.

    Its pickle may call nothing (weights_only), and the file is mapped: what it
    holds compressed, or promises and does not hold, is never allocated. They
    may stand under one of the keys `under`, beside other things.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            check_archive(file, _PICKLE)
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )
        for key in under:
            if isinstance(state, Mapping) and isinstance(
                state.get(key), Mapping
            ):
                state = state[key]
        if not isinstance(state, Mapping) or not all(
            isinstance(key, str)
            and isinstance(each, torch.Tensor)
            and (each.device.type, each.layout) == ("cpu", torch.strided)
            and not each.is_quantized
            for key, each in state.items()
        ):
            raise ValueError("not all of it are tensors with names")
        return dict(state)
    except Exception as error:  # whatever the bytes bring about
        raise EncoderError(
            f"'{path}' does not hold plain weights: {first_line(error)}"
        ) from error


def check_state(
    wanted: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    name: str,
) -> None:
    """Raise an EncoderError unless tensors have these forms and are finite."""
    for key in sorted(wanted.keys() | weights.keys()):
        if form_of(wanted, key) != form_of(weights, key):
            raise EncoderError(
                f"{name}: the weights do not fit the architecture: for "
                f"{key[:100]!r} it has {form_of(wanted, key)}, they have "
                f"{form_of(weights, key)}. Was the run continued with other "
                "settings?"
            )
        if not torch.isfinite(weights[key]).all():
            raise EncoderError(
                f"{name}: the weights '{key}' hold NaN or infinite values. "
                "Did the training diverge?"
            )


def form_of(tensors: Mapping[str, torch.Tensor], key: str) -> str:
    """Type and shape of a tensor in words, "nothing" where there is none."""
    if key not in tensors:
        return "nothing"
    shape = ", ".join(map(str, tensors[key].shape[:8]))
    return f"{str(tensors[key].dtype)[6:]} of shape [{shape}]"


def open_regular(path: str, flags: int) -> int:
    """Open a file that ends; a pipe would wait, a device goes on for ever."""
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    status = os.fstat(number)
    if stat.S_ISREG(status.st_mode) and status.st_size <= _FILE:
        return number
    os.close(number)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    raise ValueError(f"it has {status.st_size} bytes, at most {_FILE} are read")


def first_line(error: BaseException) -> str:
    """The first line of an error, printable and short."""
    text = str(error) or type(error).__name__
    return ascii(text.splitlines()[0][:200])[1:-1]
