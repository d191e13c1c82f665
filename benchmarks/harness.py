"""What every benchmark here shares: fair timing, and tables that last.

Ours and theirs run by turns in one process, so that a busy minute of the
machine hits both; the median of the rounds is reported, and the quartiles are
kept for ``compare.py``. On a CPU with one thread the clock is the process's
own CPU time, which other programs do not lengthen much; otherwise it is the
wall, after a device synchronisation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchaudio

from speechbrain_ram.utils import atomic_writer

RESULTS = Path(__file__).parent / "results"

#: Channels of ResNet34's stages: the paper's, and half as many.
WIDTHS = {"full": (32, 64, 128, 256), "half": (16, 32, 64, 128)}


def machine() -> str:
    """The hardware and versions that a table was made with."""
    cpu = platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    if Path("/proc/cpuinfo").exists():
        about = Path("/proc/cpuinfo").read_text()
        if "amx_bf16" in about:
            capability += ", AMX"
        for line in about.splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    parts = [
        f"{cpu}, {os.cpu_count()} cores",
        capability,
        f"{torch.get_num_threads()} thread(s)",
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchaudio {torchaudio.__version__}",
    ]
    if torch.cuda.is_available():
        parts.append(
            f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        )
    return "; ".join(parts)


def wespeaker_importable(checkout: str) -> None:
    """Let WeSpeaker's modules be imported from a checkout of theirs.

    Without their package's __init__ and the libraries that only their command
    lines need.
    """
    package = types.ModuleType("wespeaker")
    package.__path__ = [f"{checkout}/wespeaker"]
    sys.modules["wespeaker"] = package
    for name in ("fire", "kaldiio"):
        sys.modules.setdefault(name, types.ModuleType(name))


def clock(device: str = "cpu", wall: bool = False) -> float:
    """Seconds; see the module's docstring for which."""
    if device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    if torch.get_num_threads() == 1 and not wall:
        return time.process_time()
    return time.perf_counter()


def alternate(
    cases: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    device: str = "cpu",
    wall: bool = False,
) -> dict[str, list[float]]:
    """Run the cases by turns and return the seconds of each round.

    `wall` is for what other processes do: their CPU time is not ours.
    """
    for _ in range(warmup):
        for run in cases.values():
            run()
    seconds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            apart = isinstance(run, Apart)  # measures itself
            seconds[name].append(run() if apart else timed(run, device, wall))
    return seconds


def timed(
    run: Callable[[], object], device: str = "cpu", wall: bool = False
) -> float:
    """Seconds of one call."""
    start = clock(device, wall)
    run()
    return clock(device, wall) - start


def matrix_product(device: str, half: bool = False) -> float:
    """Operations a second of a large matrix product: the roof."""
    size = 1536 if device == "cpu" else 8 * 1536
    matrix = torch.randn(size, size, device=device)
    matrix = matrix.bfloat16() if half else matrix
    seconds = alternate({"": lambda: matrix @ matrix}, 7, 2, device)[""]
    return 2 * size**3 / statistics.median(seconds)


class Apart:
    """A case in a process of its own, which a setting may concern as a whole.

    Arguments
    ---------
    build : callable
        Called in the new process with the rest of the arguments; what it
        returns is the case, and has the attribute ``device``.
    """

    def __init__(self, build: Callable[..., Any], *args: Any, **kwargs: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, build, args, kwargs), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is built

    def ask(self, method: str) -> Any:
        """What a method of the case returns."""
        self._pipe.send(method)
        return self._pipe.recv()

    def __call__(self) -> float:
        """Run the case once; returns the seconds that it measured."""
        return self.ask("")

    def close(self) -> None:
        """End the process and free what it holds."""
        self._pipe.close()
        self._process.join()


def _serve(pipe, build, args, kwargs) -> None:
    case = build(*args, **kwargs)
    pipe.send(None)
    while True:
        try:
            method = pipe.recv()
        except EOFError:
            return
        if method:
            pipe.send(getattr(case, method)())
        else:
            pipe.send(timed(case, case.device))


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(seconds) < 2:
        seconds = seconds * 2
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"low": low, "median": middle, "high": high}


class Table:
    """Rows of text for people, numbers with quartiles for ``compare.py``.

    Arguments
    ---------
    name : str
        File name without ending, in `folder`.
    title, about : str
        The heading, and a paragraph on what was measured and how.
    columns : list of str
        The table's head.
    folder : path
        ``benchmarks/results`` by default.
    """

    def __init__(
        self,
        name: str,
        title: str,
        about: str,
        columns: list[str],
        folder: str | os.PathLike | None = None,
    ):
        self.name, self.title, self.about = name, title, about
        self.columns = columns
        self.folder = Path(folder) if folder else RESULTS
        self.rows: list[list[str]] = []
        self.numbers: dict[str, dict[str, float]] = {}

    def add(self, *cells: object) -> None:
        """A row; also printed, so that a long run shows where it is."""
        self.rows.append([str(cell) for cell in cells])
        print("| " + " | ".join(self.rows[-1]) + " |", flush=True)

    def note(self, key: str, seconds: list[float]) -> None:
        """Keep a measurement for ``compare.py`` under a lasting name."""
        self.numbers[key] = summary(seconds)

    def markdown(self) -> str:
        """The page."""
        lines = [f"# {self.title}", "", self.about, "", machine(), ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|" + " --- |" * len(self.columns))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """NAME.md and NAME.json, each renamed into place when whole."""
        content = {"machine": machine(), "numbers": self.numbers}
        for ending, text in (
            ("md", self.markdown()),
            ("json", json.dumps(content, indent=1) + "\n"),
        ):
            with atomic_writer(self.folder / f"{self.name}.{ending}") as file:
                file.write(text)
        print(f"wrote {self.folder / self.name}.md")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The option ``--sizes``, of networks and batches."""
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="WIDTH:N",
        type=_size,
        default=[(width, n) for width in ("half", "full") for n in (16, 64)],
        help="half or full, and the batch; full:64 needs 20 GB on a CPU",
    )


def _size(text: str) -> tuple[str, int]:
    """Width and batch of WIDTH:N."""
    width, _, batch = text.partition(":")
    if width not in WIDTHS or not batch.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}, expected half:16")
    return width, int(batch)
