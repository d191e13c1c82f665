"""Headers of every container, damage that they show, and the cache."""

import os
import struct
import threading
import time
import wave

import numpy as np
import pytest
import soundfile

from speechbrain_ram.data import headers
from speechbrain_ram.data.audio import AudioError
from speechbrain_ram.data.headers import read_headers
from speechbrain_ram.data.record import write_recorded

NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        ("a.wav", "PCM_16"),
        ("a.wav", "PCM_24"),
        ("a.wav", "FLOAT"),
        ("a.wav", "ALAW"),
        ("a.wav", "IMA_ADPCM"),
        ("a.flac", "PCM_16"),
        ("a.flac", "PCM_24"),
        ("a.ogg", "VORBIS"),
    ],
)
def test_same_as_decoding(tmp_path, name, subtype, rate, channels):
    """The oracle is to decode the whole file and count."""
    path = tmp_path / name
    data = np.repeat(NOISE[:, None], channels, axis=1)
    soundfile.write(path, data, rate, subtype=subtype)
    header = read_headers(tmp_path, [name])[0]
    decoded, decoded_rate = soundfile.read(path, always_2d=True)
    assert (header.frames, header.channels) == decoded.shape
    assert header.sample_rate == decoded_rate
    assert header.size == path.stat().st_size


def test_extensible_wav_and_chunks_before_the_samples(tmp_path):
    soundfile.write(
        tmp_path / "ext.wav", NOISE, 16000, format="WAVEX", subtype="PCM_16"
    )
    with wave.open(str(tmp_path / "plain.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(2000))
    plain = (tmp_path / "plain.wav").read_bytes()
    for size in (7, 3000):  # odd: padded; large: beyond what is read first
        chunk = b"LIST" + struct.pack("<I", size) + bytes(size + size % 2)
        (tmp_path / f"list{size}.wav").write_bytes(
            plain[:12] + chunk + plain[12:]
        )
    names = ["ext.wav", "list7.wav", "list3000.wav"]
    found = read_headers(tmp_path, names)
    assert [header.frames for header in found] == [8000, 1000, 1000]


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF])
def test_wav_from_a_pipe(tmp_path, length):
    """A stream cannot know its length; the file's size tells it."""
    path = tmp_path / "a.wav"
    soundfile.write(path, NOISE, 16000)
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", length)
    path.write_bytes(data)
    assert read_headers(tmp_path, ["a.wav"])[0].frames == 8000


def damaged(path, kind):
    """Write a file that is no good."""
    soundfile.write(path, NOISE, 16000, subtype="PCM_16")
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "cut in its header":
        path.write_bytes(data[:30])
    elif kind == "no samples":
        path.write_bytes(data[:40] + bytes(4))
    elif kind == "0 bytes":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not audio " * 100)
    elif kind == "missing":
        path.unlink()
    elif kind == "broken link":
        path.unlink()
        path.symlink_to("/nowhere/a.wav")
    elif kind == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("ending", ["wav", "flac"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut in its header", "cannot be read as audio"),
        ("0 bytes", r"empty file \(0 bytes\)"),
        ("text", "cannot be read as audio"),
        ("missing", "does not exist"),
        ("broken link", "link to a file that is not there"),
        ("folder", "is a folder"),
    ],
)
def test_damage_is_named(tmp_path, ending, kind, reason):
    path = tmp_path / f"x.{ending}"
    damaged(path, kind)
    error = read_headers(tmp_path, [path.name])[0]
    assert isinstance(error, AudioError)
    with pytest.raises(AudioError, match=reason):
        raise error
    assert str(path) in str(error)


def test_wav_without_samples(tmp_path):
    damaged(tmp_path / "a.wav", "no samples")
    error = read_headers(tmp_path, ["a.wav"])[0]
    with pytest.raises(AudioError, match="a.wav' holds no samples"):
        raise error


def test_wav_cut_short_shows_in_the_header(tmp_path):
    damaged(tmp_path / "a.wav", "cut")
    error = read_headers(tmp_path, ["a.wav"])[0]
    with pytest.raises(AudioError, match="promises 16000 bytes.*7978 are"):
        raise error


def test_flac_cut_short_shows_only_when_decoded(tmp_path):
    damaged(tmp_path / "a.flac", "cut")
    assert read_headers(tmp_path, ["a.flac"])[0].frames == 8000
    error = read_headers(tmp_path, ["a.flac"], verify=True)[0]
    with pytest.raises(AudioError, match="truncated|cannot be read"):
        raise error


def test_verify_finds_nan_and_is_remembered(tmp_path, monkeypatch):
    bad = NOISE.copy()
    bad[100] = np.nan
    soundfile.write(tmp_path / "bad.wav", bad, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "good.wav", NOISE, 8000)
    names, cache = ["bad.wav", "good.wav"], tmp_path / "cache"
    assert not read_headers(tmp_path, names, cache)[1].verified
    error, good = read_headers(tmp_path, names, cache, verify=True)
    with pytest.raises(AudioError, match="1 samples that are NaN"):
        raise error
    assert good.verified
    decoded = []
    monkeypatch.setattr(
        headers.Audio, "windows", lambda _, path: decoded.append(path)
    )
    read_headers(tmp_path, ["good.wav"], cache, verify=True)
    assert decoded == []


@pytest.fixture
def opened(monkeypatch):
    """The files whose headers are really read."""
    paths, original = [], headers._read_header
    monkeypatch.setattr(
        headers,
        "_read_header",
        lambda path: paths.append(os.path.basename(path)) or original(path),
    )
    return paths


def test_cache_reads_only_what_changed(tmp_path, opened):
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    corpus.mkdir()
    names = [f"{i}.wav" for i in range(600)]  # several chunks
    for name in names:
        soundfile.write(corpus / name, NOISE[:1000], 16000)
    first = read_headers(corpus, names, cache)
    assert sorted(opened) == sorted(names)
    opened.clear()
    assert read_headers(corpus, names, cache) == first
    assert opened == []

    soundfile.write(corpus / "3.wav", NOISE[:2000], 16000)  # another size
    os.utime(corpus / "5.wav", ns=(0, 10**18 + 1))  # another time
    again = read_headers(corpus, names, cache)
    assert sorted(opened) == ["3.wav", "5.wav"]
    assert again[3].frames == 2000
    opened.clear()

    # A part of the corpus is looked at, nothing of the rest is forgotten.
    read_headers(corpus, names[:10], cache)
    read_headers(corpus, names, cache)
    assert opened == []


def test_cache_of_another_corpus_or_none_is_not_used(tmp_path, opened):
    for folder, length in (("one", 1000), ("two", 1000)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "a.wav"
        soundfile.write(path, NOISE[:length], 16000)
        os.utime(path, ns=(0, 10**18))
    cache = tmp_path / "cache"
    read_headers(tmp_path / "one", ["a.wav"], cache)
    read_headers(tmp_path / "two", ["a.wav"], cache)
    assert opened == ["a.wav", "a.wav"]
    old = '{"header_cache": 2, "data_root": "/"}\n1 2 3 4 5 1 a.wav\n'
    for rubbish in ("", "{}\n", "[]\n", "null\n", "rubbish\x00", old):
        cache.write_text(rubbish)
        opened.clear()
        assert read_headers(tmp_path / "two", ["a.wav"], cache)[0].frames
        assert opened == ["a.wav"]


def test_cache_of_another_reader_is_not_used(tmp_path, opened, monkeypatch):
    soundfile.write(tmp_path / "a.wav", NOISE, 16000)
    cache = tmp_path / "cache"
    for version in ("1.2.3", "1.2.3", "1.2.4"):
        monkeypatch.setattr(soundfile, "__libsndfile_version__", version)
        read_headers(tmp_path, ["a.wav"], cache)
    assert len(opened) == 2


def test_a_damaged_cache_is_not_used(tmp_path, opened):
    """Whichever bit is another: most would change a number in silence."""
    soundfile.write(tmp_path / "a.wav", NOISE, 16000)
    cache = tmp_path / "cache"
    whole = read_headers(tmp_path, ["a.wav"], cache)
    written = cache.read_bytes()
    for bit in range(0, 8 * len(written), 5):
        damaged = bytearray(written)
        damaged[bit // 8] ^= 1 << bit % 8
        cache.write_bytes(damaged)
        opened.clear()
        assert read_headers(tmp_path, ["a.wav"], cache) == whole
        assert opened == ["a.wav"]
    opened.clear()
    assert read_headers(tmp_path, ["a.wav"], cache) == whole
    assert opened == []  # it was written again


HOSTILE = {
    "no rate": ["a.wav", 1, 1, 8000, 0, 1, False],
    "no channels": ["a.wav", 1, 1, 8000, 16000, 0, False],
    "no samples": ["a.wav", 1, 1, -1, 16000, 1, False],
    "too many samples": ["a.wav", 1, 1, 10**400, 16000, 1, False],
    "a list for a number": ["a.wav", 1, 1, [8000], 16000, 1, False],
    "a fraction": ["a.wav", 1, 1, 8000, 16000.5, 1, False],
    "too few numbers": ["a.wav", 1, 1],
    "no name": [7, 1, 1, 8000, 16000, 1, False],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_cache_that_somebody_has_sealed(tmp_path, opened, caplog, name):
    """Its checksum is right; what it says of a file cannot be."""
    soundfile.write(tmp_path / "a.wav", NOISE, 16000)
    status, row = (tmp_path / "a.wav").stat(), HOSTILE[name]
    if len(row) == 7:
        row[1:3] = status.st_size, status.st_mtime_ns
    cache = tmp_path / "cache"
    write_recorded(cache, headers._made_with(tmp_path), [row])
    (header,) = read_headers(tmp_path, ["a.wav"], cache)
    assert header[2:] == (8000, 16000, 1, False)
    assert opened == ["a.wav"]
    assert "cache' is not used" in caplog.text


def test_strange_names_are_remembered(tmp_path, opened):
    names = ["a\u2028b.wav", "a\nb.wav", "a b\t.wav", "a\udcff.wav"]
    for name in names:
        soundfile.write(os.fsencode(tmp_path / name), NOISE, 16000)
    first = read_headers(tmp_path, names, tmp_path / "cache")
    opened.clear()
    assert read_headers(tmp_path, names, tmp_path / "cache") == first
    assert opened == []


def test_interrupted_reading_is_continued(tmp_path, opened, monkeypatch):
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    corpus.mkdir()
    names = [f"{i:04d}.wav" for i in range(600)]
    for name in names:
        soundfile.write(corpus / name, NOISE[:100], 16000)
    wrapped = headers._read_header

    def interrupt(path):
        if path.endswith("0590.wav"):
            raise KeyboardInterrupt
        return wrapped(path)

    monkeypatch.setattr(headers, "_read_header", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_headers(corpus, names, cache, workers=1)
    monkeypatch.setattr(headers, "_read_header", wrapped)
    opened.clear()
    assert len(read_headers(corpus, names, cache)) == 600
    assert sorted(opened) == names[512:]  # two chunks of 256 were kept


def test_slow_disks_are_asked_in_parallel(tmp_path, monkeypatch):
    """Order stays; nobody waits for one file after the other."""
    names = [f"{i:04d}.wav" for i in range(800)]
    for name in names:
        soundfile.write(tmp_path / name, NOISE[: 100 + int(name[:4])], 16000)
    original, threads = headers._read_header, set()

    def slow(path):
        threads.add(threading.get_ident())
        time.sleep(0.0005)
        return original(path)

    assert [h.frames for h in read_headers(tmp_path, names)] == [
        100 + i for i in range(800)
    ]
    monkeypatch.setattr(headers, "_read_header", slow)
    found = read_headers(tmp_path, names, workers=6)
    assert [h.frames for h in found] == [100 + i for i in range(800)]
    assert len(threads) > 3
