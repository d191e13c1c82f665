"""Every YAML loads, and holds no forgotten reference."""

import re

import pytest
import torch
from conftest import REPOSITORY
from hyperpyyaml import load_hyperpyyaml, resolve_references

from speechbrain_ram.training.options import NEEDED

FILES = sorted(
    [
        *REPOSITORY.glob("hparams/*.yaml"),
        *REPOSITORY.glob("recipes/*/hparams/*.yaml"),
    ]
)
IDS = [str(file.relative_to(REPOSITORY)) for file in FILES]
TRAINING = [file for file in FILES if file.name != "encoder.yaml"]


def placeholders(file, tmp_path):
    """A value for each key that the user must give."""
    keys = re.findall(r"^(\w+): !PLACEHOLDER", file.read_text(), re.M)
    return {key: str(tmp_path / key) for key in keys}


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_no_reference_is_forgotten(file, tmp_path):
    """``results/<seed>`` without !ref would become a folder of that name."""
    with open(file, encoding="utf-8") as stream:
        text = resolve_references(stream, placeholders(file, tmp_path)).read()
    code = re.sub(r"#.*", "", text)
    assert not re.search(r"<\w+", code), re.findall(r".*<\w+.*", code)


@pytest.mark.parametrize("file", TRAINING, ids=IDS[-len(TRAINING) :])
def test_the_model_card_gets_its_facts(file):
    facts = file.read_text().split("\nfacts:\n")[1]
    for key in ("corpus", "language", "license"):
        assert f"    {key}: " in facts, f"{file} does not state its {key}"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_small_enough_to_read(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= 135
    assert not [line for line in lines if re.search(r": (yes|no)$", line)]
    assert not [line for line in lines if "out_neurons" in line]


@pytest.mark.parametrize("file", TRAINING, ids=IDS[-len(TRAINING) :])
def test_loads_and_has_what_the_script_reads(file, tmp_path, monkeypatch):
    overrides = placeholders(file, tmp_path)
    overrides["output_folder"] = str(tmp_path / "out")
    monkeypatch.chdir(tmp_path)  # nothing may be written elsewhere
    with open(file, encoding="utf-8") as stream:
        hparams = load_hyperpyyaml(stream, overrides)
    for key in (*NEEDED, "trials"):
        assert key in hparams, key
    feats = torch.zeros(2, 40, hparams["encoder"]["n_mels"])
    embedding = hparams["modules"]["embedding_model"].eval()(feats)
    classifier = hparams["make_classifier"](out_neurons=3)
    cosines = classifier(embedding)
    loss = hparams["compute_cost"](cosines, torch.zeros(2, 1).long())
    assert torch.isfinite(loss)
