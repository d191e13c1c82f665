"""The Kaldi front-end against SpeechBrain's and torchaudio's.

OMP_NUM_THREADS=1 python benchmarks/bench_features.py [--quick]
    [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torchaudio
from harness import Table, alternate

from speechbrain_ram.features import make_front_end

RATE = 16000


def torchaudio_loop(wavs: torch.Tensor) -> torch.Tensor:
    """What a batch costs with the reference, one recording at a time."""
    return torch.stack(
        [
            torchaudio.compliance.kaldi.fbank(
                wav[None] * 32768,
                num_mel_bins=80,
                high_freq=-400.0,
                snip_edges=False,
            )
            for wav in wavs
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="folder of the table")
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    table = Table(
        "features" + ("" if on_cpu else f"-{arguments.device}"),
        "Front-ends",
        "80 bands, 25 ms windows, 10 ms hop. Milliseconds of the batch, "
        "median, and times the duration of its audio.",
        ["batch", "front-end", "ms", "x real time"],
        arguments.output,
    )
    kaldi = make_front_end("kaldi").to(arguments.device)
    fbank = make_front_end("fbank").to(arguments.device)
    for batch, seconds in ((1, 3), (64, 2)):
        wavs = torch.randn(batch, seconds * RATE, device=arguments.device)
        cases = {
            "KaldiFbank": lambda wavs=wavs: kaldi(wavs),
            "SpeechBrain Fbank": lambda wavs=wavs: fbank(wavs),
            "torchaudio kaldi.fbank": lambda wavs=wavs: torchaudio_loop(wavs),
        }
        rounds = 3 if arguments.quick else 21
        with torch.inference_mode():
            times = alternate(cases, rounds, device=arguments.device)
        for name, measured in times.items():
            median = statistics.median(measured)
            table.note(f"{name}, {batch} x {seconds} s", measured)
            table.add(
                f"{batch} x {seconds} s",
                name,
                f"{1000 * median:.2f}",
                f"{batch * seconds / median:,.0f}",
            )
    table.write()


if __name__ == "__main__":
    main()
