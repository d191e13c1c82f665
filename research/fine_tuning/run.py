#!/usr/bin/env python3
"""Fine-tune an imported encoder on speakers of one's own, on real speech.

    python research/fine_tuning/run.py DATA_FOLDER [--work FOLDER] [--threads N]

DATA_FOLDER holds train/, dev/ and dev_trials.txt, see recipes/SpeechOcean762.
Every other training speaker trains a first encoder, which is written under
WeSpeaker's names and imported again, as one that comes from elsewhere. The
other half of the speakers is one's own corpus: --pretrained fine-tunes on it,
as docs/import.md says. The dev speakers, in no half, judge before and after;
the last epoch counts. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from speechbrain_ram.export.folder import read_folder
from speechbrain_ram.export.importers import theirs
from speechbrain_ram.resnet import ResNet34

ROOT = Path(__file__).resolve().parents[2]
START = "from speechbrain_ram.cli.main import main; main()"
CHANNELS = (16, 16, 32, 64)
CONFIG = """\
dataset_args:
  resample_rate: 16000
  fbank_args: {num_mel_bins: 80, frame_shift: 10, frame_length: 25, dither: 1.0}
model: ResNet34
model_args:
  feat_dim: 80
  embed_dim: 256
  pooling_func: TSTP
  two_emb_layer: False
projection_args: {project_type: add_margin, scale: 30.0}
"""
#: What all trainings share: the end of the schedule is the result.
COMMON = "--average_checkpoints 1 --verify_every 99 --verify_untrained False"
COMMON += " --batch_size 16"
FIRST = "--objective am --margin 0.2 --lr 0.05 --final_lr 1.0e-3"
FIRST += " --number_of_epochs 12 --crop_seconds 1.5"
#: The settings of docs/import.md, in which the margin suits 56 speakers.
TUNED = "--objective ram --margin 0.34 --lr 0.1 --final_lr 1.0e-3"
TUNED += " --frozen_epochs 2 --encoder_lr_factor 0.05 --crop_seconds 3.0"
TUNED += " --number_of_epochs 6"


def main() -> None:
    """Train what is not trained yet, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_folder", type=Path)
    parser.add_argument(
        "--work", type=Path, default=Path("results/fine_tuning")
    )
    parser.add_argument("--threads", type=int, help="of PyTorch, for each run")
    args = parser.parse_args()
    work = args.work.resolve()
    data = args.data_folder.resolve()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ["PYTHONPATH"] = str(ROOT)
    for first, part in enumerate(("elsewhere", "own")):
        link_speakers(data / "train", first, work / part)

    blank = work / "blank"
    if not (blank / "encoder.json").exists():
        torch.manual_seed(1)
        through_their_names(new_network(), work / "blank_model", blank)
    train(work, data, "elsewhere", "first", blank, FIRST)
    imported = work / "imported"
    if not (imported / "encoder.json").exists():
        network = new_network()
        found = read_folder(work / "first" / "inference")
        network.load_state_dict(dict(found.weights))
        through_their_names(network, work / "model", imported)
    verify(work, data, "before", imported)
    train(work, data, "own", "tuned", imported, TUNED)
    verify(work, data, "tuned", work / "tuned" / "inference")
    scores = [
        f"{name}={work}/scores/{name}/dev_trials/scores.txt"
        for name in ("before", "tuned")
    ]
    command("verify", "--scores", *scores, "--output", str(work / "comparison"))


def link_speakers(source: Path, first: int, folder: Path) -> None:
    """Every other speaker's folder, of links."""
    for speaker in sorted(source.iterdir())[first::2]:
        target = folder / speaker.name
        if not target.exists():
            target.mkdir(parents=True)
            for path in speaker.iterdir():
                (target / path.name).symlink_to(path.resolve())


def new_network() -> ResNet34:
    """As WeSpeaker's, of the size of CONFIG."""
    return ResNet34(
        channels=CHANNELS,
        embedding_dim=256,
        deviation="sample",
        norm_embedding=False,
    )


def through_their_names(network: ResNet34, model: Path, folder: Path) -> None:
    """Write a network as WeSpeaker would, and import that."""
    state = {
        theirs(name): value for name, value in network.state_dict().items()
    }
    state["projection.weight"] = torch.zeros(1, network.embedding_dim)
    model.mkdir(parents=True, exist_ok=True)
    torch.save(state, model / "avg_model.pt")
    (model / "config.yaml").write_text(CONFIG, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    command("import", "wespeaker", str(model), "-o", str(folder))


def train(work, data, corpus, name, start, settings) -> None:
    """One training, unless it has come to its end."""
    if (work / name / "report" / "results.md").exists():
        return
    command(
        *["train", "own", "--corpus", str(work / corpus)],
        *["--trials", str(data / "dev_trials.txt")],
        *["--trials_root", str(data / "dev"), "--pretrained", str(start)],
        *["--output_folder", str(work / name)],
        *[*COMMON.split(), *settings.split()],
    )


def verify(work, data, name, encoder) -> None:
    """Scores of the dev trials by one encoder."""
    folder = work / "scores" / name
    if not (folder / "dev_trials" / "scores.txt").exists():
        command(
            *["verify", "--encoder", str(encoder), "--output", str(folder)],
            *["--trials", str(data / "dev_trials.txt")],
            *["--data_root", str(data / "dev")],
        )


def command(*arguments: str) -> None:
    """What a user types."""
    print("speechbrain-ram", *arguments, flush=True)
    subprocess.run(
        [sys.executable, "-c", START, *arguments],
        check=True,
    )


if __name__ == "__main__":
    main()
