"""Reading recordings: one place that says no to bad audio, by name.

Everything that opens a recording in this package does so here, so that a
wrong sample rate, a stereo file, a truncated or silent-by-NaN file gives the
same clear error in training, verification and inference. Files are read with
libsndfile (WAV, FLAC, Ogg, MP3, ...).

Durations are counted in samples at the file's own rate, waveforms are mono
float32 tensors in [-1, 1], shape ``[samples]``.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch

#: File name endings that are taken for recordings when a folder is searched.
AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".sph", ".aiff")

# No format needs less for silence: FLAC has up to 65,535 samples in 14 bytes.
_SAMPLES_PER_BYTE = 10_000

#: Hz; outside, a header is damaged rather than a recording unusual.
_RATES = (1_000, 1_000_000)

#: Coefficients of torchaudio's filter between two rates: 64 MB of float32.
_FILTER = 2**24


class AudioError(ValueError):
    """A recording cannot be used; the message names the file and says why."""


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says, without decoding it.

    Arguments
    ---------
    frames : int
        Samples per channel.
    sample_rate : int
        In Hz.
    channels : int
        1 is mono.
    """

    frames: int
    sample_rate: int
    channels: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate


def audio_info(path: str | os.PathLike) -> AudioInfo:
    """Read a recording's length, rate and channels from its header.

    Arguments
    ---------
    path : path
        A file that libsndfile can open.

    Returns
    -------
    AudioInfo

    Raises
    ------
    AudioError
        The file is missing, empty, truncated before its header ends, or not
        audio.
    """
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioError(_why_unreadable(path, error)) from error
    if info.frames <= 0:
        raise AudioError(f"'{path}' holds no samples (an empty recording).")
    _check_promise(path, info.frames)
    return AudioInfo(info.frames, info.samplerate, info.channels)


def read_audio(
    path: str | os.PathLike,
    start: int = 0,
    stop: int | None = None,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
) -> torch.Tensor:
    """Read a mono waveform, or a piece of one, and check it.

    Arguments
    ---------
    path : path
        A file that libsndfile can open.
    start, stop : int
        Samples at the file's own rate, end exclusive. `stop=None` reads to
        the end.
    sample_rate : int
        The rate in Hz that the caller needs.
    resample : bool
        Whether a file of another rate may be converted.
    mixdown : bool
        Whether the channels of a multi-channel file may be averaged.

    Returns
    -------
    torch.Tensor
        Shape [samples], float32.

    Raises
    ------
    AudioError
        Missing, unreadable, truncated or empty file; another sample rate or
        several channels where that was not allowed; a rate that nothing
        sensible converts; NaN or infinite samples.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, np.zeros(1600), 16000)
    >>> read_audio(path).shape
    torch.Size([1600])
    >>> read_audio(path, start=100, stop=500).shape
    torch.Size([400])
    """
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate, available = file.samplerate, file.frames
            _check_promise(path, available)
            wanted = available if stop is None else min(stop, available)
            if not 0 <= start < max(wanted, 1):
                raise AudioError(
                    f"'{path}' has {available} samples, but samples {start} "
                    f"to {stop} were asked for. Did the file change since "
                    "the manifest was written?"
                )
            if start:
                file.seek(start)
            data = file.read(wanted - start, dtype="float32", always_2d=True)
    except (
        soundfile.SoundFileError,
        OSError,
        TypeError,
    ) as error:
        raise AudioError(_why_unreadable(path, error)) from error

    if len(data) == 0:
        raise AudioError(f"'{path}' holds no samples (an empty recording).")
    if len(data) < wanted - start:
        raise AudioError(
            f"'{path}' is truncated: its header promises {wanted - start} "
            f"samples, {len(data)} could be read. Was a copy interrupted?"
        )
    check_format(path, data.shape[1], rate, sample_rate, resample, mixdown)
    data = data.mean(axis=1) if data.shape[1] > 1 else data[:, 0]
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise AudioError(
            f"'{path}' has {bad} samples that are NaN or infinite. Was it "
            "written from a computation that overflowed?"
        )
    waveform = torch.from_numpy(np.ascontiguousarray(data))
    if rate != sample_rate:
        import torchaudio.functional  # slow to import and seldom needed

        waveform = torchaudio.functional.resample(waveform, rate, sample_rate)
    return waveform


def check_format(
    path: str | os.PathLike,
    channels: int,
    rate: int,
    sample_rate: int,
    resample: bool,
    mixdown: bool,
) -> None:
    """Refuse several channels or another rate where that is not allowed.

    Where it is, refuse rates between which a filter would fill the memory, as
    damaged headers have them.

    Arguments
    ---------
    path : path
        Named in the error.
    channels, rate : int
        What the recording has.
    sample_rate, resample, mixdown
        As for :func:`read_audio`.

    Raises
    ------
    AudioError
        It is not allowed.
    """
    if channels > 1 and not mixdown:
        raise AudioError(
            f"'{path}' has {channels} channels, mono is needed. "
            "`--mixdown True` averages them, or convert the file."
        )
    if rate != sample_rate and not resample:
        raise AudioError(
            f"'{path}' has a sample rate of {rate} Hz, {sample_rate} Hz is "
            "needed. `--resample True` converts it while reading, or convert "
            "the file."
        )
    if rate != sample_rate:
        common = math.gcd(rate, sample_rate)
        size = rate * sample_rate // common**2
        if not _RATES[0] <= rate <= _RATES[1] or size > _FILTER:
            raise AudioError(
                f"'{path}' has a sample rate of {rate} Hz, which cannot be "
                f"converted to {sample_rate} Hz here: allowed are "
                f"{_RATES[0]} to {_RATES[1]} Hz with a product of at most "
                f"{_FILTER} when the two are divided by their greatest "
                f"common divisor, {common}. Is the header damaged? If not, "
                "convert the file with sox or ffmpeg."
            )


def from_16_bit(samples: np.ndarray) -> torch.Tensor:
    """Turn 16-bit samples into float32 in [-1, 1), as libsndfile does.

    Arguments
    ---------
    samples : np.ndarray
        Shape [samples], int16.

    Returns
    -------
    torch.Tensor
        Shape [samples], float32.

    Example
    -------
    >>> from_16_bit(np.array([-32768, 0, 16384], np.int16))
    tensor([-1.0000,  0.0000,  0.5000])
    """
    floats = samples.astype(np.float32)
    floats /= 32768
    return torch.from_numpy(floats)


def pad_waveforms(
    waveforms: Sequence[torch.Tensor], hop: int = 160
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch waveforms so that the host's masks fit their feature frames.

    SpeechBrain's Fbank makes ``n // hop + 1`` frames of n samples, and its
    masks keep frame i of T while ``i < rel * T``. Lengths relative to samples
    are a frame off there; these are relative to frames and exact. With k of T
    frames valid, ``rel = (k - 0.5) / T``, half a frame away from rounding.

    Arguments
    ---------
    waveforms : sequence of torch.Tensor
        B mono waveforms, each of shape [samples].
    hop : int
        Samples from one feature frame to the next.

    Returns
    -------
    tuple of torch.Tensor
        Waveforms [B, N] padded with zeros, N a whole number of hops, and
        relative lengths [B], 1 where every frame is valid.

    Raises
    ------
    AudioError
        There is no waveform, or one is empty or not one-dimensional.

    Example
    -------
    >>> wavs, lens = pad_waveforms([torch.ones(320), torch.ones(100)])
    >>> wavs.shape, lens
    (torch.Size([2, 320]), tensor([1.0000, 0.1667]))
    """
    shapes = [tuple(wav.shape) for wav in waveforms]
    if not shapes or any(len(s) != 1 or s[0] == 0 for s in shapes):
        raise AudioError(
            f"Waveforms of shape [samples] are needed, got {shapes}. Mix "
            "channels down and leave empty recordings out first."
        )
    longest = max(len(wav) for wav in waveforms)
    hops = -(-longest // hop)  # rounded up
    padded = waveforms[0].new_zeros(len(waveforms), hops * hop)
    for row, wav in zip(padded, waveforms, strict=True):
        row[: len(wav)] = wav
    valid = torch.tensor([len(wav) // hop + 1 for wav in waveforms])
    lens = (valid - 0.5) / (hops + 1)
    lens[valid == hops + 1] = 1.0
    return padded, lens


def _check_promise(path: str | os.PathLike, frames: int) -> None:
    """Is the length in a header possible? Memory is taken for it at once."""
    size = os.path.getsize(path)
    if frames > _SAMPLES_PER_BYTE * size:
        raise AudioError(
            f"'{path}' is damaged: its header promises {frames} samples in "
            f"{size} bytes."
        )


def _why_unreadable(path: str | os.PathLike, error: Exception) -> str:
    """Say why a file cannot be opened, in the order a person would check."""
    path = Path(path)
    if not path.exists():
        if path.is_symlink():
            return f"'{path}' is a link to a file that is not there."
        return f"'{path}' does not exist. Is data_root the right folder?"
    if path.is_dir():
        return f"'{path}' is a folder, not a recording."
    if path.stat().st_size == 0:
        return f"'{path}' is an empty file (0 bytes)."
    return (
        f"'{path}' cannot be read as audio: {error}. It may be truncated, "
        "or in a format that libsndfile does not know."
    )


# -- Pieces of recordings, without libsndfile where the samples lie bare ------
#
# libsndfile takes 0.2 ms for a crop of 2 s from a WAV file, most of it to turn
# integers into floats one by one; reading the bytes and converting them at once
# takes 0.03 ms. :func:`read_samples` does that for plain WAV files and for
# packed shards, and leaves everything else, errors included, to
# :func:`read_audio`. The samples are the same to the last bit.

_HEAD = 4096  # bytes; samples that begin later are left to libsndfile


def read_samples(
    path: str,
    start: int,
    stop: int,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
) -> torch.Tensor:
    """Read a piece of a recording; ``read_audio`` with shorter ways.

    Arguments
    ---------
    path, start, stop, sample_rate, resample, mixdown
        As for :func:`read_audio`; `path` may also name a packed recording.

    Returns
    -------
    torch.Tensor
        Shape [samples], float32.

    Raises
    ------
    AudioError
        As ``read_audio``.

    Example
    -------
    >>> import soundfile
    >>> path = str(getfixture("tmp_path") / "a.wav")
    >>> soundfile.write(path, np.arange(100) / 100, 16000)
    >>> whole = read_audio(path)
    >>> torch.equal(read_samples(path, 10, 20), whole[10:20])
    True
    """
    if is_packed(path):
        return read_packed(path, start, stop)
    found = None
    if path.lower().endswith(".wav"):
        found = _read_plain_wav(path, start, stop, sample_rate)
    if found is not None:
        return found
    return read_audio(path, start, stop, sample_rate, resample, mixdown)


def _read_plain_wav(
    path: str, start: int, stop: int, sample_rate: int
) -> torch.Tensor | None:
    """Read 16-bit mono PCM; None where there is anything else."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        first, frames = _plain_samples(os.pread(file, _HEAD, 0), sample_rate)
        if not 0 <= start < stop <= frames:
            return None
        data = os.pread(file, 2 * (stop - start), first + 2 * start)
    except OSError:
        return None
    finally:
        os.close(file)
    if len(data) < 2 * (stop - start):
        return None
    return from_16_bit(np.frombuffer(data, "<i2"))


def _plain_samples(head: bytes, sample_rate: int) -> tuple[int, int]:
    """Byte of the first sample and number of samples; (0, 0) if not plain."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return 0, 0
    wanted = struct.pack("<HHIIHH", 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    plain, position = False, 12
    while position + 8 <= len(head):
        name = head[position : position + 4]
        (size,) = struct.unpack_from("<I", head, position + 4)
        position += 8
        if name == b"fmt ":
            plain = head[position : position + 16] == wanted
        elif name == b"data":
            return (position, size // 2) if plain else (0, 0)
        position += size + size % 2
    return 0, 0


# -- Recordings in tar shards, as data/shards.py packs them -------------------
#
# The path of a packed recording is ``SHARD.tar#BYTE``: the shard, and where its
# 16-bit samples begin. A piece of it is one read of its bytes: no header, no
# decoding, no listing of folders.

_MARK = ".tar#"


def is_packed(path: str | os.PathLike) -> bool:
    """Whether a path names samples in a shard.

    Example
    -------
    >>> is_packed("/shards/shard-000002.tar#51756"), is_packed("/a.wav")
    (True, False)
    """
    return _MARK in str(path)


def read_packed(path: str, start: int, stop: int) -> torch.Tensor:
    """Read samples of a packed utterance.

    Arguments
    ---------
    path : str
        ``SHARD.tar#BYTE`` from a packed manifest.
    start, stop : int
        Samples of the utterance, end exclusive.

    Returns
    -------
    torch.Tensor
        Shape [stop - start], float32 in [-1, 1]: bit for bit what
        :func:`speechbrain_ram.data.audio.read_audio` gives of a 16-bit source.

    Raises
    ------
    AudioError
        The shard is missing or truncated.
    """
    shard, _, offset = path.rpartition("#")
    try:
        data = os.pread(
            _descriptor(shard), 2 * (stop - start), int(offset) + 2 * start
        )
    except OSError as error:
        raise AudioError(
            f"'{path}' cannot be read: {error}. Were the shards moved since "
            "they were packed?"
        ) from error
    if len(data) < 2 * (stop - start):
        raise AudioError(
            f"'{path}' is truncated: samples {start} to {stop} were asked "
            f"for, {len(data) // 2} could be read. Was a copy interrupted?"
        )
    return from_16_bit(np.frombuffer(data, "<i2"))


@cache
def _descriptor(shard: str) -> int:
    """Open a shard once a process; pread() shares no position with others."""
    return os.open(shard, os.O_RDONLY)
