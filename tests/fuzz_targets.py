"""What reads files of others, with a good file each to begin from.

A target takes bytes. It may succeed, or raise the error of its own; any other
exception is a bug. Used by test_fuzz.py and by fuzz_atheris.py.
"""

import contextlib
import io
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from safetensors.torch import load_file
from small_encoder import export_small

from speechbrain_ram.data.audio import AudioError, audio_info, read_audio
from speechbrain_ram.data.manifest import ManifestError, read_manifest
from speechbrain_ram.export.architecture import fingerprint
from speechbrain_ram.inference import EncoderError, SpeakerEncoder
from speechbrain_ram.training.checkpoints import (
    CheckpointError,
    SafeCheckpointer,
    read_checkpoint,
)
from speechbrain_ram.verification.scores import read_scores
from speechbrain_ram.verification.trials import (
    FORMS,
    TrialError,
    read_models,
    read_trials,
)


class Target(NamedTuple):
    """A reader, its own error, and a good file.

    `place` is where the bytes are put before `read(place)`.
    """

    read: object
    error: type
    good: bytes
    place: Path


TRIALS = b"1 id1/a.wav id1/b.wav\n0 id1/a.wav id2/c d.wav\n"
MANIFEST = (
    b"ID,duration,wav,start,stop,spk_id\n"
    b's/a.wav,1.5,$data_root/s/a.wav,0,24000,"s"\n'
    b"s/b.wav,2.0,/abs/b.wav,16000,48000,t\n"
)
SCORES = b"id1/a.wav id1/b.wav 0.25 1\nid1/a.wav id2/c.wav -1e-3 0\n"


def recording(format, subtype=None):
    noise = np.random.default_rng(0).normal(0, 0.1, 2000).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, noise, 16000, format=format, subtype=subtype)
    return file.getvalue()


def read_any_trials(path):
    """All forms of lists; the first error is raised at the end."""
    errors = []
    for form in FORMS:
        try:
            read_trials(path, form)
        except TrialError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def read_recording(path):
    errors = []
    for attempt in (
        lambda: audio_info(path),
        lambda: read_audio(path),
        lambda: read_audio(path, 5, 900, 8000, resample=True, mixdown=True),
    ):
        try:
            attempt()
        except AudioError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def load_edited(encoder):
    """An encoder whose description was edited by who knows fingerprints.

    Without a new one nearly every change would be refused for that alone.
    """
    file = encoder / "encoder.json"
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        description = json.loads(file.read_text(encoding="utf-8"))
        weights = load_file(encoder / "encoder.safetensors")
        description["fingerprint"] = fingerprint(
            description["architecture"], weights
        )
        file.write_text(json.dumps(description))
    return SpeakerEncoder.from_folder(encoder)


def trained_run(folder, encoder):
    """A run of which SpeakerEncoder takes the best checkpoint."""
    model = SpeakerEncoder.from_folder(encoder).modules["embedding_model"]
    saved = SafeCheckpointer(folder / "save", {"embedding_model": model})
    checkpoint = saved.save_checkpoint(meta={"EER": 3.5}).path
    text = (encoder / "hyperparams.yaml").read_text()
    text = text.partition("# Cosines")[0]  # the encoder: parsing is slow
    (folder / "hyperparams.yaml").write_text(text)
    return checkpoint


def targets(folder):
    """Name -> target; `folder` is for their files."""
    encoder = export_small(folder / "encoder")
    edited = export_small(folder / "edited")
    checkpoint = trained_run(folder / "run", encoder)
    texts = {
        "trials": (read_any_trials, TrialError, TRIALS),
        "models": (read_models, TrialError, b"m1 a.wav b.wav\nm2 c.wav\n"),
        "scores": (read_scores, TrialError, SCORES),
        "manifest": (read_manifest, ManifestError, MANIFEST),
    }
    recordings = {
        "wav": ("WAV", "PCM_16"),
        "wav float": ("WAV", "FLOAT"),
        "flac": ("FLAC", None),
        "ogg": ("OGG", "VORBIS"),
        "mp3": ("MP3", None),
    }
    found = {
        name: Target(*each, folder / f"{name}.txt")
        for name, each in texts.items()
    }
    for name, how in recordings.items():
        place = folder / f"{name}.{name.split()[0]}"
        good = recording(*how)
        found[name] = Target(read_recording, AudioError, good, place)
    for name in ("encoder.json", "encoder.safetensors"):
        found[name] = Target(
            lambda _: SpeakerEncoder.from_folder(encoder),
            EncoderError,
            (encoder / name).read_bytes(),
            encoder / name,
        )
    found["edited encoder.json"] = Target(
        lambda _: load_edited(edited),
        EncoderError,
        (edited / "encoder.json").read_bytes(),
        edited / "encoder.json",
    )
    for place in (
        folder / "run" / "hyperparams.yaml",
        checkpoint / "embedding_model.ckpt",
    ):
        # The checkpoint's own folder: its checksums would refuse all changes.
        found[place.name] = Target(
            lambda _: SpeakerEncoder.from_folder(checkpoint),
            EncoderError,
            place.read_bytes(),
            place,
        )
    found["CKPT.yaml"] = Target(
        lambda _: read_checkpoint(checkpoint),
        CheckpointError,
        (checkpoint / "CKPT.yaml").read_bytes(),
        checkpoint / "CKPT.yaml",
    )
    return found


def try_input(target, data):
    """Whether the reader accepted it; restores the good file."""
    target.place.write_bytes(data)
    try:
        target.read(target.place)
    except target.error as error:
        assert str(error)
        return False
    finally:
        target.place.write_bytes(target.good)
    return True


#: What breaks parsers, put into good files.
TOKENS = (
    *(b"", b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"),
    *(b"\n", b"\r", b"\t", b" ", b",", b'"', b"'", b"$", b"/", b"..", b"%s"),
    *(b"nan", b"inf", b"-1", b"1e999", b"9" * 400, b"0x10", b"null", b"true"),
    *(b"{", b"}", b"[", b"]", b"[" * 3000, b'{"a":' * 2000, b"\xef\xbb\xbf"),
    *("\u2028", "\u202e", "é"),
)


def mutate(good, draw: random.Random):
    """A good file with a few pieces cut, doubled, flipped or replaced."""
    data = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        begin = draw.randrange(len(data) + 1)
        end = min(len(data), begin + draw.choice((0, 1, 4, 40)))
        kind = draw.randrange(4)
        if kind == 0:
            token = draw.choice(TOKENS)
            data[begin:end] = (
                token if isinstance(token, bytes) else (token.encode())
            )
        elif kind == 1:
            data[begin:begin] = data[begin:end] * draw.choice((1, 50))
        elif kind == 2 and data:
            data[begin % len(data)] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data) + 1) :]
    return bytes(data)
