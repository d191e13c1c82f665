"""What the margin diagnostics cost a training step, on and off by turns.

    OMP_NUM_THREADS=1 python benchmarks/bench_diagnostics.py [--quick]
        [--device cuda]

The step is ResNet34, classifier, RAM-Softmax, backward and Adam on features
of 2 s crops; the front-end is left out, which makes the share larger.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from harness import Table, alternate
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import LogSoftmaxWrapper

from speechbrain_ram.losses import make_objective
from speechbrain_ram.resnet import ResNet34
from speechbrain_ram.training.diagnostics import MarginDiagnostics

# channels, classes, batch, rounds
SIZES = [
    ((16, 16, 32, 64), 125, 64, 21),
    ((16, 32, 64, 128), 5_994, 64, 11),
    ((16, 16, 32, 64), 100_000, 64, 5),
]


class Step:
    """A training step on random features, with or without diagnostics."""

    def __init__(self, channels, classes: int, batch: int, device: str):
        torch.manual_seed(0)
        self.encoder = ResNet34(channels=channels).to(
            device, memory_format=torch.channels_last
        )
        self.classifier = Classifier(512, out_neurons=classes).to(device)
        self.feats = torch.randn(batch, 200, 80, device=device)
        self.targets = torch.randint(classes, (batch, 1), device=device)
        loss_fn = make_objective("ram", margin=0.3)
        self.cost = LogSoftmaxWrapper(loss_fn)
        self.diagnostics = MarginDiagnostics(loss_fn)
        self.parameters = [
            *self.encoder.parameters(),
            *self.classifier.parameters(),
        ]
        self.optimiser = torch.optim.Adam(self.parameters)

    def __call__(self, diagnose: bool) -> None:
        with torch.autocast(self.feats.device.type, torch.bfloat16):
            embeddings = self.encoder(self.feats)
        cosines = self.classifier(embeddings.float())
        if diagnose:
            self.diagnostics.watch(cosines, self.targets)
        self.cost(cosines, self.targets).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", help="folder, benchmarks/results if none")
    args = parser.parse_args()
    suffix = "" if args.device == "cpu" else f"-{args.device}"
    table = Table(
        f"diagnostics{suffix}",
        "Margin diagnostics, cost a step",
        "Training step with diagnostics on against off, by turns; the ratio "
        "is the median over rounds of on / off, with quartiles.",
        ["channels", "classes", "batch", "off, s", "on, s", "on / off"],
        args.output,
    )
    for channels, classes, batch, rounds in SIZES[: 1 if args.quick else None]:
        step = Step(channels, classes, batch, args.device)
        seconds = alternate(
            {"off": lambda s=step: s(False), "on": lambda s=step: s(True)},
            rounds,
            device=args.device,
        )
        ratios = [
            on / off
            for on, off in zip(seconds["on"], seconds["off"], strict=True)
        ]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.add(
            "-".join(map(str, channels)),
            f"{classes:,}",
            batch,
            f"{statistics.median(seconds['off']):.3f}",
            f"{statistics.median(seconds['on']):.3f}",
            f"{middle:.3f} ({low:.3f} to {high:.3f})",
        )
        for name, values in seconds.items():
            table.note(f"{classes}/{name}", values)
    table.write()


if __name__ == "__main__":
    main()
