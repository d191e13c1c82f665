"""Noise, rooms, and that a key alone decides what happens."""

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.augment.time_domain import AddNoise

from speechbrain_ram.data.augmentation import (
    MUSAN_SNR,
    NoiseBank,
    RandomAugmentation,
    Reverberation,
    make_augmentation,
)
from speechbrain_ram.data.manifest import ManifestError

RATE = 16000


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE, subtype="FLOAT")


@pytest.fixture
def folders(tmp_path):
    """MUSAN and rooms in miniature, each recording of a level of its own."""
    generator = np.random.default_rng(0)
    for part, count in (("noise", 3), ("music", 2), ("speech", 1)):
        for i in range(count):
            path = tmp_path / "musan" / part / "free-sound" / f"{i}.wav"
            write(path, 0.1 * generator.standard_normal(RATE * (1 + i)))
    room = np.zeros(800)
    room[[40, 300, 700]] = 1, 0.5, -0.25
    write(tmp_path / "rirs" / "small" / "1.wav", room)
    return tmp_path / "musan", tmp_path / "rirs"


def tone(length=RATE):
    return torch.sin(torch.arange(length) * 0.3)


def test_pieces_are_consecutive_and_random(tmp_path):
    write(tmp_path / "a.wav", np.arange(10000) / 2**20)
    bank = NoiseBank(tmp_path)
    starts = set()
    for _ in range(200):
        piece = (bank.draw(9990) * 2**20).round()
        assert torch.equal(piece.diff(), torch.ones(9989))
        starts.add(int(piece[0]))
    assert starts == set(range(11))  # all places, the ends included
    assert len(bank.draw()) == 10000


def test_short_recordings_are_repeated(tmp_path):
    write(tmp_path / "a.wav", np.arange(5) / 8)
    assert torch.equal(NoiseBank(tmp_path).draw(12)[5:10], torch.arange(5) / 8)


@pytest.mark.parametrize("rate", [8000, 11025, 48000])
def test_another_rate_is_converted_where_that_is_allowed(tmp_path, rate):
    """A piece lasts as long, and its tone stays the tone that it was."""
    write(tmp_path / "a.wav", np.sin(np.arange(RATE) / RATE * 2000 * np.pi))
    with pytest.raises(ManifestError, match=f"16000 Hz, {rate} Hz is needed"):
        NoiseBank(tmp_path, rate)
    bank = NoiseBank(tmp_path, rate, resample=True)
    assert len(bank.draw()) == rate
    for length in (rate // 2 + 1, 3 * rate):  # the longer one is repeated
        piece = bank.draw(length)
        assert piece.shape == (length,)
        heard = torch.fft.rfft(piece).abs().argmax() / length * rate
        assert abs(heard - 1000) < 2


@pytest.mark.parametrize("snr", [-5, 0, 20])
def test_signal_to_noise_ratio(folders, snr):
    bank = NoiseBank(folders[0] / "noise")
    mix = AddNoise(noise_funct=bank, snr_low=snr, snr_high=snr)
    clean = tone()[None]
    noisy = mix(clean, torch.ones(1))
    # The part of the mixture along the clean signal, and the rest.
    share = (noisy * clean).sum() / (clean * clean).sum()
    rest = noisy - share * clean
    found = 20 * torch.log10((share * clean).norm() / rest.norm())
    assert abs(found - snr) < 0.5


def test_room(folders):
    """Three echoes, written down by hand."""
    clean = torch.zeros(2, 4000)
    clean[:, 1000] = 1.0
    wet = Reverberation(NoiseBank(folders[1]))(clean)
    assert wet.shape == clean.shape
    scale = wet[0, 1000]
    expected = torch.zeros(4000)
    expected[[1000, 1260, 1660]] = torch.tensor([1, 0.5, -0.25])
    assert torch.allclose(wet[1] / scale, expected, atol=1e-5)


def test_the_key_decides(folders):
    augment = make_augmentation(*folders, probability=1.0)
    keys = [f"7/1/utterance{i}" for i in range(30)]
    first = [augment(tone(), key) for key in keys]
    torch.manual_seed(99)
    again = [augment(tone(), key) for key in reversed(keys)][::-1]
    assert all(map(torch.equal, first, again))
    # About half of them are in the one room there is.
    assert len({tuple(each[:50].tolist()) for each in first}) > 10
    before = torch.random.get_rng_state()
    augment(tone(), "x")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_shares():
    """6 of 10 changed; of those, the choices by their weights."""
    changes = [lambda x, _, k=k: x + k for k in (1, 2)]
    augment = RandomAugmentation(changes, [3, 1], probability=0.6)
    drawn = [int(augment(torch.zeros(1), f"key{i}")) for i in range(1000)]
    shares = np.bincount(drawn) / 1000
    # Four standard deviations of a share near one half: 0.06.
    assert np.abs(shares - [0.4, 0.45, 0.15]).max() < 0.06
    never = RandomAugmentation(changes, [1, 1], probability=0.0)
    assert all(int(never(torch.zeros(1), str(i))) == 0 for i in range(50))


def test_musan_and_rirs(folders):
    (augment,) = make_augmentation(*folders).links
    assert augment.probability == 0.6
    assert isinstance(augment.choices[0], Reverberation)
    found = {
        len(choice.noise_funct): (choice.snr_low, choice.snr_high)
        for choice in augment.choices[1:]
    }
    assert found == {
        3: MUSAN_SNR["noise"],
        2: MUSAN_SNR["music"],
        1: MUSAN_SNR["speech"],
    }
    assert augment.weights.tolist() == [1.0, 3 / 6, 2 / 6, 1 / 6]
    assert torch.isfinite(augment(torch.zeros(RATE), "silence")).all()


def test_noise_or_rooms_alone(folders):
    musan, rirs = folders
    (rooms,) = make_augmentation(rirs=rirs).links
    assert len(rooms.choices) == 1
    (noise,) = make_augmentation(musan).links
    assert len(noise.choices) == 3
    assert float(noise.weights.sum()) == pytest.approx(1)


def test_folders_that_are_no_good(folders, tmp_path):
    musan, rirs = folders
    with pytest.raises(ManifestError, match="nowhere/noise' does not exist"):
        make_augmentation(tmp_path / "nowhere", rirs)
    soundfile.write(rirs / "x.wav", np.zeros((99, 2)), RATE)
    with pytest.raises(ManifestError, match="x.wav' has 2 channels"):
        make_augmentation(musan, rirs)
    soundfile.write(rirs / "x.wav", np.zeros(99), 8000)
    with pytest.raises(ManifestError, match="sample rate of 8000 Hz"):
        make_augmentation(musan, rirs)


@pytest.mark.parametrize(
    ("weights", "probability", "message"),
    [
        ([], 0.5, "1 augmentations with the weights"),
        ([0.0], 0.5, "one weight above 0"),
        ([1.0], 60, "probability is 60, expected a share"),
    ],
)
def test_impossible_settings(weights, probability, message):
    with pytest.raises(ValueError, match=message):
        RandomAugmentation([torch.relu], weights, probability)
