"""One reader: the samples of libsndfile, or one clear sentence.

Each row of the first table is a file as somebody has it; what is asked of it
is asked of everything that reads: the reader, the manifest, training crops,
verification, SpeakerEncoder and the conversion.
"""

import copy
import io
import os
import re
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
from small_encoder import export_small, voice
from speechbrain.dataio.encoder import CategoricalEncoder

from speechbrain_ram.corpora.convert import convert_tree
from speechbrain_ram.data.audio import (
    AUDIO_EXTENSIONS,
    Audio,
    AudioError,
    cut,
    read_audio,
)
from speechbrain_ram.data.dataset import CropDataset
from speechbrain_ram.data.headers import read_headers
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    build_manifest,
    find_recordings,
)
from speechbrain_ram.data.recordings import is_recording, split_into_pieces
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.verification.embedder import Embedder
from speechbrain_ram.verification.embeddings import extract

RATE = 16000


@pytest.fixture
def noise():
    draw = np.random.default_rng(0)
    return draw.integers(-32768, 32768, 5000).astype(np.int16)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "encoder"
    return SpeakerEncoder.from_folder(export_small(folder))


def strict(encoder):
    """How lists are embedded where nothing else is asked for."""
    return Embedder(encoder.encode)


# -- The same samples by every way --------------------------------------------


def soundfile_reads(path, start=0, stop=None):
    with soundfile.SoundFile(path) as file:
        if start:
            file.seek(start)
        end = file.frames if stop is None else min(stop, file.frames)
        return torch.from_numpy(file.read(end - start, dtype="float32"))


@pytest.fixture
def short_way(monkeypatch):
    """A list that tells how often samples came straight from their bytes."""
    taken, read = [], Audio._read_bare

    def spy(*args):
        found = read(*args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(Audio, "_read_bare", spy)
    return taken


@pytest.mark.parametrize("piece", [(0, None), (1234, 1235), (4000, 5000)])
def test_plain_wav(tmp_path, noise, short_way, piece):
    path = str(tmp_path / "a.WAV")
    soundfile.write(path, noise, RATE)
    expected = soundfile_reads(path, *piece)
    assert torch.equal(Audio().read(path, *piece), expected)
    assert short_way == [True]


def test_chunks_before_the_samples_are_stepped_over(tmp_path, noise, short_way):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise, RATE)
    plain = path.read_bytes()
    for length in (5, 9000):  # odd, so padded; further than is read first
        extra = b"LIST" + struct.pack("<I", length) + bytes(length + length % 2)
        size = struct.pack("<I", len(plain) - 8 + len(extra))
        path.write_bytes(plain[:4] + size + plain[8:12] + extra + plain[12:])
        found = Audio().read(path, 7, 300)
        assert torch.equal(found, soundfile_reads(path, 7, 300))
    assert short_way == [True, True]


@pytest.mark.parametrize(
    "settings",
    [
        {"subtype": "PCM_24"},
        {"subtype": "FLOAT"},
        {"subtype": "ULAW"},
        {"format": "RF64"},
        {"format": "WAVEX"},
        {"format": "AIFF"},
        {"format": "AU"},
        {"format": "W64"},
        {"format": "CAF"},
        {"format": "NIST"},
        {"format": "FLAC"},
        {"format": "OGG"},
        {"format": "MP3"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_other_files_are_libsndfiles(tmp_path, noise, settings):
    path = str(tmp_path / "a.wav")
    soundfile.write(path, noise, RATE, **settings)
    for piece in ((0, None), (5, 900), (4900, 5100)):
        expected = soundfile_reads(path, *piece)
        assert torch.equal(Audio().read(path, *piece), expected)
    assert Audio().info(path).frames == soundfile.info(path).frames


def test_other_rates_and_channels(tmp_path, noise):
    path = str(tmp_path / "a.wav")
    soundfile.write(path, noise, 8000)
    with pytest.raises(AudioError, match="8000 Hz, 16000 Hz .*--resample True"):
        Audio().read(path, 0, 500)
    assert len(Audio(resample=True).read(path, 0, 500)) == 1000
    soundfile.write(path, noise.reshape(-1, 2), RATE)
    with pytest.raises(AudioError, match="2 channels, mono.*--mixdown True"):
        Audio().read(path, 0, 500)
    found = Audio(mixdown=True).read(path, 0, 500)
    expected = soundfile.read(path, stop=500, dtype="float32")[0].mean(axis=1)
    assert np.array_equal(found, expected)


def test_pieces_that_are_not_there(tmp_path, noise):
    for name in ("a.wav", "a.flac"):
        path = tmp_path / name
        soundfile.write(path, noise, RATE)
        with pytest.raises(AudioError, match="has 5000 samples, but"):
            Audio().read(path, 5000, 5010)
        # Past the end: what is there.
        assert torch.equal(
            Audio().read(path, 4900, 5100), Audio().read(path, 4900, 5000)
        )


def test_windows_are_equal_and_all_of_it(tmp_path, noise):
    assert cut(0, 60, 1, 25.0) == [(0, 20), (20, 40), (40, 60)]
    path = tmp_path / "a.wav"
    soundfile.write(path, noise, RATE)
    windows = list(Audio().windows(path, seconds=0.1))
    assert [len(window) for window in windows] == [1250] * 4
    assert torch.equal(torch.cat(windows), Audio().read(path))


# -- Headers that promise too little, too much or nothing ---------------------


def write_mp3(path, wav, codec, **options):
    """As ``ffmpeg -f mp3 -`` writes it to a pipe: without Xing's header."""
    av = pytest.importorskip("av", reason="the extra m4a is not installed")
    form = "mp2" if codec == "mp2" else "mp3"
    mux = {} if codec == "mp2" else {"write_xing": "0"}
    with av.open(str(path), "w", format=form, options=mux) as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(
            (wav * 32767).astype(np.int16)[None], format="s16", layout="mono"
        )
        frame.rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def with_data_size(path, wav, size, **settings):
    soundfile.write(path, wav, RATE, **settings)
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(data)


def without_total(path, wav):
    soundfile.write(path, wav, RATE)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)


def loud_and_quiet(seconds=4.0):
    """VBR spends few bits on its beginning, and many later."""
    wav = voice(seconds)
    wav[: len(wav) // 3] *= 1e-3
    return wav


VBR = {"flags": "+qscale", "global_quality": str(118 * 4)}
UNKNOWN_LENGTHS = {
    "cbr.mp3": lambda path, wav: write_mp3(path, wav, "libmp3lame"),
    "vbr.mp3": lambda path, wav: write_mp3(path, wav, "libmp3lame", **VBR),
    "a.mp2": lambda path, wav: write_mp3(path, wav, "mp2"),
    "pipe.flac": without_total,
    "zero.wav": lambda path, wav: with_data_size(path, wav, 0),
    "all.wav": lambda path, wav: with_data_size(path, wav, 0xFFFFFFFF),
    "sox.wav": lambda path, wav: with_data_size(path, wav, 0x7FFEFFD4),
    "zero24.wav": lambda path, wav: with_data_size(
        path, wav, 0, subtype="PCM_24"
    ),
    "all24.wav": lambda path, wav: with_data_size(
        path, wav, 0x7FFEFFD4, subtype="PCM_24"
    ),
}


@pytest.mark.parametrize("name", UNKNOWN_LENGTHS)
def test_a_length_that_no_header_knows(tmp_path, encoder, name):
    wav = loud_and_quiet()
    corpus = tmp_path / "corpus"
    (corpus / "s").mkdir(parents=True)
    path = corpus / "s" / name
    UNKNOWN_LENGTHS[name](path, wav)
    whole = Audio().read(path)
    info = Audio().info(path)
    assert len(whole) == info.frames == read_headers("/", [str(path)])[0].frames
    if name.startswith(("cbr", "vbr", "a.mp2")):  # codecs add some at the ends
        assert 0 <= len(whole) - len(wav) < 3000
        av = pytest.importorskip("av")
        with av.open(str(path)) as container:
            decoded = sum(frame.samples for frame in container.decode(audio=0))
        assert len(whole) == decoded
    else:
        np.testing.assert_allclose(whole, wav, atol=1e-4)
    for start in (100, len(whole) // 2, len(whole) - 1000):
        piece = Audio().read(path, start, start + 1000)
        np.testing.assert_allclose(piece, whole[start:][:1000], atol=1e-5)
    (row,) = build_manifest(corpus, [(f"s/{name}", "s")], verify=True)
    assert (row.start, row.stop) == (0, len(whole))
    labels = CategoricalEncoder()
    labels.update_from_iterable(["s"])
    crops = CropDataset([row], corpus, labels, crop_seconds=1.0)
    for epoch in range(5):
        crops.set_epoch(epoch)
        assert crops[0]["sig"].shape == (RATE,)
    expected = encoder.embed(whole)
    np.testing.assert_allclose(encoder.embed(path), expected, atol=1e-4)
    found = extract(strict(encoder), [f"s/{name}"], corpus)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-4)
    assert convert_tree(corpus, tmp_path / "out", workers=1).converted == 1
    (target,) = (tmp_path / "out").rglob("*.flac")
    assert Audio().info(target).frames == len(whole)


def test_an_empty_wav_is_still_empty(tmp_path, noise):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise[:0], RATE)
    plain = path.read_bytes()
    for more in (b"", b"LIST" + struct.pack("<I", 4) + b"INFO"):
        path.write_bytes(plain + more)
        for read in (Audio().info, Audio().read):
            with pytest.raises(AudioError, match="holds no samples"):
                read(path)


# -- Refused by all who read --------------------------------------------------


@pytest.fixture(params=["info", "read", "manifest", "embed", "verify"])
def refuses(request, encoder):
    """Whether one of those who read a file refuses it, in its words."""

    def check(path, match):
        path = os.fspath(path)
        with pytest.raises((AudioError, ManifestError), match=match) as caught:
            if request.param in ("info", "read"):
                getattr(Audio(), request.param)(path)
            elif request.param == "manifest":
                build_manifest("/", [(path, "s")])
            elif request.param == "embed":
                encoder.embed(path)
            else:
                extract(strict(encoder), [path], "/")
        assert path in str(caught.value)

    return check


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a.wav", {}),
        ("a.wav", {"format": "RF64"}),
        ("a.wav", {"format": "WAVEX", "subtype": "PCM_24"}),
        ("a.wav", {"endian": "BIG"}),
        ("a.aiff", {}),
        ("a.aif", {"format": "AIFF", "subtype": "FLOAT"}),
        ("a.au", {}),
        ("a.au", {"endian": "LITTLE"}),
        ("a.w64", {}),
        ("a.caf", {}),
        ("a.sph", {"format": "NIST"}),
    ],
)
def test_cut_short(tmp_path, noise, refuses, name, settings):
    path = tmp_path / name
    soundfile.write(path, noise, RATE, **settings)
    whole = path.read_bytes()
    assert len(Audio().read(path)) == len(noise)
    path.write_bytes(whole[: 2 * len(whole) // 3])
    refuses(path, r"a\.\w+' is truncated: its header promises \d+ .*\d+ are th")


OGG = ("VORBIS", "OPUS")


@pytest.mark.parametrize("subtype", OGG)
def test_a_part_of_an_ogg_file(tmp_path, refuses, subtype):
    """libsndfile takes it for a shorter recording."""
    path = tmp_path / "a.ogg"
    soundfile.write(path, voice(20.0), RATE, subtype=subtype)
    whole = path.read_bytes()
    pages = [found.start() for found in re.finditer(b"OggS", whole)]
    second = pages[-1] - 7  # into the last page but one
    for end in (len(whole) // 2, second, pages[-1] + 9, len(whole) - 1):
        path.write_bytes(whole[:end])
        refuses(path, "a.ogg' is truncated: its Ogg .* -c copy NEW.ogg` keeps")
    path.write_bytes(whole[: pages[-1]] + bytes(4096))  # after a crash
    refuses(path, "a.ogg' is truncated")


@pytest.mark.parametrize("subtype", OGG)
def test_ogg_files_that_are_whole(tmp_path, subtype):
    """Two in one; a stray tag; a live stream, whose end no page marks."""
    path = tmp_path / "a.ogg"
    soundfile.write(path, voice(20.0), RATE, subtype=subtype)
    whole = path.read_bytes()
    frames = len(Audio().read(path))
    for content in (whole + whole, whole + b"TAG" + bytes(125)):
        path.write_bytes(content)
        assert len(Audio().read(path)) == frames == Audio().info(path).frames
    live = whole[: whole.rindex(b"OggS")]
    assert live[live.rindex(b"OggS") + 5] == 0
    path.write_bytes(live)
    assert 0 < len(Audio().read(path)) == Audio().info(path).frames < frames


def test_pipes_devices_and_folders(tmp_path, refuses):
    os.mkfifo(tmp_path / "a.wav")
    refuses(tmp_path / "a.wav", "is a named pipe.*Save it as a file first")
    refuses("/dev/zero", "is a device or a socket")
    refuses(tmp_path, "is a folder")


@pytest.mark.parametrize(
    ("wav", "why"),
    [
        (np.zeros(RATE), "holds only silence"),
        (np.full(RATE, 0.25), "holds only silence"),
        (voice(0.01), "lasts 10 ms, at least 100 ms"),
    ],
)
def test_nobody_is_heard(tmp_path, encoder, wav, why):
    soundfile.write(tmp_path / "a.wav", wav, RATE)
    soundfile.write(tmp_path / "good.wav", voice(1.0), RATE)
    with pytest.raises(AudioError, match=f"a.wav' {why}"):
        encoder.embed(tmp_path / "a.wav")
    with pytest.raises(AudioError, match=f"a.wav' {why}"):
        extract(strict(encoder), ["good.wav", "a.wav"], tmp_path)


# -- Bounded memory -----------------------------------------------------------


def test_small_files_that_become_large(tmp_path, encoder):
    """An hour in 200 kB, a sparse file of 2 GB: window by window."""
    flac = tmp_path / "hour.flac"
    with soundfile.SoundFile(flac, "w", RATE, 1, "PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros(60 * RATE, np.float32))
        file.write(voice(1.0))
    sparse = tmp_path / "sparse.wav"
    soundfile.write(sparse, voice(1.0), RATE)
    data = bytearray(sparse.read_bytes())
    data[40:44] = struct.pack("<I", 2**31 - 2**20)
    sparse.write_bytes(data)
    os.truncate(sparse, 44 + 2**31 - 2**20)
    tracemalloc.start()
    try:
        assert read_headers(tmp_path, [flac.name], verify=True)[0].verified
        assert np.isfinite(encoder.embed(flac)).all()
        first = next(iter(Audio().windows(sparse)))
        assert len(first) <= 60 * RATE
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert flac.stat().st_size < 400_000
    assert peak < 200e6


# -- Found in folders, whatever they are called -------------------------------


@pytest.mark.parametrize("ending", AUDIO_EXTENSIONS)
def test_every_ending_is_found(tmp_path, ending):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / f"A{ending.upper()}").touch()
    assert find_recordings(tmp_path) == [f"s/A{ending.upper()}"]


def test_what_the_reader_reads_has_an_ending():
    assert {".aif", ".au", ".caf", ".w64", ".mp2", ".m4a", ".mp4"} <= set(
        AUDIO_EXTENSIONS
    )


@pytest.mark.parametrize("odd", ["$", "\xa0", "\u202f", "\t", "\n", "é"])
def test_odd_names_are_only_refused_by_manifests(tmp_path, encoder, odd):
    (tmp_path / "s").mkdir()
    path = tmp_path / "s" / f"a{odd}b.wav"
    soundfile.write(path, voice(0.5), RATE)
    (name,) = find_recordings(tmp_path)
    assert tmp_path / name == path
    assert encoder.embed(path).shape[0] == 1
    if odd == "é":
        assert build_manifest(tmp_path, [(name, "s")])
        return
    with pytest.raises(ManifestError, match="cannot go into a manifest"):
        build_manifest(tmp_path, [(name, "s")])


# -- What else users hand in --------------------------------------------------


def stored(wav, **settings):
    file = io.BytesIO()
    settings = {"format": "WAV", "subtype": "FLOAT"} | settings
    soundfile.write(file, wav, RATE, **settings)
    return file


def test_one_recording_or_several(noise):
    for one in ("a.wav", b"RIFF", noise, (noise, 8000), {"array": noise}):
        assert is_recording(one)
    for several in (["a.wav"], ("a.wav", "b.wav"), (noise, noise), 3, None):
        assert not is_recording(several)


def test_a_long_array_is_cut():
    minute = np.zeros(60 * RATE)
    pieces = split_into_pieces(minute, 0, RATE, False, False, 25.0)
    assert [piece.samples for piece in pieces] == [20 * RATE] * 3
    assert [len(piece.load()) for piece in pieces] == [20 * RATE] * 3


ACCEPTED = {
    "BytesIO at its end": lambda wav: stored(wav),
    "bytes": lambda wav: stored(wav).getvalue(),
    "FLAC in BytesIO": lambda wav: stored(wav, format="FLAC", subtype="PCM_24"),
    "array and sampling_rate": lambda wav: {
        "path": None,
        "array": wav,
        "sampling_rate": RATE,
    },
    "waveform and sample_rate": lambda wav: {
        "waveform": torch.from_numpy(wav)[None],
        "sample_rate": RATE,
    },
    "(array, rate)": lambda wav: (wav, RATE),
    "(tensor, rate)": lambda wav: (torch.from_numpy(wav)[None], RATE),
    "soundfile.read, stereo": lambda wav: (np.stack([wav, wav], 1), RATE),
    "torchaudio.load, stereo": lambda wav: (
        torch.from_numpy(np.stack([wav, wav])),
        float(RATE),
    ),
    "int64": lambda wav: (wav * 32768).astype(np.int64),
    "int32": lambda wav: (wav * 2.0**31).astype(np.int32),
    "int64 tensor": lambda wav: torch.from_numpy(wav * 32768).long(),
    "uint8": lambda wav: (wav * 128 + 128).round().astype(np.uint8),
    "bfloat16": lambda wav: torch.from_numpy(wav).bfloat16(),
    "float16": lambda wav: wav.astype(np.float16),
    "with gradient": lambda wav: torch.from_numpy(wav).requires_grad_(),
}
ROUGH = {"uint8": 0.9, "bfloat16": 0.99}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted(encoder, kind):
    wav = voice(1.0)
    given = ACCEPTED[kind](wav)
    assert encoder.score(given, wav) > ROUGH.get(kind, 0.9999)
    assert encoder.embed([given, wav]).shape[0] == 2
    assert encoder.embed(given).shape[0] == 1


def test_an_open_file(tmp_path, encoder):
    wav = voice(1.0)
    soundfile.write(tmp_path / "a.wav", wav, RATE, subtype="FLOAT")
    with open(tmp_path / "a.wav", "rb") as file:
        assert encoder.score(file, wav) > 0.9999
    with (
        open(tmp_path / "a.wav", encoding="latin-1") as file,
        pytest.raises(AudioError, match="recording 0 is open as text.*'rb'"),
    ):
        encoder.embed(file)


def test_an_array_of_another_rate(encoder):
    wav = voice(1.0, rate=32000)
    high = encoder.embed((wav, 32000))
    resampled = Audio(resample=True).convert(wav[:, None], 32000, "a")
    np.testing.assert_allclose(high, encoder.embed(resampled), atol=1e-5)
    plain = copy.copy(encoder)
    plain.resample = plain.mixdown = False
    with pytest.raises(AudioError, match="32000 Hz, 16000 Hz is needed"):
        plain.embed((wav, 32000))
    with pytest.raises(AudioError, match="has 2 channels"):
        plain.embed((np.stack([wav, wav], 1), RATE))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (io.BytesIO(b"no audio" * 20), "recording 0' cannot be read as audio"),
        (b"", "recording 0' is an empty file"),
        ({"bytes": b""}, r"dict with the keys \['bytes'\]; 'array' and"),
        ({"array": "a", "sampling_rate": RATE}, "recording 0 is a str"),
        ((voice(1.0), 0.5), "sample rate of 0.5"),
        ((voice(1.0), 1000.5), "sample rate of 1000.5"),
        ((voice(1.0), float("inf")), "sample rate of inf, a whole number"),
        ((voice(1.0), np.float32("inf")), "sample rate of .*inf.*, a whole"),
        (voice(1.0).astype(complex), "samples of type complex"),
        (np.ones(RATE, bool), "samples of type bool"),
        ((voice(1.0) * 2**20).astype(np.int64), "int64 numbers up to"),
        ((voice(1.0) * 2**14).astype(np.int32), "Pass it as int16"),
        (np.zeros(RATE, np.int64), "only silence"),
        (np.zeros((2, 2, RATE)), "has shape"),
        (np.array([None] * 9), "samples of type object"),
        (3, "recording 0 is a int; a path"),
    ],
)
def test_refused_in_one_sentence(encoder, given, why):
    with pytest.raises(AudioError, match=why):
        encoder.embed([given])


def test_read_audio_is_the_reader(tmp_path, noise):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise, 8000)
    options = {"sample_rate": RATE, "resample": True}
    found = read_audio(path, 10, 500, **options)
    assert torch.equal(found, Audio(**options).read(path, 10, 500))


def test_utterances_may_be_videos_and_m4a(tmp_path, encoder, monkeypatch):
    """Half of a folder in M4A is read, or named; never left out in silence."""
    pytest.importorskip("av", reason="the extra m4a is not installed")
    import miniature

    wav = voice(2.0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "1.wav", wav, RATE)
        miniature.write_m4a(tmp_path / name / "2.m4a", wav)
    names = find_recordings(tmp_path)
    assert names == ["a/1.wav", "a/2.m4a", "b/1.wav", "b/2.m4a"]
    rows = build_manifest(tmp_path, [(n, n[0]) for n in names], verify=True)
    labels = CategoricalEncoder()
    labels.update_from_iterable("ab")
    crops = CropDataset(rows, tmp_path, labels, crop_seconds=1.0)
    assert all(item["sig"].std() > 0.01 for item in crops)
    found = extract(strict(encoder), names, tmp_path)
    expected = encoder.embed([tmp_path / name for name in names])
    np.testing.assert_allclose(found.matrix, expected, atol=1e-4)
    assert isinstance(rows[0], Utterance)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ManifestError, match=r"(?s)2 of 4 .*needs PyAV"):
        build_manifest(tmp_path, [(n, n[0]) for n in names])
