"""Tests of architectures as plain data."""

import contextlib
import json

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from small_encoder import YAML, small_network

from speechbrain_ram.export.architecture import (
    EncoderError,
    build,
    fingerprint,
    read_architecture,
    write_architecture,
)

KALDI = YAML.replace("NAME", "kaldi")
EVIL = "!apply:os.mkdir ['{}']"


def test_it_is_plain_data():
    architecture = read_architecture(KALDI)
    assert json.loads(json.dumps(architecture)) == architecture
    assert architecture["compute_features"] == {
        "function": "speechbrain_ram.features.make_front_end",
        "arguments": {"name": "kaldi"},
    }
    norm = architecture["mean_var_norm"]["arguments"]
    assert norm["std_norm"] is True
    assert norm["epsilon"] == 1e-3


def test_the_parts_equal_what_hyperpyyaml_builds():
    theirs = load_hyperpyyaml(KALDI)
    state = theirs["embedding_model"].state_dict()
    ours = build(read_architecture(KALDI), state)
    wavs = torch.randn(2, 8000)
    outputs = []
    for parts in (ours, theirs):
        feats = parts["mean_var_norm"](parts["compute_features"](wavs))
        outputs.append(parts["embedding_model"].eval()(feats))
    assert torch.equal(*outputs)


def test_aliases_of_aliases_do_not_grow():
    lines = ["more:", "  - &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for i in range(12):
        lines.append(f"  - &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]")
    bomb = KALDI.replace("  n_mels: 80", "  n_mels: *a12")
    with pytest.raises(EncoderError, match="more than 10000 values"):
        read_architecture("\n".join(lines) + "\n" + bomb)


def test_it_survives_being_written():
    architecture = read_architecture(KALDI)
    assert read_architecture(write_architecture(architecture)) == architecture


def test_a_run_keeps_it_under_one_key():
    text = "seed: !apply:os.abort []\nencoder:" + KALDI.replace("\n", "\n  ")
    assert read_architecture(text) == read_architecture(KALDI)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sample_rate: 16000", "sample_rate: {}"),
        ("  n_mels: 80", "  n_mels: {}"),
        ("  epsilon: 1.0e-3", "  epsilon: {}"),
        ("  epsilon: 1.0e-3", "  epsilon: [1, {}]"),
        ("  epsilon: 1.0e-3", "  epsilon: {{a: {}}}"),
    ],
)
def test_nothing_is_executed_wherever_it_stands(tmp_path, old, new):
    trace = tmp_path / "executed"
    text = KALDI.replace(old, new.format(EVIL.format(trace)))
    with pytest.raises(EncoderError, match="'!apply:os.mkdir' where"):
        read_architecture(text)
    assert not trace.exists()
    with contextlib.suppress(Exception):
        load_hyperpyyaml(text)
    assert trace.exists()  # so the text does harm elsewhere


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1", "has no sample_rate, embedding_dim, compute_features"),
        ("sample_rate: 1", "has no embedding_dim, compute_features"),
        (KALDI.replace("!new:", "!name:"), "is '!name:speechbrain.*needed"),
        (KALDI.replace("  name: kaldi", "  - kaldi"), "with named arguments"),
        (KALDI.replace("80", "!ref <n_mels>"), "'!ref' where a number"),
        (KALDI.replace("80", "2026-01-01"), "is not plain data"),
    ],
)
def test_what_is_no_architecture(text, message):
    with pytest.raises(EncoderError, match=message):
        read_architecture(text, "some.yaml")


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "speechbrain_ram.data.audio.open",
    ],
)
def test_only_classes_on_the_list_are_built(path):
    architecture = read_architecture(KALDI)
    architecture["embedding_model"] = {"class": path, "arguments": {}}
    with pytest.raises(EncoderError, match="is not loaded from a folder"):
        build(architecture, {})


@pytest.mark.parametrize("broken", [{}, {"class": "a"}, 7, None, []])
@pytest.mark.parametrize(
    "rest", [{}, {"arguments": 3}, {"arguments": {}, "function": "a", "b": 1}]
)
def test_a_part_that_is_no_call(broken, rest):
    architecture = read_architecture(KALDI)
    call = {**broken, **rest} if isinstance(broken, dict) else broken
    architecture["compute_features"] = call
    with pytest.raises(EncoderError, match="by a class or function"):
        build(architecture, {})


def test_the_fingerprint_tells_encoders_apart():
    architecture = read_architecture(KALDI)
    weights = small_network().state_dict()
    name = fingerprint(architecture, weights)
    assert len(name) == 64
    same = {key: weights[key].clone() for key in reversed(weights)}
    assert fingerprint(dict(reversed(architecture.items())), same) == name
    fbank = read_architecture(YAML.replace("NAME", "fbank"))
    assert fingerprint(fbank, weights) != name
    same["one"] = torch.ones(1)
    one = fingerprint(architecture, same)
    same["one"] = torch.ones(200).as_strided((1,), (157,))
    assert fingerprint(architecture, same) == one  # as a file may hold it
    del same["one"]
    same["linear.bias"][0] += 1e-6
    assert fingerprint(architecture, same) != name
    del same["linear.bias"]
    assert fingerprint(architecture, same) != name
