"""Training end to end: utterances a second that a user gets, beside two peers.

    SPEECHOCEAN762=FOLDER python benchmarks/bench_training.py [--quick]
    ... bench_training.py --sizes full:64 --precision bf16 --device cuda
    ... bench_training.py --wespeaker CHECKOUT

ours       the command of recipes/YourCorpus: files, loader, checks,
           diagnostics, logging and all, on a folder of WAV files
plain      the same network in a plain SpeechBrain Brain, with the host's
           loader, Fbank, Classifier and LogSoftmaxWrapper, default layout
bare       a loop of forward pass, loss, backward pass and step over our
           loader, whose worker lives on, as ours lays tensors out: what our
           Brain adds is the difference to ours
wespeaker  WeSpeaker's ResNet34 and AddMarginProduct in that bare loop, from
           a checkout of theirs

Each run is a process of its own that trains a few epochs and reports
utterances a second of all but the first two; runs alternate. The first epoch
takes its memory from the system, and the second of ours copies it once more,
after the worker for the validation was forked.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import soundfile
import speechbrain as sb
import torch
from bench_loader import CROP, RATE, theirs
from harness import WIDTHS, Table, add_sizes, wespeaker_importable
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import LogSoftmaxWrapper
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_ram.data.audio import read_audio
from speechbrain_ram.data.dataset import speaker_datasets
from speechbrain_ram.data.manifest import read_manifest
from speechbrain_ram.losses import make_objective
from speechbrain_ram.resnet import ResNet34
from speechbrain_ram.training.faults import Batch, SkipUnreadable
from speechbrain_ram.training.layout import set_layout
from speechbrain_ram.utils import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "YourCorpus" / "hparams" / "ram_resnet34.yaml"


def main() -> None:
    """Measure, print and write the table."""
    args = parse_arguments()
    if args.child:
        print_rates(args)
        return
    if "SPEECHOCEAN762" not in os.environ:
        sys.exit("SPEECHOCEAN762 must name the corpus folder (with train/).")
    suffix = "" if args.device == "cpu" else "-cuda"
    table = Table(
        f"training{suffix}",
        "Training, end to end",
        "Utterances a second of 2 s crops, one loader worker; medians over "
        "alternated runs. See `benchmarks/bench_training.py` for the rows.",
        ["ResNet34", "batch", "precision", "row", "utterances/s", "x plain"],
        args.output,
    )
    rows = ["plain", "bare", "ours", *(["wespeaker"] if args.wespeaker else [])]
    sizes = [("half", 16)] if args.quick else args.sizes
    rounds = 2 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(corpus, 64 if args.quick else args.utterances)
        for width, batch in sizes:
            for precision in args.precision:
                rates = {row: [] for row in rows}
                for _ in range(rounds):
                    for row in rows:
                        found = measure(
                            row, corpus, width, batch, precision, args
                        )
                        rates[row] += found
                middle = {
                    row: statistics.median(found)
                    for row, found in rates.items()
                }
                for row, found in rates.items():
                    table.note(
                        f"{width} N={batch} {precision} {row}",
                        [1 / rate for rate in found],
                    )
                    table.add(
                        width,
                        batch,
                        precision,
                        row,
                        f"{middle[row]:.1f}",
                        f"{middle[row] / middle['plain']:.2f}",
                    )
    table.write()


def write_corpus(folder: Path, size: int) -> None:
    """WAV files of more than a crop, of many speakers."""
    source = Path(os.environ["SPEECHOCEAN762"]) / "train"
    left = size * 10 // 9  # the recipe holds a tenth out
    pairs = [
        (n // 2, path)  # two of each speaker, then two more
        for speaker in source.iterdir()
        for n, path in enumerate(sorted(speaker.glob("*.ogg")))
    ]
    for _, path in sorted(pairs):
        if left and soundfile.info(str(path)).frames > CROP + RATE // 10:
            target = folder / path.parent.name / f"{path.stem}.wav"
            target.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(target, read_audio(path).numpy(), RATE)
            left -= 1


def measure(row, corpus, width, batch, precision, args) -> list[float]:
    """Utterances a second of each epoch but the first two."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ["--child", row, "--corpus", str(corpus)]
        command += ["--sizes", f"{width}:{batch}", "--precision", precision]
        command += ["--device", args.device, "--epochs", str(args.epochs)]
        if args.wespeaker:
            command += ["--wespeaker", args.wespeaker]
        if row == "ours":
            command = ours(corpus, width, batch, precision, args, output)
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"'{row}' failed:\n{done.stderr[-2000:]}")
        said = done.stdout
        if row == "ours":
            said = (Path(output) / "train_log.txt").read_text()
    rates = re.findall(r"utterances/s: ([\d.e+]+)", said)
    assert len(rates) == args.epochs, said
    return [float(rate) for rate in rates[2:]]


def ours(corpus, width, batch, precision, args, output) -> list[str]:
    """The command that a user types."""
    channels = ",".join(map(str, WIDTHS[width]))
    settings = {
        "corpus": corpus,
        "output_folder": output,
        "channels": f"[{channels}]",
        "batch_size": batch,
        "precision": precision,
        "number_of_epochs": args.epochs,
        "verify_every": args.epochs,
        "verify_untrained": False,
        "device": args.device,
    }
    script = str(ROOT / "train_speaker_embeddings.py")
    options = [f"--{key}={value}" for key, value in settings.items()]
    return [sys.executable, script, str(RECIPE), *options]


# -- The peers, in processes of their own ---------------------------------


def print_rates(args) -> None:
    """Train the peer and print a line an epoch."""
    torch.manual_seed(0)
    width, batch = args.sizes[0]
    with tempfile.TemporaryDirectory() as output:
        # The manifests that the recipe makes, without its held-out speakers.
        with open(RECIPE, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(
                file, {"corpus": args.corpus, "output_folder": output}
            )
        manifests = hparams["prepare"]()
        if args.child == "plain":
            train_plain(manifests[0], args, width, batch)
        else:
            keep_freed_memory()
            train_bare(manifests, args, width, batch)


class Plain(sb.Brain):
    """As small as a Brain can be."""

    def compute_forward(self, batch, stage):
        """Waveforms to cosines."""
        waveforms, lengths = batch.to(self.device).sig
        feats = self.modules.compute_features(waveforms)
        feats = self.modules.mean_var_norm(feats, lengths)
        return self.modules.classifier(self.modules.embedding_model(feats))

    def compute_objectives(self, cosines, batch, stage):
        """The loss."""
        return self.hparams.compute_cost(cosines, batch.spk_id_encoded.data)

    def on_stage_start(self, stage, epoch=None):
        """Start the clock."""
        self.started = time.perf_counter()
        self.seen = 0

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Count."""
        self.seen += len(outputs)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Print."""
        seconds = time.perf_counter() - self.started
        print(f"utterances/s: {self.seen / seconds}", flush=True)


def optimiser(parameters):
    """The recipe's."""
    return torch.optim.SGD(
        parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4
    )


def loss_function():
    """The recipe's."""
    return LogSoftmaxWrapper(make_objective("ram", 0.5, 30.0))


def train_plain(manifest, args, width, batch):
    """SpeechBrain's parts in a plain Brain."""
    rows = [
        row._replace(wav=str(row.path(args.corpus)))
        for row in read_manifest(manifest)
    ]
    brain = Plain(
        modules={
            "compute_features": Fbank(sample_rate=RATE, n_mels=80, n_fft=512),
            "mean_var_norm": InputNormalization(norm_type="sentence"),
            "embedding_model": ResNet34(channels=WIDTHS[width]),
            "classifier": Classifier(
                512, out_neurons=len({row.spk_id for row in rows})
            ),
        },
        opt_class=optimiser,
        hparams={"compute_cost": loss_function()},
        run_opts={
            "device": args.device,
            "precision": args.precision[0],
            "noprogressbar": True,
        },
    )
    brain.fit(
        EpochCounter(args.epochs),
        theirs(rows),
        train_loader_kwargs={
            "batch_size": batch,
            "num_workers": 1,
            "persistent_workers": True,  # in long epochs starts do not count
            "shuffle": True,
        },
    )


def train_bare(manifests, args, width, batch):
    """Ours without a Brain, or WeSpeaker's network and head."""
    device = torch.device(args.device)
    data, _, labels = speaker_datasets(*manifests, args.corpus)
    features = Fbank(sample_rate=RATE, n_mels=80, n_fft=512).to(device)
    normalise = InputNormalization(norm_type="sentence", epsilon=1e-3)
    normalise.to(device)
    if args.child == "wespeaker":
        encoder, head = wespeaker(args.wespeaker, width, len(labels))
    else:
        encoder = ResNet34(channels=WIDTHS[width])
        set_layout(encoder, args.device, None)  # as the recipe does
        head = Head(Classifier(512, out_neurons=len(labels)))
    encoder.to(device).train()
    head.to(device)
    optimizer = optimiser([*encoder.parameters(), *head.parameters()])
    half = partial(
        torch.autocast,
        device.type,
        torch.bfloat16,
        enabled=args.precision[0] == "bf16",
    )
    loader = torch.utils.data.DataLoader(
        SkipUnreadable(data),
        batch_size=batch,
        shuffle=True,
        num_workers=1,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        collate_fn=Batch,
    )
    for epoch in range(1, args.epochs + 1):
        data.set_epoch(epoch)
        started, seen = time.perf_counter(), 0
        for item in loader:
            item = item.data.to(device)
            waveforms, lengths = item.sig
            optimizer.zero_grad()
            with half():
                feats = normalise(features(waveforms), lengths)
                embeddings = encoder(feats)
            if isinstance(embeddings, tuple):
                embeddings = embeddings[-1]
            head(embeddings.float(), item.spk_id_encoded.data).backward()
            optimizer.step()
            seen += len(waveforms)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        print(f"utterances/s: {seen / seconds}", flush=True)


class Head(torch.nn.Module):
    """SpeechBrain's classifier and loss."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.loss = classifier, loss_function()

    def forward(self, embeddings, targets):
        """The loss of a batch."""
        return self.loss(self.classifier(embeddings), targets)


class TheirHead(torch.nn.Module):
    """WeSpeaker's projection, with the loss that their trainer takes."""

    def __init__(self, projection):
        super().__init__()
        self.projection = projection

    def forward(self, embeddings, targets):
        """The loss of a batch."""
        targets = targets.squeeze(1)
        logits = self.projection(embeddings, targets)
        return torch.nn.functional.cross_entropy(logits, targets)


def wespeaker(checkout, width, n_speakers):
    """WeSpeaker's ResNet34 of this width, and AM-Softmax."""
    wespeaker_importable(checkout)
    from wespeaker.models import projections, resnet

    encoder = resnet.ResNet(
        resnet.BasicBlock,
        [3, 4, 6, 3],
        m_channels=WIDTHS[width][0],
        feat_dim=80,
        embed_dim=512,
    )
    head = projections.AddMarginProduct(512, n_speakers, scale=30.0)
    return encoder, TheirHead(head)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="half:16, few steps")
    add("--output", help="folder of the table")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    add("--rounds", type=int, default=3)
    add("--epochs", type=int, default=4, help="the first two do not count")
    add("--utterances", type=int, default=640, help="in an epoch, about")
    add("--wespeaker", metavar="CHECKOUT", help="their repository's folder")
    add_sizes(parser)
    add("--child", help=argparse.SUPPRESS)  # the row that this process is
    add("--corpus", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
