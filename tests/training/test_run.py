"""One output folder, one run: what continues, what is refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import RECIPE, REPOSITORY, run_recipe
from speechbrain import parse_arguments
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_ram.cli.train import train
from speechbrain_ram.data.manifest import ManifestError
from speechbrain_ram.training.checkpoints import SafeCheckpointer
from speechbrain_ram.training.run import (
    RUN_FILE,
    Run,
    RunError,
    read_run,
    sole_owner,
)
from speechbrain_ram.training.settings import (
    learned_settings,
    output_folder_of,
)

OWN = REPOSITORY / "recipes/YourCorpus/hparams/ram_resnet34.yaml"


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def content(folder):
    """Every file of a run that training writes, with its bytes."""
    passing = (".lock", "headers.cache", "log.txt")
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in passing
    }


def refused(tiny_corpus, run, match, **overrides):
    """The command is refused, and nothing of the run has changed."""
    before = content(run)
    with pytest.raises(RunError, match=match) as caught:
        run_recipe(tiny_corpus, run, **overrides)
    assert content(run) == before
    return str(caught.value)


# -- settings -------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, match",
    [
        ({"seed": 7}, "seed: 1986 -> 7"),
        (
            {"objective": "am", "margin": 0.2},
            "objective: ram -> am;\n  margin: 0.3 -> 0.2",
        ),
        ({"form": "hinge"}, "form: paper -> hinge"),
        ({"scale": 20.0}, "scale: 30.0 -> 20.0"),
        ({"margin_end": 1}, "margin_end: 0 -> 1"),
        ({"sub_centers": 3}, "sub_centers: 1 -> 3"),
        ({"std_norm": False}, "std_norm: True -> False"),
        ({"lr": 0.01}, "lr: 0.003 -> 0.01"),
        ({"warmup_steps": 3}, "warmup_steps: 2 -> 3"),
        ({"lr_decay": "step"}, "lr_decay: cosine -> step"),
        ({"crop_seconds": 0.6}, "crop_seconds: 0.5 -> 0.6"),
        ({"speeds": [1.0, 0.9]}, r"speeds: \[1.0\] -> \[1.0, 0.9\]"),
        ({"batch_size": 4}, "batch_size of all processes: 8 -> 4"),
        ({"frontend": "kaldi"}, "frontend: fbank -> kaldi"),
        ({"channels": [16, 16, 16, 32]}, "channels: .*16, 32]"),
        ({"resample": True}, "resample: False -> True"),
        ({"verify_every": 2}, "verify_every: 1 -> 2"),
        ({"number_of_epochs": 1}, r"number_of_epochs: 2 -> 1 \(more are"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else "",
)
def test_another_setting_is_refused(tiny_corpus, run, overrides, match):
    message = refused(tiny_corpus, run, match, **overrides)
    assert message.count("\n") == len(overrides) + 1  # each is named once
    assert "--output_folder" in message
    assert f"--pretrained {run}/inference" in message


def test_exceptions_change_freely(tiny_corpus, run):
    """All at once; the run is done, so that nothing is trained anew."""
    facts = json.loads((run / RUN_FILE).read_text())["facts"]
    newest = Checkpointer(run / "save").find_checkpoint().path
    run_recipe(
        tiny_corpus,
        run,
        "--precision",
        "bf16",
        num_workers=1,
        channels_last=False,
        tensorboard=True,
        max_hours=1,
        ckpt_interval_minutes=1,
        max_fault_share=0.5,
        max_bad_steps=3,
        verify_untrained=False,
    )
    assert Checkpointer(run / "save").find_checkpoint().path == newest
    card = (run / "inference" / "README.md").read_text()
    assert all(f"| {fact} |" in card for fact in facts.values())


def test_more_epochs_go_on(tiny_corpus, run):
    before = json.loads((run / RUN_FILE).read_text())
    run_recipe(tiny_corpus, run, number_of_epochs=3)
    log = (run / "train_log.txt").read_text().splitlines()
    assert [line[:8] for line in log] == [f"epoch: {i}" for i in range(4)]
    assert json.loads((run / RUN_FILE).read_text()) == before


def test_an_object_of_the_yaml_is_compared(tmp_path, tiny_corpus, run):
    """Not only what has an option."""
    recipe = RECIPE.with_name("changed_for_a_test.yaml")
    text = RECIPE.read_text().replace(
        "opt_class: !name:torch.optim.Adam",
        "opt_class: !name:torch.optim.Adam\n    weight_decay: 0.1",
    )
    recipe.write_text(text)
    try:
        refused(
            tiny_corpus,
            run,
            r"opt_class.weight_decay: none -> 0.1\.",
            recipe=recipe,
        )
    finally:
        recipe.unlink()


def test_places_are_not_settings():
    here, there = (
        learned_settings(
            OWN,
            {"corpus": f"/{place}/c", "output_folder": place, "trials": place},
        )
        for place in ("here", "there")
    )
    assert here == there
    assert "corpus" not in here and here["margin"] == 0.5
    assert here["opt_class.momentum"] == 0.9
    # The command line's text is read as HyperPyYAML reads it.
    assert learned_settings(OWN, "{corpus: /c, margin: 0.1}")["margin"] == 0.1


def test_a_date_is_a_setting():
    dated = "{corpus: /c, frontend: 2024-01-31}"
    assert learned_settings(OWN, dated)["frontend"] == "2024-01-31"


@pytest.mark.parametrize("name", ["VoxCeleb", "CNCeleb"])
def test_noise_may_move_but_not_vanish(name):
    recipe = REPOSITORY / f"recipes/{name}/hparams/ram_resnet34_strong.yaml"
    places = {
        key: "/c"
        for key in ("voxceleb1", "voxceleb2", "cnceleb1", "cnceleb2")
        if f"\n{key}: !PLACEHOLDER" in recipe.read_text()
    }
    a, b, c = (
        learned_settings(recipe, {**places, "musan": musan, "rirs": "/r"})
        for musan in ("/a", "/b", None)
    )
    assert a == b != c


# -- data -----------------------------------------------------------------


def copy_corpus(corpus, folder):
    shutil.copytree(corpus.train_root, folder)
    return folder


def test_another_corpus_with_as_many_speakers(tiny_corpus, run, tmp_path):
    other = copy_corpus(tiny_corpus, tmp_path / "b")
    for speaker in sorted(other.iterdir()):
        speaker.rename(other / f"b{speaker.name}")
    message = refused(
        tiny_corpus, run, "speakers: 6 -> 6; 6 only", data_root=str(other)
    )
    assert "utterances: 30 -> 30; 30 only there" in message


@pytest.mark.parametrize("what", ["renamed", "swapped", "added", "longer"])
def test_a_change_of_the_corpus(tiny_corpus, run, tmp_path, what):
    other = copy_corpus(tiny_corpus, tmp_path / "b")
    first, second, *_ = sorted(other.iterdir())
    match = "only here"
    if what == "renamed":
        first.rename(other / "zoe")
        match = "speakers: 6 -> 6; 1 only there: .*; 1 only here: zoe"
    elif what == "added":
        shutil.copytree(first, other / "zoe")
        match = "speakers: 6 -> 7; 1 only here: zoe"
    elif what == "swapped":
        first.rename(other / "aside")
        second.rename(first)
        (other / "aside").rename(second)
        match = "another speaker, begin or end"
    else:
        file = min(other.rglob("*.wav"))
        samples, rate = soundfile.read(file)
        soundfile.write(file, samples[:-160], rate)
        match = "1 utterances have another speaker, begin or end"
    refused(tiny_corpus, run, match, data_root=str(other))


def test_the_corpus_may_move(tiny_corpus, run, tmp_path):
    other = copy_corpus(tiny_corpus, tmp_path / "elsewhere")
    run_recipe(tiny_corpus, run, data_root=str(other))


def test_other_dev_trials_are_refused(tiny_corpus, run, tmp_path):
    lines = tiny_corpus.trials.read_text().splitlines(keepends=True)
    trials = tmp_path / "other.txt"
    trials.write_text("".join(lines[:-1]))
    refused(
        tiny_corpus,
        run,
        f"development trials: {len(lines)} lines -> {len(lines) - 1} lines",
        trials=str(trials),
    )
    refused(
        tiny_corpus, run, "trials: .* -> none", trials=None, trials_root=None
    )
    trials.write_text("".join(lines))  # the same list elsewhere
    run_recipe(tiny_corpus, run, trials=str(trials))


def test_split_and_labels_are_read_back(tiny_corpus, run, monkeypatch):
    """Whatever a newer version would draw."""
    from speechbrain_ram.cli import train as cli_train
    from speechbrain_ram.corpora import folder

    split = folder.split_by_utterance

    def another(rows, valid_fraction, seed):
        return split(rows, valid_fraction, seed + 1)

    def shuffled(*args):
        raise AssertionError("labels are numbered anew")

    manifests = (run / "manifests" / "train.csv").read_bytes()
    monkeypatch.setattr(folder, "split_by_utterance", another)
    monkeypatch.setattr(cli_train, "speaker_labels", shuffled)
    run_recipe(tiny_corpus, run)
    assert (run / "manifests" / "train.csv").read_bytes() == manifests
    labels = CategoricalEncoder()
    labels.load(run / "inference" / "label_encoder.ckpt")
    known = json.loads((run / RUN_FILE).read_text())["speakers"]
    assert [labels.ind2lab[i] for i in range(6)] == known


def test_manifests_that_were_edited_or_deleted(tiny_corpus, run):
    file = run / "manifests" / "train.csv"
    original = file.read_text()
    file.write_text("".join(original.splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match="utterances: 29 -> 30"):
        run_recipe(tiny_corpus, run)
    shutil.rmtree(run / "manifests")
    run_recipe(tiny_corpus, run)
    assert file.read_text() == original


@pytest.mark.parametrize("what", ["corpus", "version"])
def test_what_was_deleted_comes_back_as_it_was(
    tiny_corpus, run, tmp_path, monkeypatch, what
):
    """Or not at all, from a corpus or a split that is another."""
    from speechbrain_ram.corpora import folder

    file = run / "manifests" / "train.csv"
    original = file.read_bytes()
    file.unlink()
    if what == "corpus":
        other = copy_corpus(tiny_corpus, tmp_path / "b")
        min(other.iterdir()).rename(other / "zoe")
        refused(tiny_corpus, run, "only there", data_root=str(other))
    else:
        with monkeypatch.context() as patch:
            patch.setattr(
                folder,
                "split_by_utterance",
                lambda rows, *_: (rows[:-3], rows[-3:]),
            )
            refused(tiny_corpus, run, "another run")
    run_recipe(tiny_corpus, run)
    assert file.read_bytes() == original


def test_manifests_on_another_disk(tiny_corpus, run, monkeypatch):
    """A file is not renamed from one disk to another."""

    def as_between_disks(rename):
        def renamed(source, target):
            if (".prepared" in str(source)) != (".prepared" in str(target)):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            rename(source, target)

        return renamed

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, as_between_disks(getattr(os, name)))
    (run / "manifests" / "train.csv").unlink()
    cache = run / "manifests" / "headers.cache"
    for content in (cache.read_bytes(), b"damaged"):
        cache.write_bytes(content)
        run_recipe(tiny_corpus, run)
        assert cache.stat().st_size > len(b"damaged")


def test_your_corpus_names_its_folder_and_card(
    tiny_corpus, tmp_path, monkeypatch
):
    from hyperpyyaml import load_hyperpyyaml

    monkeypatch.chdir(tmp_path)  # loading it makes its folder
    with open(OWN) as file:
        hparams = load_hyperpyyaml(file, {"corpus": "/some/where/voices/"})
    assert hparams["output_folder"] == "results/own_voices_ram_m0.5_1986"
    corpus = str(tiny_corpus.train_root)
    overrides = {
        "corpus": corpus,
        "output_folder": str(tmp_path / "own"),
        "channels": [16, 16, 16, 16],
        "number_of_epochs": 1,
        "crop_seconds": 0.5,
        "num_workers": 0,
        "verify_untrained": False,
    }
    train(*parse_arguments([str(OWN), "--device", "cpu"])[:2], overrides)
    run = tmp_path / "own"
    card = (run / "inference" / "README.md").read_text()
    assert str(tiny_corpus.train_root.parent) not in card
    assert f"| Training corpus | {tiny_corpus.train_root.name} |" in card


# -- the file -------------------------------------------------------------


def test_a_first_command_that_failed_may_be_corrected(tiny_corpus, tmp_path):
    with pytest.raises(ValueError, match="crashes torch"):
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            channels=[8, 16, 16, 16],
            channels_last=True,
        )
    run = run_recipe(tiny_corpus, tmp_path / "run", number_of_epochs=1)
    assert json.loads((run / RUN_FILE).read_text())["settings"]["channels"] == [
        *(16, 16, 16, 16)
    ]


def test_every_checkpoint_keeps_it(tiny_corpus, run):
    known = json.loads((run / RUN_FILE).read_text())
    for checkpoint in Checkpointer(run / "save").find_checkpoints():
        assert json.loads((checkpoint.path / "run.ckpt").read_text()) == known
    (run / RUN_FILE).unlink()
    with pytest.raises(RunError, match="seed: 1986 -> 7"):
        run_recipe(tiny_corpus, run, seed=7)
    run_recipe(tiny_corpus, run)
    assert json.loads((run / RUN_FILE).read_text()) == known


def test_a_checkpoint_of_another_run(tiny_corpus, run, tmp_path):
    other = run_recipe(
        tiny_corpus, tmp_path / "b", number_of_epochs=1, margin=0.1
    )
    shutil.rmtree(run / "save")
    shutil.copytree(other / "save", run / "save")
    with pytest.raises(RunError, match="checkpoint of another run"):
        run_recipe(tiny_corpus, run)


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda text: "", "cannot be read"),
        (lambda text: text[:100], "cannot be read"),
        (lambda text: "[" * 100_000, "cannot be read"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2"),
        (lambda text: text.replace('"id"', '"name"'), "cannot be read"),
        (
            lambda text: text.replace('"epochs": 2', '"epochs": "2"'),
            "epochs is",
        ),
        (
            lambda text: text.replace('"epochs": 2', '"epochs": true'),
            "epochs is",
        ),
        (
            lambda text: text.replace('"epochs": 2', '"epochs": NaN'),
            "NaN is no",
        ),
        (lambda text: text.replace('"epochs": 2', '"epochs": -2'), "epochs is"),
        (
            lambda text: text.replace('"lines": ', '"lines": null, "x": '),
            "files",
        ),
        (
            lambda text: text.replace('"speakers": [', '"speakers": [7,'),
            "speak",
        ),
        (
            lambda text: text.replace('"format": 1', '"format": [1]'),
            "format .1",
        ),
        (lambda text: text.replace('"format": 1,', ""), "cannot be read"),
        (lambda text: "[1, 2]", "has format None"),
        (lambda text: "7", "has format None"),
        (lambda text: "\0" * 100, "NUL byte"),
    ],
)
def test_a_damaged_file(run, spoil, match):
    file = run / RUN_FILE
    file.write_text(spoil(file.read_text()))
    with pytest.raises(RunError, match=match):
        read_run(run, run / "save")


def test_a_folder_without_it(run):
    (run / RUN_FILE).unlink()
    for file in run.rglob("run.ckpt"):
        file.unlink()
    with pytest.raises(RunError, match="data and settings are unknown"):
        read_run(run, run / "save")


def test_the_card_is_of_the_run(tiny_corpus, run):
    """A licence may be corrected, what was learned may not."""
    facts = {"corpus": "something else", "license": "MIT", "language": "none"}
    run_recipe(tiny_corpus, run, facts=facts)
    card = (run / "inference" / "README.md").read_text()
    assert "synthetic voices" in card and "something else" not in card
    assert "license: mit" in card
    run_recipe(tiny_corpus, run, facts={"objective": "am"})
    assert "ram, margin 0.3" in (run / "inference" / "README.md").read_text()


def test_pretrained_is_known_by_its_fingerprint(
    tiny_corpus, tiny_run, tmp_path
):
    start = tmp_path / "start"
    shutil.copytree(tiny_run / "inference", start)
    settings = {"number_of_epochs": 1, "verify_untrained": False}
    run = run_recipe(
        tiny_corpus, tmp_path / "run", pretrained=str(start), **settings
    )
    refused(
        tiny_corpus,
        run,
        "pretrained: [0-9a-f]+ -> none",
        pretrained=None,
        **settings,
    )
    start.rename(tmp_path / "moved")
    for place in (tmp_path / "moved", start):  # the latter is gone
        run_recipe(tiny_corpus, run, pretrained=str(place), **settings)


def test_a_run_as_data():
    run = Run("1", {}, 2, ["b", "a"], {}, {})
    assert run.label_encoder().lab2ind == {"b": 0, "a": 1}


# -- the lock -------------------------------------------------------------

HOLDER = """
import sys, time, multiprocessing
from speechbrain_ram.training.run import sole_owner
with sole_owner(sys.argv[1]):
    child = multiprocessing.get_context("fork").Process(
        target=time.sleep, args=(60,), daemon=True
    )
    child.start()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns a folder, with a worker of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_process_is_refused_at_once(holder, tmp_path, tiny_corpus):
    began = time.monotonic()
    with pytest.raises(RunError, match=f"in use by .*process {holder.pid} on"):
        run_recipe(tiny_corpus, tmp_path / "run")
    assert time.monotonic() - began < 30
    assert {each.name for each in (tmp_path / "run").iterdir()} == {
        ".lock",
        ".owner",
    }


def test_a_dead_owners_lock_is_taken_over(holder, tmp_path):
    holder.kill()  # its worker lives on
    holder.wait()
    with sole_owner(tmp_path / "run"):
        assert (tmp_path / "run" / ".owner").exists()
    assert not (tmp_path / "run" / ".owner").exists()


def test_a_file_as_output_folder(tmp_path, tiny_corpus):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/run"):
        with pytest.raises(RunError, match="is, or lies in, a file"):
            run_recipe(tiny_corpus, tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_written_into_a_corpus(tiny_corpus, tmp_path):
    for root in ("train_root", "test_root"):
        corpus = getattr(tiny_corpus, root)
        with pytest.raises(ManifestError, match="lies within the corpus"):
            run_recipe(tiny_corpus, corpus / "results")
        assert not (corpus / "results").exists()
        for key in ("save_folder", "manifests"):
            recipe = tmp_path / "recipe.yaml"
            recipe.write_text(f"output_folder: out\ndata_root: {corpus}\n")
            with pytest.raises(ManifestError, match="lies within the corpus"):
                output_folder_of(recipe, {key: str(corpus / "new")})


@pytest.mark.parametrize("place, refused", [("a/out", True), ("out", False)])
def test_the_recordings_of_a_corpus_elsewhere(tmp_path, place, refused):
    """As a Kaldi directory has them: its own folder, and that of the paths."""
    (tmp_path / "kaldi").mkdir()
    recipe = tmp_path / "recipe.yaml"
    for root in ("a", "."):  # the second lies around all
        recipe.write_text(
            f"output_folder: {tmp_path / place}\n"
            f"corpus: {tmp_path / 'kaldi'}\ndata_root: {tmp_path / root}\n"
        )
        if refused and root == "a":
            with pytest.raises(ManifestError, match="lies within the corpus"):
                output_folder_of(recipe, {})
        else:
            assert output_folder_of(recipe, {}) == tmp_path / place


def test_results_beside_a_table(tmp_path):
    """A table names its recordings: nothing else in their folder is read."""
    (tmp_path / "table.csv").touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_folder: {tmp_path / 'results'}\ndata_root: {tmp_path}\n"
        f"corpus: {tmp_path / 'table.csv'}\n"
    )
    assert output_folder_of(recipe, {}) == tmp_path / "results"


def test_the_folders_of_cnceleb_lie_in_the_data_folder(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = f"data_folder: {tmp_path / 'data'}\n"
    elsewhere = tmp_path / "elsewhere"
    for name, output in (("CN-Celeb", "CN-Celeb/out"), (elsewhere, "out")):
        recipe.write_text(f"{text}cnceleb1: {name}\noutput_folder: {output}\n")
        assert output_folder_of(recipe, {}) == Path(output)
    with pytest.raises(ManifestError, match="lies within the corpus"):
        output_folder_of(recipe, {"output_folder": f"{elsewhere}/out"})


def test_a_place_that_cannot_be_written():
    with (
        pytest.raises(RunError, match="--output_folder '/proc/a' cannot be"),
        sole_owner("/proc/a"),
    ):
        pass


def test_a_sweep_leaves_what_others_are_writing(holder, tmp_path):
    host = os.uname().nodename
    folder = tmp_path / "save"
    names = {
        f".CKPT+1@{host}@{holder.pid}.part": True,
        ".CKPT+2@elsewhere@1.part": True,
        f".CKPT+3@{host}@{os.getpid()}.part": False,
        ".CKPT+4.part": False,
    }
    for name in names:
        (folder / name).mkdir(parents=True)
    checkpointer = SafeCheckpointer(folder, {"m": torch.nn.Linear(1, 1)})
    checkpointer.save_checkpoint()
    assert {n: Path(folder / n).exists() for n in names} == names
    holder.kill()
    holder.wait()
    checkpointer.save_checkpoint()
    assert not (folder / f".CKPT+1@{host}@{holder.pid}.part").exists()
