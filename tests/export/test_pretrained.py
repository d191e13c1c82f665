"""Starting from an exported folder, with the same speakers or others."""

import io
import re
import shutil

import pytest
import torch
from conftest import run_recipe
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.utils.checkpoints import Checkpointer
from wespeaker_model import CONFIG, make_state, write_model

from speechbrain_ram.classifier import SubCenterClassifier
from speechbrain_ram.corpora.convert import convert_tree
from speechbrain_ram.corpora.synthetic import SyntheticCorpus
from speechbrain_ram.data.manifest import ManifestError
from speechbrain_ram.export.architecture import EncoderError
from speechbrain_ram.export.folder import (
    encoder_section,
    read_folder,
    start_from,
)
from speechbrain_ram.export.importers import import_encoder


def labels(*names):
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(names)
    encoder.expect_len(len(names))
    return encoder


def test_weights_and_known_speakers_are_taken_over(tiny_run):
    folder = tiny_run / "inference"
    section = encoder_section(tiny_run / "hyperparams.yaml")
    weights = read_folder(folder).weights
    model = load_hyperpyyaml(section)["embedding_model"]
    names = labels("new", "id10003", "id10001")
    classifier = Classifier(512, out_neurons=3)
    before = classifier.weight.detach().clone()
    assert start_from(folder, section, model, classifier, names) == 2
    taken = model.state_dict()
    assert all(torch.equal(taken[name], weights[name]) for name in weights)
    rows = torch.load(folder / "classifier.ckpt")["weight"]
    assert torch.equal(classifier.weight[0], before[0])
    assert torch.equal(classifier.weight[1], rows[2])
    assert torch.equal(classifier.weight[2], rows[0])


def test_known_speakers_keep_their_sub_centres(tiny_run, tmp_path):
    """As many as there are; another number is refused where it matters."""
    folder = shutil.copytree(tiny_run / "inference", tmp_path / "inference")
    rows = torch.randn(6, 3, 512)
    torch.save({"weight": rows}, folder / "classifier.ckpt")
    section = encoder_section(tiny_run / "hyperparams.yaml")
    model = load_hyperpyyaml(section)["embedding_model"]
    names = labels("new", "id10003")
    classifier = SubCenterClassifier(512, 2, 3)
    assert start_from(folder, section, model, classifier, names) == 1
    assert torch.equal(classifier.weight[1], rows[2])
    for centers in (1, 2):
        classifier = SubCenterClassifier(512, 2, centers)
        before = classifier.weight.detach().clone()
        message = f"--sub_centers is {centers}, .* has 3 .* knows 1.*centers 3"
        with pytest.raises(EncoderError, match=message):
            start_from(folder, section, model, classifier, names)
        assert torch.equal(classifier.weight, before)
        others = labels("new", "newer")
        assert start_from(folder, section, model, classifier, others) == 0


def pickled():
    buffer = io.BytesIO()
    torch.save({"weight": print}, buffer)
    return buffer.getvalue()


ROWS = torch.ones(3, 512)
NAN = ROWS.clone()
NAN[2, 7] = torch.nan
NAMES = (
    "'a' => 0\n'b' => 1\n'c' => {}\n================\n'starting_index' => 0\n"
)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classifier.ckpt", {"weight": NAN}),
        ("classifier.ckpt", {"weight": torch.ones(3, 1)}),
        ("classifier.ckpt", {"weight": torch.ones(4, 512)}),
        ("classifier.ckpt", {"weight": torch.ones(1, 3, 3, 512)}),
        ("classifier.ckpt", {"weight": torch.ones(3, 512, dtype=torch.int64)}),
        ("classifier.ckpt", {"weight": [1.0]}),
        ("classifier.ckpt", {"other": ROWS}),
        ("classifier.ckpt", ROWS),
        ("classifier.ckpt", pickled()),
        ("classifier.ckpt", b"nothing"),
        ("classifier.ckpt", None),
        *(
            ("label_encoder.ckpt", NAMES.format(row).encode())
            for row in ("-1", "1", "3", "1_0", "9" * 5000, "x", "")
        ),
        ("label_encoder.ckpt", b"\xff"),
        ("label_encoder.ckpt", b"__import__('os') => 0\n"),
        ("label_encoder.ckpt", None),
    ],
)
def test_a_damaged_start(tiny_run, tmp_path, file, content):
    """Nothing of the classifier is taken over, and the file is named."""
    folder = tmp_path / "inference"
    shutil.copytree(tiny_run / "inference", folder)
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        torch.save(content, folder / file)
    section = encoder_section(tiny_run / "hyperparams.yaml")
    model = load_hyperpyyaml(section)["embedding_model"]
    classifier = Classifier(512, out_neurons=1)
    before = classifier.weight.detach().clone()
    with pytest.raises(EncoderError, match=re.escape(str(folder / file))):
        start_from(folder, section, model, classifier, labels("id10001"))
    assert torch.equal(classifier.weight, before)


def test_fine_tuning_with_other_speakers(tiny_corpus, tiny_run, tmp_path):
    """Half of the speakers, a longer crop, a larger margin."""
    corpus = tmp_path / "half"
    for speaker in sorted(tiny_corpus.train_root.iterdir())[:3]:
        shutil.copytree(speaker, corpus / speaker.name)
    corpus = SyntheticCorpus(corpus, tiny_corpus.test_root, tiny_corpus.trials)
    settings = {"number_of_epochs": 1, "lr": 1e-9, "margin": 0.5}
    tuned = run_recipe(
        corpus,
        tmp_path / "tuned",
        pretrained=str(tiny_run / "inference"),
        crop_seconds=0.8,
        **settings,
    )
    anew = run_recipe(corpus, tmp_path / "anew", crop_seconds=0.8, **settings)
    start = read_folder(tiny_run / "inference").weights
    end = read_folder(tuned / "inference").weights
    other = read_folder(anew / "inference").weights
    # With next to no learning rate the weights are where they started.
    names = [name for name in start if start[name].ndim == 4]
    moved = [(end[name] - start[name]).abs().max() for name in names]
    assert max(moved) < 1e-4
    apart = [(end[name] - other[name]).abs().max() for name in names]
    assert min(apart) > 1e-3
    rows = torch.load(tuned / "inference" / "classifier.ckpt")["weight"]
    assert len(rows) == 3


def imported(folder, **options):
    """An encoder of WeSpeaker's, as the tests of importing make it."""
    torch.manual_seed(3)
    state = make_state(width=16, **options)
    import_encoder(
        "wespeaker", write_model(folder / "model", state), folder / "e"
    )
    return folder / "e"


def test_fine_tuning_an_imported_encoder(tiny_corpus, tmp_path):
    """Its folder says what the encoder is, no option need repeat it."""
    start = imported(tmp_path)
    settings = {
        "pretrained": str(start),
        "channels": [16, 32, 64, 128],
        "number_of_epochs": 1,
        "lr": 1e-9,
        "final_lr": 1e-9,
    }
    tuned = run_recipe(tiny_corpus, tmp_path / "tuned", **settings)
    before, after = read_folder(start), read_folder(tuned / "inference")
    assert after.architecture == before.architecture
    for name, tensor in before.weights.items():
        if "running" not in name and tensor.is_floating_point():
            moved = (after.weights[name] - tensor).abs().max()
            assert moved < 1e-5, name
    # The same command goes on, wherever the first encoder is by then.
    start.rename(tmp_path / "moved")
    run_recipe(
        tiny_corpus, tmp_path / "tuned", **{**settings, "number_of_epochs": 2}
    )
    log = (tuned / "train_log.txt").read_text()
    assert "epoch: 2" in log and "epoch: 3" not in log


def test_recordings_are_of_the_folders_rate(tiny_corpus, tmp_path):
    """In preparation, and so before training, as in training."""
    eight = CONFIG.replace("resample_rate: 16000", "resample_rate: 8000")
    model = write_model(tmp_path / "model", make_state(width=16), eight)
    import_encoder("wespeaker", model, tmp_path / "e")
    settings = {
        "pretrained": str(tmp_path / "e"),
        "channels": [16, 32, 64, 128],
        "number_of_epochs": 1,
        "verify_untrained": False,
    }
    needed = "16000 Hz, 8000 Hz is needed. `--resample True`"
    with pytest.raises(ManifestError, match=needed):
        run_recipe(tiny_corpus, tmp_path / "run", **settings)
    rooms = {"resample": True, "rirs": str(tiny_corpus.test_root)}
    run = run_recipe(tiny_corpus, tmp_path / "run", **rooms, **settings)
    assert read_folder(run / "inference").architecture["sample_rate"] == 8000
    assert not (run / "training_faults.txt").exists()

    folders = [tiny_corpus.train_root, tiny_corpus.test_root]
    for folder, name in zip(folders, ("dev", "test"), strict=True):
        convert_tree(folder, tmp_path / name, "wav", 8000, workers=1)
    corpus = SyntheticCorpus(
        tmp_path / "dev", tmp_path / "test", tiny_corpus.trials
    )
    run_recipe(corpus, tmp_path / "at8", **settings)


def test_options_that_contradict_the_folder(tiny_corpus, tmp_path):
    match = ": --frontend is fbank, the encoder has wespeaker. Leave"
    with pytest.raises(EncoderError, match=match):
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            pretrained=str(imported(tmp_path)),
            channels=[16, 32, 64, 128],
            frontend="fbank",
        )


def test_folders_that_do_not_fit(tiny_corpus, tiny_run, tmp_path):
    with pytest.raises(EncoderError, match="cannot be read"):
        run_recipe(
            tiny_corpus, tmp_path / "a", pretrained=str(tmp_path / "nowhere")
        )
    with pytest.raises(
        EncoderError,
        match=r"another architecture: --channels is \[16, 16, 16, 32\], the "
        r"encoder has \[16, 16, 16, 16\]. Leave",
    ):
        run_recipe(
            tiny_corpus,
            tmp_path / "b",
            pretrained=str(tiny_run / "inference"),
            channels=[16, 16, 16, 32],
        )
    assert not list((tmp_path / "b" / "save").glob("CKPT*"))


@pytest.mark.parametrize("frozen_epochs", [1, 0.5])
def test_the_encoder_waits_for_its_classifier(
    frozen_epochs, tiny_corpus, tiny_run, tmp_path
):
    """Frozen, then at a rate of its own."""
    start = tiny_run / "inference"
    tuned = run_recipe(
        tiny_corpus,
        tmp_path / "tuned",
        pretrained=str(start),
        frozen_epochs=frozen_epochs,
        encoder_lr_factor=1e-6,
        lr_decay="step",
        warmup_steps=0,
        ckpt_interval_minutes=0,
    )
    at = {
        found.meta["epoch"]: found.path
        for found in Checkpointer(tuned / "save").find_checkpoints()
        if found.meta["end-of-epoch"]
    }
    before = read_folder(start).weights
    for epoch, names in ((1, list(before)), (2, ["linear.weight"])):
        after = torch.load(at[epoch] / "embedding_model.ckpt")
        same = [torch.equal(before[name], after[name]) for name in names]
        # batch statistics are frozen too, and begin to move at once
        assert all(same) is (epoch <= frozen_epochs)
    # Thawed within an epoch, it goes on with batch statistics in that epoch.
    mean = torch.load(at[1] / "embedding_model.ckpt")["norm.running_mean"]
    assert torch.equal(before["norm.running_mean"], mean) is (
        frozen_epochs >= 1
    )
    near = (after["linear.weight"] - before["linear.weight"]).abs().max()
    assert 0 < near < 1e-5
    groups = torch.load(at[2] / "optimizer.ckpt")["param_groups"]
    rates = [group["lr"] for group in groups]
    assert rates[0] == pytest.approx(1e-6 * rates[1])
    rows = [torch.load(at[n] / "classifier.ckpt")["weight"] for n in at]
    assert not torch.equal(*rows)
