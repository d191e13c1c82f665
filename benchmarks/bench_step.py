"""One training step against the same network through SpeechBrain's stock path.

    OMP_NUM_THREADS=2 python benchmarks/bench_step.py [--quick]
    python benchmarks/bench_step.py --device cuda --sizes full:64 full:512

The step is front-end, ResNet34, classifier of 5,994 speakers, loss, backward,
Adam, on crops of 2 s. Stock: SpeechBrain's Fbank, default memory layout,
Classifier, one-hot LogSoftmaxWrapper. The other rows say what they change. The
recipes train with the faster layout, memory that is kept and, below 10,000
speakers, the stock loss; what they reach end to end, ``bench_training.py``
measures. Each row is a process of
its own, because how memory is kept is a process's. On a CPU the rows run by
turns, since other programs do too; on a GPU one after the other, since all of
them do not fit into its memory. A second table says where the time of the first
and last row goes.
"""

from __future__ import annotations

import argparse
import os
import statistics
from contextlib import nullcontext
from functools import partial

import torch
from harness import (
    WIDTHS,
    Apart,
    Table,
    add_sizes,
    alternate,
    clock,
    matrix_product,
)
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import LogSoftmaxWrapper
from speechbrain.processing.features import InputNormalization
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_ram.losses import make_objective
from speechbrain_ram.resnet import ResNet34
from speechbrain_ram.training.fused import FusedMarginClassifier
from speechbrain_ram.utils import keep_freed_memory

# What deterministic products on a GPU need, before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SPEAKERS, SAMPLES = 5_994, 32_000

STEPS = {
    "stock": {},
    "channels_last": {"channels_last": True},
    "channels_last, deterministic": {
        "channels_last": True,
        "deterministic": True,
    },
    "channels_last, fused loss": {"channels_last": True, "fused": True},
}
# The same, with the scripts' way of keeping memory.
KEPT = {
    "channels_last, fused loss, memory kept": {
        "channels_last": True,
        "fused": True,
        "keep": True,
    },
}
# A CPU without bfloat16 instructions emulates them, 10 times slower.
HALF = {"channels_last, bf16": {"channels_last": True, "bf16": True}}
COMPILED = {
    "channels_last, bf16, torch.compile": {
        "channels_last": True,
        "bf16": True,
        "compiled": True,
    }
}


def main() -> None:
    """Measure, print and write the tables."""
    args = parse_arguments()
    device = args.device
    steps = dict(STEPS)
    if device == "cuda":
        steps |= {**HALF, **COMPILED}
    else:
        steps |= KEPT
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            steps |= HALF
    suffix = "" if device == "cpu" else f"-{device}"
    table = Table(
        f"step{suffix}",
        "The training step",
        "Utterances a second of one step on 2 s crops, 5,994 speakers; median "
        "over rounds. On a CPU they alternate the rows; on a GPU one row "
        "follows the other.",
        [
            "ResNet34",
            "batch",
            "step",
            "utterances/s",
            "against stock",
            "GFLOP/s",
            "share of a matrix product's",
        ],
        args.output,
    )
    profile = Table(
        f"step_profile{suffix}",
        "Where the time of a step goes",
        "Milliseconds of each stage, by turns with a synchronisation between "
        "stages; the backward pass is of encoder, classifier and loss.",
        ["ResNet34", "batch", "step", *Step.STAGES],
        args.output,
    )
    ceilings = {half: matrix_product(device, half) for half in (False, True)}
    for width, batch in [("half", 16)] if args.quick else args.sizes:
        rounds = 3 if args.quick else args.rounds
        profiled = () if args.quick else (list(steps)[0], list(steps)[-1])
        seconds, operations, stages = {}, {}, {}
        each = [steps] if device == "cpu" else [{n: steps[n]} for n in steps]
        for some in each:
            try:
                measure(
                    some,
                    (WIDTHS[width], batch, device),
                    rounds,
                    profiled,
                    (seconds, operations, stages),
                )
            except (EOFError, OSError):  # the process said why, and died
                print(f"Left out: {', '.join(some)}, {width}:{batch}")
        if "stock" not in seconds:  # what all rows are compared with
            continue
        stock = statistics.median(seconds["stock"])
        for name, values in seconds.items():
            table.note(f"{width} N={batch} {name}", values)
            middle = statistics.median(values)
            reached = operations["stock"] / middle
            table.add(
                width,
                batch,
                name,
                f"{batch / middle:.1f}",
                f"{stock / middle:.2f}",
                f"{reached / 1e9:,.0f}",
                f"{100 * reached / ceilings['bf16' in name]:.0f} %",
            )
        for name in filter(stages.get, profiled):
            each = (
                f"{1000 * stages[name][stage]:.1f}" for stage in Step.STAGES
            )
            profile.add(width, batch, name, *each)
        # A run that is cut off leaves what it has.
        table.write()
        if not args.quick:
            profile.write()


def measure(steps, of, rounds, profiled, results) -> None:
    """Time steps by turns; adds seconds, stock's operations and stages."""
    seconds, operations, stages = results
    built = {name: Apart(Step, *of, **steps[name]) for name in steps}
    seconds.update(alternate(built, rounds, device=of[-1]))
    for name, case in built.items():
        if name == "stock":
            operations[name] = case.ask("operations")
        if name in profiled:
            stages[name] = case.ask("stages")
        case.close()


class Step:
    """A training step that can be called, whole or stage by stage."""

    STAGES = ("front-end", "encoder", "classifier + loss", "backward", "Adam")

    def __init__(
        self,
        channels,
        batch,
        device,
        channels_last=False,
        fused=False,
        bf16=False,
        compiled=False,
        deterministic=False,
        keep=False,
    ):
        if keep:
            keep_freed_memory()
        torch.manual_seed(0)
        self.deterministic = deterministic
        self.device = device
        self.waveforms = torch.randn(batch, SAMPLES, device=device)
        self.lengths = torch.ones(batch, device=device)
        self.targets = torch.randint(SPEAKERS, (batch, 1), device=device)
        self.fbank = Fbank(sample_rate=16000, n_mels=80, n_fft=512).to(device)
        self.normalise = InputNormalization(norm_type="sentence").to(device)
        self.encoder = ResNet34(channels=channels).to(device).train()
        if channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        loss_fn = make_objective("ram", 0.3, 30.0)
        if fused:
            classifier = FusedMarginClassifier(512, SPEAKERS, loss_fn)
            self.loss = partial(self._fused, classifier.to(device))
        else:
            classifier = Classifier(512, out_neurons=SPEAKERS).to(device)
            wrapper = LogSoftmaxWrapper(loss_fn)
            self.loss = partial(self._stock, classifier, wrapper)
        self.optimizer = torch.optim.Adam(
            [*self.encoder.parameters(), *classifier.parameters()],
            lr=1e-3,
            fused=device == "cuda",  # as training has it there
        )
        self.context = nullcontext
        if bf16:
            self.context = partial(torch.autocast, device, torch.bfloat16)
        self.encode = torch.compile(self.encoder) if compiled else self.encoder

    def _stock(self, classifier, wrapper, embeddings):
        return wrapper(classifier(embeddings), self.targets)

    def _fused(self, classifier, embeddings):
        return classifier(embeddings, self.targets)

    def __call__(self) -> None:
        """The whole step."""
        torch.use_deterministic_algorithms(self.deterministic)
        self.optimizer.zero_grad()
        with self.context():
            feats = self.normalise(self.fbank(self.waveforms), self.lengths)
            embeddings = self.encode(feats)
        self.loss(embeddings.float()).backward()
        self.optimizer.step()

    def operations(self) -> int:
        """Floating-point operations of a step: convolutions and products."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()

    def stages(self, rounds: int = 3) -> dict[str, float]:
        """Median seconds of each stage."""
        seconds = {stage: [] for stage in self.STAGES}
        for _ in range(rounds):
            times = [clock(self.device)]
            self.optimizer.zero_grad()
            with self.context():
                feats = self.normalise(self.fbank(self.waveforms), self.lengths)
                times.append(clock(self.device))
                embeddings = self.encode(feats)
            times.append(clock(self.device))
            loss = self.loss(embeddings.float())
            times.append(clock(self.device))
            loss.backward()
            times.append(clock(self.device))
            self.optimizer.step()
            times.append(clock(self.device))
            for stage, start, end in zip(
                self.STAGES, times, times[1:], strict=False
            ):
                seconds[stage].append(end - start)
        return {
            stage: statistics.median(values)
            for stage, values in seconds.items()
        }


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="half, batch 16")
    parser.add_argument("--output", help="folder of the tables")
    parser.add_argument("--rounds", type=int, default=5)
    add_sizes(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
