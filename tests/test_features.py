"""Tests of the Kaldi-compatible front-end."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import make_padding_mask

from speechbrain_ram.features import (
    KaldiFbank,
    make_front_end,
    mel_triangles,
    mirrored,
)

SPEECH = os.environ.get("SPEECHOCEAN762")


def _noise(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, generator=generator) * 0.1


def _kaldi_frame(frame, n_mels=80, rate=16000, low=20.0, high=7600.0):
    """One frame of Kaldi's filterbank, written out in float64 loops."""
    window = len(frame)
    frame = frame.astype(np.float64) * 32768
    frame = frame - frame.mean()
    emphasised = frame.copy()
    for i in range(window - 1, 0, -1):
        emphasised[i] -= 0.97 * emphasised[i - 1]
    emphasised[0] -= 0.97 * frame[0]
    hann = [
        0.5 - 0.5 * math.cos(2 * math.pi * i / (window - 1))
        for i in range(window)
    ]
    power = np.abs(np.fft.rfft(emphasised * np.array(hann) ** 0.85, 512)) ** 2
    mel = lambda f: 1127 * math.log(1 + f / 700)  # noqa: E731
    step = (mel(high) - mel(low)) / (n_mels + 1)
    energies = []
    for band in range(n_mels):
        left = mel(low) + band * step
        energy = 0.0
        for k in range(256):
            position = (mel(k * rate / 512) - left) / step
            energy += power[k] * max(0.0, min(position, 2 - position))
        energies.append(math.log(max(energy, 2.0**-23)))
    return np.array(energies)


def _close_where_audible(ours, theirs, tolerance=1e-3):
    """Compare logarithms where float32 has digits left.

    18 nats (78 dB) below the frame's loudest band a float32 Fourier transform
    returns its own rounding; the references disagree there too.
    """
    audible = theirs > theirs.max(axis=-1, keepdims=True) - 18
    excess = np.abs(ours - theirs)[audible].max()
    assert excess < tolerance, f"differs by {excess}"


@pytest.mark.parametrize("position", [0, 7, 42])
def test_frames_equal_the_textbook(position):
    wav = _noise(16000)
    feats = KaldiFbank(snip_edges=True)(wav[None])[0].numpy()
    frame = wav[position * 160 : position * 160 + 400].numpy()
    np.testing.assert_allclose(feats[position], _kaldi_frame(frame), atol=1e-4)


def test_edges_are_mirrored_with_the_edge_sample_repeated():
    wav = _noise(1000)
    feats = KaldiFbank()(wav[None])[0].numpy()
    assert feats.shape == (6, 80)
    first = torch.cat([wav[:120].flip(0), wav[:280]]).numpy()
    last = torch.cat([wav[5 * 160 - 120 :], wav[-80:].flip(0)]).numpy()
    np.testing.assert_allclose(feats[0], _kaldi_frame(first), atol=1e-4)
    np.testing.assert_allclose(feats[5], _kaldi_frame(last), atol=1e-4)


def test_a_recording_shorter_than_its_margin_is_mirrored_again():
    expected = [1, 0, 0, 1, 2, 2, 1, 0, 0, 1]
    assert mirrored(-2, 8, samples=3).tolist() == expected


@pytest.mark.parametrize("window_type", ["povey", "hamming"])
@pytest.mark.parametrize("snip_edges", [True, False])
@pytest.mark.parametrize("samples", [400, 559, 560, 16000, 16079, 16080])
def test_torchaudio_agrees(samples, snip_edges, window_type):
    wav = _noise(samples, seed=samples)[None]
    theirs = torchaudio.compliance.kaldi.fbank(
        wav * 32768,
        num_mel_bins=80,
        high_freq=-400.0,
        snip_edges=snip_edges,
        window_type=window_type,
    )
    front_end = KaldiFbank(snip_edges=snip_edges, window_type=window_type)
    ours = front_end(wav)[0]
    assert ours.shape == theirs.shape == (front_end.frames(samples), 80)
    _close_where_audible(ours.numpy(), theirs.numpy())


def test_another_window():
    with pytest.raises(ValueError, match="window_type is 'hann', allowed are"):
        KaldiFbank(window_type="hann")


@pytest.mark.parametrize(
    ("rate", "n_mels", "high"), [(8000, 40, -200.0), (16000, 64, 0.0)]
)
def test_torchaudio_agrees_with_other_settings(rate, n_mels, high):
    wav = _noise(rate)[None]
    theirs = torchaudio.compliance.kaldi.fbank(
        wav,
        num_mel_bins=n_mels,
        low_freq=60.0,
        high_freq=high,
        sample_frequency=rate,
        snip_edges=False,
    )
    ours = KaldiFbank(n_mels, rate, low_freq=60.0, high_freq=high, scale=1.0)
    _close_where_audible(ours(wav)[0].numpy(), theirs.numpy())


def _native_fbank(wav, snip_edges):
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = snip_edges
    options.mel_opts.num_bins = 80
    options.mel_opts.high_freq = -400
    online = knf.OnlineFbank(options)
    online.accept_waveform(16000, (wav * 32768).tolist())
    online.input_finished()
    frames = range(online.num_frames_ready)
    return np.array([online.get_frame(i) for i in frames])


@pytest.mark.parametrize("snip_edges", [True, False])
@pytest.mark.parametrize("samples", [150, 400, 16079, 16080])
def test_kaldi_native_fbank_agrees(samples, snip_edges):
    if snip_edges and samples < 400:
        pytest.skip("no frame at all")
    wav = _noise(samples, seed=samples)
    theirs = _native_fbank(wav, snip_edges)
    ours = KaldiFbank(snip_edges=snip_edges)(wav[None])[0].numpy()
    assert ours.shape == theirs.shape
    _close_where_audible(ours, theirs)


@pytest.mark.real
@pytest.mark.skipif(not SPEECH, reason="SPEECHOCEAN762 is not set")
def test_real_speech_agrees_with_both_references():
    import soundfile

    paths = sorted(Path(SPEECH).glob("dev/*/*.ogg"))[::80]
    for path in paths:
        wav, _ = soundfile.read(path, dtype="float32")
        ours = KaldiFbank()(torch.from_numpy(wav)[None])[0].numpy()
        exact = torchaudio.compliance.kaldi.fbank(
            torch.from_numpy(wav)[None].double() * 32768,
            num_mel_bins=80,
            high_freq=-400.0,
            snip_edges=False,
        ).numpy()
        _close_where_audible(ours, exact)
        _close_where_audible(_native_fbank(wav, False), exact)
        # In the inaudible rest nothing is far off either.
        assert np.abs(ours - exact).max() < 0.05


@settings(deadline=None, max_examples=30)
@given(samples=st.integers(80, 3000), batch=st.integers(1, 3))
def test_a_batch_is_its_rows(samples, batch):
    front_end = KaldiFbank()
    wavs = _noise(batch * samples, seed=samples).view(batch, samples)
    feats = front_end(wavs)
    assert feats.shape == (batch, front_end.frames(samples), 80)
    alone = torch.cat([front_end(wav[None]) for wav in wavs])
    torch.testing.assert_close(feats, alone, atol=1e-3, rtol=0)


@pytest.mark.parametrize("snip_edges", [True, False])
@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(400, 2000), min_size=1, max_size=5))
def test_padding_changes_no_frame(lengths, snip_edges):
    front_end = KaldiFbank(snip_edges=snip_edges)
    wavs = [_noise(n, seed=n) for n in lengths]
    padded, lens = front_end.pad(wavs)
    feats = front_end(padded)
    keep = make_padding_mask(feats, lens)[..., 0]
    for wav, row, mask in zip(wavs, feats, keep, strict=True):
        alone = front_end(wav[None])[0]
        assert mask.sum() == len(alone) == front_end.frames(len(wav))
        torch.testing.assert_close(row[mask], alone, atol=1e-3, rtol=0)


def test_front_ends_by_name():
    assert isinstance(make_front_end("kaldi", 40), KaldiFbank)
    assert make_front_end("kaldi", 40, 8000).sample_rate == 8000
    assert isinstance(make_front_end("fbank"), Fbank)
    with pytest.raises(ValueError, match="'wespeaker' is allowed"):
        make_front_end("mfcc")


def test_silence_sits_on_the_floor():
    feats = KaldiFbank()(torch.zeros(1, 1600))
    assert torch.equal(feats, torch.full_like(feats, math.log(2.0**-23)))


def test_scale_moves_the_features_by_a_constant():
    wav = _noise(8000)[None]
    loud, soft = KaldiFbank()(wav), KaldiFbank(scale=1.0)(wav)
    torch.testing.assert_close(
        loud - soft, torch.full_like(loud, 30 * math.log(2)), atol=1e-3, rtol=0
    )


def test_float32_under_autocast_and_from_float64():
    wav = _noise(4000)[None]
    plain = KaldiFbank()(wav)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = KaldiFbank()(wav)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)
    assert torch.equal(KaldiFbank()(wav.double()), plain)


def test_nothing_in_the_checkpoint():
    assert KaldiFbank().state_dict() == {}


@pytest.mark.parametrize("shape", [(16000,), (1, 16000, 2)])
def test_wrong_dimensions(shape):
    with pytest.raises(ValueError, match=r"\[batch, samples\], got shape"):
        KaldiFbank()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("snip_edges", "samples"), [(True, 399), (False, 79), (False, 0)]
)
def test_too_short(snip_edges, samples):
    front_end = KaldiFbank(snip_edges=snip_edges)
    assert front_end.frames(samples) == 0
    with pytest.raises(ValueError, match="samples give no frame"):
        front_end(torch.zeros(1, samples))


@pytest.mark.parametrize(
    ("low", "high"), [(20.0, 9000.0), (8000.0, 0.0), (-1.0, 100.0)]
)
def test_bands_outside_the_spectrum(low, high):
    with pytest.raises(ValueError, match="not inside 0 to 8000"):
        mel_triangles(80, 512, 16000, low, high)
