"""Recordings to FLAC and WAV: same sound, no half files, no silent losses."""

import errno
import os
import sys

import miniature
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from speechbrain_ram.cli.main import main
from speechbrain_ram.corpora import convert
from speechbrain_ram.corpora.convert import convert_tree
from speechbrain_ram.data.audio import Audio, AudioError
from speechbrain_ram.data.containers import decode
from speechbrain_ram.data.manifest import ManifestError

pytest.importorskip("av", reason="the extra m4a is not installed")


@pytest.fixture
def source(tmp_path):
    return miniature.voxceleb2(
        tmp_path / "vox2", miniature.voices(2, 2), folder="dev/aac"
    )


def m4a_files(root):
    return sorted(root.rglob("*.m4a"))


@pytest.mark.parametrize("to", ["flac", "wav"])
def test_sound_is_kept(tmp_path, source, to):
    result = convert_tree(source, tmp_path / "out", to=to, workers=1)
    assert result == (4, 0, [])
    for path, samples in zip(
        m4a_files(source), sum(map(list, miniature.voices(2, 2)), []),
        strict=True,
    ):  # fmt: skip
        relative = path.relative_to(source).with_suffix(f".{to}")
        found, rate = soundfile.read(tmp_path / "out" / relative)
        info = soundfile.info(tmp_path / "out" / relative)
        assert (rate, found.ndim, info.subtype) == (16000, 1, "PCM_16")
        # AAC rounds up to frames of 1,024 samples; the sound begins on time.
        assert 0 <= len(found) - len(samples) < 1024
        correlation = np.corrcoef(found[: len(samples)], samples)[0, 1]
        assert correlation > 0.9
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not (tmp_path / "out" / "broken.txt").exists()


def test_stereo_and_other_rates_become_16_khz_mono(tmp_path):
    time = np.arange(44100) / 44100
    left, right = (np.sin(2 * np.pi * f * time) for f in (500, 3000))
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 44100)
    samples = decode(tmp_path / "a.wav")
    assert samples.dtype == np.int16
    assert abs(len(samples) - 16000) <= 32
    spectrum = np.abs(np.fft.rfft(samples[:15900] * np.hanning(15900)))
    peaks = np.argsort(spectrum)[-40:] * 16000 / 15900
    assert {round(p / 500) for p in peaks} == {1, 6}


@pytest.mark.parametrize("to", ["flac", "wav"])
@pytest.mark.parametrize("rate", [0, -8000, 999, 400_000, 16000.5])
def test_rates_that_nobody_reads_are_refused_at_once(tmp_path, to, rate):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", np.ones(1600) / 2, 16000)
    with pytest.raises(ValueError, match=f"sample_rate is {rate}, whole"):
        convert_tree(tmp_path / "in", tmp_path / "out", to, rate)
    assert not (tmp_path / "out").exists()


def test_the_ends_of_what_a_format_takes(tmp_path):
    """Of FLAC, above 65535 Hz, libsndfile writes multiples of 10 only."""
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", np.ones(1600) / 2, 16000)
    for to, rate in (
        *(("flac", 1000), ("flac", 384_000), ("flac", 65_600)),
        *(("wav", 1000), ("wav", 384_000), ("wav", 65_536)),
    ):
        out = tmp_path / f"{to}{rate}"
        done = convert_tree(tmp_path / "in", out, to, rate, workers=1)
        assert done == (1, 0, [])
        assert soundfile.info(out / f"a.{to}").samplerate == rate
    with pytest.raises(ValueError, match="65536, in FLAC only multiples of 10"):
        convert_tree(tmp_path / "in", tmp_path / "out", "flac", 65_536)


def test_rerun_continues(tmp_path, source):
    out = tmp_path / "out"
    convert_tree(source, out, workers=1)
    files = sorted(out.rglob("*.flac"))
    files[0].unlink()
    times = [path.stat().st_mtime_ns for path in files[1:]]
    assert convert_tree(source, out, workers=1) == (1, 3, [])
    assert [path.stat().st_mtime_ns for path in files[1:]] == times
    assert files[0].is_file()


def test_broken_files_are_listed_and_tried_again(tmp_path, source):
    first, second, third, _ = m4a_files(source)
    whole = first.read_bytes()
    first.write_bytes(b"")
    second.write_bytes(b"no audio at all " * 50)
    third.write_bytes(third.read_bytes()[:-2000])  # its index is at the end
    result = convert_tree(source, tmp_path / "out", workers=1)
    assert result[:2] == (1, 0)
    listed = (tmp_path / "out" / "broken.txt").read_text().splitlines()
    assert listed == result.broken
    assert [line.split(": ")[0] for line in listed] == [
        str(path.relative_to(source)) for path in (first, second, third)
    ]
    assert len(list((tmp_path / "out").rglob("*.flac"))) == 1
    first.write_bytes(whole)
    again = convert_tree(source, tmp_path / "out", workers=1)
    assert (again.converted, again.skipped, len(again.broken)) == (1, 1, 2)


def test_audio_that_ends_early_is_broken(tmp_path, source):
    """An MP4 with its index first survives cutting, and says less."""
    path = tmp_path / "early.m4a"
    samples = miniature.voices(2, 2)[0][0]
    miniature.write_m4a(path, samples, movflags="faststart")
    assert len(decode(path)) >= len(samples)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(AudioError, match="truncated|cannot be decoded"):
        decode(path)


def test_several_processes(tmp_path, source, monkeypatch):
    monkeypatch.setattr(convert, "_CHUNK", 2)
    assert convert_tree(source, tmp_path / "out", workers=2) == (4, 0, [])


@pytest.mark.parametrize("when", ["write", "short"])
def test_full_disk_stops_and_leaves_no_half_file(
    tmp_path, source, monkeypatch, when
):
    original = soundfile.SoundFile.write

    def full(file, samples):
        if "00002" in str(file.name):
            if when == "write":
                raise soundfile.LibsndfileError(2)
            samples = samples[: len(samples) // 2]
        original(file, samples)

    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    with pytest.raises(OSError, match="disk is full.*run again") as caught:
        convert_tree(source, tmp_path / "out", workers=1)
    assert caught.value.errno == errno.ENOSPC
    assert not [p for p in (tmp_path / "out").rglob("*") if "00002" in p.name]
    monkeypatch.setattr(soundfile.SoundFile, "write", original)
    result = convert_tree(source, tmp_path / "out", workers=1)
    assert result.skipped >= 1 and not result.broken


def test_sources_that_are_no_good(tmp_path, source):
    with pytest.raises(ManifestError, match="lies within the corpus"):
        convert_tree(source, source / "flac")
    with pytest.raises(ManifestError, match="no file below it ends in .*m4a"):
        (tmp_path / "bare").mkdir()
        convert_tree(tmp_path / "bare", tmp_path / "out")
    with pytest.raises(ValueError, match="to is 'mp3', allowed are flac, wav"):
        convert_tree(source, tmp_path / "out", to="mp3")
    assert not (tmp_path / "out").exists()


def test_without_the_extra(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    broken = convert_tree(source, tmp_path / "out", workers=1).broken
    assert len(broken) == 4
    assert all('pip install "speechbrain-ram[m4a]"' in why for why in broken)


def test_whatever_can_be_read(tmp_path):
    """Other containers, rates and channels, to the samples that reading has."""
    rng = np.random.default_rng(0)
    sound = rng.integers(-(2**15), 2**15, 16000).astype(np.int16)
    (tmp_path / "in" / "b").mkdir(parents=True)
    soundfile.write(tmp_path / "in" / "a.flac", sound, 16000)
    soundfile.write(tmp_path / "in" / "b" / "a.mp3", sound / 2**16, 16000)
    stereo = np.stack([sound, sound], 1)
    soundfile.write(tmp_path / "in" / "b" / "c.ogg", stereo, 8000)
    result = convert_tree(tmp_path / "in", tmp_path / "out", "wav", workers=1)
    assert result == (3, 0, [])
    found, _ = soundfile.read(tmp_path / "out" / "a.wav", dtype="int16")
    np.testing.assert_array_equal(found, sound)  # to the last bit
    infos = [soundfile.info(path) for path in (tmp_path / "out").rglob("*.wav")]
    assert {(i.samplerate, i.channels) for i in infos} == {(16000, 1)}
    assert sorted(i.frames for i in infos) == [16000, 16000, 32000]


@pytest.mark.parametrize(
    ("ending", "rate", "channels"),
    [("wav", 16000, 1), ("flac", 44100, 2), ("mp3", 16000, 1), ("ogg", 8000, 2)]
    + [("m4a", 16000, 1)],
)
def test_long_recordings_go_through_in_windows(
    tmp_path, monkeypatch, ending, rate, channels
):
    """To the same samples, without a seam."""
    generator = np.random.default_rng(0)
    sound = generator.normal(0, 0.1, (rate * 10 + 77, channels))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"a.{ending}"
    if ending == "m4a":
        miniature.write_m4a(path, sound[:, 0].astype(np.float32))
    else:
        soundfile.write(path, sound, rate)
    convert_tree(tmp_path / "in", tmp_path / "whole", workers=1)
    sizes = []

    def windows(audio, path, seconds=60.0):
        for window in original(audio, path, seconds=3.0):
            sizes.append(len(window))
            yield window

    original = Audio.windows
    monkeypatch.setattr(Audio, "windows", windows)
    convert_tree(tmp_path / "in", tmp_path / "parts", workers=1)
    assert len(sizes) >= 4 and max(sizes) < 3.2 * 16000
    whole, parts = ((tmp_path / n / "a.flac") for n in ("whole", "parts"))
    if rate == 16000:
        assert whole.read_bytes() == parts.read_bytes()
    # The last bit of a filter's float32 depends on how much it sees at once.
    samples = [soundfile.read(p, dtype="int16")[0] for p in (whole, parts)]
    np.testing.assert_allclose(*samples, rtol=0, atol=1)


def test_two_files_that_would_become_one(tmp_path):
    for ending in ("flac", "wav"):
        soundfile.write(tmp_path / f"a.{ending}", np.ones(1600) / 2, 16000)
    with pytest.raises(ManifestError, match="'a.flac' and 'a.wav'.*one file"):
        convert_tree(tmp_path, tmp_path.parent / "out")


def test_command_line(tmp_path, source):
    def run(code):
        words = [str(source), str(tmp_path / "out"), "--workers", "1"]
        result = CliRunner().invoke(main, ["convert", *words])
        assert result.exit_code == code, result.output
        return result.stdout

    assert "4 converted, 0 were there already, 0 broken" in run(0)
    os.truncate(m4a_files(source)[0], 10)
    (tmp_path / "out/dev/aac/id00012/21Uxsk56VDQ/00001.flac").unlink()
    assert "broken.txt" in run(1)
