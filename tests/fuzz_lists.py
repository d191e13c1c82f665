"""Targets that are text: lists, tables, settings, and what we note down."""

import json
import shutil
from functools import partial
from pathlib import Path

import fuzz_formats as formats
import miniature
import numpy as np
import soundfile
from fuzz_targets import Target

from speechbrain_ram.cli.verify_options import parse
from speechbrain_ram.corpora.cnceleb import prepare_cnceleb
from speechbrain_ram.corpora.folder import prepare_own
from speechbrain_ram.corpora.synthetic import make_synthetic
from speechbrain_ram.corpora.tables import kaldi_parts, read_table
from speechbrain_ram.corpora.voxceleb import prepare_sitw, prepare_voxceleb
from speechbrain_ram.data.audio import AudioError, read_audio
from speechbrain_ram.data.manifest import (
    ManifestError,
    build_manifest,
    read_manifest,
    write_manifest,
)
from speechbrain_ram.data.names import TextError
from speechbrain_ram.data.plain import PlainError, read_json, read_yaml
from speechbrain_ram.data.record import (
    RecordError,
    read_recorded,
    seal,
    write_recorded,
)
from speechbrain_ram.data.shards import pack_shards
from speechbrain_ram.training.options import check_settings
from speechbrain_ram.verification.calibration import Calibration
from speechbrain_ram.verification.scores import read_scores
from speechbrain_ram.verification.speakers import (
    TrialSpeakers,
    read_speaker_table,
    trial_groups,
)
from speechbrain_ram.verification.trials import (
    FORMS,
    TrialError,
    read_models,
    read_trials,
    speakers_beside,
)

RECIPE = Path(__file__).parent.parent / "hparams" / "ram_resnet34.yaml"
MANIFEST = (
    b"ID,duration,wav,start,stop,spk_id\n"
    b's/a.wav,1.5,$data_root/s/a.wav,0,24000,"s"\n'
    b"s/b.wav,2.0,/abs/b.wav,16000,48000,t\n"
)


def lists(folder):
    """What verification and training are told."""
    text = partial(_text, folder)
    trials = {
        form: text(
            f"trials {form}",
            partial(read_trials, form=form),
            TrialError,
            [" ".join(row) for row in _trials(*FORMS[form])],
            35_000,
        )
        for form in FORMS
    }
    models = {"m1": ("a.wav", "b.wav"), "m2": ("c.wav",)}
    return {
        **{f"trials {form}": each for form, each in trials.items()},
        "trials with tabs": text(
            "tabs",
            read_trials,
            TrialError,
            ["1\tid1/a b.wav\tid1/b.wav", "0\tid1/a b.wav\tid2/c.wav"],
            35_000,
        ),
        "trials of models": text(
            "of models",
            partial(read_trials, form="sitw", models=models, suffix=".wav"),
            TrialError,
            ["m1 x/d.flac tgt", "m2 x/d.flac imp"],
            35_000,
        ),
        "models": text(
            "models",
            read_models,
            TrialError,
            ["m1 a.wav b.wav", "m2 c.wav"],
            50_000,
        ),
        "spk2utt": text(
            "list.spk2utt",
            lambda path: speakers_beside(path.with_suffix(".txt")),
            TrialError,
            ["s1 a.wav b.wav", "s2 c.wav"],
            50_000,
        ),
        "scores": text(
            "scores",
            read_scores,
            TrialError,
            ["id1/a.wav id1/b.wav 0.25 1", "id1/a.wav id2/c.wav -1e-3 0"],
            60_000,
        ),
        "manifest": Target(
            read_manifest,
            ManifestError,
            MANIFEST,
            folder / "manifest.csv",
            formats.cells,
            90_000,
        ),
        **{
            f"speakers {ending}": Target(
                _read_groups,
                TrialError,
                f"speaker{tab}gender{tab}age\n0001{tab}f{tab}31\n"
                f"0002{tab}m{tab}\n".encode(),
                folder / f"speakers.{ending}",
                formats.cells,
                30_000,
            )
            for ending, tab in (("tsv", "\t"), ("csv", ","))
        },
    }


def _text(folder, name, read, error, lines, many):
    good = "".join(f"{line}\n" for line in lines).encode()
    return Target(read, error, good, folder / name, formats.columns, many)


def _trials(order, labels):
    for label, test in ((1, "id1/b.wav"), (0, "id2/c.wav")):
        row = {"enrol": "id1/a.wav", "test": test, "label": labels[label]}
        yield [row[name] for name in order]


def _read_groups(path):
    speakers = TrialSpeakers(
        ("0001", "0002"), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0])
    )
    table = read_speaker_table(path)
    trial_groups(np.array([1, 0, 1, 0]), speakers, table, ["gender"])


def settings(folder):
    """JSON and YAML: plain, of calibration, of commands."""
    calibration = folder / "calibration.json"
    Calibration(("score",), (12.5,), -3.25, 0.01).save(calibration)
    verify = (
        "encoder: run/inference\ntrials: [a.txt, b.txt]\ndata_root: corpus\n"
        "output: results\nmixdown: True\ntop_n: 300\np_targets: [0.01, 0.05]\n"
        "qualities: [duration]\ncalibrate_on: dev.txt\nseed: 3\n"
    )
    hparams = shutil.copytree(RECIPE.parent, folder / "hparams")
    return {
        "plain JSON": Target(
            read_json,
            (PlainError, TextError),
            b'{"a": [1, 2.5, "x"], "b": {"c": null, "d": true}}',
            folder / "plain.json",
            formats.json_values,
            50_000,
        ),
        "plain YAML": Target(
            read_yaml,
            (PlainError, TextError),
            b"a: [1, 2.5, x]\nb:\n  c: null\n  d: True\ne:\n- f\n",
            folder / "plain.yaml",
            formats.yaml_values,
            6_000,
        ),
        "calibration": Target(
            _calibrate,
            ValueError,
            calibration.read_bytes(),
            calibration,
            formats.json_values,
            60_000,
        ),
        "verify YAML": Target(
            lambda path: parse([str(path)]),
            SystemExit,
            verify.encode(),
            folder / "verify.yaml",
            formats.yaml_values,
            4_000,
        ),
        "recipe": Target(
            check_settings,
            ValueError,
            RECIPE.read_bytes(),
            hparams / RECIPE.name,
            formats.yaml_values,
            400,
        ),
    }


def _calibrate(path):
    calibration = Calibration.load(path)
    if calibration.features == ("score",):
        calibration.apply([0.5])


def made_by_us(folder):
    """What is written once and read for months: its content is sealed."""
    corpus = folder / "corpus"
    for name in ("s/a", "s/b", "t/c", "t/d"):
        path = corpus / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(len(name)).normal(0, 0.1, 4000)
        soundfile.write(path, noise, 16000)
    recordings = [(f"{s}/{u}.wav", s) for s, u in ("sa", "sb", "tc", "td")]
    cache, record = folder / "headers.cache", folder / "record"
    rows = build_manifest(corpus, recordings, cache)
    write_manifest(rows, folder / "loose.csv")
    pack = partial(
        pack_shards,
        folder / "loose.csv",
        corpus,
        folder / "shards",
        progress=False,
    )
    packed = pack()
    shard = folder / "shards" / "shard-000000.json"
    write_recorded(record, {"rate": 8000}, [["a", 1], ["b", 2]])
    synthetic = make_synthetic(folder / "synthetic", 2, 2, 2, 2, 0.6, 0.8, 7)
    return {
        "record": Target(
            lambda path: read_recorded(path, {"rate": 8000}, str, int),
            RecordError,
            record.read_bytes(),
            record,
            formats.json_values,
            40_000,
        ),
        "header cache": _sealed(
            lambda _: build_manifest(corpus, recordings, cache),
            ManifestError,
            cache,
            15_000,
        ),
        "record of a shard": _sealed(
            lambda _: pack(), ManifestError, shard, 3_000
        ),
        "shard": Target(
            lambda _: _read_all(packed),
            (ManifestError, AudioError),
            (folder / "shards" / "shard-000000.tar").read_bytes(),
            folder / "shards" / "shard-000000.tar",
            lambda good: formats.words(good, 0, 600),
            10_000,
        ),
        "packed manifest": Target(
            _read_all,
            (ManifestError, AudioError),
            packed.read_bytes(),
            folder / "packed.csv",
            formats.cells,
            40_000,
        ),
        "synthetic.json": Target(
            lambda _: make_synthetic(
                folder / "synthetic", 2, 2, 2, 2, 0.6, 0.8, 7
            ),
            ManifestError,
            (folder / "synthetic" / "synthetic.json").read_bytes(),
            synthetic.trials.parent / "synthetic.json",
            formats.json_values,
            20_000,
        ),
    }


def _read_all(manifest):
    for row in read_manifest(manifest):
        if ".tar#" in row.wav:
            read_audio(row.wav, row.start, row.stop)


def _sealed(read, error, place, many):
    """Of a file below whose record its content stands."""
    record, _, content = place.read_bytes().partition(b"\n")
    made_with = json.loads(record)["made_with"]

    def sealed(data):
        text = data.decode(errors="replace")
        return f"{seal(made_with, text)}\n".encode() + data

    return Target(
        read, error, content, place, formats.json_values, many, sealed
    )


def corpora(folder):
    """Lists and tables of corpora, published ones and one's own."""
    voices = [list(each) for each in miniature.voices(5, 4)]
    roots = {
        name: folder / name
        for name in ("voxceleb2", "voxceleb1", "sitw", "cnceleb", "calls")
    }
    miniature.voxceleb2(roots["voxceleb2"], voices[:2], ".wav", "dev/wav")
    miniature.voxceleb1(roots["voxceleb1"], voices[:3], voices[3:])
    miniature.sitw(roots["sitw"], voices[:2], voices[2:4])
    miniature.cnceleb(roots["cnceleb"], voices[:2], voices[2:3], voices[3:4])
    roots["calls"].mkdir()
    miniature.calls(roots["calls"], voices[:4])
    overlap = folder / "overlap.txt"
    overlap.write_text("Dev_Speaker_0\nid10271\n")
    kaldi = roots["calls"] / "kaldi"
    found = {}

    def add(name, read, place, changes, many):
        found[name] = Target(
            read,
            (ManifestError, TrialError, TextError),
            place.read_bytes(),
            place,
            changes,
            many,
        )

    for name in ("wav.scp", "segments", "utt2spk"):
        add(
            name,
            lambda _: kaldi_parts(kaldi, roots["calls"]),
            kaldi / name,
            formats.columns,
            25_000,
        )
    table = roots["calls"] / "table.csv"
    add("table", read_table, table, formats.cells, 50_000)
    add(
        "own corpus",
        lambda path: prepare_own(path, folder / "own", dev_share=0.5),
        shutil.copy(table, roots["calls"] / "own.csv"),
        formats.cells,
        500,
    )
    one, two = roots["voxceleb1"], roots["voxceleb2"]
    for place, many in (
        (one / "veri_test2.txt", 2_000),
        (one / "vox1_meta.csv", 500),
        (overlap, 500),
    ):
        train = two if place.name == "veri_test2.txt" else one
        add(
            place.name,
            lambda _, train=train: prepare_voxceleb(
                train,
                one,
                folder / "vox",
                lists=("O",),
                sitw_root=roots["sitw"],
                sitw_overlap=overlap,
                drop_test_speakers=True,
            ),
            place,
            formats.columns,
            many,
        )
    for name in ("lists/enroll-core.lst", "keys/core-core.lst"):
        add(
            name.partition("/")[2],
            lambda _: prepare_sitw(roots["sitw"], folder / "sitw.out"),
            roots["sitw"] / "dev" / name,
            formats.columns,
            5_000,
        )
    first, second = (
        roots["cnceleb"] / name for name in ("CN-Celeb_flac", "CN-Celeb2_flac")
    )
    for place in (
        first / "dev" / "dev.lst",
        second / "spk.lst",
        first / "eval" / "lists" / "enroll.lst",
        first / "eval" / "lists" / "enroll.map",
        first / "eval" / "lists" / "trials.lst",
    ):
        add(
            place.name,
            lambda _: prepare_cnceleb(roots["cnceleb"], folder / "cn"),
            place,
            formats.columns,
            1_500,
        )
    return found
