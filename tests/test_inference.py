"""Tests of SpeakerEncoder: what users hand in, and what they get."""

import copy
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from small_encoder import DIM, export_small, voice
from speechbrain.inference.classifiers import EncoderClassifier

from speechbrain_ram.data import recordings
from speechbrain_ram.data.audio import AudioError
from speechbrain_ram.export.architecture import EncoderError
from speechbrain_ram.inference import (
    Comparison,
    Segment,
    SpeakerEncoder,
)


@pytest.fixture(scope="module", params=["fbank", "kaldi"])
def folder(request, tmp_path_factory):
    return export_small(
        tmp_path_factory.mktemp("export") / "encoder", request.param
    )


@pytest.fixture(scope="module")
def encoder(folder):
    return SpeakerEncoder.from_folder(folder)


def write(path, wav, rate=16000):
    soundfile.write(path, wav, rate)
    return path


def close(a, b, tolerance=1e-4):
    scale = max(1.0, np.abs(b).max())
    assert np.abs(np.asarray(a) - np.asarray(b)).max() < tolerance * scale


def test_an_embedding_is_speechbrains(encoder, folder):
    model = EncoderClassifier.from_hparams(str(folder))
    wav = voice(1.3)
    theirs = model.encode_batch(torch.from_numpy(wav)[None])[0].numpy()
    close(encoder.embed(wav), theirs)


def test_every_kind_of_recording(encoder, tmp_path):
    wav = voice(1.0)
    path = write(tmp_path / "a.flac", wav)
    stored = soundfile.read(path, dtype="float32")[0]
    expected = encoder.embed(stored)
    assert expected.shape == (1, DIM) and expected.dtype == np.float32
    integers = soundfile.read(path, dtype="int16")[0]
    for recording in (
        path,
        str(path),
        Segment(path),
        Segment(path, 0, 16000),
        torch.from_numpy(stored),
        stored.astype(np.float64),
        integers,
        [path],
        iter([path]),
    ):
        close(encoder.embed(recording), expected, 1e-6)
    part = encoder.embed(Segment(path, 4000, 12000))
    close(part, encoder.embed(stored[4000:12000]))
    assert encoder.embed([]).shape == (0, DIM)


def test_a_batch_gives_what_each_recording_gives_alone(encoder):
    wavs = [voice(s, 100 + 30 * s, seed=i) for i, s in enumerate(
        (0.2, 2.0, 0.5, 1.234, 0.1, 3.0)
    )]  # fmt: skip
    together = encoder.embed(wavs)
    for wav, row in zip(wavs, together, strict=True):
        close(encoder.embed(wav)[0], row)
    few = copy.copy(encoder)
    few.batch_seconds = 0.01
    close(few.embed(wavs), together)


def test_long_recordings_are_windowed(encoder, tmp_path, monkeypatch):
    wav = np.concatenate([voice(1.0, 110), voice(1.0, 210), voice(0.4, 160)])
    windows = [wav[i * 12800 : (i + 1) * 12800] for i in range(3)]
    expected = encoder.embed(windows).mean(axis=0)
    assert np.abs(encoder.embed(wav)[0] - expected).max() > 1e-3
    monkeypatch.setattr(recordings, "WHOLE", 1.0)
    close(encoder.embed(wav)[0], expected)
    path = tmp_path / "a.wav"
    soundfile.write(path, wav, 16000, subtype="FLOAT")
    close(encoder.embed(path)[0], expected)


def test_silent_windows_are_left_out(encoder, monkeypatch):
    monkeypatch.setattr(recordings, "WHOLE", 1.0)
    speech = voice(1.0)
    close(encoder.embed(np.r_[speech, np.zeros(16000)]), encoder.embed(speech))


def test_three_hours_need_the_memory_of_a_window(encoder, tmp_path):
    """Of 691 MB of samples never more than some windows are there."""
    if encoder.pad:
        pytest.skip("the front-end makes no difference here")
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 16000, 1, "PCM_U8") as file:
        for _ in range(180):
            file.write(np.zeros(60 * 16000, np.float32))
        file.write(voice(3.0))
    tracemalloc.start()
    embedding = encoder.embed(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.isfinite(embedding).all()
    assert peak < 100e6


def test_other_rates_and_channels_by_declared_policy(encoder, tmp_path):
    wav = voice(1.0)
    mono = write(tmp_path / "mono.wav", wav)
    stereo = write(tmp_path / "stereo.wav", np.stack([wav, wav], axis=1))
    high = write(tmp_path / "high.wav", voice(1.0, rate=32000), 32000)
    close(encoder.embed(stereo), encoder.embed(mono))
    resampled = torchaudio.functional.resample(
        torch.from_numpy(soundfile.read(high, dtype="float32")[0]), 32000, 16000
    )
    close(encoder.embed(high), encoder.embed(resampled))
    strict = copy.copy(encoder)
    strict.resample = strict.mixdown = False
    with pytest.raises(AudioError, match=r"stereo\.wav.*2 channels"):
        strict.embed(stereo)
    with pytest.raises(AudioError, match=r"high\.wav.*32000 Hz"):
        strict.embed(high)


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (np.zeros(16000), "recording 0 holds only silence"),
        (np.full(16000, 0.5), "recording 0 holds only silence"),
        (1e-6 * voice(1.0), "recording 0 holds only silence"),
        (voice(0.01), "recording 0 lasts 10 ms, at least 100 ms"),
        (np.zeros(0), "recording 0 lasts 0 ms"),
        (np.r_[voice(1.0), np.nan], "NaN or infinite"),
        (voice(1.0) * 32768, "Are they 16-bit numbers"),
        (voice(1.0)[None], r"has shape \(1, 16000\)"),
        (3, "recording 0 is a int; a path"),
    ],
)
def test_what_no_speaker_can_be_heard_in(encoder, wav, message):
    with pytest.raises(AudioError, match=message):
        encoder.embed([wav])


def test_unusable_files_are_named(encoder, tmp_path):
    (tmp_path / "text.wav").write_text("no audio" * 100)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "video.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 500)
    for name in ("text.wav", "empty.wav", "video.mp4", "missing.wav"):
        with pytest.raises(AudioError, match=name):
            encoder.embed(tmp_path / name)


def test_failures_can_be_collected(encoder, tmp_path):
    good = write(tmp_path / "good.wav", voice(1.0))
    whole = write(tmp_path / "cut.flac", voice(2.0)).read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    failures = {}
    rows = encoder.embed(
        [tmp_path / "cut.flac", good, np.zeros(16000), voice(0.01), good],
        failures=failures,
    )
    close(rows, np.repeat(encoder.embed(good), 2, axis=0), 1e-6)
    assert list(failures) == [0, 2, 3]
    assert "cut.flac" in failures[0]
    assert "silence" in failures[2]
    assert "10 ms" in failures[3]


def test_clipping_is_a_warning(encoder):
    with pytest.warns(UserWarning, match="recording 0 is clipped: .* % of"):
        loud = encoder.embed([np.clip(20 * voice(1.0), -1, 1)])
    assert np.isfinite(loud).all()


def test_no_nan_leaves_a_broken_encoder(folder):
    encoder = SpeakerEncoder.from_folder(folder)
    with torch.no_grad():
        encoder._network.linear.bias[0] = torch.nan
    with pytest.raises(EncoderError, match="returns NaN"):
        encoder.embed(voice(1.0))
    with torch.no_grad():
        for parameter in encoder._network.parameters():
            parameter.zero_()
    with pytest.raises(EncoderError, match="or zero embeddings"):
        encoder.score(voice(1.0), voice(1.0))


def test_score_is_the_cosine(encoder):
    a, b = voice(1.0, 110), voice(1.0, 220)
    x, y = encoder.embed([a, b]).astype(np.float64)
    expected = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert encoder.score(a, b) == pytest.approx(expected, abs=1e-6)
    assert encoder.score(a, a) == pytest.approx(1.0)
    assert encoder.score(a, a) <= 1.0


def test_decisions(encoder):
    a, b = voice(1.0, 110), voice(1.0, 220)
    score = encoder.score(a, b)
    decision = encoder.decision
    assert encoder.same_speaker(a, b) == (score >= decision.threshold())
    assert encoder.same_speaker(a, b, threshold=score - 1e-6)
    assert not encoder.same_speaker(a, b, threshold=score + 1e-6)
    for kind in (np.float32, np.float16, np.array, torch.tensor):
        assert encoder.threshold(kind(0.5)) == 0.5
    assert encoder.threshold(np.int64(1)) == 1.0
    far = decision.threshold("FAR=1%")
    result = encoder.compare(a, b, "FAR=1%")
    assert result.threshold == far
    assert result.same_speaker == (result.score >= far)
    assert result.llr == decision.llr(result.score)
    shares = (result.targets_below, result.nontargets_above)
    assert shares == decision.shares(result.score)
    numbers, told = result.told()
    assert numbers.startswith(f"score {result.score:.3f}, threshold ")
    assert f", {100 * shares[1]:.1f} % of different-speaker pairs" in told
    assert len(Comparison(0.5, 0.4, True).told()) == 1
    few = Comparison(0.5, 0.4, True, 0.1, 0.0, 0.0004).told()[1]
    assert "0.0 % of same" in few and "under 0.1 % of different" in few
    with pytest.raises(ValueError, match="there are EER, FAR=1%"):
        encoder.same_speaker(a, b, threshold="FRR=1%")


def test_without_saved_thresholds(tmp_path):
    folder = export_small(tmp_path / "encoder", decision=False)
    encoder = SpeakerEncoder.from_folder(folder)
    a = voice(1.0)
    with pytest.raises(ValueError, match="No threshold was .*--threshold 0.5"):
        encoder.same_speaker(a, a)
    assert encoder.compare(a, a, 0.5) == Comparison(
        pytest.approx(1.0), 0.5, True
    )


def test_a_run_is_loaded_by_its_best_checkpoint(tiny_run):
    run, exported = (
        SpeakerEncoder.from_folder(tiny_run),
        SpeakerEncoder.from_folder(tiny_run / "inference"),
    )
    assert run.fingerprint == exported.fingerprint
    wavs = torch.from_numpy(voice(1.0))[None]
    ours = run.encode(wavs, torch.ones(1))
    assert torch.equal(ours, exported.encode(wavs, torch.ones(1)))
    assert exported.decision.trials == "trials.txt"
    assert exported.facts["objective"].startswith("ram, margin")
    (checkpoint, *_) = (tiny_run / "save").glob("CKPT+*")
    assert (
        SpeakerEncoder.from_folder(checkpoint).embedding_dim
        == run.embedding_dim
    )


@pytest.mark.real
def test_real_files(encoder, speechocean):
    paths = sorted((speechocean / "dev").glob("*/*.ogg"))[:3]
    rows = encoder.embed(paths, progress=True)
    assert np.isfinite(rows).all()
    for path, row in zip(paths, rows, strict=True):
        close(encoder.embed(path)[0], row)
