"""WeSpeaker's encoders become ours; what is wrong with a model is named."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_encoder import voice
from speechbrain.inference.classifiers import EncoderClassifier
from wespeaker_model import (
    CONFIG,
    DIM,
    make_state,
    reference,
    write_model,
)

from speechbrain_ram.cli.main import main
from speechbrain_ram.export.importers import import_encoder
from speechbrain_ram.inference import SpeakerEncoder


def close(ours, theirs):
    """In units of the embedding's largest component."""
    error = np.abs(ours - theirs.numpy()).max() / theirs.abs().max().item()
    assert error < 1e-5, error


WAVS = [voice(s, 100 + 20 * i, seed=i) for i, s in enumerate([0.5, 1.7, 3.03])]


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(5)
    return make_state()


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    home = tmp_path_factory.mktemp("import")
    import_encoder("wespeaker", write_model(home / "model", state), home / "e")
    return home / "e"


@pytest.mark.parametrize(
    ("model", "width", "bands"),
    [("ResNet34", 8, 80), ("ResNet34", 4, 40), ("ResNet18", 4, 80)],
)
def test_from_waveform_to_embedding(tmp_path, model, width, bands):
    """Padded or alone, it is WeSpeaker's."""
    state = make_state(model, width, bands=bands)
    config = CONFIG.replace("model: ResNet34", f"model: {model}")
    config = config.replace("feat_dim: 80", f"feat_dim: {bands}")
    config = config.replace("bins: 80", f"bins: {bands}")
    source = write_model(tmp_path / "model", state, config, "final_model.pt")
    told = import_encoder("wespeaker", source, tmp_path / "e")
    assert told["channels"] == [width, 2 * width, 4 * width, 8 * width]
    encoder = SpeakerEncoder.from_folder(tmp_path / "e")
    wanted = [reference(state, wav, model, bands) for wav in WAVS]
    padded = encoder.encode(*encoder.pad([torch.from_numpy(w) for w in WAVS]))
    for i, wav in enumerate(WAVS):
        close(encoder.embed(wav)[0], wanted[i])
        close(padded[i].numpy(), wanted[i])


def test_a_mean_is_taken_off(tmp_path, state):
    source = write_model(tmp_path / "model", state)
    mean = np.random.default_rng(0).normal(size=DIM)
    np.save(source / "mean_vec.npy", mean)
    told = import_encoder("wespeaker", source, tmp_path / "e")
    assert told["mean"] == str(source / "mean_vec.npy")
    encoder = SpeakerEncoder.from_folder(tmp_path / "e")
    close(
        encoder.embed(WAVS[1])[0],
        reference(state, WAVS[1]) - torch.from_numpy(mean).float(),
    )
    assert "mean_vec.npy is taken off" in encoder.facts["note"]


def test_speechbrain_loads_it(folder, state):
    model = EncoderClassifier.from_hparams(str(folder))
    wavs, lengths = SpeakerEncoder.from_folder(folder).pad(
        [torch.from_numpy(wav) for wav in WAVS]
    )
    found = model.encode_batch(wavs, lengths).squeeze(1)
    for row, wav in zip(found, WAVS, strict=True):
        close(row.numpy(), reference(state, wav))


def test_what_is_recorded(folder):
    told = json.loads((folder / "encoder.json").read_text())
    network = told["architecture"]["embedding_model"]["arguments"]
    assert network == {
        "n_mels": 80,
        "channels": [4, 8, 16, 32],
        "embedding_dim": DIM,
        "depth": 34,
        "deviation": "sample",
        "norm_embedding": False,
    }
    front_end = told["architecture"]["compute_features"]["arguments"]
    assert front_end["name"] == "wespeaker"
    assert told["facts"]["objective"] == "arc_margin"
    assert told["facts"]["speakers"] == "not stated"
    text = (folder / "hyperparams.yaml").read_text()
    assert 'deviation: "sample"' in text
    assert "norm_embedding: false" in text


def test_one_pooled_frame_is_a_number(folder):
    """Where WeSpeaker's formula divides by 0."""
    encoder = SpeakerEncoder.from_folder(folder)
    assert np.isfinite(encoder.embed(WAVS[0][:1600])).all()


def test_weights_beside_other_things(tmp_path, state, folder):
    for key in ("state_dict", "model"):
        everything = {key: state, "epoch": 3}
        source = write_model(tmp_path / key, everything)
        import_encoder("wespeaker", source, tmp_path / f"{key}_e")
        found = SpeakerEncoder.from_folder(tmp_path / f"{key}_e")
        assert (
            found.fingerprint == SpeakerEncoder.from_folder(folder).fingerprint
        )


def refused(source, output, match, toolkit="wespeaker"):
    """One line, exit status 2, and nothing is written."""
    before = sorted(output.parent.iterdir())
    result = CliRunner().invoke(
        main, ["import", toolkit, str(source), "-o", str(output)]
    )
    assert result.exit_code == 2, result.output
    assert re.search(match, result.stderr), result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert len(result.stderr) < 1500
    assert sorted(output.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("model: ResNet34", "model: ResNet152", "need bottleneck blocks"),
        ("model: ResNet34", "model: ECAPA_TDNN_c512", "the ECAPA-TDNN, a"),
        ("model: ResNet34", "model: CAMPPlus", "need the CAM\\+\\+ network"),
        ("model: ResNet34", "model: SimAM_ResNet34_ASP", "need SimAM att"),
        ("model: ResNet34", "model: New", "'New'; ResNet18 and ResNet34 are"),
        ("model: ResNet34", "model: [1]", "model is \\[1\\]; ResNet18 and"),
        ("model: ResNet34", "nothing: 1", "model is None; ResNet18 and"),
        ('"TSTP"', "ASTP", "'ASTP'; 'TSTP' is imported.* another pooling"),
        ("layer: False", "layer: True", "True.*a second embedding layer"),
        ("spec_aug: False", "frontend: s3prl", "need another front-end"),
        ("spec_aug: False", "cmvn: False", "features without normalisation"),
        (
            "spec_aug: False",
            "cmvn_args: {norm_var: True}",
            "norm_var is True.*another normalisation",
        ),
        ("length: 25", "length: 20", "frame_length is 20; 25 is imported"),
        ("shift: 10", "shift: 5", "frame_shift is 5; 10 is imported"),
        ("  feat_dim: 80\n", "", "feat_dim is None, allowed is a whole number"),
        ("bins: 80", "bins: 64", "feat_dim is 80, num_mel_bins 64"),
        ("feat_dim: 80", "feat_dim: 0", "feat_dim is 0, allowed is a whole"),
        ("rate: 16000", "rate: 5", "resample_rate is 5, allowed is a whole"),
        ("embed_dim: 24", "embed_dim: x", "embed_dim is 'x', allowed is"),
        ("embed_dim: 24", "embed_dim: 25", "seg_1.weight is float32 of shape"),
        ("model: ResNet34", "model: ResNet18", "also has 96 tensors .* more"),
        (CONFIG, "[1, 2]", "has no KEY: VALUE"),
        (CONFIG, "a: [", "is not valid YAML"),
        (CONFIG, "a: !!python/object:os.system x", "is not valid YAML"),
        (
            "dataset_args:\n  resample_rate: 16000\n",
            "dataset_args: 7\nother:\n",
            "dataset_args is 7, KEY: VALUE is needed",
        ),
    ],
)
def test_configurations(tmp_path, state, old, new, match):
    assert old in CONFIG
    config = CONFIG.replace(old, new)
    source = write_model(tmp_path / "model", state, config)
    refused(source, tmp_path / "e", match)


def test_other_bands_than_the_weights_have(tmp_path, state):
    config = CONFIG.replace(": 80", ": 40")
    source = write_model(tmp_path / "model", state, config)
    refused(source, tmp_path / "e", "feat_dim 40 and .*seg_1.weight is .*320")


def keyed(key, value):
    return lambda state: {**state, key: value}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "bn2" not in k},
            "lacks 80 tensors .*layer1.0.bn2.weight, .* and 70 more",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k[:6] != "layer3"},
            "lacks layer3.0.conv1.weight, which",
        ),
        (
            keyed("seg_2.weight", torch.ones(1)),
            "also has 1 tensors where .*: seg_2.weight. Is",
        ),
        (
            lambda s: {f"resnet.{k}": v for k, v in s.items()},
            "behind 'resnet.': take that off",
        ),
        (keyed("bn1.bias", torch.ones(5)), r"bn1.bias is .*\[5\] instead"),
        (keyed("bn1.bias", torch.ones(4).half()), "float16 of shape .4. inst"),
        (keyed("bn1.num_batches_tracked", torch.ones(2)), r"shape \[2\] inst"),
        (keyed("bn1.bias", torch.full((4,), np.nan)), "hold NaN"),
        (keyed("bn1.running_var", -torch.ones(4)), "embedding of noise is NaN"),
        (keyed("layer1.0.conv1.weight", torch.tensor(1.0)), "channels is"),
        (
            keyed("layer1.0.conv1.weight", torch.ones(1).expand(10**9, 1)),
            "channels is .*1000000000.* allowed is a list of 4",
        ),
        (lambda s: {"conv1": print}, "does not hold plain weights"),
        (lambda s: [1], "does not hold plain weights"),
        (lambda s: {}, "lacks layer1.0.conv1.weight"),
    ],
)
def test_weights(tmp_path, state, change, match):
    source = write_model(tmp_path / "model", change(state))
    refused(source, tmp_path / "e", match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (np.zeros(DIM + 1), r"shape \[25\], embed_dim is 24"),
        (np.full(DIM, np.nan), "NaN or infinite"),
        (np.array([print] * DIM), "pickle|Object arrays"),
        (np.array(["a"] * DIM), "<U1 of shape"),
        (b"", "is not the mean of embeddings"),
        (b"\x93NUMPY\1\0\xff\xff{", "is not the mean of embeddings"),
        (b"\0" * 2**21, "not a short file"),
    ],
)
def test_means(tmp_path, state, content, match):
    source = write_model(tmp_path / "model", state)
    if isinstance(content, bytes):
        (source / "mean_vec.npy").write_bytes(content)
    else:
        np.save(source / "mean_vec.npy", content, allow_pickle=True)
    refused(source, tmp_path / "e", match)


def test_files(tmp_path, state):
    source, output = write_model(tmp_path / "model", state), tmp_path / "e"
    refused(tmp_path / "nowhere", output, "is not a folder. Expected")
    refused(source / "config.yaml", output, "is not a folder. Expected")
    refused(source, output, "'vosk' is not a toolkit", toolkit="vosk")
    refused(source, output, "a second embedding layer", toolkit="3D-Speaker")
    refused(source, output, "voxceleb_resnet34_LM: import", toolkit="pyannote")
    refused(source, source, "is there already and not an empty folder")
    refused(source, source / "config.yaml", "is there already")
    whole = (source / "avg_model.pt").read_bytes()
    (source / "avg_model.pt").write_bytes(whole[: len(whole) // 2])
    refused(source, output, "avg_model.pt' does not hold plain weights")
    (source / "models").mkdir()
    (source / "avg_model.pt").rename(source / "models" / "avg_model.pt")
    refused(source, output, "has no avg_model.pt and no .* copy config.yaml")
    shutil.rmtree(source / "models")
    refused(source, output, "no final_model.pt, WeSpeaker's weights. Is it")
    write_model(source, state)
    (source / "config.yaml").unlink()
    refused(source, output, "config.yaml': No such file or directory. WeSp")


def test_the_command_says_what_it_wrote(tmp_path, state, folder):
    source = write_model(tmp_path / "model", state)
    words = ["import", "wespeaker", str(source), "-o", str(tmp_path / "e")]
    result = CliRunner().invoke(main, [*words, "--json"])
    told = json.loads(result.stdout)
    encoder = SpeakerEncoder.from_folder(tmp_path / "e")
    assert told["fingerprint"] == encoder.fingerprint
    assert told["embedding_dim"] == DIM and told["mean"] is None
    (tmp_path / "empty").mkdir()
    words[-1] = str(tmp_path / "empty")  # an empty folder is filled
    result = CliRunner().invoke(main, words)
    assert "ResNet34 from" in result.stdout and result.exit_code == 0
    assert SpeakerEncoder.from_folder(tmp_path / "empty")
