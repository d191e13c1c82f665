"""A recording has one embedding, whichever way it is asked for."""

import io
import json

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from small_encoder import export_small, voice

from speechbrain_ram.cli import verify
from speechbrain_ram.cli.main import main
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.training.brain import SpeakerBrain
from speechbrain_ram.verification.scores import read_scores
from speechbrain_ram.verification.store import EmbeddingStore

RATE = 16000
LONG = ("150 s.wav", "600 s.wav")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Recordings of all kinds, an encoder, a list of all pairs."""
    root = tmp_path_factory.mktemp("routes")
    rng = np.random.default_rng(0)
    for name, seconds in (("short.wav", 0.5), ("s.flac", 2.3), ("t.wav", 2.31)):
        soundfile.write(root / name, voice(seconds, 90 + 40 * seconds), RATE)
    for name in LONG:
        seconds = int(name.split()[0])
        wav = np.tile(voice(5.0, 100 + seconds / 10), seconds // 5)
        wav *= 1 + 0.1 * np.sin(np.arange(len(wav)) / 9000)
        wav[len(wav) // 2 :] += 0.01 * rng.standard_normal(
            len(wav) - len(wav) // 2
        )
        soundfile.write(root / name, wav, RATE)
    stereo = np.stack([voice(3.0, f, rate=8000) for f in (120, 180)], axis=1)
    soundfile.write(root / "8k stereo.wav", stereo, 8000)
    names = [path.name for path in sorted(root.iterdir())]
    av = pytest.importorskip("av")
    with av.open(str(root / "voice.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        samples = voice(3.0, 200).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    names.append("voice.m4a")
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    (root / "trials.txt").write_text(
        "".join(f"{i % 2}\t{a}\t{b}\n" for i, (a, b) in enumerate(pairs))
    )
    folder = export_small(root / "encoder")
    encoder = SpeakerEncoder.from_folder(folder)
    rows = encoder.embed([root / name for name in names])
    return root, folder, encoder, names, rows


def same(rows, expected):
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)


def run(*arguments):
    done = CliRunner().invoke(main, [str(part) for part in arguments])
    assert done.exit_code in (0, 1), done.output
    return done.output


def cosines(root, rows, names):
    """Of the list, from the rows."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    place = {name: i for i, name in enumerate(names)}
    lines = (root / "trials.txt").read_text().splitlines()
    pairs = [line.split("\t")[1:] for line in lines]
    return np.array([unit[place[a]] @ unit[place[b]] for a, b in pairs])


def test_alone_and_in_a_batch(world):
    root, _, encoder, names, rows = world
    for name, row in zip(names, rows, strict=True):
        same(encoder.embed(root / name)[0], row)


def test_long_recordings_are_read_by_one_rule(world):
    """150 s whole; of 600 s the mean of three windows."""
    root, _, encoder, names, rows = world
    for name, windows in zip(LONG, (1, 3), strict=True):
        wav = soundfile.read(root / name, dtype="float32")[0]
        parts = np.split(wav, windows)
        expected = encoder.embed(parts).mean(axis=0)
        same(rows[names.index(name)], expected)


def test_by_verify_speakers(world, tmp_path):
    root, folder, _, names, rows = world
    verify.main(
        [
            *("--encoder", str(folder), "--data_root", str(root)),
            *("--trials", str(root / "trials.txt"), "--bootstrap", "0"),
            *("--resample", "--mixdown", "--output", str(tmp_path)),
        ]
    )
    store = EmbeddingStore(
        tmp_path / "embeddings.safetensors",
        SpeakerEncoder.from_folder(folder).fingerprint,
    )
    kept = store.load()
    place = {name: i for i, name in enumerate(kept.ids)}
    same(kept.matrix[[place[name] for name in names]], rows)
    _, scores = read_scores(tmp_path / "trials" / "scores.txt")
    same(scores, cosines(root, rows, names))


def test_by_the_command_line(world, tmp_path):
    root, folder, _, names, rows = world
    paths = [root / name for name in names]
    run("embed", "-e", folder, *paths, "-o", tmp_path / "e.npz")
    same(np.load(tmp_path / "e.npz")["embeddings"], rows)
    given = cosines(root, rows, names)
    options = ["-e", folder, root / "trials.txt", "--root", root]
    run("score", *options, "-o", tmp_path / "scores.txt")
    same(read_scores(tmp_path / "scores.txt")[1], given)
    said = run("compare", "-e", folder, paths[1], paths[0], "--json")
    same(json.loads(said)["score"], given[0])


def test_by_the_page(world):
    pytest.importorskip("multipart")
    client = pytest.importorskip("starlette.testclient")
    from speechbrain_ram.cli.demo import create_app

    root, _, encoder, names, rows = world
    given = cosines(root, rows, names)
    with client.TestClient(create_app(encoder), "http://localhost") as page:
        answer = page.post(
            "/compare",
            files={
                side: (names[i], io.BytesIO((root / names[i]).read_bytes()))
                for side, i in (("a", 2), ("b", 0))  # not too long
            },
        )
    same(answer.json()["score"], given[1])


def test_by_training(world):
    """The network as it is trained, not folded for a CPU."""
    root, _, encoder, names, rows = world
    brain = SpeakerBrain(
        modules=dict(encoder.modules),
        hparams={"compute_cost": torch.nn.Identity(), "train_logger": None},
        run_opts={"device": "cpu", "noprogressbar": True},
        read_options={"sample_rate": RATE, "resample": True, "mixdown": True},
    )
    same(brain.embed(names, str(root)).matrix, rows)
