"""Verification with an encoder that SpeechBrain loads, an ECAPA-TDNN."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from small_encoder import export_small, voice
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier

from speechbrain_ram.cli import verify
from speechbrain_ram.cli.trusted import TrustedEncoder
from speechbrain_ram.export.limits import EncoderError
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.verification.scores import read_scores

YAML = """
pretrained_path: somebody/on-a-hub
sample_rate: 16000
compute_features: !new:speechbrain.lobes.features.Fbank
  n_mels: 40
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
  norm_type: sentence
  std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
  input_size: 40
  channels: [8, 8, 8, 8, 24]
  kernel_sizes: [5, 3, 3, 3, 1]
  dilations: [1, 2, 3, 4, 1]
  attention_channels: 8
  se_channels: 8
  res2net_scale: 4
  lin_neurons: 12
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
  input_size: 12
  out_neurons: 3
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
modules:
  compute_features: !ref <compute_features>
  mean_var_norm: !ref <mean_var_norm>
  embedding_model: !ref <embedding_model>
  classifier: !ref <classifier>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables:
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
    label_encoder: !ref <label_encoder>
  paths:
    embedding_model: !ref <pretrained_path>/embedding_model.ckpt
    classifier: !ref <pretrained_path>/classifier.ckpt
    label_encoder: !ref <pretrained_path>/label_encoder.txt
"""


@pytest.fixture(scope="module")
def ecapa(tmp_path_factory):
    """A folder as SpeechBrain's hub has it, of random weights."""
    folder = tmp_path_factory.mktemp("host") / "ecapa"
    folder.mkdir()
    torch.manual_seed(0)
    network = ECAPA_TDNN(
        40,
        channels=[8, 8, 8, 8, 24],
        attention_channels=8,
        se_channels=8,
        res2net_scale=4,
        lin_neurons=12,
    )
    (folder / "hyperparams.yaml").write_text(YAML)
    torch.save(network.state_dict(), folder / "embedding_model.ckpt")
    torch.save(
        Classifier(12, out_neurons=3).state_dict(), folder / "classifier.ckpt"
    )
    labels = CategoricalEncoder()
    labels.update_from_iterable("abc")
    labels.save(folder / "label_encoder.txt")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Recordings of three voices and a list of trials."""
    root = tmp_path_factory.mktemp("world")
    names = []
    for i, pitch in enumerate((95, 150, 230)):
        for k in range(3):
            name = f"s{i}_{k}.wav"
            wave = voice(0.3 + 0.11 * k, pitch + 4 * k, seed=i + 5 * k)
            soundfile.write(root / name, wave, 16000, subtype="FLOAT")
            names.append(name)
    pairs = [(a, b) for a in names for b in names if a < b]
    lines = [f"{int(a[:2] == b[:2])} {a} {b}\n" for a, b in pairs]
    (root / "list.txt").write_text("".join(lines))
    return root


def run(world, encoder, output, *more):
    words = ["--encoder", encoder, "--trials", world / "list.txt"]
    words += ["--data_root", world, "--output", output, *more]
    return verify.main([str(word) for word in words], "verify")


def test_scores_are_those_of_speechbrain(world, ecapa, tmp_path):
    """Each recording alone, since padding changes ECAPA's embeddings."""
    before = {file.name: file.stat().st_mtime_ns for file in ecapa.iterdir()}
    run(world, ecapa, tmp_path / "out", "--trust_yaml")
    assert before == {
        file.name: file.stat().st_mtime_ns for file in ecapa.iterdir()
    }
    model = EncoderClassifier.from_hparams(
        str(ecapa), overrides={"pretrained_path": str(ecapa)}
    )

    def embedding(name):
        wave, _ = soundfile.read(world / name, dtype="float32")
        return model.encode_batch(torch.from_numpy(wave)).flatten().numpy()

    trials, scores = read_scores(tmp_path / "out" / "list" / "scores.txt")
    for i in (0, 7, 20):
        a = embedding(trials.enrol_ids[trials.enrol[i]])
        b = embedding(trials.test_ids[trials.test[i]])
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert scores[i] == pytest.approx(cosine, abs=1e-5)
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.startswith("# ecapa\n\nECAPA_TDNN of ")
    assert "embedded one at a time: padding changes its embeddings" in text


def test_without_the_flag_nothing_is_executed(world, ecapa, tmp_path):
    copy = shutil.copytree(ecapa, tmp_path / "copy")
    trace = tmp_path / "executed"
    yaml = f"{YAML}\nevil: !apply:os.mkdir ['{trace}']\n"
    (copy / "hyperparams.yaml").write_text(yaml)
    with pytest.raises(
        EncoderError, match="With --trust_yaml .* which executes its hyperparam"
    ):
        run(world, copy, tmp_path / "out")
    assert not trace.exists()
    run(world, copy, tmp_path / "out", "--trust_yaml", "True")
    assert trace.exists()  # so the warning is true


def test_a_yaml_of_options_cannot_trust_another(ecapa, tmp_path, capsys):
    file = tmp_path / "verify.yaml"
    file.write_text(f"encoder: {ecapa}\ntrust_yaml: True\n")
    with pytest.raises(SystemExit):
        verify.main([str(file), "--output", str(tmp_path / "out")], "verify")
    assert "trust_yaml, which a file cannot give" in capsys.readouterr().err


SWITCHES = ["--trust_yaml", "--trust", "--trust_yaml=True", "--t", "--"]
OPTIONS = vars(verify.parse(["--scores", "a=b", "--output", "o"]))


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"hparams"}))
@pytest.mark.parametrize("switch", SWITCHES)
def test_no_value_in_a_yaml_trusts_another(name, switch, tmp_path, capsys):
    """Whichever option it is given to, alone or in a list."""
    values = {"encoder": "e", "trials": ["t"], "data_root": "d", "output": "o"}
    file = tmp_path / "verify.yaml"
    for value in (
        switch,
        [switch],
        ["5", switch],
        [switch, "True"],
        [["5", switch]],
    ):
        file.write_text(json.dumps({**values, name: value}))
        try:
            options = verify.parse([str(file)])
        except SystemExit:
            assert len(capsys.readouterr().err.splitlines()) == 1
        else:  # it is a name, or a file
            assert value in (switch, [switch])
            assert getattr(options, name) in (switch, [switch])
            assert options.trust_yaml is False
            assert options.hparams == str(file)


def test_batches_where_padding_changes_nothing(tmp_path, world, ecapa):
    """Such as the folders of ours, as SpeechBrain loads them."""
    folder = export_small(tmp_path / "ours", "fbank")
    ours = SpeakerEncoder.from_folder(folder)
    (folder / "encoder.json").unlink()
    encoder = TrustedEncoder(folder)
    assert encoder.padded_alike and "in batches" in str(encoder)
    assert not TrustedEncoder(ecapa).padded_alike
    wave = torch.from_numpy(voice(0.5))[None]
    torch.testing.assert_close(
        encoder.encode(wave, torch.ones(1)), ours.encode(wave, torch.ones(1))
    )


def test_a_folder_of_ours_is_never_executed(world, tmp_path):
    folder = export_small(tmp_path / "ours")
    (folder / "hyperparams.yaml").write_text("a: !apply:os.abort []")
    run(world, folder, tmp_path / "out", "--trust_yaml")
    assert "EncoderClassifier" not in (tmp_path / "out/results.md").read_text()
    (folder / "encoder.safetensors").unlink()
    with pytest.raises(EncoderError, match="cannot be read") as caught:
        run(world, folder, tmp_path / "out", "--trust_yaml")
    assert "trust" not in str(caught.value)


def test_another_encoder_has_another_store(world, ecapa, tmp_path):
    first = TrustedEncoder(ecapa).fingerprint
    copy = shutil.copytree(ecapa, tmp_path / "copy")
    assert TrustedEncoder(copy).fingerprint == first
    state = torch.load(copy / "embedding_model.ckpt")
    state["fc.conv.bias"] += 1
    torch.save(state, copy / "embedding_model.ckpt")
    assert TrustedEncoder(copy).fingerprint != first


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda f: (f / "hyperparams.yaml").unlink(),
            "has no hyperparams.yaml",
        ),
        (shutil.rmtree, "has no hyperparams.yaml that can be read"),
        (lambda f: (f / "embedding_model.ckpt").unlink(), "does not load it"),
        (
            lambda f: (f / "embedding_model.ckpt").write_bytes(b"x"),
            "does not load it, or it embeds no noise",
        ),
        (
            lambda f: (f / "hyperparams.yaml").write_text("modules: 7"),
            "does not load it",
        ),
        (
            lambda f: (f / "hyperparams.yaml").write_text("a: !new:os.nothing"),
            "does not load it",
        ),
    ],
)
def test_folders_that_do_not_load(world, ecapa, tmp_path, change, match):
    copy = shutil.copytree(ecapa, tmp_path / "copy")
    change(copy)
    with pytest.raises(EncoderError, match=match) as caught:
        run(world, copy, tmp_path / "out", "--trust_yaml")
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)
