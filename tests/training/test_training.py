"""The main job from end to end, in miniature, and what stops it early."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPOSITORY, run_recipe
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_ram.data.audio import AudioError
from speechbrain_ram.data.manifest import ManifestError, read_manifest
from speechbrain_ram.data.synthetic import feature_masks
from speechbrain_ram.export.folder import read_folder
from speechbrain_ram.resnet import ResNet34
from speechbrain_ram.training import brain
from speechbrain_ram.training.run import RunError
from speechbrain_ram.verification.scores import read_scores
from speechbrain_ram.verification.trials import TrialError, read_trials


def weights(run):
    newest = Checkpointer(run / "save").find_checkpoint()
    return {
        name: torch.load(newest.path / f"{name}.ckpt")
        for name in ("embedding_model", "classifier", "optimizer")
    }


def assert_same(first, second):
    """Equal to the last bit, whatever the nesting."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


def test_the_log_says_what_a_long_run_must(tiny_run):
    lines = (tiny_run / "train_log.txt").read_text().splitlines()
    assert lines[0].startswith("epoch: 0") and "valid EER" in lines[0]
    assert len(lines) == 3
    for name in (
        "lr: ",
        "train loss: ",
        "train accuracy: ",
        "train grad_norm: ",
        "train utterances/s: ",
        "valid loss: ",
        "valid error: ",
        "valid EER: ",
        "valid minDCF(0.01): ",
    ):
        assert name in lines[1] and name in lines[2]


def test_two_newest_and_best_checkpoint_are_kept(tiny_run):
    checkpointer = Checkpointer(tiny_run / "save")
    kept = checkpointer.find_checkpoints()
    ends = [c.meta["end-of-epoch"] for c in kept]
    # The last one; the one before its validation; the best, if it is another.
    assert ends in ([True, False], [True, False, True])
    assert all("EER" in c.meta for c in kept if c.meta["end-of-epoch"])


def test_scores_are_written_for_every_trial(tiny_run, tiny_corpus):
    trials, scores = read_scores(tiny_run / "scores.txt")
    lines = tiny_corpus.trials.read_text().splitlines()
    assert len(scores) == len(lines) == len(trials.labels)
    assert np.abs(scores).max() <= 1 + 1e-6
    label, enrol, test = lines[0].split()
    first = (tiny_run / "scores.txt").read_text().split("\n")[0].split()
    assert first[:2] == [enrol, test] and first[3] == label


def test_few_speakers_have_no_intervals(tiny_run):
    text = (tiny_run / "report" / "results.md").read_text()
    assert re.search(r"^\| ram \| \d+\.\d\d \|", text, re.M)
    assert "95 %" not in text
    assert "4 speakers have same-speaker trials, 10 are needed" in text


def test_few_pairs_measure_no_false_alarm_rate(tiny_run):
    saved = json.loads((tiny_run / "inference" / "encoder.json").read_text())
    assert list(saved["decision"]["thresholds"]) == ["EER"]
    card = (tiny_run / "inference" / "README.md").read_text()
    assert "need, at FAR=1% 3,000 and at FAR=0.1% 30,000" in card


def test_number_of_speakers_comes_from_the_labels(tiny_run):
    assert weights(tiny_run)["classifier"]["weight"].shape == (6, 512)


def test_one_seed_one_result(tiny_run, tiny_corpus, tmp_path):
    again = run_recipe(tiny_corpus, tmp_path / "again")
    assert_same(weights(tiny_run), weights(again))
    other = run_recipe(
        tiny_corpus, tmp_path / "other", seed=7, number_of_epochs=1
    )
    assert not torch.equal(
        weights(tiny_run)["classifier"]["weight"],
        weights(other)["classifier"]["weight"],
    )


def test_an_interrupted_run_goes_on_where_it_was(
    tiny_run, tiny_corpus, tmp_path, monkeypatch
):
    from speechbrain_ram.training.brain import SpeakerBrain

    step = SpeakerBrain.fit_batch

    def killed(self, batch):
        if self.hparams.epoch_counter.current == 2 and self.step == 2:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(SpeakerBrain, "fit_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(tiny_corpus, tmp_path / "run")
    assert not (tmp_path / "run" / "inference").exists()
    monkeypatch.undo()
    run_recipe(tiny_corpus, tmp_path / "run")
    assert_same(weights(tiny_run), weights(tmp_path / "run"))


@pytest.mark.parametrize("best, times", [(1, 4), (2, 3)])
def test_trials_are_scored_by_the_best_epoch(
    tiny_corpus, tmp_path, monkeypatch, best, times
):
    """Which embeds the recordings once more, unless they were embedded last."""
    from speechbrain_ram.training import brain

    recordings = len(read_trials(tiny_corpus.trials).utterances)
    embedded, rates = [], []
    embed = brain.SpeakerBrain.embed

    def counted(self, utterances, root):
        embedded.append(len(utterances))
        return embed(self, utterances, root)

    def rate(scores, labels):  # untrained, epoch 1, epoch 2
        rates.append(len(rates))
        return float(abs(rates[-1] - best))

    monkeypatch.setattr(brain.SpeakerBrain, "embed", counted)
    monkeypatch.setattr(brain, "eer", rate)
    run = run_recipe(tiny_corpus, tmp_path / "run")
    assert len(rates) == 3 and embedded.count(recordings) == times
    scores = (run / "scores.txt").read_bytes()
    (run / "scores.txt").unlink()
    run_recipe(tiny_corpus, run)  # is done, loads the best and scores anew
    assert (run / "scores.txt").read_bytes() == scores
    assert embedded.count(recordings) == times + 1


def test_folders_may_be_relative(tiny_corpus, tmp_path, monkeypatch):
    """As in the YAML of the demo."""
    shutil.copytree(tiny_corpus.train_root, tmp_path / "dev")
    shutil.copytree(tiny_corpus.test_root, tmp_path / "test")
    monkeypatch.chdir(tmp_path)
    folders = {"data_root": "dev", "trials_root": "test"}
    run = run_recipe(tiny_corpus, "run", number_of_epochs=1, **folders)
    assert (run / "inference" / "encoder.json").is_file()


@pytest.mark.parametrize(
    "objective, form",
    [
        ("softmax", "paper"),
        ("am", "paper"),
        ("aam", "paper"),
        ("ram", "hinge"),
        ("raam", "released"),
    ],
)
def test_every_objective_trains(tiny_corpus, tmp_path, objective, form):
    run = run_recipe(
        tiny_corpus,
        tmp_path / "run",
        objective=objective,
        form=form,
        number_of_epochs=1,
        verify_untrained=False,
    )
    assert (run / "inference" / "hyperparams.yaml").is_file()


def test_bfloat16_and_tensorboard(tiny_corpus, tmp_path):
    run = run_recipe(
        tiny_corpus,
        tmp_path / "run",
        "--precision",
        "bf16",
        number_of_epochs=1,
        tensorboard=True,
        verify_untrained=False,
    )
    assert list((run / "tensorboard").glob("events*"))


def test_without_trials_the_error_picks_the_checkpoint(tiny_corpus, tmp_path):
    run = run_recipe(
        tiny_corpus, tmp_path / "run", trials=None, number_of_epochs=1
    )
    assert not (run / "scores.txt").exists()
    assert (run / "inference").is_dir()


# -- bad input: named before training starts ------------------------------


@pytest.fixture
def broken(tiny_corpus, tmp_path):
    """A copy of the training folder that a test may spoil."""
    folder = tmp_path / "corpus"
    shutil.copytree(tiny_corpus.train_root, folder)
    return folder


def first_file(folder):
    return min(folder.rglob("*.wav"))


def no_run(tiny_corpus, tmp_path, error, match, **overrides):
    with pytest.raises(error, match=match):
        run_recipe(tiny_corpus, tmp_path / "run", **overrides)
    left = [f for f in (tmp_path / "run").rglob("*") if f.is_file()]
    assert not [f for f in left if f.suffix in (".csv", ".ckpt")]


def test_missing_folder(tiny_corpus, tmp_path):
    gone = tmp_path / "gone"
    no_run(tiny_corpus, tmp_path, ManifestError, str(gone), data_root=str(gone))


def test_folder_without_audio(tiny_corpus, tmp_path):
    empty = tmp_path / "empty"
    (empty / "anna").mkdir(parents=True)
    (empty / "anna" / "notes.txt").write_text("hello")
    no_run(tiny_corpus, tmp_path, ManifestError, "empty", data_root=str(empty))


def test_one_speaker_only(tiny_corpus, tmp_path, broken):
    for speaker in sorted(broken.iterdir())[1:]:
        shutil.rmtree(speaker)
    no_run(
        tiny_corpus,
        tmp_path,
        ManifestError,
        "one speaker",
        data_root=str(broken),
    )


def test_a_speaker_with_one_utterance_is_trained_on(
    tiny_corpus, tmp_path, broken
):
    for file in sorted(first_file(broken).parents[1].rglob("*.wav"))[1:]:
        file.unlink()
    run = run_recipe(
        tiny_corpus,
        tmp_path / "run",
        data_root=str(broken),
        number_of_epochs=1,
        verify_untrained=False,
    )
    assert weights(run)["classifier"]["weight"].shape[0] == 6


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda f: f.write_bytes(b""), "empty"),
        (lambda f: f.write_text("not audio at all"), "00001.wav"),
        (lambda f: f.write_bytes(f.read_bytes()[:2000]), "00001.wav"),
        (lambda f: soundfile.write(f, np.zeros(8000), 8000), "8000 Hz"),
        (lambda f: soundfile.write(f, np.zeros(9000), 48000), "48000 Hz"),
        (lambda f: soundfile.write(f, np.zeros((9000, 2)), 16000), "channels"),
    ],
)
def test_an_unusable_file_is_named(tiny_corpus, tmp_path, broken, spoil, match):
    file = first_file(broken)
    spoil(file)
    no_run(tiny_corpus, tmp_path, ManifestError, match, data_root=str(broken))


def test_nan_samples_are_named(tiny_corpus, tmp_path, broken):
    file = first_file(broken)
    soundfile.write(file, np.full(16000, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN or infinite"):
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            data_root=str(broken),
            max_fault_share=0,
            verify_untrained=False,
        )


def test_other_rates_and_channels_when_asked(tiny_corpus, tmp_path, broken):
    files = sorted(broken.rglob("*.wav"))
    soundfile.write(
        files[0], np.random.default_rng(0).normal(0, 0.1, (48000, 2)), 48000
    )
    run = run_recipe(
        tiny_corpus,
        tmp_path / "run",
        data_root=str(broken),
        resample=True,
        mixdown=True,
        number_of_epochs=1,
        verify_untrained=False,
    )
    assert (run / "inference").is_dir()


def test_missing_trial_files_are_listed(tiny_corpus, tmp_path):
    with pytest.raises(TrialError, match="16 of 16 recordings are missing"):
        run_recipe(
            tiny_corpus, tmp_path / "run", trials_root=str(tmp_path / "empty")
        )


def test_trials_of_one_kind_are_refused_before_training(tiny_corpus, tmp_path):
    lines = Path(tiny_corpus.trials).read_text().splitlines(keepends=True)
    targets = tmp_path / "targets.txt"
    targets.write_text("".join(x for x in lines if x.startswith("1")))
    with pytest.raises(TrialError, match="both kinds are needed"):
        run_recipe(tiny_corpus, tmp_path / "run", trials=str(targets))
    assert not list((tmp_path / "run").rglob("CKPT*"))


def test_trials_of_models(tiny_corpus, tmp_path):
    """LIST.models is read, and belongs to what a run goes on with."""
    trials = read_trials(tiny_corpus.trials)
    one, two, *more = sorted(trials.utterances)
    models = tmp_path / "dev.models"
    models.write_text(f"who {one} {two}\n")
    lines = [f"{i % 2} who {name}\n" for i, name in enumerate(more)]
    (tmp_path / "dev.txt").write_text("".join(lines))
    settings = {"trials": str(tmp_path / "dev.txt"), "number_of_epochs": 1}
    run = run_recipe(
        tiny_corpus, tmp_path / "run", **settings, verify_untrained=False
    )
    assert read_scores(run / "scores.txt")[0].enrol_ids == ("who",)
    models.write_text(f"who {one}\n")
    with pytest.raises(RunError, match="the development trials' models: 1 lin"):
        run_recipe(tiny_corpus, run, **settings, verify_untrained=False)


def test_unknown_settings(tiny_corpus, tmp_path):
    for name, value in (("objective", "arcface"), ("form", "max")):
        with pytest.raises((ValueError, TypeError), match=f"{name} is"):
            run_recipe(tiny_corpus, tmp_path / "run", **{name: value})
    with pytest.raises(KeyError, match="'margn' not found"):
        run_recipe(tiny_corpus, tmp_path / "run", margn=0.2)
    assert {each.name for each in (tmp_path / "run").iterdir()} <= {".lock"}


def test_channels_that_crash_torch_are_refused(tiny_corpus, tmp_path):
    with pytest.raises(ValueError, match="crashes torch's CPU backward"):
        run_recipe(
            tiny_corpus,
            tmp_path / "run",
            channels=[8, 16, 16, 16],
            channels_last=True,
        )


def linear_encoder(self, feats, lengths=None):
    """Instead of ResNet34, whose ten steps turn 1e-6 into 1e-1."""
    weight = self.linear.weight[:, : feats.shape[2]]
    return (feats.square().mean(dim=1) @ weight.t()).unsqueeze(1)


def logged(run):
    """The numbers of each line of the log, by stage and name."""
    lines = (run / "train_log.txt").read_text().splitlines()
    found = [
        re.findall(r"((?:\w+ )?\S+): (\S+?)(?:,| |$)", each) for each in lines
    ]
    return [{name: float(value) for name, value in line} for line in found]


@pytest.mark.parametrize(
    "objective, form, centers",
    [("ram", "hinge", 1), ("aam", "paper", 1), ("ram", "released", 3)],
)
def test_the_fused_loss_trains_the_same(
    tiny_corpus, tmp_path, monkeypatch, objective, form, centers
):
    """Losses, weights and the log, to rounding, after ten steps."""
    monkeypatch.setattr(ResNet34, "forward", linear_encoder)
    folder = REPOSITORY / "recipes" / "YourCorpus" / "hparams"
    runs = {
        fused: run_recipe(
            tiny_corpus,
            tmp_path / f"{fused}",
            recipe=folder / "ram_resnet34.yaml",
            corpus=str(tiny_corpus.train_root),
            dev_share=0.2,
            objective=objective,
            form=form,
            fused_loss=fused,
            sub_centers=centers,
            batch_size=4,  # of 18 utterances: five steps an epoch
        )
        for fused in (False, True)
    }
    plain, fused = (weights(runs[key]) for key in (False, True))
    for name in ("embedding_model", "classifier"):
        assert plain[name].keys() == fused[name].keys()
        for key, value in plain[name].items():
            assert (fused[name][key] - value).abs().max() < 1e-5, key
    shape = plain["classifier"]["weight"].shape
    assert shape == ((4, 3, 512) if centers == 3 else (4, 512))
    folder = runs[True] / "inference"
    rows = torch.load(folder / "classifier.ckpt")["weight"]
    assert torch.equal(rows, fused["classifier"]["weight"])
    facts = read_folder(folder).facts
    said = "3 sub-centres a speaker" in facts["objective"]
    assert said == (centers == 3)
    plain, fused = (logged(runs[key]) for key in (False, True))
    without = {"train angle_between", "train angle_between_std"}
    assert without < plain[-1].keys()
    for ours, theirs in zip(fused, plain, strict=True):
        names = set(theirs) - without - {"train utterances/s"}
        assert set(ours) == set(theirs) - without
        # As printed: three digits.
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=0.011), name


def test_made_up_distortions(tiny_corpus, tmp_path, monkeypatch):
    """Crops by workers, features in training only; the seed says how."""
    masked = []

    def counted():
        masks = feature_masks()
        masks.register_forward_hook(lambda *args: masked.append(args[2].shape))
        return masks

    monkeypatch.setattr(brain, "feature_masks", counted)
    wanted = ["room", "noise", "microphone", "codec", "masks"]
    runs = [tmp_path / name for name in ("first", "second", "plain")]
    for run, options in zip(
        runs,
        (
            {"synthetic": wanted, "num_workers": 0},
            {"synthetic": wanted, "num_workers": 1},
            {},
        ),
        strict=True,
    ):
        run_recipe(tiny_corpus, run, number_of_epochs=1, **options)
    first, second, plain = map(weights, runs)
    assert_same(first, second)
    crops = len(read_manifest(runs[0] / "manifests" / "train.csv"))
    assert sum(shape[0] for shape in masked) == 2 * crops
    name = "embedding_model"
    assert not torch.equal(
        next(iter(first[name].values())), next(iter(plain[name].values()))
    )
