"""Kaldi's log-Mel filterbank as a batched module, for training and export.

SpeechBrain's ``Fbank`` is centred on its frames, uses a Hamming window and
decibels. Clients that compute the features themselves (sherpa-onnx on phones
and in browsers, WeSpeaker's runtimes) use Kaldi's filterbank, and an encoder
hears the difference. :class:`KaldiFbank` is a drop-in for
``compute_features`` that gives those clients' numbers; on a CPU from plain
matrix products, so that it exports to ONNX without complex values.

Waveforms are in [-1, 1], shape ``[batch, samples]``; features are natural
logarithms of power, shape ``[batch, frames, bands]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import spectral_magnitude
from speechbrain.utils.autocast import fwd_default_precision

#: Length of the Fourier transform in the front-end called "fbank".
FBANK_N_FFT = 512

#: Kaldi never takes the logarithm of less than float32's machine epsilon.
ENERGY_FLOOR = torch.finfo(torch.float32).eps

#: Windows by name, each from a number of samples.
WINDOWS = {
    "povey": lambda size: torch.hann_window(
        size, periodic=False, dtype=torch.float64
    ).pow(0.85),
    "hamming": lambda size: torch.hamming_window(
        size, periodic=False, dtype=torch.float64
    ),
}


class KaldiFbank(torch.nn.Module):
    """Log-Mel filterbank energies as Kaldi computes them, without dither.

    A frame loses its mean, is pre-emphasised (x[t] - 0.97 x[t-1]), windowed
    (Povey's: a Hann window to the power 0.85), zero-padded to a power of two;
    its power spectrum is summed in triangles that are equally wide on the
    scale mel(f) = 1127 ln(1 + f / 700), floored and put through ln.

    The defaults are what sherpa-onnx computes for a speaker model: 80 bands
    from 20 to 7600 Hz, waveform on the 16-bit scale (its metadata key
    ``normalize_samples`` is 0), and `snip_edges=False`, so that frame i is
    centred on sample (i + 1/2) * hop and the recording is mirrored at both
    ends. That gives round(samples / hop) frames.

    Arguments
    ---------
    n_mels : int
        Number of bands.
    sample_rate : int
        In Hz.
    win_length, hop_length : float
        Window and step, in milliseconds.
    low_freq, high_freq : float
        Where the first band starts and the last one ends, in Hz. A
        `high_freq` of 0 or less counts down from half the sample rate.
    snip_edges : bool
        If True, only frames that lie wholly inside the recording are made,
        1 + (samples - window) // hop of them; nothing is mirrored.
    preemphasis : float
        Coefficient of the pre-emphasis.
    scale : float
        The waveform is multiplied by this first: 32768 is Kaldi's 16-bit
        scale (WeSpeaker's models), 1 leaves [-1, 1] (3D-Speaker's). It is a
        constant that mean normalisation removes, except where the energy
        floor is reached: on the scale of 1 that is already quiet noise.
    window_type : str
        "povey", or "hamming" (WeSpeaker's models).

    Raises
    ------
    ValueError
        Another window, or bands that do not fit the sample rate.

    Example
    -------
    >>> front_end = KaldiFbank(n_mels=80)
    >>> front_end(torch.randn(2, 16000)).shape
    torch.Size([2, 100, 80])
    >>> front_end.frames(16000)
    100
    """

    spectrum: torch.Tensor
    bands: torch.Tensor

    def __init__(
        self,
        n_mels: int = 80,
        sample_rate: int = 16000,
        win_length: float = 25.0,
        hop_length: float = 10.0,
        low_freq: float = 20.0,
        high_freq: float = -400.0,
        snip_edges: bool = False,
        preemphasis: float = 0.97,
        scale: float = 32768.0,
        window_type: str = "povey",
    ) -> None:
        super().__init__()
        if window_type not in WINDOWS:
            raise ValueError(
                f"window_type is {window_type!r}, allowed are "
                f"{' and '.join(map(repr, WINDOWS))}. Is it misspelt?"
            )
        self.n_mels = n_mels
        self.sample_rate = sample_rate
        self.window = int(sample_rate * win_length / 1000)
        self.hop = int(sample_rate * hop_length / 1000)
        self.low_freq = low_freq
        self.high_freq = high_freq
        self.snip_edges = snip_edges
        self.preemphasis = preemphasis
        self.scale = scale
        self.window_type = window_type

        n_fft = 1 << (self.window - 1).bit_length()
        spectrum = windowed_dft(self.window, n_fft, window_type)
        # Not part of a checkpoint: the arguments above say it all.
        self.register_buffer(
            "spectrum",
            spectrum[1:] if window_type == "povey" else spectrum,
            persistent=False,
        )
        self.register_buffer(
            "bands",
            mel_triangles(n_mels, n_fft, sample_rate, low_freq, high_freq),
            persistent=False,
        )

    def frames(self, samples: int) -> int:
        """Number of frames that a recording of `samples` samples gives."""
        if self.snip_edges:
            return max(0, 1 + (samples - self.window) // self.hop)
        return (samples + self.hop // 2) // self.hop

    @fwd_default_precision(cast_inputs=torch.float32)
    def forward(self, wavs: torch.Tensor) -> torch.Tensor:
        """Compute the features of a batch.

        Arguments
        ---------
        wavs : torch.Tensor
            Shape [batch, samples], in [-1, 1].

        Returns
        -------
        torch.Tensor
            Shape [batch, frames, n_mels], float32, under autocast too.

        Raises
        ------
        ValueError
            Another number of dimensions, or too short for one frame.
        """
        if wavs.ndim != 2:
            raise ValueError(
                f"KaldiFbank takes waveforms [batch, samples], got shape "
                f"{tuple(wavs.shape)}. Mix channels down, and add a batch "
                "dimension to a single recording with wav.unsqueeze(0)."
            )
        least = self.window if self.snip_edges else self.hop - self.hop // 2
        if wavs.shape[1] < least:
            raise ValueError(
                f"{wavs.shape[1]} samples give no frame: at least {least} are "
                "needed. Is the recording empty, or its sample rate wrong?"
            )
        wavs = wavs.to(self.spectrum.dtype)
        if not self.snip_edges:
            wavs = self._mirror_edges(wavs)
        frames = wavs.unfold(1, self.window, self.hop)  # [B, T, window]

        frames = frames * self.scale
        frames = frames - frames.mean(dim=-1, keepdim=True)
        first = frames[..., :1]
        frames = frames[..., 1:] - self.preemphasis * frames[..., :-1]
        # Kaldi repeats the first sample before itself. Povey's window is 0
        # there, so that its matrix starts at the second.
        if self.window_type != "povey":
            first = first - self.preemphasis * first
            frames = torch.cat([first, frames], dim=-1)

        power = self._power_by_fft if frames.is_cuda else self._power
        energies = in_bands(power(frames), self.bands)
        return energies.clamp(min=ENERGY_FLOOR).log()

    def _power(self, frames: torch.Tensor) -> torch.Tensor:
        """Power spectrum [B, T, n_fft / 2], without complex values."""
        real, imaginary = (frames @ self.spectrum).chunk(2, dim=-1)
        return real.square() + imaginary.square()

    def _power_by_fft(self, frames: torch.Tensor) -> torch.Tensor:
        """The same without a product, which a GPU would round to TF32."""
        window = self.spectrum[:, 0]  # the cosine of bin 0 is 1
        bins = torch.fft.rfft(frames * window, self.spectrum.shape[1])
        return torch.view_as_real(bins[..., :-1]).square().sum(dim=-1)

    def pad(
        self, waveforms: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch recordings so that each keeps the frames it has alone.

        Zeros behind a recording would show in its last two frames, where
        Kaldi sees the recording mirrored: so the mirror goes first.

        Arguments
        ---------
        waveforms : sequence of torch.Tensor
            B mono waveforms, each of shape [samples].

        Returns
        -------
        tuple of torch.Tensor
            Waveforms [B, N], and relative lengths [B] with which
            SpeechBrain's masks keep exactly the frames of each.
        """
        tail = 0 if self.snip_edges else self.window - self.window // 2
        longest = max(len(wav) for wav in waveforms) + tail
        padded = waveforms[0].new_zeros(len(waveforms), longest)
        for row, wav in zip(padded, waveforms, strict=True):
            end = len(wav) + tail
            row[:end] = wav[mirrored(0, end, len(wav), wav.device)]
        valid = torch.tensor([self.frames(len(wav)) for wav in waveforms])
        # Half a frame less keeps float32 away from the masks' rounding.
        return padded, (valid - 0.5) / self.frames(longest)

    def _mirror_edges(self, wavs: torch.Tensor) -> torch.Tensor:
        """Continue recordings past both ends so that every frame is full."""
        start = self.hop // 2 - self.window // 2
        frames = (wavs.shape[1] + self.hop // 2) // self.hop
        stop = start + (frames - 1) * self.hop + self.window
        return wavs[:, mirrored(start, stop, wavs.shape[1], wavs.device)]


class HostFbank(Fbank):
    """SpeechBrain's ``Fbank``, whose window and bands move with the module.

    The original copies both to the device in every call, and a copy from
    ordinary memory waits for the device.
    """

    def __init__(self, n_mels: int, sample_rate: int, n_fft: int) -> None:
        super().__init__(n_mels=n_mels, sample_rate=sample_rate, n_fft=n_fft)
        stft, bank = self.compute_STFT, self.compute_fbanks
        window = stft.window
        del stft.window
        stft.register_buffer("window", window, persistent=False)
        bins = len(bank.all_freqs_mat[0])
        bands = bank._create_fbank_matrix(
            bank.f_central.repeat(bins, 1).transpose(0, 1),
            bank.band.repeat(bins, 1).transpose(0, 1),
        )
        self.register_buffer("bands", bands, persistent=False)

    @fwd_default_precision(cast_inputs=torch.float32)
    def forward(self, wavs: torch.Tensor) -> torch.Tensor:
        """Waveforms [B, samples] to decibels [B, frames, n_mels]."""
        power = spectral_magnitude(self.compute_STFT(wavs))
        energies = in_bands(power, self.bands)
        return self.compute_fbanks._amplitude_to_DB(energies)


def in_bands(power: torch.Tensor, bands: torch.Tensor) -> torch.Tensor:
    """Sum power [B, T, bins] in bands [bins, n_mels].

    On a GPU in float64: ``import speechbrain`` lets products of float32 be
    rounded to TF32's 10 bits. Turning that off here would turn it off, for a
    moment, for other threads too, and would break a compiled graph.
    """
    if power.is_cuda:
        return (power.double() @ bands.double()).float()
    return power @ bands


def mirrored(
    start: int, stop: int, samples: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Indices [stop - start] into a recording that is mirrored at its ends.

    Positions below 0 or from `samples` on are outside of it; every index is in
    [0, samples), however short the recording.
    """
    index = torch.arange(start, stop, device=device)
    # A tensor of moduli: the ONNX exporter refuses a symbolic number.
    index = index.remainder(torch.full_like(index, 2 * samples))
    return torch.minimum(index, 2 * samples - 1 - index)


def make_front_end(
    name: str = "fbank", n_mels: int = 80, sample_rate: int = 16000
) -> torch.nn.Module:
    """The front-end that a recipe names: the function behind a YAML's choice.

    Arguments
    ---------
    name : str
        "fbank": SpeechBrain's, decibels from 25 ms Hamming windows every
        10 ms. "kaldi": :class:`KaldiFbank`, for clients that compute the
        features themselves. "wespeaker": the same as WeSpeaker's models have
        it, with a Hamming window, up to half the sample rate, of frames that
        lie inside the recording.
    n_mels : int
        Number of bands.
    sample_rate : int
        In Hz.

    Returns
    -------
    torch.nn.Module
        Waveforms [B, N] to features [B, T, n_mels].

    Raises
    ------
    ValueError
        Another name.

    Example
    -------
    >>> make_front_end("fbank")(torch.randn(2, 16000)).shape
    torch.Size([2, 101, 80])
    """
    if name == "fbank":
        return HostFbank(n_mels, sample_rate, FBANK_N_FFT)
    if name == "kaldi":
        return KaldiFbank(n_mels=n_mels, sample_rate=sample_rate)
    if name == "wespeaker":
        return KaldiFbank(
            n_mels=n_mels,
            sample_rate=sample_rate,
            high_freq=0.0,
            snip_edges=True,
            window_type="hamming",
        )
    raise ValueError(
        f"The front-end is {name!r}, 'fbank', 'kaldi' or 'wespeaker' is "
        "allowed. Is it misspelt in the YAML or after --frontend?"
    )


def windowed_dft(
    window: int, n_fft: int, window_type: str = "povey"
) -> torch.Tensor:
    """Window and discrete Fourier transform as one matrix.

    [window, n_fft], float32: cosines of bins 0 to n_fft / 2 - 1, then their
    sines. The Nyquist bin is left out: Kaldi's triangles never reach it.
    """
    taper = WINDOWS[window_type](window)
    time = torch.arange(window, dtype=torch.float64)
    angles = (
        2
        * math.pi
        / n_fft
        * torch.outer(time, time.new_tensor(range(n_fft // 2)))
    )
    matrix = torch.cat([angles.cos(), angles.sin()], dim=1)
    return (taper.unsqueeze(1) * matrix).float()


def mel_triangles(
    n_mels: int,
    n_fft: int,
    sample_rate: int,
    low_freq: float,
    high_freq: float,
) -> torch.Tensor:
    """Triangles equally wide on the Mel scale, [n_fft / 2, n_mels], float32.

    A `high_freq` of 0 or less counts down from Nyquist.
    """
    nyquist = sample_rate / 2
    top = high_freq if high_freq > 0 else nyquist + high_freq
    if not 0 <= low_freq < top <= nyquist:
        raise ValueError(
            f"Mel bands from {low_freq} to {top} Hz are not inside 0 to "
            f"{nyquist} Hz, half of the sample rate {sample_rate}. Was the "
            "front-end set up for another sample rate?"
        )

    def mel(frequency: torch.Tensor) -> torch.Tensor:
        return 1127.0 * torch.log1p(frequency / 700.0)

    limits = mel(torch.tensor([low_freq, top], dtype=torch.float64))
    first, last = limits.tolist()
    edges = torch.linspace(first, last, n_mels + 2, dtype=torch.float64)
    bins = torch.arange(n_fft // 2, dtype=torch.float64)
    bins = mel(bins * sample_rate / n_fft).unsqueeze(1)  # [n_fft / 2, 1]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0).float()
