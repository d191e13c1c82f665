"""Noise and rooms for training crops, drawn for each utterance by itself.

Runs in the workers that read the crops. What happens to an utterance is a
function of (seed, epoch, utterance ID), like its crop: a resumed run, or one
with other workers, hears the same. SpeechBrain's classes mix and convolve;
the recordings come from local folders and only the piece that is needed is
read. What needs no recordings is in :mod:`.synthetic`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from speechbrain.augment.time_domain import AddNoise

from speechbrain_ram.data.audio import Audio
from speechbrain_ram.data.manifest import build_manifest, find_recordings
from speechbrain_ram.data.synthetic import (
    DISTORTIONS,
    SYNTHETIC,
    distortion,
    echo,
)

#: Signal-to-noise ratios in dB of MUSAN's parts, as WeSpeaker draws them.
MUSAN_SNR = {"noise": (0, 15), "music": (5, 15), "speech": (10, 30)}


class NoiseBank:
    """Pieces of the mono recordings in a folder, at one rate, drawn at random.

    `resample` allows recordings of other rates. A ``noise_funct`` for
    SpeechBrain's ``AddNoise``.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        sample_rate: int = 16000,
        resample: bool = False,
    ):
        names = [(name, "") for name in find_recordings(folder)]
        rows = build_manifest(
            folder, names, sample_rate=sample_rate, resample=resample
        )
        self.recordings = [
            (row.path(folder), row.stop, round(row.stop / row.duration))
            for row in rows
        ]
        self.audio = Audio(sample_rate, resample)

    def __len__(self) -> int:
        return len(self.recordings)

    def draw(self, length: int | None = None) -> torch.Tensor:
        """Read a random recording, [samples], or `length` samples of one.

        The piece is taken at random; shorter recordings are repeated.
        """
        path, frames, rate = self.recordings[_randint(len(self.recordings))]
        if length is None:
            return self.audio.read(path, 0, frames)
        wanted = math.ceil(length * rate / self.audio.sample_rate)
        start = _randint(max(frames - wanted, 0) + 1)
        piece = self.audio.read(path, start, min(start + wanted, frames))
        return piece.repeat(math.ceil(length / len(piece)))[:length]

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Draw one piece for each waveform; [B, T] to [B, T]."""
        pieces = [self.draw(waveforms.shape[1]) for _ in waveforms]
        return torch.stack(pieces).to(waveforms)


class Reverberation:
    """A random room for each waveform, the direct sound kept in its place."""

    def __init__(self, rirs: NoiseBank):
        self.rirs = rirs

    def __call__(
        self, waveforms: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Convolve; [B, T] to [B, T], as loud, what echoes after T included."""
        return torch.cat(
            [echo(one[None], self.rirs.draw()) for one in waveforms]
        )


class RandomAugmentation:
    """One of several augmentations, or none, for every utterance.

    Each of `choices` maps (waveforms [1, T], lengths [1]) to waveforms [1, T],
    such as SpeechBrain's ``AddNoise``, and draws from torch's random generator.
    Each is chosen as often as its weight says; `probability` is the share of
    utterances that are changed.
    """

    def __init__(
        self,
        choices: Sequence[Callable],
        weights: Sequence[float],
        probability: float = 0.6,
    ):
        if not choices or len(choices) != len(weights) or min(weights) <= 0:
            raise ValueError(
                f"{len(choices)} augmentations with the weights "
                f"{list(weights)}: one weight above 0 for each is needed."
            )
        if not 0 <= probability <= 1:
            raise ValueError(
                f"probability is {probability}, expected a share in [0, 1]."
            )
        self.choices = list(choices)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.probability = probability

    def __call__(self, waveform: torch.Tensor, key: str) -> torch.Tensor:
        """Change a waveform [T], or not; the same key gives the same change."""
        digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest, "big"))
            if torch.rand(()) >= self.probability:
                return waveform
            choice = self.choices[int(torch.multinomial(self.weights, 1))]
            return choice(waveform[None], torch.ones(1))[0]


class Chain:
    """Augmentations of a waveform [T], one after the other."""

    def __init__(self, *links: RandomAugmentation):
        self.links = links

    def __call__(self, waveform: torch.Tensor, key: str) -> torch.Tensor:
        """Change a waveform; the same key gives the same changes."""
        for i, link in enumerate(self.links):
            waveform = link(waveform, f"{key}/{i}" if i else key)
        return waveform


def make_augmentation(
    musan: str | os.PathLike | None = None,
    rirs: str | os.PathLike | None = None,
    synthetic: Sequence[str] = (),
    probability: float = 0.6,
    sample_rate: int = 16000,
    resample: bool = False,
) -> Chain | None:
    """Recorded noise and rooms, WeSpeaker's recipe, then synthetic ones.

    Of the utterances that recordings change, half get a room and half a
    recording of MUSAN, any of its recordings as likely as any other. Each
    synthetic distortion changes 3 utterances of 10.

    Arguments
    ---------
    musan : path, optional
        OpenSLR 17 unpacked: ``noise``, ``music``, ``speech``. None adds none.
    rirs : path, optional
        Mono room impulse responses, such as ``RIRS_NOISES/simulated_rirs`` of
        OpenSLR 28. None adds no rooms.
    synthetic : sequence of str
        Any of :data:`.synthetic.SYNTHETIC`; masks, which are of features, are
        not for here.
    probability : float
        Share of utterances that are changed by recordings.
    sample_rate : int
        In Hz.
    resample : bool
        Whether recordings of another rate are converted to it.

    Returns
    -------
    Chain or None
        None where nothing is given.

    Raises
    ------
    ManifestError
        A folder is missing or has no usable recordings.
    ValueError
        There is no such distortion.

    Example
    -------
    >>> make_augmentation() is None
    True
    >>> make_augmentation(synthetic=["room"])(torch.randn(800), "key").shape
    torch.Size([800])
    """
    unknown = [name for name in synthetic if name not in SYNTHETIC]
    if unknown:
        raise ValueError(
            f"synthetic has {', '.join(map(repr, unknown))}, allowed are "
            f"{', '.join(SYNTHETIC)}."
        )
    choices, weights = _recorded(musan, rirs, sample_rate, resample)
    links = []
    if choices:
        links.append(RandomAugmentation(choices, weights, probability))
    links += [
        RandomAugmentation([distortion(name, sample_rate)], [1.0], 0.3)
        for name in DISTORTIONS
        if name in synthetic
    ]
    return Chain(*links) if links else None


def _recorded(
    musan: str | os.PathLike | None,
    rirs: str | os.PathLike | None,
    sample_rate: int,
    resample: bool,
) -> tuple[list[Callable], list[float]]:
    """What recordings do to an utterance, and how often each."""
    choices: list[Callable] = []
    weights: list[float] = []
    if rirs is not None:
        choices.append(Reverberation(NoiseBank(rirs, sample_rate, resample)))
        weights.append(1.0)
    if musan is not None:
        sizes = []
        for part, (low, high) in MUSAN_SNR.items():
            bank = NoiseBank(Path(musan) / part, sample_rate, resample)
            choices.append(
                AddNoise(noise_funct=bank, snr_low=low, snr_high=high)
            )
            sizes.append(len(bank))
        weights += [size / sum(sizes) for size in sizes]
    return choices, weights


def _randint(high: int) -> int:
    """A whole number in [0, high), from torch's generator."""
    return int(torch.randint(high, ()))
