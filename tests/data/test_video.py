"""Tests of the sound of videos: the same sound, or a clear no."""

import copy
import sys

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from small_encoder import export_small, voice

from speechbrain_ram.data.audio import Audio, AudioError, audio_info, read_audio
from speechbrain_ram.data.containers import is_container
from speechbrain_ram.inference import Segment, SpeakerEncoder

RATE = 48000
# Ending: codecs of sound and picture, and samples at 16 kHz by which the
# format's own padding delays the sound.
FORMATS = {
    "mp4": ("aac", "mpeg4", 16),
    "m4a": ("aac", None, 16),
    "mov": ("aac", "mpeg4", 16),
    "mkv": ("libopus", "mpeg4", 16),
    "webm": ("libopus", "libvpx", 16),
    "avi": ("mp3", "mpeg4", 400),
    "flv": ("aac", "flv", 400),
    "mpg": ("mp2", "mpeg1video", 400),
    "ts": ("aac", "mpeg2video", 400),
}


def write_video(path, wav, sound, picture, rate=RATE):
    """A film of a grey wall, with stereo sound."""
    av = pytest.importorskip("av", reason="the extra m4a is not installed")
    with av.open(str(path), "w") as container:
        if picture:
            video = container.add_stream(picture, rate=25)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream(sound, rate=rate)
        audio.layout = "stereo"
        if picture:
            wall = np.full((48, 64, 3), 128, np.uint8)
            for i in range(25 * len(wav) // rate):
                frame = av.VideoFrame.from_ndarray(wall, "rgb24")
                frame.pts = i
                container.mux(video.encode(frame))
            container.mux(video.encode())
        step = rate // 25
        for start in range(0, len(wav), step):
            block = (wav[start : start + step] * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(
                np.repeat(block, 2)[None], format="s16", layout="stereo"
            )
            frame.rate, frame.pts = rate, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


def delay(found, expected):
    """Samples by which `found` comes later, and how alike they are then."""
    size = 2 * max(len(found), len(expected))
    spectra = np.fft.rfft(found, size) * np.conj(np.fft.rfft(expected, size))
    correlation = np.fft.irfft(spectra, size)
    best = int(np.argmax(correlation))
    norms = np.linalg.norm(found) * np.linalg.norm(expected)
    return (best + size // 2) % size - size // 2, correlation[best] / norms


@pytest.fixture(scope="module")
def wav():
    return voice(4.0, rate=RATE)


@pytest.fixture(scope="module")
def film(wav, tmp_path_factory):
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    return write_video(path, wav, "aac", "mpeg4")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "encoder"
    return SpeakerEncoder.from_folder(export_small(folder))


@pytest.mark.parametrize("ending", FORMATS)
def test_the_whole_sound_and_parts_of_it(tmp_path, wav, ending):
    sound, picture, most = FORMATS[ending]
    path = write_video(tmp_path / f"film.{ending}", wav, sound, picture)
    assert is_container(path.read_bytes())
    info = audio_info(path)
    assert (info.sample_rate, info.channels) == (RATE, 2)
    assert info.frames / info.sample_rate == pytest.approx(4.0, abs=0.05)
    allowed = {"resample": True, "mixdown": True}
    whole = read_audio(path, **allowed)
    assert whole.dtype == torch.float32 and whole.ndim == 1
    expected = torchaudio.functional.resample(
        torch.from_numpy(wav), RATE, 16000
    )
    late, likeness = delay(whole.numpy(), expected.numpy())
    assert 0 <= late <= most and likeness > 0.9
    for start, stop in ((0, 1), (1, 2.5), (3, 3.7)):  # seconds
        part = read_audio(path, int(start * RATE), int(stop * RATE), **allowed)
        assert len(part) == round(16000 * (stop - start))
        there = whole[16000 * start : round(16000 * stop)]
        late, likeness = delay(part.numpy(), there.numpy())
        assert abs(late) <= 16 and likeness > 0.98


def test_a_film_is_embedded_as_its_sound_is(
    encoder, film, tmp_path, monkeypatch
):
    stop = audio_info(film).frames  # a codec's padding follows
    sound = read_audio(film, 0, stop, resample=True, mixdown=True).numpy()
    soundfile.write(tmp_path / "sound.wav", sound, 16000, subtype="FLOAT")
    rows = encoder.embed([film, tmp_path / "sound.wav"])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)
    part = Segment(film, RATE, 3 * RATE)
    assert encoder.score(part, sound[16000:48000]) > 0.99
    with monkeypatch.context() as patch:
        patch.setattr("speechbrain_ram.data.recordings.WHOLE", 1.0)
        assert encoder.score(film, tmp_path / "sound.wav") > 0.99
    named_otherwise = film.rename(tmp_path / "upload")
    assert encoder.score(named_otherwise, sound) > 0.9999
    named_otherwise.rename(film)


def test_rates_and_channels_by_declared_policy(encoder, film):
    strict = copy.copy(encoder)
    strict.mixdown = False
    with pytest.raises(AudioError, match=r"film\.mp4' has 2 channels"):
        strict.embed(film)
    strict = copy.copy(encoder)
    strict.resample = False
    with pytest.raises(AudioError, match=r"film\.mp4' has .* 48000 Hz"):
        strict.embed(film)


def test_without_the_extra(encoder, film, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    message = r"film\.mp4' is a video.*pip install \"speechbrain-ram\[m4a\]\""
    with pytest.raises(AudioError, match=message):
        encoder.embed(film)
    failures = {}
    rows = encoder.embed([film, voice(1.0)], failures=failures)
    assert len(rows) == 1 and list(failures) == [0]


def test_films_that_are_no_good(encoder, film, wav, tmp_path):
    mute = tmp_path / "mute.mp4"
    av = pytest.importorskip("av")
    with av.open(str(mute), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        wall = np.zeros((48, 64, 3), np.uint8)
        frame = av.VideoFrame.from_ndarray(wall, "rgb24")
        container.mux(video.encode(frame))
        container.mux(video.encode())
    with pytest.raises(AudioError, match=r"mute\.mp4' has no audio stream"):
        encoder.embed(mute)
    silent = write_video(tmp_path / "still.mp4", 0 * wav, "aac", "mpeg4")
    with pytest.raises(AudioError, match=r"still\.mp4' holds only silence"):
        encoder.embed(silent)
    for name, original in (
        ("cut.mp4", film),
        ("cut.mkv", write_video(tmp_path / "a.mkv", wav, "libopus", "mpeg4")),
    ):
        data = original.read_bytes()
        (tmp_path / name).write_bytes(data[: 2 * len(data) // 3])
        with pytest.raises(AudioError, match=f"{name}' .*(decoded|truncated)"):
            encoder.embed(tmp_path / name)
    (tmp_path / "noise.mp4").write_bytes(bytes(4) + b"ftyp" + bytes(1000))
    with pytest.raises(AudioError, match=r"noise\.mp4' cannot be decoded"):
        encoder.embed(tmp_path / "noise.mp4")


def test_nothing_else_is_handed_to_ffmpeg(tmp_path):
    for name, content in (
        ("playlist.mp4", b"#EXTM3U\nhttp://127.0.0.1/secret.wav\n"),
        ("notes.mkv", b"no film"),
        ("empty.mov", b""),
        ("sound.wav", b"RIFF\0\0\0\0WAVEfmt "),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AudioError, match="audio|empty file"):
            Audio().info(tmp_path / name)
        assert not is_container(content)


@pytest.fixture
def m4a(tmp_path):
    pytest.importorskip("av", reason="the extra m4a is not installed")
    import miniature

    miniature.write_m4a(tmp_path / "a.m4a", voice(1.0))
    return tmp_path / "a.m4a"


def test_words_that_are_not_utf_8_do_not_matter(m4a):
    """Brands and titles are read by nobody here."""
    expected, content = read_audio(m4a), m4a.read_bytes()
    m4a.write_bytes(content[:8] + b"\xff" + content[9:])
    assert torch.equal(read_audio(m4a), expected)


def test_sound_that_nothing_decodes(m4a):
    content = m4a.read_bytes().replace(b"mp4a", b"mp4\xff")
    m4a.write_bytes(content.replace(b"@\x15", b"\xfe\x15"))  # MPEG-4 audio
    for read in (audio_info, read_audio):
        with pytest.raises(AudioError, match="a.m4a' has sound that FFmpeg"):
            read(m4a)
