"""Reading recordings: one place that says no to bad audio, by name.

Everything that opens a recording in this package does so here, so that a
wrong sample rate, a stereo file, a truncated or silent-by-NaN file, a pipe or
a header that lies gives the same clear error in training, verification and
inference. libsndfile reads WAV, FLAC, Ogg, MP3 and others, PyAV what
:mod:`speechbrain_ram.data.containers` knows.

Durations are counted in samples at the file's own rate, waveforms are mono
float32 tensors in [-1, 1], shape ``[samples]``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import soundfile
import torch

from speechbrain_ram.data import containers
from speechbrain_ram.data.files import File, decoder_of, opened
from speechbrain_ram.data.lengths import (
    AudioError,
    AudioInfo,
    Samples,
    check_promise,
    find_samples,
    flac_info,
)

#: File name endings that are taken for recordings when a folder is searched.
AUDIO_EXTENSIONS = (
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".mp2",
    ".sph",
    ".aiff",
    ".aif",
    ".aifc",
    ".au",
    ".caf",
    ".w64",
    *containers.VIDEO_EXTENSIONS,
)

#: Hz; outside, a header is damaged rather than a recording unusual.
_RATES = (1_000, 1_000_000)

#: Coefficients of torchaudio's filter between two rates: 64 MB of float32.
_FILTER = 2**24

#: Samples that are read from their bytes at once; one system call gives 2 GB.
_AT_ONCE = 2**29


@dataclass(frozen=True)
class Audio:
    """The reader of recordings.

    Arguments
    ---------
    sample_rate : int
        The rate in Hz that the caller needs.
    resample : bool
        Whether a file of another rate may be converted.
    mixdown : bool
        Whether the channels of a multi-channel file may be averaged.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, np.zeros(1600), 16000)
    >>> audio = Audio(sample_rate=16000)
    >>> audio.info(path)
    AudioInfo(frames=1600, sample_rate=16000, channels=1)
    >>> audio.read(path, start=100, stop=500).shape
    torch.Size([400])
    >>> [len(window) for window in audio.windows(path, seconds=0.06)]
    [800, 800]
    """

    sample_rate: int = 16000
    resample: bool = False
    mixdown: bool = False

    def info(self, path: str | os.PathLike) -> AudioInfo:
        """Length, rate and channels of a recording.

        From its header, or, where that only estimates the length, by decoding.

        Raises
        ------
        AudioError
            The file is missing, empty, cut short, no regular file, or not
            audio.
        """
        with opened(path) as file:
            if containers.is_container(file.head):
                return containers.sound_of(path)
            samples = find_samples(path, file.number, file.size, file.head)
            info = samples and samples.info or flac_info(file.head)
            if not (info and info.frames) and not (samples and samples.info):
                with decoder_of(file, samples) as (decoder, frames):
                    info = AudioInfo(
                        frames, decoder.samplerate, decoder.channels
                    )
            return check_promise(path, info, file.size)

    def read(
        self, path: str | os.PathLike, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Read a mono waveform, or a piece of one, and check it.

        Arguments
        ---------
        path : path
            A file, or a recording in a shard.
        start, stop : int
            Samples at the file's own rate, end exclusive. `stop=None` reads
            to the end, and so does one beyond it.

        Returns
        -------
        torch.Tensor
            Shape [samples], float32, at `sample_rate`.

        Raises
        ------
        AudioError
            As :meth:`info`; another sample rate or several channels where
            that was not allowed; a rate that nothing sensible converts; NaN
            or infinite samples; samples that the header promises and that
            cannot be decoded.
        """
        if is_packed(path):
            return read_packed(path, start, stop)
        with opened(path) as file:
            if containers.is_container(file.head):
                return self._read_container(path, start, stop)
            samples = find_samples(path, file.number, file.size, file.head)
            if samples and samples.bare:
                waveform = self._read_bare(path, file, samples, start, stop)
                if waveform is not None:
                    return waveform
            with decoder_of(file, samples) as (decoder, frames):
                rate = decoder.samplerate
                info = AudioInfo(frames, rate, decoder.channels)
                check_promise(path, info, file.size)
                wanted = _within(path, start, stop, frames) - start
                if start:
                    decoder.seek(start)
                data = _decoded(path, decoder, wanted)
        return self.convert(data, rate, path)

    def windows(
        self, path: str | os.PathLike, seconds: float = 60.0
    ) -> Iterator[torch.Tensor]:
        """Read a recording in equal windows, so that memory is bounded.

        Arguments
        ---------
        path : path
            The file.
        seconds : float
            Longest window.

        Yields
        ------
        torch.Tensor
            Shape [samples], as :meth:`read` gives it.
        """
        info = self.info(path)
        bounds = cut(0, info.frames, info.sample_rate, seconds)
        with opened(path) as file:
            if containers.is_container(file.head):
                self.check(path, info.channels, info.sample_rate)
                ratio = self.sample_rate / info.sample_rate
                for samples in containers.stream(
                    path,
                    self.sample_rate,
                    stop=round(info.frames * ratio),
                    least=round(seconds * self.sample_rate),
                ):
                    yield _from_16_bit(samples)
                return
            samples = find_samples(path, file.number, file.size, file.head)
            with decoder_of(file, samples) as (decoder, _):
                # soundfile seeks after every read of what can be sought in,
                # which an MP3 pays with its next frames.
                decoder.seekable = lambda: False
                blocks = (_decoded(path, decoder, b - a) for a, b in bounds)
                yield from self._converted(
                    blocks, len(bounds), decoder.samplerate, path
                )

    def convert(
        self,
        samples: np.ndarray,
        rate: int,
        path: str | os.PathLike,
    ) -> torch.Tensor:
        """Samples [samples, channels], float32, as :meth:`read` gives them.

        They are refused as there; `path` is what they are called then.
        """
        self.check(path, samples.shape[1], rate)
        several = samples.shape[1] > 1
        samples = samples.mean(axis=1) if several else samples[:, 0]
        if not np.isfinite(samples).all():
            bad = int((~np.isfinite(samples)).sum())
            raise AudioError(
                f"'{path}' has {bad} samples that are NaN or infinite. Was it "
                "written from a computation that overflowed?"
            )
        waveform = torch.from_numpy(np.ascontiguousarray(samples))
        if rate == self.sample_rate:
            return waveform
        import torchaudio.functional  # slow to import and seldom needed

        return torchaudio.functional.resample(waveform, rate, self.sample_rate)

    def _converted(
        self,
        blocks: Iterable[np.ndarray],
        count: int,
        rate: int,
        path: str | os.PathLike,
    ) -> Iterator[torch.Tensor]:
        """What :meth:`convert` makes of all `count` blocks at once.

        Bit for bit, as long as blocks last seconds: the filter between two
        rates sees `margin` samples of the neighbours.
        """
        common = math.gcd(rate, self.sample_rate)
        old, new = rate // common, self.sample_rate // common
        # torchaudio's: six zero crossings of a sinc at 0.99 of the lower rate.
        width = math.ceil(6 * old / (0.99 * min(old, new)))
        margin = 0 if old == new else (width // old + 2) * old
        held, sent = None, 0
        for left, block in zip(range(count - 1, -1, -1), blocks, strict=True):
            held = block if held is None else np.concatenate([held, block])
            end = (len(held) - margin) // old * old if left else len(held)
            if end <= sent:
                continue
            waveform = self.convert(
                held[: end + margin if left else None], rate, path
            )
            yield waveform[
                sent // old * new : end // old * new if left else None
            ]
            keep = max(end - margin, 0)
            held, sent = held[keep:], end - keep

    def check(self, path: str | os.PathLike, channels: int, rate: int) -> None:
        """Refuse several channels or another rate where that is not allowed.

        Where it is, refuse rates between which a filter would fill the memory,
        as damaged headers have them.
        """
        if channels > 1 and not self.mixdown:
            raise AudioError(
                f"'{path}' has {channels} channels, mono is needed. "
                "`--mixdown True` averages them, or convert the file."
            )
        if rate == self.sample_rate:
            return
        if not self.resample:
            raise AudioError(
                f"'{path}' has a sample rate of {rate} Hz, {self.sample_rate} "
                "Hz is needed. `--resample True` converts it while reading, or "
                "convert the file."
            )
        common = math.gcd(rate, self.sample_rate)
        size = rate * self.sample_rate // common**2
        if not _RATES[0] <= rate <= _RATES[1] or size > _FILTER:
            raise AudioError(
                f"'{path}' has a sample rate of {rate} Hz, which cannot be "
                f"converted to {self.sample_rate} Hz here: allowed are "
                f"{_RATES[0]} to {_RATES[1]} Hz with a product of at most "
                f"{_FILTER} when the two are divided by their greatest "
                f"common divisor, {common}. Is the header damaged? If not, "
                "convert the file with sox or ffmpeg."
            )

    def _read_bare(
        self,
        path: str | os.PathLike,
        file: File,
        samples: Samples,
        start: int,
        stop: int | None,
    ) -> torch.Tensor | None:
        """Read 16-bit mono WAV by its bytes, without libsndfile.

        libsndfile takes 0.2 ms for a crop of 2 s, most of it to turn integers
        into floats one by one; converted at once they take 0.03 ms. The
        samples are the same to the last bit.
        """
        info = check_promise(path, samples.info, file.size)
        stop = _within(path, start, stop, info.frames)
        self.check(path, 1, info.sample_rate)
        if info.sample_rate != self.sample_rate or stop - start > _AT_ONCE:
            return None
        data = os.pread(
            file.number, 2 * (stop - start), samples.first + 2 * start
        )
        if len(data) < 2 * (stop - start):
            return None  # cut short at this moment: libsndfile will tell
        return _from_16_bit(np.frombuffer(data, "<i2"))

    def _read_container(
        self, path: str | os.PathLike, start: int, stop: int | None
    ) -> torch.Tensor:
        """Read the sound of a video, at the rate that is needed."""
        info = containers.sound_of(path)
        self.check(path, info.channels, info.sample_rate)
        ratio = self.sample_rate / info.sample_rate
        stop = _within(path, start, stop, info.frames)  # padding may follow
        samples = containers.decode(
            path, self.sample_rate, round(start * ratio), round(stop * ratio)
        )
        return _from_16_bit(samples)


def audio_info(path: str | os.PathLike) -> AudioInfo:
    """As :meth:`Audio.info`."""
    return Audio().info(path)


def read_audio(
    path: str | os.PathLike,
    start: int = 0,
    stop: int | None = None,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
) -> torch.Tensor:
    """As :meth:`Audio.read`, in one call."""
    return Audio(sample_rate, resample, mixdown).read(path, start, stop)


def cut(
    start: int, stop: int, rate: int, seconds: float
) -> list[tuple[int, int]]:
    """Bounds of equal windows of at most some seconds.

    Example
    -------
    >>> cut(0, 60 * 8000, 8000, 25.0)
    [(0, 160000), (160000, 320000), (320000, 480000)]
    """
    n = max(math.ceil((stop - start) / rate / seconds), 1)
    cuts = [start + (stop - start) * i // n for i in range(n + 1)]
    return list(zip(cuts, cuts[1:], strict=False))


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


def _decoded(
    path: str | os.PathLike, decoder: soundfile.SoundFile, wanted: int
) -> np.ndarray:
    """The next samples of a decoder, [wanted, channels]."""
    data = decoder.read(wanted, dtype="float32", always_2d=True)
    if len(data) < wanted:
        raise AudioError(
            f"'{path}' is truncated: its header promises {wanted} samples, "
            f"{len(data)} could be read. Was a copy interrupted?"
        )
    return data


def _from_16_bit(samples: np.ndarray) -> torch.Tensor:
    """16-bit samples as float32 in [-1, 1), as libsndfile makes them."""
    floats = samples.astype(np.float32)
    floats /= 32768
    return torch.from_numpy(floats)


def _within(
    path: str | os.PathLike, start: int, stop: int | None, frames: int
) -> int:
    """The end of a piece; raises where it begins behind the recording."""
    end = frames if stop is None else min(stop, frames)
    if not 0 <= start < end:
        raise AudioError(
            f"'{path}' has {frames} samples, but samples {start} to {stop} "
            "were asked for. Did the file change since the manifest was "
            "written?"
        )
    return end


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
        :meth:`Audio.read` gives of a 16-bit source.

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
    return _from_16_bit(np.frombuffer(data, "<i2"))


@cache
def _descriptor(shard: str) -> int:
    """Open a shard once a process; pread() shares no position with others."""
    return os.open(shard, os.O_RDONLY)
