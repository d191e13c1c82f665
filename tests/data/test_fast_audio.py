"""The short ways give the samples of the long one, or leave it to it."""

import struct

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_ram.data import audio as fast_audio
from speechbrain_ram.data.audio import AudioError, read_audio, read_samples

RATE = 16000


@pytest.fixture
def noise():
    draw = np.random.default_rng(0)
    return draw.integers(-32768, 32768, 5000).astype(np.int16)


@pytest.fixture
def short_way(monkeypatch):
    """A list that tells how often the short way was taken."""
    taken, read = [], fast_audio._read_plain_wav

    def spy(*args):
        found = read(*args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(fast_audio, "_read_plain_wav", spy)
    return taken


@pytest.mark.parametrize("piece", [(0, 5000), (1234, 1235), (4000, 5000)])
def test_plain_wav(tmp_path, noise, short_way, piece):
    path = str(tmp_path / "a.WAV")
    soundfile.write(path, noise, RATE)
    assert torch.equal(read_samples(path, *piece), read_audio(path, *piece))
    assert short_way == [True]


def test_chunks_before_the_samples_are_stepped_over(tmp_path, noise, short_way):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise, RATE)
    plain = path.read_bytes()
    extra = b"LIST" + struct.pack("<I", 5) + b"hello\0"  # odd, so padded
    size = struct.pack("<I", len(plain) - 8 + len(extra))
    path.write_bytes(plain[:4] + size + plain[8:12] + extra + plain[12:])
    found = read_samples(str(path), 7, 300)
    assert torch.equal(found, read_audio(path, 7, 300))
    assert short_way == [True]
    path.write_bytes(  # further back than is looked
        plain[:12]
        + b"LIST"
        + struct.pack("<I", 9000)
        + bytes(9000)
        + plain[12:]
    )
    assert torch.equal(read_samples(str(path), 7, 300), found)
    assert short_way == [True, False]


@pytest.mark.parametrize(
    "settings",
    [
        {"subtype": "PCM_24"},
        {"subtype": "FLOAT"},
        {"subtype": "ULAW"},
        {"format": "RF64"},
        {"format": "WAVEX"},
        {"format": "AIFF"},
        {"format": "FLAC"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_other_files_go_the_long_way(tmp_path, noise, short_way, settings):
    path = str(tmp_path / "a.wav")
    soundfile.write(path, noise, RATE, **settings)
    assert torch.equal(read_samples(path, 5, 900), read_audio(path, 5, 900))
    assert short_way == [False]


def test_other_rates_and_channels_go_the_long_way(tmp_path, noise, short_way):
    path = str(tmp_path / "a.wav")
    soundfile.write(path, noise, 8000)
    with pytest.raises(AudioError, match="8000 Hz, 16000 Hz is needed"):
        read_samples(path, 0, 500)
    found = read_samples(path, 0, 500, RATE, resample=True)
    assert torch.equal(found, read_audio(path, 0, 500, RATE, resample=True))
    soundfile.write(path, noise.reshape(-1, 2), RATE)
    with pytest.raises(AudioError, match="2 channels"):
        read_samples(path, 0, 500)
    found = read_samples(path, 0, 500, RATE, mixdown=True)
    assert torch.equal(found, read_audio(path, 0, 500, RATE, mixdown=True))
    assert not any(short_way)


def test_errors_are_those_of_read_audio(tmp_path, noise):
    path = tmp_path / "a.wav"
    for content in (None, b"", b"RIFF", b"RIFF....WAVEfmt "):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(AudioError) as expected:
            read_audio(path, 0, 10)
        with pytest.raises(AudioError) as found:
            read_samples(str(path), 0, 10)
        assert str(found.value) == str(expected.value)
    soundfile.write(path, noise, RATE)
    with pytest.raises(AudioError, match="has 5000 samples, but samples 5000"):
        read_samples(str(path), 5000, 5010)
    # Past the end: what is there, as read_audio.
    assert torch.equal(
        read_samples(str(path), 4900, 5100), read_audio(path, 4900, 5100)
    )


@pytest.mark.parametrize("size", [0, 20_000, 0xFFFFFFFF])
def test_headers_that_promise_something_else(tmp_path, noise, size):
    """As libsndfile reads them: a stream's header, a copy that broke off."""
    path = tmp_path / "a.wav"
    soundfile.write(path, noise, RATE)
    content = bytearray(path.read_bytes())
    assert content[36:40] == b"data"
    content[40:44] = struct.pack("<I", size)
    path.write_bytes(content)
    for piece in ((10, 500), (4900, 5100)):
        try:
            expected = read_audio(path, *piece)
        except AudioError as error:
            with pytest.raises(AudioError) as caught:
                read_samples(str(path), *piece)
            assert str(caught.value) == str(error)
        else:
            assert torch.equal(read_samples(str(path), *piece), expected)
