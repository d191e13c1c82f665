"""Targets that are recordings, of every format that is read."""

import io
from fractions import Fraction
from functools import partial

import av
import fuzz_formats as formats
import numpy as np
import soundfile
from fuzz_targets import Target

from speechbrain_ram.data.audio import AudioError, audio_info, read_audio

_BEGIN = partial(formats.words, begin=0, end=64)
_LITTLE = partial(formats.little, begin=0, end=64)

#: Format and subtype of libsndfile, what its header's fields are, inputs.
FORMATS = {
    "wav": ("WAV", "PCM_16", _LITTLE, 20_000),
    "wav uint8": ("WAV", "PCM_U8", _LITTLE, 12_000),
    "wav float": ("WAV", "FLOAT", _LITTLE, 12_000),
    "wav double": ("WAV", "DOUBLE", _LITTLE, 12_000),
    "wavex": ("WAVEX", "PCM_16", _LITTLE, 12_000),
    "rf64": ("RF64", "PCM_16", partial(_LITTLE, end=120), 12_000),
    "aiff": ("AIFF", "PCM_16", _BEGIN, 12_000),
    "au": ("AU", "PCM_16", partial(_BEGIN, end=32), 12_000),
    "w64": ("W64", "PCM_16", partial(_LITTLE, end=128), 12_000),
    "caf": ("CAF", "PCM_16", partial(_BEGIN, end=100), 12_000),
    "nist": ("NIST", "PCM_16", formats.columns, 12_000),
    "flac": ("FLAC", None, formats.flac, 16_000),
    "ogg": ("OGG", "VORBIS", partial(_LITTLE, end=140), 5_000),
    "opus": ("OGG", "OPUS", partial(_LITTLE, end=140), 5_000),
    "mp3": ("MP3", None, partial(_BEGIN, end=80), 5_000),
}

#: Containers: codec, what its header's fields are.
CONTAINERS = {
    "m4a": ("mp4", "aac", formats.moov),
    "mp3 of a pipe": ("mp3", "libmp3lame", _BEGIN),
    "webm": ("webm", "libopus", partial(formats.words, end=400)),
    "avi": ("avi", "mp3", partial(formats.little, end=400)),
    "flv": ("flv", "mp3", partial(formats.words, end=300)),
    "ts": ("mpegts", "mp2", partial(formats.words, end=500)),
}


def recordings(folder):
    """Formats of libsndfile, and those of FFmpeg."""
    found = {}
    for name, (form, subtype, changes, many) in FORMATS.items():
        found[name] = Target(
            read_recording,
            AudioError,
            sounding(form, subtype),
            folder / f"{name}.sound",
            changes,
            many,
            formats.ogg_sums if form == "OGG" else bytes,
        )
    for name, (form, codec, changes) in CONTAINERS.items():
        found[name] = Target(
            read_recording,
            AudioError,
            contained(form, codec),
            folder / f"{name}.sound",
            changes,
            3_000,
        )
    return found


def sounding(form, subtype=None, samples=2000):
    noise = np.random.default_rng(0).normal(0, 0.1, samples)
    file = io.BytesIO()
    noise = noise.astype(np.float32)
    soundfile.write(file, noise, 16000, format=form, subtype=subtype)
    return file.getvalue()


def contained(form, codec, samples=4800):
    """What FFmpeg writes; of MP3 as it does to a pipe, without a length."""
    rate = 48000 if codec == "libopus" else 16000
    rate = 44100 if form == "flv" else rate
    noise = np.random.default_rng(0).normal(0, 0.1, (1, samples))
    file = io.BytesIO()
    options = {"write_xing": "0"} if form == "mp3" else {}
    with av.open(file, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        wanted = stream.codec_context.format.name
        frame = av.AudioFrame.from_ndarray(
            noise.astype(np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.time_base, frame.pts = (
            rate,
            Fraction(1, rate),
            0,
        )
        resampler = av.AudioResampler(
            wanted, "mono", rate, stream.codec_context.frame_size
        )
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            for packet in stream.encode(part):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return file.getvalue()


def read_recording(path):
    """In all ways, whatever the others said; an error if there was one."""
    errors = []
    for attempt in (
        lambda: audio_info(path),
        lambda: read_audio(path, resample=True, mixdown=True),
        lambda: read_audio(path, 5, 900, 8000, resample=True, mixdown=True),
    ):
        try:
            attempt()
        except AudioError as error:
            errors.append(error)
    if errors:
        raise errors[0]
