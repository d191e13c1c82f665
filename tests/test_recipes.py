"""Each recipe end to end, in miniature: prepare, train, verify, table."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import miniature
import pytest
import speechbrain as sb
import torch
import yaml
from click.testing import CliRunner
from conftest import REPOSITORY
from hyperpyyaml import resolve_references
from speechbrain.nnet.losses import AdditiveAngularMargin
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_ram.cli import train as cli_train
from speechbrain_ram.cli import verify as cli_verify
from speechbrain_ram.cli.main import main
from speechbrain_ram.corpora import convert
from speechbrain_ram.export.folder import read_folder
from speechbrain_ram.losses import (
    RealMargin,
    make_objective,
    paper_margin_for,
)
from speechbrain_ram.training.schedules import MarginRise
from speechbrain_ram.verification.scores import read_scores

sys.path.insert(0, str(REPOSITORY / "recipes"))
import plot_training
import sweep

VOICES = miniature.voices(8, 6)
TINY = {
    "channels": [16, 16, 16, 16],
    "number_of_epochs": 2,
    "batch_size": 6,
    "crop_seconds": 0.5,
    "num_workers": 0,
    "verify_every": 1,
    "precision": "fp32",
}


def arguments(settings):
    return [text for k, v in settings.items() for text in (f"--{k}", str(v))]


def train(recipe, output, *options, **settings):
    """What the command line does, in this process."""
    command = [str(REPOSITORY / recipe), "--device", "cpu", "--noprogressbar"]
    settings = {**TINY, "output_folder": output, **settings}
    parsed = sb.parse_arguments([*command, *options, *arguments(settings)])
    cli_train.train(*parsed)
    return output


@pytest.fixture
def in_process(monkeypatch):
    """The sweep's commands run here; starting Python takes a while."""
    commands = []

    def run(command):
        commands.append(command)
        if command[1].endswith("verify_speakers.py"):
            cli_verify.main(command[2:])
        else:
            options = ["--device", "cpu", "--noprogressbar"]
            parsed = sb.parse_arguments([*command[2:], *options])
            cli_train.train(*parsed)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return commands


@pytest.fixture(scope="module")
def voxceleb(tmp_path_factory):
    """VoxCeleb2 as WAV, VoxCeleb1, SITW: (arguments of the recipe)."""
    root = tmp_path_factory.mktemp("voxceleb")
    return {
        "voxceleb2": miniature.voxceleb2(root / "v2", VOICES[:4], ".wav"),
        "voxceleb1": miniature.voxceleb1(root / "v1", VOICES[4:6], VOICES[6:8]),
        "sitw": miniature.sitw(root / "sitw", VOICES[4:6], VOICES[6:8]),
    }


@pytest.fixture(scope="module")
def cnceleb(tmp_path_factory):
    root = tmp_path_factory.mktemp("cnceleb")
    miniature.cnceleb(root, VOICES[:2], VOICES[2:4], VOICES[4:6])
    return {"data_folder": root}


def test_table_1(voxceleb, tmp_path, in_process, capsys):
    plan = REPOSITORY / "recipes" / "VoxCeleb" / "table1.yaml"
    command = [
        str(plan),
        "--output",
        str(tmp_path),
        "--rows",
        "4",
        *arguments({**voxceleb, **TINY, "number_of_epochs": 1}),
    ]
    assert sweep.main(command) == 0
    table = (tmp_path / "table.md").read_text()
    rows = re.findall(
        r"\| (Real AM-Softmax|AM-Softmax) \| (0\S+) \|(.*)", table
    )
    assert [row[:2] for row in rows] == [
        ("AM-Softmax", "0.20"),
        *(("Real AM-Softmax", f"0.{m}") for m in (20, 25, 30, 35)),
    ]
    assert "| Equation 12 | 0.20 | - |" in table
    assert "| Equation 12 at m + ln(C)/s | 0.49 | - |" in table
    done = rows[3][2].split("|")[:5]
    assert all(re.match(r" \d+\.\d{3} \(", cell) for cell in done)
    assert "(1.755)" in done[0] and "(3.417)" in done[4]
    assert rows[1][2].startswith(" - (1.872) | - (3.068)")
    # Two development lists choose, of the only row that there is.
    assert re.findall(r"\| (\S+) \| 0.30 of 1 \| (\S+) .*\|\n", table) == [
        ("VoxCeleb1", "VoxCeleb1-H"),
        ("SITW.Dev.Core", "SITW.Eval.Core"),
    ]
    # Three commands a row; again, nothing is left to do.
    assert len(in_process) == 3
    assert sweep.main(command) == 0
    assert len(in_process) == 3
    # An interrupted verification is all that is done again.
    (tmp_path / "ram_m0.30/verification/sitw-eval/scores.txt").unlink()
    assert sweep.main(command) == 0
    assert len(in_process) == 4
    assert (tmp_path / "table.md").read_text() == table


def test_table_2(cnceleb, tmp_path, in_process):
    command = [
        str(REPOSITORY / "recipes" / "CNCeleb" / "table2.yaml"),
        "--output",
        str(tmp_path),
        "--rows",
        "4",
        *arguments({**cnceleb, **TINY}),
    ]
    assert sweep.main(command) == 0
    assert re.search(
        r"\n\| Real AM-Softmax \| 0.20 \| [\d.]+ \(11.049\) \| [\d.]+ \|\n",
        (tmp_path / "table.md").read_text(),
    )
    # Averaged enrolment goes by model, and is another list of scores.
    lists = tmp_path / "ram_m0.20" / "verification"
    concat, average = (
        read_scores(lists / f"cnceleb-{name}" / "scores.txt")
        for name in ("concat", "average")
    )
    assert average[0].enrol_ids == ("id00800-enroll", "id00801-enroll")
    assert (average[0].labels == concat[0].labels).all()
    assert abs(average[1] - concat[1]).max() > 1e-4


def test_sweep_says_what_it_would_do(tmp_path, capsys):
    plan = str(REPOSITORY / "recipes" / "VoxCeleb" / "table1.yaml")
    options = ["--output", str(tmp_path / "o"), "--dry_run"]
    corpora = ["--voxceleb2", "/v2", "--voxceleb1", "/v1"]
    launch = ["--launch", "torchrun --nproc_per_node=4"]
    assert sweep.main([plan, *options, *launch, *corpora]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 26  # without SITW, two commands a row
    assert lines[0].startswith("torchrun --nproc_per_node=4 ")
    assert "--objective am --margin 0.2 --voxceleb2 /v2" in lines[0]
    assert "--data_root /v1" in lines[1] and "vox1-E.txt" in lines[1]
    assert not (tmp_path / "o").exists()
    for wrong in (["--lr"], ["--lr", "--margin"]):
        with pytest.raises(SystemExit):
            sweep.main([plan, *options, *corpora, *wrong])
        assert "come in pairs" in capsys.readouterr().err
    for wrong in ("0", "-1", "14"):
        with pytest.raises(ValueError, match=f"has {wrong}, .* rows 1 to 13"):
            sweep.main([plan, *options, *corpora, "--rows", "1", wrong])
        assert not capsys.readouterr().out
    sweep.main([plan, *options, *corpora, "--resample", "True"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" --resample True")
    assert lines[1].endswith(" --resample")


def test_lists_that_were_not_prepared_are_left_out(tmp_path, monkeypatch):
    """--lists [O] with VoxCeleb1's test archive alone."""
    commands = []

    def run(command):
        commands.append(command)
        trains = command[1].endswith("train_speaker_embeddings.py")
        if trains:
            folder = tmp_path / "am_m0.20" / "manifests"
            folder.mkdir(parents=True)
            (folder / "vox1-O.txt").touch()
        return subprocess.CompletedProcess(command, 0 if trains else 1)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    plan = str(REPOSITORY / "recipes" / "VoxCeleb" / "table1.yaml")
    corpora = ["--voxceleb2", "/v2", "--voxceleb1", "/v1", "--lists", "[O]"]
    assert sweep.main([plan, "--output", str(tmp_path), *corpora]) == 1
    lists = [word for word in commands[1] if word.endswith(".txt")]
    assert [Path(each).name for each in lists] == ["vox1-O.txt"]


def test_development_lists_choose_the_margin():
    """The paper's own numbers: m = 0.30 by VoxCeleb1-O, 0.35 by SITW dev."""
    path = REPOSITORY / "recipes" / "VoxCeleb" / "table1.yaml"
    plan = yaml.safe_load(path.read_text())
    lines = sweep.choices(plan, [row.get("paper", {}) for row in plan["rows"]])
    assert lines[3:] == [
        "| AM-Softmax | VoxCeleb1 | 0.20 of 1 "
        "| VoxCeleb1-H 2.895, VoxCeleb1-E 1.724 |",
        "| Real AM-Softmax | VoxCeleb1 | 0.30 of 4 "
        "| VoxCeleb1-H 2.812, VoxCeleb1-E 1.696 |",
        "| AM-Softmax | SITW.Dev.Core | 0.20 of 1 | SITW.Eval.Core 3.362 |",
        "| Real AM-Softmax | SITW.Dev.Core | 0.35 of 4 "
        "| SITW.Eval.Core 3.335 |",
    ]


def test_sweep_stops_with_the_status_of_a_run(tmp_path, monkeypatch, capsys):
    plan = str(REPOSITORY / "recipes" / "CNCeleb" / "table2.yaml")
    monkeypatch.setattr(
        sweep.subprocess,
        "run",
        lambda command: subprocess.CompletedProcess(command, 75),
    )
    options = ["--output", str(tmp_path), "--data_folder", "/cn"]
    assert sweep.main([plan, *options]) == 75
    assert "am_m0.10: status 75" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["VoxCeleb", "CNCeleb"])
def test_tables_are_the_papers(recipe):
    """Every number of the plan is in the paper's order: lower m first."""
    file = {"VoxCeleb": "table1.yaml", "CNCeleb": "table2.yaml"}[recipe]
    path = REPOSITORY / "recipes" / recipe / file
    plan = yaml.safe_load(path.read_text())
    rows = [row["overrides"] for row in plan["rows"]]
    margins = [row["margin"] for row in rows]
    assert margins[1:] == sorted(margins[1:5]) * 2 + sorted(margins[9:])
    # The paper's five rows in the toolkit's form; then equation 12, at the
    # same margins and where it acts like AM-Softmax at them.
    assert [row.get("form") for row in rows] == (
        [None] + ["released"] * 4 + ["paper"] * 8
    )
    assert all(
        ("paper" in row) == (i < 5) for i, row in enumerate(plan["rows"])
    )
    n_classes = {"VoxCeleb": 5994, "CNCeleb": 2793}[recipe]
    for margin, shifted in zip(margins[1:5], margins[9:], strict=True):
        assert shifted == pytest.approx(
            paper_margin_for(margin, 30.0, n_classes), abs=0.006
        )
    hparams = yaml.safe_load(
        re.sub(r"!\S*", "", (path.parent / plan["hparams"]).read_text())
    )
    assert hparams["scale"] == 30.0 and hparams["crop_seconds"] == 2.0
    best = min(
        plan["rows"][1:5],
        key=lambda row: row["paper"][plan["lists"][0]["name"]],
    )
    assert hparams["margin"] == best["overrides"]["margin"]
    assert hparams["form"] == "released"


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    """MUSAN and rooms in miniature."""
    root = tmp_path_factory.mktemp("noises")
    for i, part in enumerate(("noise", "music", "speech")):
        miniature.write(root / "musan" / part / "a" / "1.wav", VOICES[i][0])
    room = VOICES[0][0][:800] * 0.1
    room[40] = 0.9
    miniature.write(root / "rirs" / "Room001-00001.wav", room)
    return {"musan": root / "musan", "rirs": root / "rirs"}


def test_strong_voxceleb(voxceleb, noises, tmp_path, monkeypatch):
    """Noise, rooms, speeds, rising margin, averaging, then a large margin."""
    margins = []
    original = cli_train.SpeakerBrain.compute_objectives

    def watch(self, cosines, batch, stage):
        if stage == sb.Stage.TRAIN:
            margins.append(self.hparams.compute_cost.loss_fn.margin)
        return original(self, cosines, batch, stage)

    monkeypatch.setattr(cli_train.SpeakerBrain, "compute_objectives", watch)
    recipe = "recipes/VoxCeleb/hparams/ram_resnet34_strong.yaml"
    run = train(
        recipe,
        tmp_path / "strong",
        **voxceleb,
        **noises,
        number_of_epochs=3,
        average_checkpoints=2,
        margin_start=1,
        margin_end=2,
        batch_size=9,
    )
    # 23 utterances, one held out, at three speeds: 8 steps of 9 an epoch.
    per_epoch = len(margins) // 3
    # From what is worth nothing among 4 speakers at three speeds.
    rise = MarginRise(0.5, start=1, end=2, initial=math.log(12) / 32)
    expected = [rise(step / per_epoch) for step in range(len(margins))]
    assert margins == pytest.approx(expected)
    assert margins[-1] == 0.5

    # What is exported is the mean of the last two epochs.
    ends = [
        path
        for path in sorted((run / "save").glob("CKPT*"))
        if "end-of-epoch: true" in (path / "CKPT.yaml").read_text()
    ]
    best = Checkpointer(run / "save").find_checkpoint(min_key="EER").path
    assert len(ends) >= 2 and set(ends) == {*ends[-2:], best}
    states = [torch.load(path / "embedding_model.ckpt") for path in ends[-2:]]
    weights = read_folder(run / "inference").weights
    for name, value in weights.items():
        if value.is_floating_point():
            mean = (states[0][name] + states[1][name]) / 2
            assert torch.allclose(value, mean, atol=1e-6)
    rows = torch.load(run / "inference" / "classifier.ckpt")["weight"]
    assert len(rows) == 4  # the speeds' speakers are gone

    result = fine_tuned(run, voxceleb, noises, crop_seconds=1.0)
    assert 0 <= result.eer <= 100


def fine_tuned(run, voxceleb, noises, **settings):
    """Large-margin fine-tuning, then sub-mean and adaptive s-norm."""
    tuned = train(
        "recipes/VoxCeleb/hparams/ram_resnet34_strong.yaml",
        run.parent / "tuned",
        **voxceleb,
        **noises,
        **{
            "pretrained": run / "inference",
            "number_of_epochs": 1,
            "margin": 0.8,
            "margin_start": 0,
            "margin_end": 0,
            "warmup_epochs": 0,
            "speeds": [1.0],
            "average_checkpoints": 1,
            "lr": 1e-4,
            "final_lr": 2.5e-5,
            **settings,
        },
    )
    command = [
        *("--encoder", str(tuned / "inference")),
        *("--trials", str(tuned / "manifests" / "vox1-O.txt")),
        *("--data_root", str(voxceleb["voxceleb1"])),
        *("--cohort", str(tuned / "manifests" / "train.csv")),
        *("--cohort_root", str(voxceleb["voxceleb2"])),
        *("--center", "--normalise", "as-norm1", "--top_n", "3"),
        *("--output", str(run.parent / "verified")),
    ]
    return cli_verify.main(command)["vox1-O"]


def test_strong_cnceleb(cnceleb, noises, tmp_path):
    """Joined utterances are trained on, and embedded at the end.

    A run that goes on finds them, and what was lost of them is put back.
    """

    def trained():
        run = train(
            "recipes/CNCeleb/hparams/ram_resnet34_strong.yaml",
            tmp_path / "strong",
            **cnceleb,
            **noises,
        )
        return read_folder(run / "inference").weights, {
            file: (file.read_bytes(), file.stat().st_mtime_ns)
            for file in sorted((run / "manifests").rglob("*.*"))
            if file.suffix in (".csv", ".flac", ".txt")
        }

    weights, files = trained()
    joined = [file for file in files if "-join" in file.name]
    assert len(joined) == 12
    manifests = tmp_path / "strong" / "manifests"
    for lost in ([], [manifests / "train.csv", joined[0]], joined):
        for found in Checkpointer(tmp_path / "strong/save").find_checkpoints():
            if found.meta.get("epoch") != 1:
                shutil.rmtree(found.path)
        for file in lost:
            file.unlink()
        if lost == joined:
            shutil.rmtree(manifests / "joined")
        again, found = trained()
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        assert list(found) == list(files)
        assert all(found[file][0] == files[file][0] for file in files)
        assert [f for f in files if found[f] != files[f]] == sorted(lost)
        files = found


@pytest.mark.parametrize("objective", ["softmax", "am", "aam", "ram", "raam"])
def test_any_objective_takes_another_margin(objective):
    """In place: who holds the object holds the new margin; softmax has none."""
    loss_fn = make_objective(objective, margin=0.1, scale=30.0)
    give_margin(loss_fn, objective)
    expected = make_objective(objective, margin=0.4, scale=30.0)
    assert same_logits(loss_fn, expected)


def test_a_loss_that_the_yaml_names_takes_another_margin():
    """`objective` stands beside it, of another loss."""
    loss_fn = RealMargin(AdditiveAngularMargin(0.1, 30.0), "hinge")
    give_margin(loss_fn, "ram")
    expected = RealMargin(AdditiveAngularMargin(0.4, 30.0), "hinge")
    assert same_logits(loss_fn, expected)


@pytest.mark.parametrize(
    "objective, expected",
    [
        ("softmax", "softmax, scale 30"),
        ("am", "am, margin 0.2, scale 30"),
        ("ram", "ram, margin 0.2, scale 30, form hinge"),
        ("real-a.B", "real-a.B, margin 0.2, scale 30, form hinge"),
    ],
)
def test_the_objective_of_a_model_card(objective, expected):
    settings = {"margin": 0.2, "scale": 30, "form": "hinge"}
    settings["objective"] = objective
    assert cli_train.objective_of(settings) == expected


def give_margin(loss_fn, objective):
    """As the Brain of a recipe with this `objective`, a margin of 0.4."""
    brain = torch.nn.Module()
    brain.hparams = torch.nn.Module()
    brain.hparams.objective = objective
    brain.hparams.compute_cost = torch.nn.Module()
    brain.hparams.compute_cost.loss_fn = loss_fn
    cli_train.SpeakerBrain._set_margin(brain, 0.4)


def same_logits(first, second):
    cosines = torch.rand(5, 7) * 2 - 1
    targets = torch.nn.functional.one_hot(torch.arange(5), 7)
    return torch.equal(first(cosines, targets), second(cosines, targets))


def test_your_own_corpus(voxceleb, cnceleb, tmp_path):
    """A folder of speakers to encoder, report and inference folder."""
    recipe = "recipes/YourCorpus/hparams/ram_resnet34.yaml"
    run = train(
        recipe,
        tmp_path / "own",
        corpus=voxceleb["voxceleb2"] / "dev" / "aac",
        number_of_epochs=1,
    )
    assert (run / "report" / "results.md").is_file()
    assert (run / "inference" / "encoder.json").is_file()
    # From that folder on, with other speakers, and more of them.
    (tmp_path / "more").mkdir()
    for speaker in cnceleb["data_folder"].glob("*/data/*"):
        (tmp_path / "more" / speaker.name).symlink_to(speaker)
    tuned = train(
        recipe,
        tmp_path / "tuned",
        corpus=tmp_path / "more",
        number_of_epochs=1,
        pretrained=run / "inference",
        lr=1e-4,
    )
    rows = [
        len(torch.load(each / "inference" / "classifier.ckpt")["weight"])
        for each in (run, tuned)
    ]
    assert rows == [2, 4]  # two of each are held out


@pytest.mark.parametrize("corpus", ["table.csv", "kaldi"])
def test_your_own_corpus_of_parts(corpus, tmp_path):
    """From recordings of two speakers each to a report on their turns."""
    calls = miniature.calls(tmp_path / "calls", miniature.voices(6, 4))
    recipe = "recipes/YourCorpus/hparams/ram_resnet34.yaml"
    options = {"corpus": calls / corpus, "data_root": calls}
    for epochs in (1, 2):  # the second goes on with the first
        run = train(
            recipe, tmp_path / "own", number_of_epochs=epochs, **options
        )
    report = (run / "report" / "results.md").read_text()
    assert "Of 8 target trials, 8 pair" in report
    assert "No intervals over speakers" in report  # of so few of them
    for name, old, new in [
        ("kaldi/segments", " 0.000000 ", " 0.100000 "),
        ("table.csv", ",0,", ",1600,"),
    ]:
        text = (calls / name).read_text()
        assert old in text
        (calls / name).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match="only there"):
        train(recipe, tmp_path / "own", number_of_epochs=2, **options)


def test_a_run_on_shards_is_continued(voxceleb, tmp_path):
    """Its recipe packs what it prepares; the shards are made once."""
    hparams = tmp_path / "a" / "b" / "hparams"
    hparams.mkdir(parents=True)
    (tmp_path / "hparams").mkdir()
    encoder = REPOSITORY / "hparams" / "encoder.yaml"
    (tmp_path / "hparams" / encoder.name).write_text(encoder.read_text())
    own = REPOSITORY / "recipes/YourCorpus/hparams/ram_resnet34.yaml"
    before, prepare, after = re.split(
        r"^(prepare: (?:.*\n)(?: .*\n)+)", own.read_text(), flags=re.M
    )
    packing = f"""prepare: !name:speechbrain_ram.data.shards.prepare_shards
{textwrap.indent(prepare, "    ")}    data_root: !ref <data_root>
    output_dir: !ref <manifests>
    shards: {tmp_path / "shards"}
"""
    (hparams / own.name).write_text(before + packing + after)
    made = []
    for epochs in (1, 2):
        run = train(
            hparams / own.name,
            tmp_path / "run",
            corpus=voxceleb["voxceleb2"] / "dev" / "aac",
            number_of_epochs=epochs,
        )
        made.append((tmp_path / "shards" / "shard-000000.tar").stat())
    assert made[0].st_mtime_ns == made[1].st_mtime_ns
    assert "epoch: 2" in (run / "train_log.txt").read_text()
    (row, *_) = (run / "manifests" / "packed.csv").read_text().split()[1:]
    assert "shard-000000.tar#" in row


@pytest.fixture(scope="module")
def real_voxceleb(speechocean, tmp_path_factory):
    """speechocean762 in VoxCeleb's clothes: m4a, converted; and SITW's."""
    root = tmp_path_factory.mktemp("real")
    voices = miniature.real_voices("train", 24, 12)
    tested = miniature.real_voices("dev", 10, 8)
    miniature.voxceleb2(root / "m4a", voices)
    convert.convert_tree(root / "m4a", root / "v2")
    return {
        "voxceleb2": root / "v2",
        "voxceleb1": miniature.voxceleb1(root / "v1", tested[:5], tested[5:]),
        "sitw": miniature.sitw(root / "s", tested[:5], tested[5:]),
    }


@pytest.mark.real
@pytest.mark.slow
def test_voxceleb_recipe_learns_real_speech(real_voxceleb, tmp_path):
    run = train(
        "recipes/VoxCeleb/hparams/ram_resnet34.yaml",
        tmp_path / "run",
        **real_voxceleb,
        number_of_epochs=8,
        verify_every=4,
        crop_seconds=2.0,
        batch_size=24,
        warmup_steps=20,
        lr=0.003,
    )
    log = (run / "train_log.txt").read_text()
    rates = [float(rate) for rate in re.findall(r"valid EER: ([\d.e+]+)", log)]
    assert rates[-1] < 0.7 * rates[0], rates


@pytest.mark.real
@pytest.mark.slow
def test_strong_recipe_learns_real_speech(
    real_voxceleb, noises, tmp_path, capsys
):
    """All of the strong recipe, in order, on 24 people's speech."""
    run = train(
        "recipes/VoxCeleb/hparams/ram_resnet34_strong.yaml",
        tmp_path / "strong",
        **real_voxceleb,
        **noises,
        number_of_epochs=9,
        average_checkpoints=2,
        margin_start=3,
        margin_end=7,
        warmup_epochs=1,
        verify_every=3,
        crop_seconds=2.0,
        batch_size=36,
        lr=0.03,
        final_lr=0.003,
        verify_untrained=True,
    )
    said = capsys.readouterr().out
    before = float(re.search(r"EER before training: ([\d.]+)", said)[1])
    fine_tuned(run, real_voxceleb, noises, crop_seconds=6.0)
    results = tmp_path / "verified" / "vox1-O" / "results.json"
    # By plain cosine: whether a cohort of so few speakers helps is luck.
    after = json.loads(results.read_text())["systems"]["cosine"]["eer"]
    assert after < 0.8 * before, (after, before)


PAGES = [
    REPOSITORY / "docs" / "your-corpus.md",
    REPOSITORY / "recipes" / "VoxCeleb" / "README.md",
    REPOSITORY / "recipes" / "CNCeleb" / "README.md",
]
COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(
        r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S
    )
    for line in block.strip().splitlines()
]


@pytest.mark.parametrize("line", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_of_the_pages_are_understood(line, monkeypatch, capsys):
    """Options exist, files of ours are there; nothing is trained."""
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line)
    if words[0] == "torchrun":
        words[:2] = ["python"]
    if words[0] == "make":
        done = subprocess.run(
            ["make", "-n", *words[1:]], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        command = done.stdout.replace("\\\n", " ").split("recipes/sweep.py ")[1]
        command = command.splitlines()[0]
        assert sweep.main([*shlex.split(command), "--dry_run"]) == 0
        assert "train_speaker_embeddings.py" in capsys.readouterr().out
    elif words[0] == "speechbrain-ram":
        result = CliRunner().invoke(main, words[1:])
        assert "vox2/dev/aac' does not exist" in result.stderr
    elif words[1] == "verify_speakers.py":
        assert cli_verify.parse(words[2:]).trials
    else:
        assert words[1] == "train_speaker_embeddings.py"
        file, _, overrides = sb.parse_arguments(words[2:])
        with open(file, encoding="utf-8") as stream:
            resolve_references(stream, overrides, overrides_must_match=True)


def test_a_learning_curve_has_its_floor_and_readable_ticks(tmp_path):
    """Equation 12, 20 classes: the loss never goes below ln 20 = 3.00.

    Both numbers that tell it are rounded in the log; the last ones give 2.99.
    """
    log = tmp_path / "train_log.txt"
    log.write_text(
        "".join(
            f"epoch: {i}, lr: 1.00e-02 - train loss: {9 - i}, "
            f"train above_floor: {6.0 - i + (0.01 if i == 4 else 0)} - "
            f"valid loss: {9.5 - i}, "
            f"valid error: {60 - 9 * i}, valid EER: {30 - 5 * i}\n"
            for i in (1, 2, 3, 4)
        )
    )
    plot_training.plot(plot_training.read_log(log), tmp_path / "curve.png")
    figure = plot_training.plt.gcf()
    above, below = figure.axes
    texts = [text.get_text() for text in above.get_legend().get_texts()]
    assert "least possible loss, 3.0" in texts
    low, high = below.get_ylim()
    ticks = [y for y in below.get_yticks() if low <= y <= high]
    assert {10.0, 20.0, 50.0} <= set(ticks)
    plot_training.plt.close(figure)
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "rates, ticks",
    [
        ([95, 21.56], {20, 30, 50, 70, 100}),
        ([47, 38.2], {30, 50}),
        ([99.9, 0.8], {0.5, 1, 2, 5, 10, 20, 50, 100}),
        ([100, 100], {100}),
        ([5, 0.0], {5}),  # which no logarithm shows
        ([0.3, 0.3], {0.3}),
    ],
)
def test_a_learning_curve_names_its_lowest_and_highest_rates(
    tmp_path, rates, ticks
):
    log = [
        {"epoch": i, "train loss": 1.0, "valid loss": 1.0, "valid EER": rate}
        for i, rate in enumerate(rates)
    ]
    plot_training.plot(log, tmp_path / "curve.png")
    figure = plot_training.plt.gcf()
    axes = figure.axes[1]
    low, high = axes.get_ylim()
    shown = [
        float(label.get_text())
        for y, label in zip(
            axes.get_yticks(), axes.get_yticklabels(), strict=True
        )
        if low <= y <= high
    ]
    plot_training.plt.close(figure)
    assert set(shown) == ticks
