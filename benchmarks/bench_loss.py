"""The fused margin loss against SpeechBrain's path: time and peak memory.

Both with what training takes of a step beside the loss: right answers, and the
margin's diagnostics.

    OMP_NUM_THREADS=1 python benchmarks/bench_loss.py [--quick] [--device cuda]

Theirs is what a recipe writes: ``Classifier``, ``LogSoftmaxWrapper(loss_fn)``.
Forward and backward, float32, embeddings of 512 dimensions.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Table, alternate
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import LogSoftmaxWrapper

from speechbrain_ram.losses import make_objective
from speechbrain_ram.training.diagnostics import MarginDiagnostics
from speechbrain_ram.training.fused import FusedMarginClassifier

DIM, MARGIN, SCALE = 512, 0.2, 30.0

# N, C, whether SpeechBrain's path fits in 16 GB beside the rest, rounds; with
# 0 rounds the one step that measures the memory gives the time as well.
SIZES = [
    (64, 1_000, True, 11),
    (64, 2_500, True, 11),
    (64, 5_000, True, 11),
    (64, 10_000, True, 7),
    (64, 100_000, True, 3),
    (512, 1_000, True, 7),
    (512, 5_000, True, 5),
    (512, 10_000, True, 3),
    (512, 100_000, True, 1),
    (512, 1_000_000, False, 0),
    (64, 1_000_000, True, 0),
]
QUICK = [(64, c, True, 5) for c in (1_000, 2_500, 5_000, 10_000)]

# Untrained: random directions, every class violates. Separated: each
# embedding leans on its class as in a trained system, few classes violate.
OBJECTIVES = [
    ("am", "paper", "untrained"),
    ("ram", "paper", "untrained"),
    ("ram", "hinge", "untrained"),
    ("ram", "paper", "separated"),
]


def main() -> None:
    """Measure, print and write the table."""
    args = parse_arguments()
    if args.peak:
        implementation, objective, form, state, n, c = args.peak
        print(
            *peak_beyond_gradient(
                implementation,
                objective,
                form,
                state,
                int(n),
                int(c),
                args.device,
            )
        )
        return
    table = Table(
        "loss" if args.device == "cpu" else f"loss-{args.device}",
        "Fused margin loss",
        "Forward and backward of classifier and loss, with right answers and "
        f"diagnostics as in training, float32, E = {DIM}; median seconds, "
        "`theirs` is SpeechBrain's Classifier + LogSoftmaxWrapper. Memory is "
        "the peak beyond the weights and their gradient (in per cent of the "
        "weights), on a CPU in a process of its own. "
        "`-`: not run, it does not fit.",
        [
            "N",
            "C",
            "objective",
            "embeddings",
            "theirs s",
            "ours s",
            "theirs / ours",
            "memory theirs",
            "memory ours",
        ],
        args.output,
    )
    for n, c, both, rounds in QUICK if args.quick else SIZES:
        for objective, form, state in OBJECTIVES:
            names = ["theirs", "ours"] if both else ["ours"]
            seconds = {}
            if rounds:
                steps = build(names, objective, form, state, n, c, args.device)
                seconds = alternate(steps, rounds, device=args.device)
                del steps
            case = f"{objective} {form} {state} N={n} C={c}"
            cells = {}
            for name in names:
                peak = ""
                if not args.quick:
                    peak, once = memory_and_time(
                        args.device, name, objective, form, state, n, c
                    )
                    seconds.setdefault(name, [once])
                table.note(f"{case} {name}", seconds[name])
                cells[name] = statistics.median(seconds[name]), peak
            ours, peak = cells["ours"]
            theirs, peak_theirs = cells.get("theirs", (None, "-"))
            label = objective if objective == "am" else f"{objective} {form}"
            table.add(
                n,
                f"{c:,}",
                label,
                state,
                f"{theirs:.4f}" if theirs else "-",
                f"{ours:.4f}",
                f"{theirs / ours:.2f}" if theirs else "-",
                peak_theirs,
                peak,
            )
        # A long run leaves what it has; sizes in order.
        table.rows.sort(
            key=lambda row: [int(x.replace(",", "")) for x in row[:2]]
        )
        table.write()


def build(names, objective, form, state, n, c, device):
    """One step of each implementation, on shared weights."""
    torch.manual_seed(0)
    loss_fn = make_objective(objective, MARGIN, SCALE, form)
    theirs = Classifier(DIM, out_neurons=c).to(device)
    ours = FusedMarginClassifier(DIM, 2, loss_fn)
    ours.weight = theirs.weight
    wrapper = LogSoftmaxWrapper(loss_fn)
    targets = torch.randint(c, (n, 1), device=device)
    x = F.normalize(torch.randn(n, 1, DIM, device=device), dim=-1)
    if state == "separated":
        own = F.normalize(theirs.weight.detach()[targets.squeeze(1)])
        x = x + 2 * own.unsqueeze(1)  # a cosine of 0.9
    x.requires_grad_()

    def step(loss_of):
        def run():
            x.grad = theirs.weight.grad = None
            loss_of(MarginDiagnostics(loss_fn)).backward()

        return run

    def their_loss(diagnostics):
        cosines = theirs(x)
        diagnostics.watch(cosines, targets)
        right = cosines.detach().squeeze(1).argmax(dim=1) == targets.squeeze(1)
        right.sum()
        return wrapper(cosines, targets)

    def our_loss(diagnostics):
        loss, margins = ours(x, targets, with_margins=True)
        diagnostics.add_margins(margins, c)
        (margins.cosine > margins.nearest).sum()
        return loss

    steps = {"theirs": step(their_loss), "ours": step(our_loss)}
    return {name: steps[name] for name in names}


def memory_and_time(device, *case):
    """Peak memory as text, and the seconds of one step.

    On a CPU in a process of its own; on a GPU PyTorch keeps the account.
    """
    if device == "cpu":
        command = [sys.executable, __file__, "--peak", *map(str, case)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True
        )
        peak, seconds = map(float, done.stdout.split()[-2:])
    else:
        peak, seconds = peak_beyond_gradient(*case, device)
    percent = 100 * peak / (case[-1] * DIM * 4)
    return f"{peak / 1e6:,.0f} MB ({percent:.0f} %)", seconds


def peak_beyond_gradient(
    implementation, objective, form, state, n, c, device
) -> tuple[float, float]:
    """Bytes at the peak less the weights' gradient; seconds."""
    warm = build([implementation], objective, form, state, n, 2_048, device)
    warm[implementation]()  # libraries allocate what they keep
    del warm
    (step,) = build(
        [implementation], objective, form, state, n, c, device
    ).values()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = resident("VmRSS")
        (seconds,) = alternate({"": step}, 1, 0, device)[""]
        peak = resident("VmHWM") - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (seconds,) = alternate({"": step}, 1, 0, device)[""]
        peak = torch.cuda.max_memory_allocated() - before
    return peak - c * DIM * 4, seconds


def resident(key: str) -> int:
    """Bytes of memory that Linux counts for this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", status).group(1))


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="four sizes, time")
    parser.add_argument("--output", help="folder of the table")
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
