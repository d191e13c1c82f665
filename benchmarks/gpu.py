"""The first day on a GPU: every check and table that needs one.

    make gpu            # or: python benchmarks/gpu.py --output results/gpu

At most 20 minutes. What is done is not done again: the same command goes on
after an interruption. Tables go to ``benchmarks/results``, logs and a summary
to the output folder; both are to be committed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import Table, alternate, machine

from speechbrain_ram.utils import atomic_writer

ROOT = Path(__file__).parents[1]
MINUTES = 20


def steps(output: Path) -> dict[str, tuple[int, list[str]]]:
    """Name -> most seconds, command."""
    here = Path(__file__).parent
    recipe = ROOT / "recipes/SpeechOcean762/hparams/ram_resnet34_gpu.yaml"
    tests = ("test_cuda.py", "training/test_fused.py", "training/test_steps.py")
    found = {
        "tests": (
            300,
            ["-m", "pytest", "-q", *(str(ROOT / "tests" / t) for t in tests)],
        ),
        "roofs": (60, [__file__, "--roofs"]),
        "step": (
            420,
            [
                str(here / "bench_step.py"),
                *("--device", "cuda", "--rounds", "3"),
                *("--sizes", "full:64", "full:256", "full:512"),
            ],
        ),
        "loss": (120, [str(here / "bench_loss.py"), "--device", "cuda"]),
    }
    corpus = os.environ.get("SPEECHOCEAN762")
    if corpus:
        found["extraction"] = (
            120,
            [str(here / "bench_extraction.py"), "--device", "cuda"],
        )
        found["training"] = (
            600,
            [
                str(ROOT / "train_speaker_embeddings.py"),
                str(recipe),
                *("--data_folder", corpus),
                *("--output_folder", str(output / "ram_resnet34_gpu")),
            ],
        )
    return found


def main() -> None:
    """Run what is not done yet, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="results/gpu", type=Path)
    parser.add_argument(
        "--device", default="cuda", help=argparse.SUPPRESS
    )  # to try this script itself
    parser.add_argument("--roofs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: torch.cuda.is_available() is False: there is no GPU.")
    if args.roofs:
        roofs(args.device)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * MINUTES
    failed = [
        name
        for name, (limit, command) in steps(args.output).items()
        if not run(name, command, min(limit, end - time.monotonic()), args)
    ]
    if "SPEECHOCEAN762" not in os.environ:
        print("SPEECHOCEAN762 is not set: NOTHING was run on real speech.")
    print(f"Summary: {args.output / 'summary.md'}")
    if failed:
        sys.exit(f"gpu.py: failed or cut off: {', '.join(failed)}")


def run(name: str, command: list[str], limit: float, args) -> bool:
    """Run one step unless it is done; whether it is done now."""
    done = args.output / f"{name}.done"
    if done.exists():
        print(f"{name}: done before")
        return True
    log = args.output / f"{name}.log"
    print(f"{name}: at most {limit:.0f} s, see {log}", flush=True)
    started = time.monotonic()
    status = "no time was left"
    if limit > 0:
        with open(log, "w", encoding="utf-8") as file:
            try:
                code = subprocess.run(
                    [sys.executable, *command],
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                ).returncode
                status = "done" if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                status = f"cut off after {limit:.0f} s"
    if status == "done":
        done.touch()
    seconds = time.monotonic() - started
    summary = args.output / "summary.md"
    text = summary.read_text(encoding="utf-8") if summary.exists() else ""
    if not text:
        text = f"# On a GPU\n\n{machine()}\n\n| step | result | s |\n"
        text += "| --- | --- | ---: |\n"
    with atomic_writer(summary) as file:
        file.write(f"{text}| {name} | {status} | {seconds:.0f} |\n")
    print(f"{name}: {status}, {seconds:.0f} s", flush=True)
    return status == "done"


def roofs(device: str) -> None:
    """What the device can do at most: products, and memory."""
    import speechbrain  # noqa: F401  # allows TF32, as in every training

    size = 8192 if device == "cuda" else 512
    table = Table(
        f"roofs-{device}",
        "The most that the device does",
        "Square matrix products, float32 with TF32 allowed as in training, and "
        "bytes read and written by a copy of 1 GB; median of 10.",
        ["what", "reached"],
    )
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(2, size, size, device=device).to(dtype)).unbind()
        out = torch.empty_like(a)
        cases = {"": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}
        values = alternate(cases, 10, 3, device)[""]
        middle = sorted(values)[5]
        table.add(
            f"{name} product", f"{2 * size**3 / middle / 1e12:.1f} TFLOP/s"
        )
    source = torch.zeros(2**28, device=device)
    target = torch.empty_like(source)
    values = alternate({"": lambda: target.copy_(source)}, 10, 3, device)[""]
    rate = 2 * source.numel() * 4 / sorted(values)[5]
    table.add("copy", f"{rate / 1e9:,.0f} GB/s")
    table.write()


if __name__ == "__main__":
    main()
