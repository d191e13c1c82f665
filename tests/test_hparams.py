"""Every YAML loads, and holds no forgotten reference."""

import re

import pytest
import torch
from conftest import REPOSITORY
from hyperpyyaml import load_hyperpyyaml, resolve_references

from speechbrain_ram.data.shards import at_rate
from speechbrain_ram.training.options import NEEDED, check_settings

FILES = sorted(
    [
        *REPOSITORY.glob("hparams/*.yaml"),
        *REPOSITORY.glob("recipes/*/hparams/*.yaml"),
    ]
)
IDS = [str(file.relative_to(REPOSITORY)) for file in FILES]
TRAINING = [file for file in FILES if file.name != "encoder.yaml"]

#: Options that only a corpus has; docs/options.md lists all others.
OF_A_CORPUS = {
    *("cnceleb1", "cnceleb2", "corpus", "corpus_folder", "corpus_name"),
    *("data_folder", "dev_share", "drop_test_speakers", "join_below"),
    *("license", "lists", "lists_folder", "make_corpus", "manifests"),
    *("sitw", "sitw_overlap", "voxceleb1", "voxceleb2"),
}
SAME = "\n# -- From here to its end every recipe is the same"


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
    own = file.read_text().split(SAME)[0].splitlines()
    assert len(own) <= 100 and len(lines) <= 160
    assert not [line for line in lines if re.search(r": (yes|no)$", line)]
    assert not [line for line in lines if "out_neurons" in line]


def documented():
    """The options in the tables of docs/options.md."""
    page = (REPOSITORY / "docs" / "options.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \|", page, re.M)


def keys_of(text):
    return re.findall(r"^([a-z]\w*):", text, re.M)


@pytest.mark.parametrize("file", TRAINING, ids=IDS[-len(TRAINING) :])
def test_a_recipe_has_every_documented_option(file, tmp_path):
    """And no other, but for those of its corpus."""
    own = file.read_text(encoding="utf-8").split(SAME)[0]
    options = [key for key in keys_of(own) if key not in OF_A_CORPUS]
    objects = ["prepare", "opt_class", "facts"]
    assert sorted(options) == sorted([*documented(), *objects])
    given = placeholders(file, tmp_path)
    with open(file, encoding="utf-8") as stream:
        settings = load_hyperpyyaml(stream, {**given, "output_folder": "out"})
    chosen = {key: settings[key] for key in documented()}
    check_settings(file, {**given, **chosen})


def test_the_recipes_are_the_same_where_they_say_so():
    ends = [
        re.sub(r"(!include:)\S*/", r"\1", file.read_text().split(SAME)[1])
        for file in TRAINING
    ]
    assert len(set(ends)) == 1
    # Where data and noise lie stands with the folders of the corpus.
    rest = set(documented()[documented().index("objective") :])
    rest -= {"musan", "rirs"}
    order = {
        file: [key for key in keys_of(file.read_text()) if key in rest]
        for file in TRAINING
    }
    for file, keys in order.items():
        assert keys == order[TRAINING[0]], f"{file} has another order"


@pytest.mark.parametrize("file", TRAINING, ids=IDS[-len(TRAINING) :])
def test_loads_and_has_what_the_script_reads(file, tmp_path, monkeypatch):
    overrides = placeholders(file, tmp_path)
    overrides["output_folder"] = str(tmp_path / "out")
    monkeypatch.chdir(tmp_path)  # nothing may be written elsewhere
    with open(file, encoding="utf-8") as stream:
        hparams = load_hyperpyyaml(stream, overrides)
    for key in (*NEEDED, "trials"):
        assert key in hparams, key
    prepare = at_rate(hparams["prepare"], 8000)
    assert prepare.keywords["sample_rate"] == 8000
    feats = torch.zeros(2, 40, hparams["encoder"]["n_mels"])
    embedding = hparams["modules"]["embedding_model"].eval()(feats)
    classifier = hparams["make_classifier"](out_neurons=3)
    cosines = classifier(embedding)
    loss = hparams["compute_cost"](cosines, torch.zeros(2, 1).long())
    assert torch.isfinite(loss)
