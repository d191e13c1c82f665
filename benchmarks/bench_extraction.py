"""Embedding recordings of mixed length, against one at a time.

    SPEECHOCEAN762=FOLDER python benchmarks/bench_extraction.py [--quick]

All rows read the same files and run the same half-width ResNet34, each in a
process of its own; the result of each is compared with that of the first row.
The last row is what the exported encoder and the scripts do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import Apart, Table, alternate, matrix_product
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_ram.data.audio import read_audio
from speechbrain_ram.resnet import ResNet34, folded
from speechbrain_ram.utils import keep_freed_memory
from speechbrain_ram.verification.embedder import Embedder
from speechbrain_ram.verification.embeddings import extract

CHANNELS = (16, 32, 64, 128)

LARGE = {"threads": 1, "batch_seconds": 60.0}
CASES = {
    "one by one": {"one_by_one": True},
    "one by one, channels_last": {"one_by_one": True, "channels_last": True},
    "extract": {},
    "extract, one thread": {"threads": 1},
    "extract, one thread, 6,000 frames a batch": LARGE,
    "extract, folded": {"fold": True},
    "extract, folded, one thread": {"fold": True, "threads": 1},
    "extract, folded, memory kept": {"fold": True, "keep": True},
}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer files")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--files", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="folder of the table")
    args = parser.parse_args()
    if "SPEECHOCEAN762" not in os.environ:
        sys.exit("SPEECHOCEAN762 must name the corpus folder (with dev/).")
    root = Path(os.environ["SPEECHOCEAN762"]) / "dev"
    files = sorted(str(p.relative_to(root)) for p in root.glob("*/*.ogg"))
    wanted = 40 if args.quick else args.files
    files = files[:: max(1, len(files) // wanted)][:wanted]
    lengths = [len(read_audio(root / file)) / 16000 for file in files]
    suffix = "" if args.device == "cpu" else f"-{args.device}"
    table = Table(
        f"extraction{suffix}",
        "Extracting embeddings",
        f"{len(files)} recordings of real speech, {min(lengths):.1f} to "
        f"{max(lengths):.1f} s, {statistics.mean(lengths):.1f} s on average, "
        "Ogg Vorbis; half-width ResNet34 (16-32-64-128), float32; reading and "
        "front-end included. Difference: the largest of any coordinate, "
        "against the first row, embeddings scaled to length 1. The last "
        "column holds the network's operations against what a product of two "
        "matrices of 1,536 rows reaches on the same cores.",
        [
            "extraction",
            "utterances/s",
            "against the first",
            "difference",
            "share of a matrix product's",
        ],
        args.output,
    )
    cases = {
        name: Apart(Extraction, files, root, args.device, **options)
        for name, options in CASES.items()
    }
    seconds = alternate(
        cases, 2 if args.quick else args.rounds, device=args.device
    )
    results = {name: unit(case.ask("result")) for name, case in cases.items()}
    operations = cases["one by one"].ask("operations") * sum(lengths)
    for case in cases.values():
        case.close()
    roof = matrix_product(args.device)
    base = statistics.median(seconds["one by one"])
    for name, values in seconds.items():
        table.note(name, [value / sum(lengths) for value in values])
        middle = statistics.median(values)
        difference = np.abs(results[name] - results["one by one"]).max()
        table.add(
            name,
            f"{len(files) / middle:.1f}",
            f"{base / middle:.2f}",
            f"{difference:.1e}",
            f"{100 * operations / middle / roof:.0f} %",
        )
    table.write()


class Extraction:
    """One way of embedding all files, with the same network."""

    def __init__(
        self,
        files,
        root,
        device,
        one_by_one=False,
        channels_last=False,
        fold=False,
        keep=False,
        **options,
    ):
        if keep:
            keep_freed_memory()
        self.device = device
        torch.manual_seed(0)
        network = settled(ResNet34(channels=CHANNELS))
        if channels_last:
            network.to(memory_format=torch.channels_last)
        if fold:
            network = folded(network)
        self.network = network.to(device)
        encode = Encoder(self.network, device)
        if one_by_one:
            self.run = partial(by_loop, encode, files, root)
        else:
            embedder = Embedder(encode, device=device, **options)
            self.run = lambda: (
                extract(embedder, files, root, progress=False).matrix
            )

    def __call__(self) -> None:
        """Embed everything."""
        self.matrix = self.run()

    def result(self) -> np.ndarray:
        """The embeddings, [files, E]."""
        return self.matrix

    def operations(self) -> float:
        """Floating-point operations for a second of audio."""
        feats = torch.zeros(1, 400, 80, device=self.device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.network(feats)
        return counter.get_total_flops() / 4


def settled(network: ResNet34) -> ResNet34:
    """Give the batch norms statistics, as training would."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 200, 80))
    return network.eval()


class Encoder:
    """Waveforms to embeddings, SpeechBrain's front-end."""

    def __init__(self, network, device):
        self.device = device
        self.fbank = Fbank(sample_rate=16000, n_mels=80, n_fft=512).to(device)
        self.normalise = InputNormalization(norm_type="sentence").to(device)
        self.network = network.to(device)

    def __call__(self, waveforms, lengths):
        waveforms, lengths = waveforms.to(self.device), lengths.to(self.device)
        feats = self.normalise(self.fbank(waveforms), lengths)
        return self.network(feats, lengths).squeeze(1)


@torch.inference_mode()
def by_loop(encode, files, root) -> np.ndarray:
    """What a first script does."""
    rows = []
    for file in files:
        waveform = read_audio(root / file)
        row = encode(waveform.unsqueeze(0), torch.ones(1))
        rows.append(row.float().cpu().numpy())
    return np.concatenate(rows)


def unit(matrix: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
