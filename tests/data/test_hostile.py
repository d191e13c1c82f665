"""Headers that contradict themselves, absurd formats, and small files that
become large: one clear line, in bounded memory.
"""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from speechbrain_ram.data.audio import Audio, AudioError
from speechbrain_ram.data.headers import read_headers
from speechbrain_ram.data.recordings import split_into_pieces

ANYTHING = Audio(16000, resample=True, mixdown=True)


def wav(kind=1, channels=1, rate=16000, block=None, bits=16, size=None):
    """A WAV file of 32,000 bytes of samples, as its header describes them."""
    block = channels * bits // 8 if block is None else block
    layout = struct.pack(
        "<HHIIHH", kind, channels, rate, 32000, block & 0xFFFF, bits
    )
    size = 32000 if size is None else size
    body = b"WAVEfmt " + struct.pack("<I", 16) + layout
    body += b"data" + struct.pack("<I", size) + bytes(32000)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def ogg(path, channels, rate):
    """A Vorbis file with other numbers in its first header."""
    soundfile.write(path, np.zeros(3200), 16000, format="OGG")
    data = bytearray(path.read_bytes())
    place = data.index(b"\x01vorbis")
    data[place + 11 : place + 16] = struct.pack("<BI", channels, rate)
    page = data[: 27 + data[26] + sum(data[27 : 27 + data[26]])]
    page[22:26] = bytes(4)
    check = 0
    for byte in page:
        check ^= byte << 24
        for _ in range(8):
            check = (check << 1 ^ (check >> 31) * 0x04C11DB7) & 0xFFFFFFFF
    data[22:26] = struct.pack("<I", check)
    path.write_bytes(data)


def flac(path, channels=1, rate=16000, frames=3200):
    soundfile.write(path, np.zeros(3200), 16000)
    data = bytearray(path.read_bytes())
    bits = rate << 44 | channels - 1 << 41 | 15 << 36 | frames
    data[18:26] = bits.to_bytes(8, "big")
    path.write_bytes(data)


def au(channels, rate):
    return (
        b".snd"
        + struct.pack(">5I", 24, 32000, 3, rate, channels)
        + bytes(32000)
    )


def caf(rate):
    layout = struct.pack(">d4s5I", rate, b"lpcm", 0, 2, 1, 1, 16)
    start = b"caff\0\1\0\0desc" + struct.pack(">Q", 32) + layout
    return start + b"data" + struct.pack(">QI", 32004, 0) + bytes(32000)


DAMAGED = {
    **{f"block {n}.wav": wav(block=n) for n in (1, 3, 4, 65535)},
    **{f"bits {n}.wav": wav(block=2, bits=n) for n in (0, 7, 33, 65535)},
    "float of 64 bits.wav": wav(kind=3, block=4, bits=64),
    **{f"channels {n}.wav": wav(channels=n) for n in (0, 1025, 65535)},
    **{f"rate {n}.wav": wav(rate=n) for n in (0, 1, 999, 384_001, 2**32 - 1)},
    **{f"channels {n}.au": au(n, 16000) for n in (0, 65535, 2**31)},
    **{f"rate {n}.au": au(1, n) for n in (0, 1, 2**31, 2**32 - 1)},
    **{f"rate {n}.caf": caf(n) for n in (0, -1, 1e300, np.inf, np.nan)},
    "channels 0.ogg": lambda path: ogg(path, 0, 16000),
    **{
        f"rate {n}.ogg": lambda path, n=n: ogg(path, 1, n)
        for n in (0, 1, 2**31 - 1, 2**31)
    },
    **{
        f"rate {n}.flac": lambda path, n=n: flac(path, rate=n)
        for n in (0, 1, 2**20 - 1)
    },
    "frames.flac": lambda path: flac(path, frames=2**36 - 1),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_no_recording_has(tmp_path, name):
    """Header, whole, piece and plan: everywhere the same one line."""
    path, content = tmp_path / name, DAMAGED[name]
    content(path) if callable(content) else path.write_bytes(content)
    for read in (
        ANYTHING.info,
        ANYTHING.read,
        lambda path: ANYTHING.read(path, 100, 200),
        lambda path: split_into_pieces(path, 0, 16000, True, True),
    ):
        with pytest.raises(AudioError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"'{path}' ") and "\n" not in message
        assert "damaged" in message or "cannot be read as audio" in message
    (error,) = read_headers(tmp_path, [name])
    assert isinstance(error, AudioError)


def test_samples_that_end_in_the_middle_of_one(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(size=31999))
    assert ANYTHING.info(tmp_path / "a.wav").frames == 15999
    assert len(ANYTHING.read(tmp_path / "a.wav")) == 15999


def test_many_channels(tmp_path):
    ogg(tmp_path / "a.ogg", 255, 16000)
    assert ANYTHING.info(tmp_path / "a.ogg").channels == 255
    assert len(ANYTHING.read(tmp_path / "a.ogg")) == 3200
    path = tmp_path / "a.wav"
    noise = np.random.default_rng(0).uniform(-1, 1, (5000, 200))
    soundfile.write(path, noise, 16000, subtype="FLOAT")  # several blocks
    expected = soundfile.read(path, dtype="float32")[0].mean(axis=1)
    assert np.array_equal(ANYTHING.read(path), expected)


@pytest.mark.parametrize("byte", ["", "x", "-44", "1_0", "٣", "9" * 400])
def test_places_in_shards_that_are_none(tmp_path, byte):
    (tmp_path / "a.tar").write_bytes(bytes(1000))
    with pytest.raises(AudioError, match="a.tar#"):
        Audio().read(f"{tmp_path}/a.tar#{byte}", 0, 100)


def test_shards_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "a.tar").write_bytes(bytes(1000))
    for name, start, stop in [
        ("pipe.tar#0", 0, 100),
        ("no.tar#0", 0, 100),
        ("a.tar#0", 0, 10**17),
        ("a.tar#0", -1, 100),
        ("a.tar#0", 100, 100),
        ("a.tar#0", 0, None),
    ]:
        with pytest.raises(AudioError, match="tar#0' (has no|is trunc|cannot)"):
            Audio().read(f"{tmp_path}/{name}", start, stop)


# -- Bombs, each in a process of its own that tells its largest memory --------

WATCH = """
import resource, sys, tracemalloc
import torchaudio.functional
from speechbrain_ram.data.audio import Audio
from speechbrain_ram.data.headers import read_headers
from speechbrain_ram.data.recordings import split_into_pieces
audio, path = Audio(16000, True, True), sys.argv[1]
audio.read(sys.argv[2])
usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = usage()
tracemalloc.start()
(header,) = read_headers("/", [path])
pieces = split_into_pieces(path, 0, 16000, True, True)
lengths = [len(piece.load()) for piece in pieces[:2]]
print(header.frames, lengths[0], usage() - before,
      tracemalloc.get_traced_memory()[1] / 2**20)
"""


def sparse(path, channels, rate):
    size = (2**31 - 2**20) // (2 * channels) * 2 * channels
    path.write_bytes(wav(channels=channels, rate=rate, size=size)[:44])
    os.truncate(path, 44 + size)
    return size // (2 * channels)


def hour(path):
    with soundfile.SoundFile(path, "w", 16000, 1, "PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 16000, np.float32))
    assert path.stat().st_size < 200_000
    return 3600 * 16000


BOMBS = {
    "hour.flac": (hour, 100),
    "sparse.wav": (lambda path: sparse(path, 1, 16000), 100),
    "16 channels.wav": (lambda path: sparse(path, 16, 16000), 100),
    "384 kHz.wav": (lambda path: sparse(path, 1, 384_000), 800),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    make, most = BOMBS[name]
    frames = make(tmp_path / name)
    soundfile.write(tmp_path / "a.wav", np.zeros((16000, 2)), 8000)
    done = subprocess.run(
        [sys.executable, "-c", WATCH, tmp_path / name, tmp_path / "a.wav"],
        capture_output=True,
        text=True,
        check=True,
    )
    said, length, resident, traced = map(float, done.stdout.split())
    assert said == frames
    assert length <= 240 * 16000
    assert resident < most, f"{resident:.0f} MB, {traced:.0f} of them traced"
    assert traced < most
