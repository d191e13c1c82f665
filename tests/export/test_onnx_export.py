"""Tests of ONNX export, in the real runtimes."""

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import REPOSITORY
from small_encoder import DIM, export_small, voice
from wespeaker_model import write_model

from speechbrain_ram.cli.main import main
from speechbrain_ram.export.architecture import EncoderError
from speechbrain_ram.export.importers import import_encoder
from speechbrain_ram.export.onnx import (
    agreement,
    client_front_end,
    export_sherpa,
    export_waveform,
    quantise,
)
from speechbrain_ram.inference import OnnxEncoder, SpeakerEncoder

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


FACTS = {"corpus": "voices", "speakers": 3, "note": "Do not use it."}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {
        name: SpeakerEncoder.from_folder(
            export_small(folder / name, name, facts=FACTS)
        )
        for name in ("fbank", "kaldi")
    }


def test_the_language_is_that_of_the_encoder(tmp_path):
    folder = export_small(tmp_path / "e", "kaldi", facts={"language": "Thai"})
    encoder = SpeakerEncoder.from_folder(folder)
    model = onnx.load(export_sherpa(encoder, tmp_path / "s.onnx"))
    assert ("language", "Thai") in [
        (each.key, each.value) for each in model.metadata_props
    ]


@pytest.fixture(scope="module")
def files(encoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    written = {
        name: export_waveform(encoder, folder / f"{name}.onnx")
        for name, encoder in encoders.items()
    }
    written["sherpa"] = export_sherpa(encoders["kaldi"], folder / "s.onnx")
    return written


def run(path, x):
    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    (value,) = session.get_inputs()
    return session.run(None, {value.name: np.asarray(x, np.float32)})[0]


def alone(encoder, wavs):
    """Without a padding mask."""
    return encoder.encode(torch.as_tensor(wavs), torch.ones(len(wavs))).numpy()


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("front_end", ["fbank", "kaldi"])
@pytest.mark.parametrize("shape", [(1, 1600), (1, 48000), (3, 16079)])
def test_it_computes_what_pytorch_does(encoders, files, front_end, shape):
    wavs = np.stack(
        [voice(shape[1] / 16000, 100 + 60 * i, seed=i) for i in range(shape[0])]
    )
    ours = alone(encoders[front_end], wavs)
    theirs = run(files[front_end], wavs)
    assert theirs.shape == (shape[0], DIM)
    scale = np.abs(ours).max()
    assert np.abs(ours - theirs).max() < 1e-4 * max(scale, 1)


def test_metadata(encoders, files):
    def read(path):
        model = onnx.load(path)
        onnx.checker.check_model(model)
        return {p.key: p.value for p in model.metadata_props}

    encoder = encoders["fbank"]
    metadata = read(files["fbank"])
    assert metadata["sample_rate"] == "16000"
    assert metadata["output_dim"] == str(DIM)
    assert metadata["fingerprint"] == encoder.fingerprint
    thresholds = json.loads(metadata["thresholds"])
    assert thresholds == encoder.decision.thresholds
    metadata = read(files["sherpa"])
    assert metadata["framework"] == "wespeaker"
    assert metadata["language"] == "not stated"
    assert metadata["normalize_samples"] == "0"


def client(path):
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    config = sherpa_onnx.SpeakerEmbeddingExtractorConfig(
        model=str(path), num_threads=1
    )
    extractor = sherpa_onnx.SpeakerEmbeddingExtractor(config)

    def embed(wav):
        stream = extractor.create_stream()
        stream.accept_waveform(16000, wav)
        stream.input_finished()
        return np.array(extractor.compute(stream))

    return sherpa_onnx, extractor, embed


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """An encoder of WeSpeaker's."""
    home = tmp_path_factory.mktemp("imported")
    torch.manual_seed(4)
    import_encoder("wespeaker", write_model(home / "model"), home / "e")
    return SpeakerEncoder.from_folder(home / "e")


@pytest.mark.parametrize("samples", [1600, 1700, 48000])
def test_an_imported_encoder(imported, tmp_path, samples):
    """One pooled frame, too, of which a sample has no deviation."""
    path = export_waveform(imported, tmp_path / "e.onnx")
    wav = voice(samples / 16000)[None]
    ours = alone(imported, wav)
    assert np.abs(ours - run(path, wav)).max() < 1e-4 * np.abs(ours).max()


def test_an_imported_encoder_for_a_client(imported, tmp_path):
    """Its own features are others than the client's; how far is told."""
    path = export_sherpa(imported, tmp_path / "s.onnx")
    _, _, embed = client(path)
    wav = voice(2.0)
    theirs = embed(wav)
    _, near = agreement(imported, path, [wav], client_front_end(imported))
    assert near < 0.9999
    assert cosine(theirs, imported.embed(wav)[0]) == pytest.approx(near, 1e-4)
    error, same = agreement(imported, path, [wav])
    assert error < 1e-4 and same > 0.999999
    # its file says which they are, and the client's can be asked for
    assert "window hamming" in str(OnnxEncoder(path))
    ours = imported.embed(wav)[0]
    assert 1 - cosine(ours, OnnxEncoder(path).embed(wav)[0]) < 1e-5
    row = OnnxEncoder(path, "sherpa-onnx").embed(wav)[0]
    assert cosine(row, theirs) > 0.99999


@pytest.mark.parametrize("seconds", [0.33, 1.0, 2.345])
def test_sherpa_onnx_gives_our_embeddings(encoders, files, seconds):
    _, extractor, embed = client(files["sherpa"])
    assert extractor.dim == DIM
    wav = voice(seconds)
    ours = alone(encoders["kaldi"], wav[None])[0]
    assert cosine(ours, embed(wav)) > 0.99999


@pytest.mark.real
def test_sherpa_onnx_enrols_and_searches_real_speakers(
    encoders, files, speechocean
):
    import soundfile

    sherpa_onnx, extractor, embed = client(files["sherpa"])
    manager = sherpa_onnx.SpeakerEmbeddingManager(extractor.dim)
    speakers = sorted((speechocean / "dev").iterdir())[:3]
    encoder = encoders["kaldi"]
    for speaker in speakers:
        paths = sorted(speaker.glob("*.ogg"))[:2]
        wavs = [soundfile.read(p, dtype="float32")[0] for p in paths]
        theirs = np.stack([embed(wav) for wav in wavs])
        for a, b in zip(encoder.embed(paths), theirs, strict=True):
            assert cosine(a, b) > 0.999
        assert manager.add(speaker.name, list(theirs))
        assert manager.search(theirs[0], threshold=0.5)
        assert manager.verify(speaker.name, theirs[0], threshold=0.5)


@pytest.mark.parametrize(
    "front_end, written",
    [("fbank", "fbank"), ("kaldi", "kaldi"), ("kaldi", "sherpa")],
)
def test_a_file_of_ours_is_the_encoder(
    encoders, files, tmp_path, front_end, written
):
    """A recording has the embedding that it has from the folder."""
    import soundfile

    paths = []
    for i, seconds in enumerate((0.3, 1.0, 1.234)):
        paths.append(tmp_path / f"{i}.wav")
        wave = voice(seconds, 100 + 50 * i)
        soundfile.write(paths[-1], wave, 16000, subtype="FLOAT")
    encoder = OnnxEncoder(files[written])
    rows = encoder.embed(paths)
    for ours, row in zip(encoders[front_end].embed(paths), rows, strict=True):
        assert 1 - cosine(ours.astype(np.float64), row) < 1e-5
    if written != "sherpa":  # its client reads no thresholds
        want = encoders[front_end].compare(*paths[:2], "FAR=1%")
        found = encoder.compare(*paths[:2], "FAR=1%")
        assert found.llr == pytest.approx(want.llr, abs=1e-3)
        assert found.threshold == want.threshold
        assert encoder.decision == encoders[front_end].decision


@pytest.mark.parametrize("written", ["fbank", "sherpa"])
def test_what_is_told_of_an_encoder_is_told_of_its_file(files, written):
    """Above all that it must not be used."""
    told = OnnxEncoder(files[written]).facts
    assert told.pop("note").startswith("Do not use it. ")
    assert told == {"corpus": "voices", "speakers": 3}
    command = ["info", "-e", str(files[written])]
    said = CliRunner().invoke(main, command).stdout
    assert "Note: Do not use it. " in said and "an ONNX file of" in said


def test_int8_is_smaller_and_close(encoders, files, tmp_path, caplog):
    examples = [voice(1.0, 100 + 20 * i, seed=i)[None] for i in range(6)]
    caplog.clear()
    small = quantise(files["fbank"], tmp_path / "int8.onnx", examples)
    assert not [each for each in caplog.records if each.name == "root"]
    wav = voice(1.2, 150)[None]
    assert cosine(run(small, wav)[0], run(files["fbank"], wav)[0]) > 0.95
    kinds = {node.op_type for node in onnx.load(small).graph.node}
    assert "QuantizeLinear" in kinds
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]
    assert OnnxEncoder(small).facts["note"].startswith("Do not use it. ")


def test_an_encoder_of_other_features_is_no_sherpa_model(encoders, tmp_path):
    with pytest.raises(EncoderError, match="Train one with --frontend kaldi"):
        export_sherpa(encoders["fbank"], tmp_path / "s.onnx")
    assert not list(tmp_path.iterdir())


def test_the_missing_extra_is_named(encoders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"speechbrain-ram\[onnx\]"):
        export_waveform(encoders["fbank"], tmp_path / "a.onnx")


def test_the_server_of_ten_lines(files, tmp_path):
    import io
    import subprocess
    import urllib.error
    import urllib.request

    import soundfile

    script = REPOSITORY / "examples" / "serve_onnx.py"
    server = subprocess.Popen(
        [sys.executable, script, files["fbank"], "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = server.stdout.readline().strip()
        wav = voice(1.0)
        body = io.BytesIO()
        soundfile.write(body, wav, 16000, format="WAV", subtype="FLOAT")
        request = urllib.request.Request(address, body.getvalue())
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        body = io.BytesIO()
        soundfile.write(body, wav, 8000, format="WAV")
        request = urllib.request.Request(address, body.getvalue())
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request, timeout=60)
    finally:
        server.terminate()
        server.wait()
    np.testing.assert_allclose(
        answer, run(files["fbank"], wav[None])[0], rtol=1e-5
    )
