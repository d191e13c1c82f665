"""Tests of the folder that an encoder is shipped in."""

import json
import pickle
import resource
import shutil

import pytest
import safetensors.torch
import torch
from hyperpyyaml import load_hyperpyyaml
from small_encoder import DIM, SPEAKERS, export_small, voice
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.inference.speaker import SpeakerRecognition

from speechbrain_ram.export import folder as encoder_folder
from speechbrain_ram.export.architecture import EncoderError
from speechbrain_ram.export.folder import read_folder
from speechbrain_ram.inference import SpeakerEncoder


@pytest.fixture(scope="module", params=["fbank", "kaldi"])
def folder(request, tmp_path_factory):
    return export_small(
        tmp_path_factory.mktemp("export") / "encoder", request.param
    )


@pytest.fixture
def copy(tmp_path):
    """A folder that may be damaged."""
    return export_small(tmp_path / "encoder")


def files(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_speechbrain_loads_it_moved_and_writes_nothing(
    folder, tmp_path, monkeypatch
):
    moved = shutil.copytree(folder, tmp_path / "else where" / "encoder")
    monkeypatch.chdir(tmp_path)
    before = files(moved)
    model = SpeakerRecognition.from_hparams(str(moved))
    wavs = torch.from_numpy(voice(1.0))[None].repeat(2, 1)
    score, same = model.verify_batch(wavs[:1], wavs[1:])
    assert score.item() == pytest.approx(1.0, abs=1e-5) and bool(same)
    plain = model.encode_batch(wavs)
    assert plain.shape == (2, 1, DIM)
    mean = model.hparams.mean_var_norm_emb.glob_mean
    assert mean.abs().max() > 0
    torch.testing.assert_close(
        model.encode_batch(wavs, normalize=True), plain - mean
    )
    assert files(moved) == before
    assert [p.name for p in tmp_path.iterdir()] == ["else where"]


def test_whoever_may_read_new_files_may_load_it(copy, tmp_path):
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    assert {file.name for file in copy.iterdir()} == {
        file.name for file in copy.iterdir() if file.stat().st_mode == usual
    }


def test_speechbrain_compares_and_classifies_files(folder, tmp_path):
    import soundfile

    for name, pitch in (("a", 110.0), ("b", 220.0)):
        soundfile.write(tmp_path / f"{name}.wav", voice(1.0, pitch), 16000)
    options = {"savedir": str(tmp_path / "cache")}
    model = SpeakerRecognition.from_hparams(str(folder), **options)
    score, _ = model.verify_files(
        str(tmp_path / "a.wav"), str(tmp_path / "b.wav")
    )
    assert -1 <= score.item() < 0.9999
    model = EncoderClassifier.from_hparams(str(folder), **options)
    scores, best, index, label = model.classify_file(str(tmp_path / "a.wav"))
    assert scores.shape == (1, len(SPEAKERS))
    assert label == [SPEAKERS[index.item()]]
    assert best.item() == scores.max()


def test_ours_and_speechbrains_embeddings_are_equal(folder):
    encoder = SpeakerEncoder.from_folder(folder)
    model = EncoderClassifier.from_hparams(str(folder))
    wavs = torch.from_numpy(voice(1.5))[None]
    ours = encoder.encode(wavs, torch.ones(1))
    torch.testing.assert_close(ours, model.encode_batch(wavs).squeeze(1))


def test_what_is_read_is_what_was_written(folder):
    read = read_folder(folder)
    encoder = SpeakerEncoder.from_folder(folder)
    assert encoder.fingerprint == read.fingerprint
    assert encoder.embedding_dim == DIM
    assert read.decision.trials == "imagined"
    assert read.facts == {"speakers": 3}
    state = encoder.modules["embedding_model"].state_dict()
    assert state.keys() == read.weights.keys()
    assert not encoder.modules["embedding_model"].training


def test_a_malicious_yaml_or_pickle_is_not_executed(copy, tmp_path):
    trace = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return trace.mkdir, ()

    yaml = copy / "hyperparams.yaml"
    yaml.write_text(f"x: !apply:os.mkdir ['{trace}']\n" + yaml.read_text())
    for name in ("embedding_model", "classifier", "mean_var_norm_emb"):
        (copy / f"{name}.ckpt").write_bytes(pickle.dumps(Evil()))
    encoder = SpeakerEncoder.from_folder(copy)
    encoder.encode(torch.randn(1, 8000), torch.ones(1))
    assert not trace.exists()
    with open(yaml, encoding="utf-8") as file:
        load_hyperpyyaml(file)
    assert trace.exists()  # so the folder does harm elsewhere
    trace.rmdir()

    # Without our own files, as SpeechBrain's checkpoints are: refused.
    (copy / "encoder.json").unlink()
    with pytest.raises(EncoderError, match="does not hold plain weights"):
        SpeakerEncoder.from_folder(copy)
    assert not trace.exists()


def test_a_folder_from_before_loads_without_executing(copy):
    fingerprint = SpeakerEncoder.from_folder(copy).fingerprint
    (copy / "encoder.json").unlink()
    (copy / "encoder.safetensors").unlink()
    encoder = SpeakerEncoder.from_folder(copy)
    assert encoder.fingerprint == fingerprint
    assert encoder.decision is None


def change(folder, **values):
    file = folder / "encoder.json"
    description = json.loads(file.read_text())
    description.update(values)
    file.write_text(json.dumps(description))


def test_another_format_number(copy):
    change(copy, format=2)
    with pytest.raises(EncoderError, match="has format 2, .* reads format 1"):
        SpeakerEncoder.from_folder(copy)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "null"])
def test_a_description_that_is_none(copy, text):
    (copy / "encoder.json").write_text(text)
    with pytest.raises(EncoderError, match="was it copied whole"):
        SpeakerEncoder.from_folder(copy)


def test_missing_and_cut_off_weights(copy):
    weights = copy / "encoder.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EncoderError, match="cannot be read.*copied"):
        SpeakerEncoder.from_folder(copy)
    weights.unlink()
    with pytest.raises(EncoderError, match="cannot be read.*copied"):
        SpeakerEncoder.from_folder(copy)


def test_one_flipped_bit(copy):
    weights = copy / "encoder.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(EncoderError, match="do not belong together"):
        SpeakerEncoder.from_folder(copy)


def test_weights_of_another_architecture(copy):
    state = safetensors.torch.load_file(copy / "encoder.safetensors")
    del state["linear.bias"]
    safetensors.torch.save_file(state, copy / "encoder.safetensors")
    architecture = json.loads((copy / "encoder.json").read_text())
    architecture = architecture["architecture"]
    change(copy, fingerprint=encoder_folder.fingerprint(architecture, state))
    with pytest.raises(EncoderError, match="do not fit the architecture"):
        SpeakerEncoder.from_folder(copy)


def test_an_architecture_larger_than_its_weights_takes_no_memory(copy):
    loaded = read_folder(copy)
    network = loaded.architecture["embedding_model"]["arguments"]
    network["channels"] = [3000] * 4  # 10 GB of convolutions
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EncoderError, match="allowed is a list of 4"):
        SpeakerEncoder(loaded)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) / 2**10 < 500  # MB


def test_damaged_thresholds(copy):
    change(copy, decision={"eer": 3})
    with pytest.raises(EncoderError, match="not thresholds"):
        SpeakerEncoder.from_folder(copy)


def test_no_folder(tmp_path):
    with pytest.raises(EncoderError, match="is not a folder"):
        SpeakerEncoder.from_folder(tmp_path / "nowhere")
    with pytest.raises(EncoderError, match="neither an exported folder"):
        SpeakerEncoder.from_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_the_old_one(copy, monkeypatch):
    before = files(copy)

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(encoder_folder.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_small(copy, seed=1)
    assert files(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_the_card_says_what_is_known(tmp_path):
    facts = {"corpus": "read speech", "license": "Apache-2.0", "name": "Tiny"}
    folder = export_small(tmp_path / "a", facts=facts)
    card = (folder / "README.md").read_text()
    for line in (
        "license: apache-2.0",
        "# Tiny",
        "| Training corpus | read speech |",
        "| Training speakers | 3 |",
        "| Objective | not stated |",
        "| Front-end | `make_front_end(name=fbank)` |",
        "| list | imagined: 400 target and 4,000 non-target trials |",
        "16000 Hz to 16 numbers",
    ):
        assert line in card, line
    assert "{" not in card.split("```bibtex")[0]
    bare = export_small(tmp_path / "b", decision=False)
    assert "no threshold is saved" in (bare / "README.md").read_text()
    with pytest.raises(ValueError, match="has no licence; it has name, corpus"):
        export_small(tmp_path / "c", facts={"licence": "MIT"})
    assert not (tmp_path / "c").exists()
