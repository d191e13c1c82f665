"""The public corpora in miniature: their folders, codecs, lists and quirks.

Every function writes one corpus, as its archives unpack, from voices that are
given: ``voices[k]`` is a list of waveforms of the k-th speaker, float, 16 kHz.
Layouts and list forms are those that public recipes read: Kaldi's egs/sitw and
egs/cnceleb, WeSpeaker's examples/voxceleb and examples/cnceleb, SITW's README.
"""

from __future__ import annotations

import os
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile

from speechbrain_ram.corpora.synthetic import make_synthetic

RATE = 16000
VIDEOS = ("21Uxsk56VDQ", "_raOc3-IRsw", "zw-4DTjqIA0")
GENRES = ("interview", "singing", "live_broadcast")


@lru_cache
def voices(speakers=8, utterances=4, low=0.6, high=1.2, seed=7):
    """Synthetic voices."""
    with TemporaryDirectory() as folder:
        root = make_synthetic(
            Path(folder) / "c", speakers, utterances, 2, 2, low, high, seed
        ).train_root
        return tuple(
            [soundfile.read(path)[0] for path in sorted(speaker.rglob("*.wav"))]
            for speaker in sorted(root.iterdir())
        )


def real_voices(part, speakers, utterances):
    """Speech of speechocean762."""
    root = Path(os.environ["SPEECHOCEAN762"]) / part
    return tuple(
        [soundfile.read(path)[0] for path in sorted(speaker.glob("*.ogg"))][
            :utterances
        ]
        for speaker in sorted(root.iterdir())[:speakers]
    )


def write(path, samples):
    """Write FLAC, WAV or AAC in an MP4 container, as `path` ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".m4a":
        write_m4a(path, samples)
    else:
        soundfile.write(path, samples, RATE, subtype="PCM_16")


def write_m4a(path, samples, **options):
    """Encode AAC; `options` are those of FFmpeg's MP4 muxer."""
    import av

    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            samples[None].astype(np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
        frame.pts = 0  # else the encoder's delay is not written down
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


def voxceleb2(root, voices, ending=".m4a", folder="dev/aac"):
    """``dev/aac/id00012/VIDEO/00001.m4a``, and what else lies about."""
    for k, utterances in enumerate(voices):
        for i, samples in enumerate(utterances):
            video = VIDEOS[i % 2]
            path = f"{folder}/id{12 + k:05d}/{video}/{i + 1:05d}{ending}"
            write(root / path, samples)
    (root / "vox2_meta.csv").write_text(
        "VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \n"
        + "".join(f"id{12 + k:05d} ,n000{k} ,f ,dev \n" for k in range(9))
    )
    return root


def voxceleb1(root, dev_voices, test_voices, folders=("dev/wav", "test/wav")):
    """Both archives, and the official lists beside them.

    List O tests the test part, E and H all speakers; the original lists have
    a few trials more than the cleaned ones.
    """
    names = {"dev": [], "test": []}
    parts = (("dev", 10001, dev_voices), ("test", 10270, test_voices))
    for (part, first, speakers), folder in zip(parts, folders, strict=True):
        for k, utterances in enumerate(speakers):
            for i, samples in enumerate(utterances):
                name = f"id{first + k}/{VIDEOS[i % 3]}/{i + 1:05d}.wav"
                write(root / folder / name, samples)
                names[part].append(name)
    pairs = {
        "veri_test": names["test"],
        "list_test_all": names["dev"] + names["test"],
        "list_test_hard": (names["dev"] + names["test"])[::2],
    }
    for stem, utterances in pairs.items():
        lines = [
            f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n"
            for a, b in combinations(utterances, 2)
        ]
        (root / f"{stem}.txt").write_text("".join(lines))
        # The published cleaned list ends without a line end.
        (root / f"{stem}2.txt").write_text("".join(lines[:-2])[:-1])
    (root / "vox1_meta.csv").write_text(
        "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\n"
        + "".join(
            f"id{first + k}\t{part.title()}_Speaker_{k}\tm\tSri Lanka\t{part}\n"
            for part, first, speakers in parts
            for k in range(len(speakers))
        )
    )
    return root


def sitw(root, dev_voices, eval_voices):
    """``dev`` and ``eval`` with audio, lists and keys.

    A speaker's first recording enrols a model; file names say nothing of the
    speaker, as SITW's do not.
    """
    for part, speakers in (("dev", dev_voices), ("eval", eval_voices)):
        folder, enrol, test = root / part, {}, {}
        for k, utterances in enumerate(speakers):
            for i, samples in enumerate(utterances):
                name = f"audio/{part[0]}{chr(97 + k)}{chr(97 + i)}xq.flac"
                write(folder / name, samples)
                (enrol if i == 0 else test)[name] = k
        models = {k: f"{12013 + 7 * k}" for k in enrol.values()}
        (folder / "lists").mkdir()
        (folder / "keys" / "aux").mkdir(parents=True)
        (folder / "lists" / "enroll-core.lst").write_text(
            "".join(f"{models[k]} {name}\n" for name, k in enrol.items())
        )
        (folder / "lists" / "enroll-assist.lst").write_text(
            "".join(f"{models[k]} {n} 0.1 0.5\n" for n, k in enrol.items())
        )
        (folder / "lists" / "test-core.lst").write_text(
            "".join(f"{name}\n" for name in test)
        )
        trials = [
            (models[k], name, "tgt" if k == other else "imp")
            for k in enrol.values()
            for name, other in test.items()
        ]
        (folder / "lists" / "trial.core-core.lst").write_text(
            "".join(f"{model} {name}\n" for model, name, _ in trials)
        )
        (folder / "keys" / "core-core.lst").write_text(
            "".join(" ".join(trial) + "\n" for trial in trials)
        )
    return root


def cnceleb(root, voices1, voices2, eval_voices):
    """Both archives side by side: ``CN-Celeb_flac``, ``CN-Celeb2_flac``.

    The lists name ``.wav`` files though all are FLAC. The evaluation speakers
    are in ``data`` too, and follow the training speakers in number.
    """
    first, second = root / "CN-Celeb_flac", root / "CN-Celeb2_flac"

    def name(i):
        return f"{GENRES[i % 3]}-{i // 3 + 1:02d}-{i + 1:03d}"

    def write_data(folder, start, speakers):
        ids = [f"id{start + k:05d}" for k in range(len(speakers))]
        for speaker, utterances in zip(ids, speakers, strict=True):
            for i, samples in enumerate(utterances):
                path = folder / "data" / speaker / f"{name(i)}.flac"
                write(path, samples)
        return ids

    train = write_data(first, 0, voices1)
    (first / "dev").mkdir()
    (first / "dev" / "dev.lst").write_text("\n".join(train) + "\n")
    more = write_data(second, 10000, voices2)
    (second / "spk.lst").write_text("\n".join(more) + "\n")

    tested = write_data(first, 800, eval_voices)
    lists = first / "eval" / "lists"
    lists.mkdir(parents=True)
    enrol, mapping, tests, trials = [], [], [], []
    for speaker, utterances in zip(tested, eval_voices, strict=True):
        half = len(utterances) // 2
        enrol.append(f"{speaker}-enroll enroll/{speaker}-enroll.wav")
        path = first / "eval" / f"enroll/{speaker}-enroll.flac"
        write(path, np.concatenate(utterances[:half]))
        files = [f"{speaker}/{name(i)}.wav" for i in range(half)]
        mapping.append(" ".join([f"{speaker}-enroll", *files]))
        for i in range(half, len(utterances)):
            tests.append(f"test/{speaker}-{name(i)}.wav")
            path = first / "eval" / f"test/{speaker}-{name(i)}.flac"
            write(path, utterances[i])
    for speaker in tested:
        for test in tests:
            label = int(speaker == os.path.basename(test).split("-")[0])
            trials.append(f"{speaker}-enroll {test} {label}")
    for file, lines in (
        ("enroll.lst", enrol),
        ("enroll.map", mapping),
        ("test.lst", tests),
        ("trials.lst", trials),
    ):
        (lists / file).write_text("\n".join(lines) + "\n")
    return root


def calls(root, voices):
    """Two speakers in every recording: ``table.csv``, and ``kaldi``.

    Two recordings of each pair of speakers, who take turns.
    """
    table, segments, speakers, recordings = [], [], [], []
    for first in range(0, len(voices), 2):
        pair = list(zip(voices[first], voices[first + 1], strict=True))
        for part in range(2):
            name, turns = f"call{first}{part}", []
            for i, samples in enumerate(sum(pair[part::2], ())):
                at = sum(map(len, turns))
                end = at + len(samples)
                speaker = f"s{first + i % 2}"
                table.append(f"{name}.wav,{speaker},{at},{end}")
                seconds = f"{at / RATE:.6f} {end / RATE:.6f}"
                segments.append(f"{name}-{i} {name} {seconds}")
                speakers.append(f"{name}-{i} {speaker}")
                turns.append(samples)
            write(root / f"{name}.wav", np.concatenate(turns))
            recordings.append(f"{name} {name}.wav")
    lists = {
        "table.csv": ["wav,spk_id,start,stop", *table],
        "kaldi/segments": segments,
        "kaldi/utt2spk": speakers,
        "kaldi/wav.scp": recordings,
    }
    (root / "kaldi").mkdir()
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root
