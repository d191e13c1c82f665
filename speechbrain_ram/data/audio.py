"""Reading recordings: one place that refuses bad audio, by name.

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

import numpy as np
import soundfile
import torch

from speechbrain_ram.data import containers
from speechbrain_ram.data.files import BLOCK, File, decoder_of, opened
from speechbrain_ram.data.lengths import (
    RATES,
    AudioError,
    AudioInfo,
    Samples,
    check_promise,
    find_samples,
    flac_info,
)
from speechbrain_ram.data.packed import is_packed, read_packed

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

#: Coefficients of torchaudio's filter between two rates, of which it needs 30
#: bytes each on the way; from 11,025 Hz to 16,000 it has 282,240.
_FILTER = 10**6

#: Samples that are read from their bytes at once; one system call gives 2 GB.
_AT_ONCE = 2**29


@dataclass(frozen=True)
class Audio:
    """The reader: recordings at one rate in Hz, others only where allowed.

    `resample` allows another rate, `mixdown` several channels, which are
    averaged.
    """

    sample_rate: int = 16000
    resample: bool = False
    mixdown: bool = False

    def info(self, path: str | os.PathLike) -> AudioInfo:
        """Length, rate and channels of a recording, an AudioError if it is bad.

        From its header, or by decoding where a header only estimates the
        length.
        """
        with opened(path) as file:
            if containers.is_container(file.head):
                return check_promise(path, containers.sound_of(path), file.size)
            samples = find_samples(path, file.number, file.size, file.head)
            info = samples and samples.info or flac_info(file.head)
            if not (info and info.frames) and not (samples and samples.info):
                with decoder_of(file, samples) as (decoder, frames):
                    info = AudioInfo(
                        frames, decoder.samplerate, decoder.channels
                    )
            return check_promise(path, info, file.size)

    def read(
        self,
        path: str | os.PathLike,
        start: int = 0,
        stop: int | None = None,
        as_stored: bool = False,
    ) -> torch.Tensor:
        """Read a checked mono waveform, float32 [samples], or a piece of one.

        `start` and `stop` are samples at the file's own rate, end exclusive;
        `None`, or what lies beyond the end, is the end. The AudioError says
        what is wrong with the file, its rate, its channels or its samples.
        `as_stored` allows int16, of which :func:`as_floats` makes the same.
        """
        waveform = self._read(path, start, stop)
        return waveform if as_stored else as_floats(waveform)

    def _read(
        self, path: str | os.PathLike, start: int, stop: int | None
    ) -> torch.Tensor:
        """What :meth:`read` gives, int16 where the file holds just that."""
        if is_packed(path):
            return read_packed(path, start, stop, self.sample_rate)
        with opened(path) as file:
            if containers.is_container(file.head):
                return self._read_container(path, file, start, stop)
            samples = find_samples(path, file.number, file.size, file.head)
            if samples and samples.bare:
                waveform = self._read_bare(path, file, samples, start, stop)
                if waveform is not None:
                    return waveform
            with decoder_of(file, samples) as (decoder, frames):
                rate = decoder.samplerate
                info = AudioInfo(frames, rate, decoder.channels)
                check_promise(path, info, file.size)
                self.check(path, info.channels, rate)
                wanted = _within(path, start, stop, frames) - start
                if start:
                    decoder.seek(start)
                data = _decoded(path, decoder, wanted)
        return self._checked(data, rate, path)

    def windows(
        self, path: str | os.PathLike, seconds: float = 60.0
    ) -> Iterator[torch.Tensor]:
        """Read a recording in equal windows, so that memory is bounded."""
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
                    yield as_floats(_owned(samples))
                return
            samples = find_samples(path, file.number, file.size, file.head)
            with decoder_of(file, samples) as (decoder, _):
                self.check(path, decoder.channels, decoder.samplerate)
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
        """Samples [samples, channels] of `path` as :meth:`read` gives them."""
        self.check(path, samples.shape[1], rate)
        several = samples.shape[1] > 1
        samples = samples.mean(axis=1) if several else samples[:, 0]
        return self._checked(samples, rate, path)

    def _checked(
        self, samples: np.ndarray, rate: int, path: str | os.PathLike
    ) -> torch.Tensor:
        """Finite samples, at the rate that is needed."""
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
        """What :meth:`_checked` makes of all `count` blocks at once.

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
            waveform = self._checked(
                held[: end + margin if left else None], rate, path
            )
            yield waveform[
                sent // old * new : end // old * new if left else None
            ]
            keep = max(end - margin, 0)
            held, sent = held[keep:], end - keep

    def check(self, path: str | os.PathLike, channels: int, rate: int) -> None:
        """Refuse several channels or another rate where that is not allowed.

        Also refuse rates, as damaged headers have them, for which the filter of
        the conversion would fill the memory.
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
        if not RATES[0] <= rate <= RATES[1] or size > _FILTER:
            raise AudioError(
                f"'{path}' has a sample rate of {rate} Hz, which cannot be "
                f"converted to {self.sample_rate} Hz here: allowed are "
                f"{RATES[0]} to {RATES[1]} Hz with a product of at most "
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
        into floats one by one; converted at once they take 0.03 ms. The samples
        are the same to the last bit.
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
        return _owned(np.frombuffer(data, "<i2"))

    def _read_container(
        self,
        path: str | os.PathLike,
        file: File,
        start: int,
        stop: int | None,
    ) -> torch.Tensor:
        """Read the sound of a video, at the rate that is needed."""
        info = check_promise(path, containers.sound_of(path), file.size)
        self.check(path, info.channels, info.sample_rate)
        ratio = self.sample_rate / info.sample_rate
        stop = _within(path, start, stop, info.frames)  # padding may follow
        samples = containers.decode(
            path, self.sample_rate, round(start * ratio), round(stop * ratio)
        )
        return _owned(samples)


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
    """Bounds of equal windows, each of at most some seconds."""
    n = max(math.ceil((stop - start) / rate / seconds), 1)
    cuts = [start + (stop - start) * i // n for i in range(n + 1)]
    return list(zip(cuts, cuts[1:], strict=False))


def pad_waveforms(
    waveforms: Sequence[torch.Tensor], hop: int = 160
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch B waveforms: [B, N] with zeros behind, relative lengths [B].

    SpeechBrain's Fbank makes ``n // hop + 1`` frames of n samples, and its
    masks keep frame i of T while ``i < rel * T``. Lengths relative to samples
    are a frame off there; these are relative to frames and exact. With k of T
    frames valid, ``rel = (k - 0.5) / T``, half a frame away from rounding. N is
    a whole number of hops.
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
    """The next samples of a decoder; channels are averaged block by block."""
    if decoder.channels == 1:
        samples = decoder.read(wanted, dtype="float32")
        have = len(samples)
    else:
        samples, have = np.empty(wanted, np.float32), 0
        size = BLOCK // decoder.channels
        while len(
            block := decoder.read(min(size, wanted - have), dtype="float32")
        ):
            block.mean(axis=1, out=samples[have : have + len(block)])
            have += len(block)
    if have < wanted:
        raise AudioError(
            f"'{path}' is truncated: its header promises {wanted} samples, "
            f"{have} could be read. Was a copy interrupted?"
        )
    return samples


def as_floats(waveform: torch.Tensor) -> torch.Tensor:
    """int16 as float32 in [-1, 1), as libsndfile makes it; others as is."""
    is_16_bit = waveform.dtype == torch.int16
    return waveform.float().div_(32768) if is_16_bit else waveform


def _owned(samples: np.ndarray) -> torch.Tensor:
    """16-bit samples that may lie in a buffer of somebody else."""
    return torch.from_numpy(samples.astype(np.int16))


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
