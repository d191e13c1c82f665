"""Random crops of 2 s from loose files and shards, against SpeechBrain's path.

    SPEECHOCEAN762=FOLDER python benchmarks/bench_loader.py [--quick]

Theirs is SpeechBrain's VoxCeleb recipe: ``DynamicItemDataset``, a pipeline
with ``random.randint`` and ``audio_io.load``. Both go through SpeechBrain's
``make_dataloader`` in batches of 32, on the same files, in the page cache; ours
as ``RobustBrain`` wraps it. ``wav, libsndfile`` is ours without the short way,
which reads 16-bit mono WAV by its bytes.

A second table says how much memory the datasets take, at VoxCeleb2's number of
utterances and three speeds, and how much of it a forked worker makes its own by
looking at every item once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import soundfile
import speechbrain as sb
import torch
from harness import Table, alternate
from speechbrain.dataio import audio_io
from speechbrain.dataio.dataloader import make_dataloader

from speechbrain_ram.data import dataset
from speechbrain_ram.data.audio import Audio, read_audio
from speechbrain_ram.data.manifest import Utterance, write_manifest
from speechbrain_ram.data.shards import pack_shards
from speechbrain_ram.training.faults import Batch, SkipUnreadable

BATCH, CROP, RATE = 32, 32_000, 16_000
UTTERANCES = 1_092_009  # of VoxCeleb2's dev part
SPEEDS = (1.0, 0.9, 1.1)
EPOCHS = 6  # with workers, so that starting them counts for little


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer files")
    parser.add_argument("--output", help="folder of the table")
    args = parser.parse_args()
    if "SPEECHOCEAN762" not in os.environ:
        sys.exit("SPEECHOCEAN762 must name the corpus folder (with train/).")
    torch.set_num_threads(1)
    table = Table(
        "loader",
        "Loading training crops",
        "Utterances a second, 2 s crops of real speech (speechocean762), "
        "batches of 32; `in process` is CPU time without workers, `workers` "
        "is wall time with one worker a core.",
        ["files", "workers", "theirs", "ours", "ours / theirs"],
        args.output,
    )
    rounds = 3 if args.quick else 9
    wav = {}
    with tempfile.TemporaryDirectory() as folder:
        roots = corpora(Path(folder), 64 if args.quick else 192)
        workers = [0] if args.quick else [0, os.cpu_count()]
        for kind, (manifest, root, rows) in roots.items():
            for n in workers:
                data = {"ours": ours(manifest, root)}
                if kind != "shards":
                    data["theirs"] = theirs(rows)
                if kind == "wav":
                    data["libsndfile"] = ours(manifest, root, Libsndfile)
                cases = {
                    name: partial(consume, one, n) for name, one in data.items()
                }
                seconds = alternate(cases, rounds, wall=n > 0)
                for name, values in seconds.items():
                    values[:] = [
                        value / (EPOCHS if n else 1) for value in values
                    ]
                    each = [value / len(rows) for value in values]
                    table.note(f"{kind} workers={n} {name}", each)
                rate = {
                    name: len(rows) / statistics.median(values)
                    for name, values in seconds.items()
                }
                if kind == "wav":
                    wav[n] = rate["theirs"]  # what shards replace
                other = rate.get("theirs", wav.get(n))
                table.add(
                    kind,
                    n or "in process",
                    f"{other:,.0f}" + " (wav)" * (kind == "shards"),
                    f"{rate['ours']:,.0f}",
                    f"{rate['ours'] / other:.2f}",
                )
                if "libsndfile" in rate:
                    table.add(
                        "wav, libsndfile",
                        n or "in process",
                        f"{other:,.0f}",
                        f"{rate['libsndfile']:,.0f}",
                        f"{rate['libsndfile'] / other:.2f}",
                    )
    table.write()
    memory(20_000 if args.quick else UTTERANCES, args.output)


def memory(n: int, output: str | None) -> None:
    """Measure, print and write the second table."""
    table = Table(
        "loader_memory",
        "Memory of a training set",
        f"{n:,} utterances at {len(SPEEDS)} speeds. MB that the process holds "
        "once the set is made, and MB that a forked worker does not share with "
        "it after looking at every item.",
        ["set", "process", "worker's own"],
        output,
    )
    for name in SETS:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_held, args=(name, n, theirs))
        process.start()
        theirs.close()
        table.add(name, *(f"{pipe.recv():,.0f}" for _ in range(2)))
        process.join()
    table.write()


def _held(name, n, pipe):
    """What a process holds, then what its worker has of its own."""
    before = _private()
    data = SETS[name](n)
    pipe.send(_private() - before)
    if os.fork() == 0:
        start = _private()
        for index in range(len(data.data_ids)):
            _ = data[index]
        pipe.send(_private() - start)
        os._exit(0)
    os.wait()


def _private() -> float:
    """MB of this process that it shares with no other."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return sum(
            int(line.split()[1]) / 1000
            for line in file
            if line.startswith("Private_")
        )


def _rows(n):
    return [
        Utterance(
            f"id{i // 182:05d}/video{i // 8:07d}/{i % 8:05d}.wav",
            7.8,
            f"$data_root/id{i // 182:05d}/video{i // 8:07d}/{i % 8:05d}.wav",
            0,
            124_800 + i % 999,
            f"id{i // 182:05d}",
        )
        for i in range(n)
    ]


def _our_set(n):
    rows = _rows(n)
    labels = sb.dataio.encoder.CategoricalEncoder()
    labels.update_from_iterable(
        dataset.at_speed(row.spk_id, speed) for row in rows for speed in SPEEDS
    )
    labels.expect_len(len(labels))
    data = dataset.CropDataset(rows, "/corpus", labels, speeds=SPEEDS)
    data.set_output_keys(["id", "path", "start", "stop", "spk_id"])
    return data


def _their_set(n):
    data = sb.dataio.dataset.DynamicItemDataset(
        {
            dataset.at_speed(row.id, speed): {
                "path": row.path("/corpus"),
                "start": row.start,
                "stop": row.stop,
                "speed": speed,
                "spk_id": dataset.at_speed(row.spk_id, speed),
            }
            for speed in SPEEDS
            for row in _rows(n)
        }
    )
    data.set_output_keys(["id", "path", "start", "stop", "spk_id"])
    return data


SETS = {"SpeechBrain, a dict an utterance": _their_set, "ours": _our_set}


def corpora(folder: Path, size: int):
    """The same utterances as ogg, flac, wav and shards."""
    source = Path(os.environ["SPEECHOCEAN762"]) / "train"
    files = []
    for path in sorted(source.glob("*/*.ogg")):
        if soundfile.info(str(path)).frames > CROP + RATE // 10:
            files.append(path)
    files = files[:: max(1, len(files) // size)][:size]
    result = {}
    for kind in ("ogg", "flac", "wav"):
        rows = []
        for path in files:
            target = folder / kind / path.parent.name / f"{path.stem}.{kind}"
            target.parent.mkdir(parents=True, exist_ok=True)
            samples = read_audio(path).numpy()
            if kind == "ogg":
                target.symlink_to(path)
            else:
                soundfile.write(target, samples, RATE, subtype="PCM_16")
            name = str(target.relative_to(folder / kind))
            rows.append(
                Utterance(
                    name,
                    len(samples) / RATE,
                    str(target),
                    0,
                    len(samples),
                    path.parent.name,
                )
            )
        manifest = folder / f"{kind}.csv"
        write_manifest(rows, manifest)
        result[kind] = manifest, folder / kind, rows
    packed = pack_shards(
        folder / "wav.csv", folder / "wav", folder / "shards", progress=False
    )
    # Last: in the order of measuring, after wav.
    result["shards"] = packed, folder / "wav", result["wav"][2]
    return result


class Libsndfile(Audio):
    """The reader without its short way."""

    def _read_bare(self, *args):
        return None


def ours(manifest, root, reader=Audio):
    """This package's dataset, as training uses it."""
    crops, _, _ = dataset.speaker_datasets(manifest, manifest, root)
    crops.audio = reader(RATE)
    return SkipUnreadable(crops)


def theirs(rows):
    """The pipeline of SpeechBrain's VoxCeleb recipe."""
    data = sb.dataio.dataset.DynamicItemDataset(
        {
            row.id: {
                "wav": row.wav,
                "start": row.start,
                "stop": row.stop,
                "duration": row.duration,
                "spk_id": row.spk_id,
            }
            for row in rows
        }
    )
    encoder = sb.dataio.encoder.CategoricalEncoder()

    @sb.utils.data_pipeline.takes("wav", "start", "stop", "duration")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav, start, stop, duration):
        start = random.randint(0, int(duration * RATE) - CROP)
        sig, _ = audio_io.load(wav, num_frames=CROP, frame_offset=start)
        return sig.transpose(0, 1).squeeze(1)

    @sb.utils.data_pipeline.takes("spk_id")
    @sb.utils.data_pipeline.provides("spk_id", "spk_id_encoded")
    def label_pipeline(spk_id):
        yield spk_id
        yield encoder.encode_sequence_torch([spk_id])

    data.add_dynamic_item(audio_pipeline)
    data.add_dynamic_item(label_pipeline)
    encoder.update_from_didataset(data, "spk_id")
    encoder.expect_len(len(encoder))
    data.set_output_keys(["id", "sig", "spk_id_encoded"])
    return data


def consume(data, workers) -> None:
    """Take every batch of an epoch."""
    collate = {"collate_fn": Batch} if isinstance(data, SkipUnreadable) else {}
    loader = make_dataloader(
        data,
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        **collate,
    )
    for _ in range(EPOCHS if workers else 1):
        for batch in loader:
            batch = getattr(batch, "data", batch)
            assert batch.sig.data.shape[1] == CROP


if __name__ == "__main__":
    main()
