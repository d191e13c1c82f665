"""Rooms, noises, microphones and codecs: what they do to known signals."""

import math

import pytest
import torch

from speechbrain_ram.data.augmentation import Chain, make_augmentation
from speechbrain_ram.data.synthetic import (
    CODECS,
    DISTORTIONS,
    codec,
    coloured_noise,
    distortion,
    echo,
    feature_masks,
    microphone,
    room,
)

RATE = 16000


def white(n_seconds=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(1, int(n_seconds * RATE), generator=generator)


def power(waveform, low, high):
    """Energy between two frequencies."""
    spectrum = torch.fft.rfft(waveform.double()).abs().square()
    frequency = torch.fft.rfftfreq(waveform.shape[-1], 1 / RATE)
    return float(spectrum[..., (frequency >= low) & (frequency < high)].sum())


@pytest.mark.parametrize("name", DISTORTIONS)
@pytest.mark.parametrize("length", [160, 799, 16001, 24000])
def test_length_and_values_stay(name, length):
    distort = distortion(name)
    torch.manual_seed(length)
    for waveform in (white()[:, :1].repeat(1, length), torch.zeros(1, length)):
        for _ in range(8):
            before = waveform.clone()
            changed = distort(waveform, torch.ones(1))
            assert changed.shape == waveform.shape
            assert changed.dtype == torch.float32
            assert torch.isfinite(changed).all()
            assert torch.equal(waveform, before)  # not in place


@pytest.mark.parametrize("name", ["room", "noise", "microphone"])
def test_loudness_does_not_matter(name):
    """The same draw at a hundredth of the level: a hundredth of the result."""
    voice = white() * torch.sin(torch.arange(RATE) / 999.0)
    results = []
    for factor in (1.0, 0.01):
        torch.manual_seed(5)
        changed = distortion(name)(voice * factor, torch.ones(1)) / factor
        results.append(changed)
    error = (results[0] - results[1]).norm() / results[0].norm()
    assert error < 1e-3


def test_a_room_answers_a_click():
    """The direct sound, then noise that falls by 60 dB in 0.1 to 0.7 s."""
    click = torch.zeros(1, RATE)
    click[0, 100] = 1.0
    times, ratios = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        answer = room(click)[0]
        assert int(answer.abs().argmax()) == 100
        assert answer[:100].abs().max() < 1e-6
        assert answer[101:116].abs().max() < 1e-6  # 1 ms of nothing
        tail = answer[116:].double()
        energy = tail.square().sum()
        ratios.append(float(10 * torch.log10(answer[100] ** 2 / energy)))
        # Schroeder's backward integral: the time from -5 to -25 dB, times 3.
        left = 10 * torch.log10(
            tail.square().flip(0).cumsum(0).flip(0) / energy
        )
        first, last = (int((left < -level).nonzero()[0]) for level in (5, 25))
        times.append(3 * (last - first) / RATE)
    assert 0.08 < min(times) < 0.25 and 0.5 < max(times) < 0.8
    assert -3.1 < min(ratios) < 0 and 9 < max(ratios) < 12.1


def test_the_echo_of_the_end_does_not_begin_the_crop():
    """Of a crop that is silent but for its end, and of any room."""
    late = torch.zeros(1, RATE)
    late[0, -200:] = 1.0
    for seed in range(10):
        torch.manual_seed(seed)
        assert room(late)[0, : RATE - 200].abs().max() < 1e-5
    response = torch.zeros(RATE)
    response[40], response[5000] = 1.0, 0.5  # the direct sound comes late
    heard = echo(late, response)[0]
    assert heard[: RATE - 200].abs().max() < 1e-5
    assert heard[RATE - 200 :].std() < 1e-5 < heard[-1]


def test_noise_falls_by_0_to_6_decibels_an_octave():
    slopes = []
    for seed in range(40):
        torch.manual_seed(seed)
        noise = coloured_noise(torch.zeros(1, 4 * RATE))
        # A band of one octave is twice as wide as the one below.
        bands = [power(noise, 250 * 2**i, 500 * 2**i) / 2**i for i in range(4)]
        slopes.append(10 * math.log10(bands[3] / bands[0]) / 3)
    assert -6.3 < min(slopes) < -5 and -1 < max(slopes) < 0.3


def test_the_share_of_noise():
    snrs = []
    for seed in range(40):
        torch.manual_seed(seed)
        clean = white(seed=seed)
        noisy = distortion("noise")(clean, torch.ones(1))
        share = (noisy * clean).sum() / clean.square().sum()
        rest = noisy - share * clean
        snrs.append(
            float(20 * torch.log10((share * clean).norm() / rest.norm()))
        )
    assert 4 < min(snrs) < 9 and 21 < max(snrs) < 26


def test_a_microphone_is_one_linear_filter():
    """The response that a click shows is the one that noise gets."""
    for seed in range(20):
        click = torch.zeros(1, RATE)
        click[0, RATE // 2] = 1.0
        torch.manual_seed(seed)
        response = torch.fft.rfft(microphone(click), 2 * RATE).abs()
        torch.manual_seed(seed)
        heard = microphone(white())
        for low in (100, 200, 400, 800, 1600, 3200):
            band = slice(2 * low, 4 * low)
            expected = float(response[0, band].square().mean())
            found = power(heard, low, 2 * low) / power(white(), low, 2 * low)
            assert found == pytest.approx(expected, rel=0.25)


def test_a_microphone_has_limits():
    below, above = [], []
    for seed in range(60):
        torch.manual_seed(seed)
        heard, middle = microphone(white()), (1000, 2000)
        reference = power(heard, *middle) / power(white(), *middle)
        below.append(power(heard, 0, 40) / power(white(), 0, 40) / reference)
        above.append(
            power(heard, 7100, 8000) / power(white(), 7100, 8000) / reference
        )
    assert sum(each < 0.1 for each in below) > 30
    assert 10 <= sum(each < 1e-4 for each in above) <= 30  # a third of 60


@pytest.mark.parametrize("which", range(len(CODECS)))
def test_each_codec_keeps_the_sound(which, monkeypatch):
    """And those for telephones keep nothing above 4 kHz."""
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(which))
    low = white(2.0)
    spectrum = torch.fft.rfft(low)
    spectrum[:, 6000:] = 0  # above 3 kHz
    low = torch.fft.irfft(spectrum)
    loud = low / low.abs().max() * 0.7
    heard = codec(loud)
    # An encoder may delay; the closest of all shifts counts.
    products = torch.fft.irfft(
        torch.fft.rfft(heard).conj() * torch.fft.rfft(loud)
    )
    alike = float(products.max() / heard.norm() / loud.norm())
    assert alike > (0.6 if CODECS[which][1] == "GSM610" else 0.95)
    if CODECS[which][2] == 8000:
        heard = codec(white())
        assert power(heard, 4200, 8000) < 0.01 * power(white(), 4200, 8000)


def test_a_chain_by_keys():
    augment = make_augmentation(synthetic=["codec", "room"])
    assert isinstance(augment, Chain)
    assert [link.choices[0].func for link in augment.links] == [room, codec]
    waveform = white()[0]
    keys = [f"1/{i}" for i in range(60)]
    first = [augment(waveform, key) for key in keys]
    again = [augment(waveform, key) for key in reversed(keys)][::-1]
    assert all(map(torch.equal, first, again))
    # 0.7 x 0.7 of them pass through neither.
    unchanged = sum(torch.equal(each, waveform) for each in first)
    assert 17 <= unchanged <= 42


def test_masks_are_not_of_waveforms():
    assert make_augmentation(synthetic=["masks"]) is None


def test_a_distortion_that_there_is_not():
    with pytest.raises(ValueError, match="has 'cave', allowed are room, noise"):
        make_augmentation(synthetic=["room", "cave"])


def test_feature_masks():
    masks, seen = feature_masks(), set()
    for seed in range(50):
        torch.manual_seed(seed)
        masked = masks(torch.ones(3, 150, 80))
        for one in masked:
            frames = int((one == 0).all(dim=1).sum())
            bands = int((one == 0).all(dim=0).sum())
            assert 1 <= frames <= 20 and 1 <= bands <= 16
            assert float((one == 0).sum()) == frames * 80 + bands * (
                150 - frames
            )
            seen.add((frames, bands))
    assert len(seen) > 50  # of each utterance by itself
