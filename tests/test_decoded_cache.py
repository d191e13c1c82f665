"""Decoded recordings: the same crops, bounded, and never in the way."""

import errno
import os

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.dataio.dataloader import make_dataloader

from speechbrain_ram import decoded_cache
from speechbrain_ram.audio import AudioError, read_audio
from speechbrain_ram.corpora.manifest import (
    ManifestError,
    Utterance,
    write_manifest,
)
from speechbrain_ram.dataset import speaker_datasets
from speechbrain_ram.decoded_cache import DecodedCache

RATE = 16000


def write(path, seconds=0.5, seed=0):
    """Noise that swells: its values are on no grid after Vorbis."""
    draw = np.random.default_rng(seed)
    samples = draw.normal(size=int(RATE * seconds)) * 0.1
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE)
    return str(path)


def entries(cache):
    return [path for path in cache.folder.rglob("*") if path.is_file()]


@pytest.fixture
def decodings(monkeypatch):
    """What was decoded, as (start, stop)."""
    done = []

    def spy(path, start, stop, *args, **kwargs):
        done.append((start, stop))
        return read_audio(path, start, stop, *args, **kwargs)

    monkeypatch.setattr(decoded_cache, "read_audio", spy)
    return done


@pytest.mark.parametrize("ending, width", [("flac", 2), ("ogg", 4)])
def test_pieces_are_the_same_and_decoded_once(
    tmp_path, decodings, ending, width
):
    path = write(tmp_path / f"a.{ending}", 3)
    cache = DecodedCache(tmp_path / "cache", max_gb=1)
    draw = np.random.default_rng(1)
    for _ in range(20):
        start, stop = np.sort(draw.choice(np.arange(2000, 46001), 2, False))
        found = cache.read(path, (2000, 46000), int(start), int(stop))
        assert torch.equal(found, read_audio(path, start, stop))
    assert decodings == [(2000, 46000)]
    (entry,) = entries(cache)
    assert entry.stat().st_size == 40 + width * 44000


def test_24_bits_are_kept_whole(tmp_path):
    samples = np.random.default_rng(0).integers(-(2**31), 2**31, 4000) >> 8 << 8
    path = str(tmp_path / "a.flac")
    soundfile.write(path, samples.astype(np.int32), RATE, subtype="PCM_24")
    cache = DecodedCache(tmp_path / "cache", max_gb=1)
    for _ in range(2):
        found = cache.read(path, (0, 4000), 100, 200)
        assert torch.equal(found, read_audio(path, 100, 200))


def test_a_changed_source_is_decoded_anew(tmp_path, decodings):
    path = write(tmp_path / "a.flac", seed=1)
    cache = DecodedCache(tmp_path / "cache", max_gb=1)
    before = cache.read(path, (0, 8000), 0, 100)
    write(tmp_path / "a.flac", seed=2)
    os.utime(path, ns=(1, 2))
    after = cache.read(path, (0, 8000), 0, 100)
    assert torch.equal(after, read_audio(path, 0, 100))
    assert not torch.equal(before, after)
    assert len(decodings) == 2
    assert len(entries(cache)) == 1
    os.unlink(path)
    assert cache.read(path, (0, 8000), 0, 100) is None  # read_audio says why


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: bytes(len(content)),
    ],
    ids=["empty", "header", "samples", "zeros"],
)
def test_a_damaged_entry_is_written_anew(tmp_path, decodings, damage):
    path = write(tmp_path / "a.flac")
    cache = DecodedCache(tmp_path / "cache", max_gb=1)
    cache.read(path, (0, 8000), 0, 10)
    (entry,) = entries(cache)
    entry.write_bytes(damage(entry.read_bytes()))
    for _ in range(2):
        found = cache.read(path, (0, 8000), 7000, 8000)
        assert torch.equal(found, read_audio(path, 7000, 8000))
    assert len(decodings) == 2


def test_the_bound(tmp_path):
    each = 40 + 4 * 1000
    cache = DecodedCache(tmp_path, max_gb=2.5 * each / 1e9)
    rows = [
        ("a.flac", (0, 1000)),
        ("b.wav", (0, 1000)),  # needs no decoding
        ("c.ogg", (0, 9000)),  # too large
        ("c.ogg", (500, 1500)),
        ("d.flac", (0, 1000)),  # full
    ]
    assert cache.plan(rows) == [True, False, False, True, False]
    with pytest.raises(ValueError, match="max_gb is 0, more than 0 is needed"):
        DecodedCache(tmp_path, max_gb=0)


def test_a_full_disk_is_said_once_and_reading_goes_on(
    tmp_path, monkeypatch, caplog
):
    paths = [write(tmp_path / f"{i}.flac", seed=i) for i in range(3)]
    cache = DecodedCache(tmp_path / "cache", max_gb=1)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache.read(paths[0], (0, 8000), 0, 10)
    monkeypatch.setattr(decoded_cache.os, "replace", full)
    found = cache.read(paths[1], (0, 8000), 20, 30)
    assert torch.equal(found, read_audio(paths[1], 20, 30))
    assert "No space left" in caplog.text
    assert cache.read(paths[2], (0, 8000), 20, 30) is None
    found = cache.read(paths[0], (0, 8000), 0, 10)  # still served
    assert torch.equal(found, read_audio(paths[0], 0, 10))
    assert caplog.text.count("Nothing more is kept") == 1
    assert len(entries(cache)) == 1  # no temporary file stays


def test_unusable_recordings_raise_as_without(tmp_path):
    path = tmp_path / "a.flac"
    path.write_bytes(b"fLaC")
    cache = DecodedCache(tmp_path / "cache", max_gb=1)
    with pytest.raises(AudioError, match="cannot be read as audio"):
        cache.read(str(path), (0, 10), 0, 10)
    soundfile.write(path, np.zeros((100, 2)), RATE)
    with pytest.raises(AudioError, match="2 channels"):
        cache.read(str(path), (0, 100), 0, 10)


@pytest.fixture
def corpus(tmp_path):
    """FLAC and Ogg, whole and as segments of one file."""
    rows = []
    for i in range(6):
        ending = ("flac", "ogg")[i % 2]
        write(tmp_path / f"corpus/{i}.{ending}", 1.0 + 0.1 * i, i)
        start, stop = (0, RATE) if i < 4 else (1000, 9000)
        rows.append(
            Utterance(
                f"{i}",
                (stop - start) / RATE,
                f"$data_root/{i}.{ending}",
                start,
                stop,
                "ab"[i % 2],
            )
        )
    write_manifest(rows, tmp_path / "all.csv")
    return tmp_path


def epoch_of(corpus, workers=0, **settings):
    manifest = corpus / "all.csv"
    crops, _, _ = speaker_datasets(
        manifest, manifest, corpus / "corpus", crop_seconds=0.3, **settings
    )
    crops.set_epoch(7)
    loader = make_dataloader(crops, batch_size=2, num_workers=workers)
    return torch.cat([batch.sig.data for batch in loader])


@pytest.mark.parametrize(
    "settings", [{}, {"resample": True}, {"speeds": (1, 2)}]
)
def test_crops_are_the_same(corpus, settings):
    plain = epoch_of(corpus, **settings)
    room = 4.5 * (40 + 4 * RATE) / 1e9  # not for all
    cache = DecodedCache(corpus / "cache", max_gb=room)
    for workers in (2, 0):  # first empty, then filled
        found = epoch_of(corpus, workers, cache=cache, **settings)
        assert torch.equal(found, plain)
    assert len(entries(cache)) == 4
    assert sum(path.stat().st_size for path in entries(cache)) <= room * 1e9


def test_never_into_the_corpus(corpus):
    cache = DecodedCache(corpus / "corpus" / "cache", max_gb=1)
    with pytest.raises(ManifestError, match="lies within the corpus"):
        epoch_of(corpus, cache=cache)
