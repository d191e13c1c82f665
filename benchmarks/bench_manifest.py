#!/usr/bin/env python3
"""Manifest of a large tree: headers alone against reading every file.

    python benchmarks/bench_manifest.py [--quick]

One tree in VoxCeleb's shape, utterances of VoxCeleb2's mean length, is listed
by

- SpeechBrain's VoxCeleb preparation. ``recipes/VoxCeleb/voxceleb_prepare.py``
  is not in SpeechBrain's wheel, so its steps are repeated here through
  SpeechBrain's API: a recursive glob, then for each file one whole read
  (``speechbrain.dataio.audio_io.load``), the duration from the signal's
  length and, as the recipes call it, the mean amplitude of every 3-second
  chunk; then the CSV. ``random_segment=True`` is its cheaper branch, one row a
  file and no amplitudes;
- ``speechbrain_ram.corpora``: find, read headers, write the CSV; once without
  a cache, once with the cache of the first time, once without a cache and with
  every header read by libsndfile.

Each runs in a process of its own. The paths are hard links to a few hundred
recordings that stay in the page cache: nobody waits for a disk, which is to
the advantage of whoever reads more. The CSV files of one row a file are
compared row by row.
"""

from __future__ import annotations

import argparse
import csv
import glob
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from harness import Table

VOXCELEB2 = 1_092_009  # utterances of its dev part
SECONDS = 7.8  # their mean length
RATE = 16000


def write_tree(root, files, distinct=200):
    """Make `files` paths, 50 a video, 4 videos a speaker."""
    generator = np.random.default_rng(0)
    source = root.parent / "recordings"
    source.mkdir(parents=True)
    for i in range(min(distinct, files)):
        length = round(generator.uniform(0.9, 1.1) * SECONDS * RATE)
        samples = generator.integers(-3000, 3000, length, np.int16)
        soundfile.write(source / f"{i}.wav", samples, RATE)
    for i in range(files):
        folder = root / f"id{10000 + i // 200:05d}" / f"video{i // 50:06d}"
        if i % 50 == 0:
            folder.mkdir(parents=True)
        os.link(source / f"{i % distinct}.wav", folder / f"{i % 50:05d}.wav")


def as_speechbrain_does(root, output):
    """SpeechBrain's VoxCeleb preparation, with `random_segment=True`."""
    rows = []
    for path, name, speaker, signal in _load_all(root):
        seconds = str(signal.shape[0] / RATE)
        rows.append([name, seconds, path, 0, signal.shape[0], speaker])
    _write(rows, output)


def as_speechbrain_recipes_do(root, output, seconds=3.0, threshold=5e-4):
    """The same as the recipes call it: 3-second chunks that are not silent."""
    import torch

    rows = []
    for path, name, speaker, signal in _load_all(root):
        duration = signal.shape[0] / RATE
        for i in range(int(duration / seconds)):
            start, stop = (int((i + k) * seconds * RATE) for k in (0, 1))
            if torch.mean(torch.abs(signal[start:stop])) < threshold:
                continue
            chunk = f"{name}_{i * seconds}_{(i + 1) * seconds}"
            rows.append([chunk, str(duration), path, start, stop, speaker])
    _write(rows, output)


def _load_all(root):
    from speechbrain.dataio import audio_io

    for path in glob.glob(os.path.join(root, "**", "*.wav"), recursive=True):
        speaker, session, utterance = path.split("/")[-3:]
        signal, _ = audio_io.load(path)
        name = "--".join((speaker, session, utterance.split(".")[0]))
        yield path, name, speaker, signal.squeeze(0)


def _write(rows, output):
    with open(output, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", "wav", "start", "stop", "spk_id"])
        writer.writerows(rows)


def from_headers(root, output):
    """What this package does, with a cache beside the manifest."""
    from speechbrain_ram.data.manifest import (
        build_manifest,
        find_recordings,
        write_manifest,
    )

    names = find_recordings(root, (".wav",))
    rows = build_manifest(
        root,
        [(name, name.split("/")[0]) for name in names],
        cache=f"{root}.headers.cache",
    )
    write_manifest(rows, output)


def from_libsndfile(root, output):
    """The same without a cache, no header being read by its bytes."""
    from speechbrain_ram.data import audio

    find = audio.find_samples

    def find_no_info(*args):
        found = find(*args)
        return found and found._replace(info=None, bare=False)

    audio.find_samples = find_no_info  # the process ends with the method
    Path(f"{root}.headers.cache").unlink()
    from_headers(root, output)


def measure(method, root, output):
    """Run in a process of its own; (seconds, CPU seconds, MiB)."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, method, root, output).result()


def _measure(method, root, output):
    import torch
    from speechbrain.dataio import audio_io  # noqa: F401

    import speechbrain_ram.data.manifest  # noqa: F401

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    method(root, output)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, cpu, (after - before) / 1024


def contents(path):
    """(duration, start, stop, speaker) of each utterance, by its path."""
    with open(path, newline="", encoding="utf-8") as file:
        return {
            "/".join(row["wav"].split("/")[-3:]): (
                float(row["duration"]),
                row["start"],
                row["stop"],
                row["spk_id"],
            )
            for row in csv.DictReader(file)
        }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5,000 files")
    parser.add_argument("--output", help="folder of the table")
    args = parser.parse_args()
    files, rounds = (5000, 1) if args.quick else (100_000, 3)
    table = Table(
        "manifest",
        "Manifest of a large tree",
        f"{files:,} WAV files of about {SECONDS} s, hard links to a few "
        "hundred recordings in the page cache. Median of the rounds; the CPU "
        "time counts all threads. Memory is what a process takes above its "
        "imports and grows with the number of files. `VoxCeleb2` is "
        f"extrapolated, file by file, to its {VOXCELEB2:,} files.",
        [
            "",
            "files/s",
            "times as fast",
            "CPU time a file",
            "times less CPU",
            "memory",
            "VoxCeleb2",
            "its memory",
        ],
        args.output,
    )
    measured = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "wav"
        write_tree(root, files)
        for _ in range(rounds):
            Path(f"{root}.headers.cache").unlink(missing_ok=True)
            for i, (name, method) in enumerate(METHODS.items()):
                output = f"{folder}/{i}.csv"
                measured[name].append(measure(method, str(root), output))
        rows = [contents(f"{folder}/{i}.csv") for i in (1, 2, 3, 4)]
    assert all(each == rows[0] for each in rows) and len(rows[0]) == files

    base_wall = base_cpu = None
    for name, runs in measured.items():
        wall, cpu, mib = map(statistics.median, zip(*runs, strict=True))
        base_wall, base_cpu = base_wall or wall, base_cpu or cpu
        table.add(
            name,
            f"{files / wall:,.0f}",
            f"{base_wall / wall:.1f}",
            f"{1e6 * cpu / files:.1f} µs",
            f"{base_cpu / cpu:.1f}",
            f"{mib:.0f} MiB",
            f"{wall * VOXCELEB2 / files:.0f} s",
            f"{mib * VOXCELEB2 / files:.0f} MiB",
        )
        table.note(name, [run[1] / files for run in runs])
    table.write()


METHODS = {
    "SpeechBrain, as its recipes prepare VoxCeleb": as_speechbrain_recipes_do,
    "SpeechBrain, random_segment=True": as_speechbrain_does,
    "ours, first time": from_headers,
    "ours, again": from_headers,
    "ours, first time, libsndfile": from_libsndfile,
}

if __name__ == "__main__":
    main()
