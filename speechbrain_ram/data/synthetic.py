"""Rooms, noises, microphones and codecs that are computed: no download.

Training crops of few speakers come from few phones and rooms, and an encoder
learns to tell those apart as well. Each function here lets a crop pass through
something that it was not recorded with. They map waveforms [B, T] and relative
lengths [B] to waveforms [B, T] and draw from torch's random generator, as the
choices of :class:`.augmentation.RandomAugmentation` do. A factor of loudness is
not among them: mean normalisation takes it away.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import soundfile
import torch
import torch.nn.functional as F
from speechbrain.augment.freq_domain import SpectrogramDrop
from speechbrain.augment.time_domain import AddNoise
from speechbrain.processing.signal_processing import reverberate
from torchaudio.functional import resample

#: Of waveforms, in the order in which they come.
DISTORTIONS = ("room", "noise", "microphone", "codec")

#: What recipes may name in `synthetic`: masks are of features.
SYNTHETIC = (*DISTORTIONS, "masks")

#: Formats of soundfile that a crop is written in and read again, with the rate
#: that they are for.
CODECS = (
    ("WAV", "ULAW", 8000),
    ("WAV", "GSM610", 8000),
    ("MP3", "MPEG_LAYER_III", 16000),
    ("OGG", "OPUS", 16000),
)


def room(
    waveforms: torch.Tensor,
    lengths: torch.Tensor | None = None,
    sample_rate: int = 16000,
) -> torch.Tensor:
    """A direct sound and noise that decays, of a random time and strength.

    60 dB of decay take 0.1 to 0.7 s, the reverberation has 12 dB less to 3 dB
    more energy than the direct sound and begins 1 to 10 ms after it.
    """
    seconds, ratio, gap = _uniform(0.1, 0.7), _uniform(-3, 12), _uniform(1, 10)
    time = torch.arange(round(seconds * sample_rate)) / sample_rate
    tail = torch.randn(len(time)) * 10 ** (-3 * time / seconds)
    tail *= 10 ** (-ratio / 20) / tail.norm()
    silence = torch.zeros(round(gap / 1000 * sample_rate))
    response = torch.cat([torch.ones(1), silence, tail])
    response /= response.abs().max()
    return torch.cat([echo(one[None], response) for one in waveforms])


def echo(waveform: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """SpeechBrain's ``reverberate``, [1, T] to [1, T], without wrapping round.

    Its convolution is circular: the echo of the end would begin the crop.
    """
    padded = F.pad(waveform, (0, response.shape[-1]))
    return reverberate(padded, response)[..., : waveform.shape[-1]]


def coloured_noise(waveforms: torch.Tensor) -> torch.Tensor:
    """Noise whose power falls with frequency by 0 to 6 dB an octave."""
    spectrum = torch.fft.rfft(torch.randn_like(waveforms))
    number = torch.arange(spectrum.shape[-1]).clamp(min=1)
    return torch.fft.irfft(
        spectrum * number ** -_uniform(0, 1), waveforms.shape[-1]
    )


def microphone(
    waveforms: torch.Tensor,
    lengths: torch.Tensor | None = None,
    sample_rate: int = 16000,
) -> torch.Tensor:
    """A random frequency response, with limits of the band.

    Decibels at eight frequencies from 60 Hz to half the rate, an octave or so
    apart, are drawn with a standard deviation of 5 and joined by lines. Below
    50 to 400 Hz it falls by 12 dB an octave; in a third of the cases nothing
    is left above 3.4 to 7 kHz.
    """
    length = waveforms.shape[-1]
    padded = length + sample_rate // 10  # or its echo would begin the crop
    frequency = torch.fft.rfftfreq(padded, 1 / sample_rate).clamp(min=1.0)
    octaves = torch.log2(frequency / 60).clamp(min=0)
    step = torch.log2(torch.tensor(sample_rate / 2 / 60)) / 7
    place = (octaves / step).clamp(max=6.999)
    decibels, left = 5 * torch.randn(8), place.long()
    response = torch.lerp(decibels[left], decibels[left + 1], place - left)
    low = _uniform(50, 400)
    response -= 12 * torch.log2(low / frequency).clamp(min=0)
    if torch.rand(()) < 1 / 3:
        response[frequency > _uniform(3400, 7000)] = -80
    spectrum = torch.fft.rfft(waveforms, padded)
    filtered = torch.fft.irfft(spectrum * 10 ** (response / 20), padded)
    return filtered[..., :length]


def codec(
    waveforms: torch.Tensor,
    lengths: torch.Tensor | None = None,
    sample_rate: int = 16000,
) -> torch.Tensor:
    """Through mu-law or GSM at 8 kHz, MP3 or Opus at 16, each as often."""
    form, subtype, rate = CODECS[int(torch.randint(len(CODECS), ()))]
    sent = resample(waveforms, sample_rate, rate)
    sent = sent / sent.abs().amax(dim=-1, keepdim=True).clamp(min=1)
    received = []
    for one in sent:
        file = io.BytesIO()
        soundfile.write(file, one.numpy(), rate, format=form, subtype=subtype)
        file.seek(0)
        received.append(torch.from_numpy(soundfile.read(file)[0]))
    back = resample(torch.stack(received).to(sent), rate, sample_rate)
    missing = max(waveforms.shape[-1] - back.shape[-1], 0)
    return F.pad(back, (0, missing))[..., : waveforms.shape[-1]]


def distortion(name: str, sample_rate: int = 16000) -> Callable:
    """Find one by its name in :data:`DISTORTIONS`."""
    if name == "noise":
        return AddNoise(noise_funct=coloured_noise, snr_low=5, snr_high=25)
    function = {"room": room, "microphone": microphone, "codec": codec}[name]
    return partial(function, sample_rate=sample_rate)


def feature_masks() -> torch.nn.Module:
    """Zero one or two stretches of frames and of bands: SpecAugment.

    Of 1 to 10 frames and of 1 to 8 bands, as long as WeSpeaker's; after mean
    normalisation zero is the mean of a band.

    Returns
    -------
    torch.nn.Module
        From features [B, T, F] to features, changed in place.

    Example
    -------
    >>> feature_masks()(torch.ones(2, 100, 80)).shape
    torch.Size([2, 100, 80])
    """
    return torch.nn.Sequential(
        SpectrogramDrop(1, 11, 1, 2, dim=1), SpectrogramDrop(1, 9, 1, 2, dim=2)
    )


def _uniform(low: float, high: float) -> float:
    return float(torch.rand(())) * (high - low) + low
