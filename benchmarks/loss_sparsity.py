"""How many classes a real margin lets the backward pass skip, over training.

    SPEECHOCEAN762=FOLDER python benchmarks/loss_sparsity.py

Real speech: statistics (mean and deviation of 80 log Mel bands over 2 s
crops) of the 125 training speakers of speechocean762, each at three speeds,
which makes 375 classes. A small network embeds them and is trained with the
fused loss; every few epochs we count, on training batches, the (sample,
class) pairs that break the margin, the classes that some sample of the batch
breaks it with (all that the fused backward visits), and the blocks of 16
neighbouring classes in which there is one (what a kernel could skip).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
from harness import Table
from speechbrain.lobes.features import Fbank
from tqdm import tqdm

from speechbrain_ram.data.audio import read_audio
from speechbrain_ram.losses import make_objective
from speechbrain_ram.training.fused import FusedMarginClassifier

SPEEDS = (1.0, 0.9, 1.1)
CROPS, CROP_SAMPLES = 3, 32_000
BATCH, BLOCK = 512, 16
EPOCHS = (0, 1, 2, 5, 10, 20)
CASES = [
    ("ram", "hinge", 0.2),
    ("ram", "hinge", 0.3),
    ("ram", "paper", 0.3),
]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="folder of the table")
    args = parser.parse_args()
    if "SPEECHOCEAN762" not in os.environ:
        sys.exit("SPEECHOCEAN762 must name the corpus folder (with train/).")
    torch.manual_seed(0)
    x, labels = statistics(Path(os.environ["SPEECHOCEAN762"]) / "train")
    n_classes = int(labels.max()) + 1
    table = Table(
        "loss_sparsity",
        "What a real margin leaves to do",
        f"{len(x):,} crops of 2 s of real speech, {n_classes} classes (125 "
        "speakers of speechocean762 at three speeds), a two-layer network on "
        "statistics of log Mel bands, scale 30, batches of "
        f"{BATCH}. Pairs: the share of (sample, class) pairs that break the "
        "margin, which is also the share of classes that the backward pass "
        "of one sample visits. Classes: the share that it visits for a batch "
        f"of 64 or 512. Blocks: of {BLOCK} neighbouring classes.",
        [
            "loss",
            "margin",
            "epoch",
            "accuracy",
            "pairs",
            "classes, N = 64",
            "classes, N = 512",
            "blocks, N = 64",
        ],
        args.output,
    )
    for objective, form, margin in CASES:
        train(table, x, labels, n_classes, objective, form, margin)
    table.write()


def statistics(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of log Mel bands of crops, and class indices."""
    fbank = Fbank(sample_rate=16000, n_mels=80)
    speakers = sorted(path for path in folder.iterdir() if path.is_dir())
    rows, labels = [], []
    for speaker, path in enumerate(tqdm(speakers, desc="features")):
        for file in sorted(path.iterdir()):
            waveform = read_audio(file)
            for index, speed in enumerate(SPEEDS):
                sound = waveform
                if speed != 1:
                    sound = torchaudio.functional.resample(
                        waveform, round(100 * speed), 100
                    )
                crops = torch.stack([random_crop(sound) for _ in range(CROPS)])
                feats = fbank(crops)
                rows.append(torch.cat([feats.mean(1), feats.std(1)], dim=1))
                labels += [speaker * len(SPEEDS) + index] * CROPS
    x = torch.cat(rows)
    return (x - x.mean(0)) / x.std(0), torch.tensor(labels)


def random_crop(waveform: torch.Tensor) -> torch.Tensor:
    """Two seconds from anywhere; short ones repeated."""
    while len(waveform) < CROP_SAMPLES:
        waveform = torch.cat([waveform, waveform])
    start = int(torch.randint(len(waveform) - CROP_SAMPLES + 1, ()))
    return waveform[start : start + CROP_SAMPLES]


def train(table, x, labels, n_classes, objective, form, margin) -> None:
    """One training; a row of the table at each of EPOCHS."""
    torch.manual_seed(1)
    embed = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], 512),
        torch.nn.ReLU(),
        torch.nn.BatchNorm1d(512),
        torch.nn.Linear(512, 256),
        torch.nn.BatchNorm1d(256),
    )
    loss_fn = make_objective(objective, margin, 30.0, form)
    classifier = FusedMarginClassifier(256, n_classes, loss_fn)
    optimizer = torch.optim.Adam(
        [*embed.parameters(), *classifier.parameters()], lr=2e-3
    )
    for epoch in range(EPOCHS[-1] + 1):
        if epoch in EPOCHS:
            table.add(
                f"{objective} {form}",
                margin,
                epoch,
                *shares(embed, classifier, x, labels, margin),
            )
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            classifier(embed(x[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def shares(embed, classifier, x, labels, margin) -> list[str]:
    """Accuracy, then what breaks the margin in 10 random batches."""
    right, violated = [], []
    for batch in torch.randperm(len(x)).split(BATCH)[:10]:
        cosines = classifier(embed(x[batch])).squeeze(1)
        own = cosines.gather(1, labels[batch].unsqueeze(1))
        right.append(cosines.argmax(1) == labels[batch])
        rivals = F.one_hot(labels[batch], cosines.shape[1]) == 0
        violated.append((cosines > own - margin) & rivals)
    violated = torch.stack(violated)  # [10, N, C]
    by_64 = violated.unflatten(1, (-1, 64)).any(dim=2).flatten(0, 1)
    whole = by_64[:, : by_64.shape[1] // BLOCK * BLOCK]
    values = [
        torch.cat(right).float().mean(),
        violated.float().mean(),
        by_64.float().mean(),
        violated.any(dim=1).float().mean(),
        whole.unflatten(1, (-1, BLOCK)).any(dim=2).float().mean(),
    ]
    return [f"{100 * float(value):.1f} %" for value in values]


if __name__ == "__main__":
    main()
