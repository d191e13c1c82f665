"""Bad input gives our own errors: no other exception, no hang, no flood.

Every reader of a file that may come from somebody else is tried: with good
files of which one field is changed, with files cut and flipped anywhere, and
with noise. Each change of the code tries a sample of some seconds;
`pytest -m slow tests/test_fuzz.py` tries over a million inputs within an hour
and prints what the slowest and the largest of each reader needed.
"""

import logging
import random
import tracemalloc

import pytest
from fuzz_targets import MEGABYTES, inputs, targets, try_input, try_inputs

from speechbrain_ram.data.audio import AudioError, audio_info, read_audio

NAMES = [
    # lists and tables
    *("trials voxceleb", "trials kaldi", "trials sitw", "trials cnceleb"),
    *("trials with tabs", "trials of models", "models", "spk2utt", "scores"),
    *("manifest", "speakers tsv", "speakers csv", "wav.scp", "segments"),
    *("utt2spk", "table", "own corpus", "veri_test2.txt", "vox1_meta.csv"),
    *("overlap.txt", "enroll-core.lst", "core-core.lst", "dev.lst"),
    *("spk.lst", "enroll.lst", "enroll.map", "trials.lst"),
    # settings, and what is noted down
    *("plain JSON", "plain YAML", "calibration", "verify YAML", "recipe"),
    *("record", "header cache", "record of a shard", "shard"),
    *("packed manifest", "synthetic.json", "run.json"),
    # recordings
    *("wav", "wav uint8", "wav float", "wav double", "wavex", "rf64", "aiff"),
    *("au", "w64", "caf", "nist", "flac", "ogg", "opus", "mp3"),
    *("mp3 of a pipe", "m4a", "webm", "avi", "flv", "ts"),
    # encoders, checkpoints, embeddings
    *("encoder.json", "encoder.safetensors", "edited encoder.json"),
    *("edited encoder.safetensors", "classifier.ckpt", "label_encoder.ckpt"),
    *("config.yaml", "avg_model.pt", "mean_vec.npy", "model.onnx"),
    *("hyperparams.yaml", "embedding_model.ckpt", "optimizer.ckpt"),
    *(
        "brain.ckpt",
        "counter.ckpt",
        "CKPT.yaml",
        "sealed CKPT.yaml",
        "store",
        "enrolment",
    ),
]


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    logging.disable(logging.CRITICAL)  # a warning for each of a million files
    yield targets(tmp_path_factory.mktemp("fuzz"))
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def costs(request):
    """Name -> outcome, printed when all have been tried."""
    found = {}
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n\n{'reader':28}  inputs  accepted  ms each  slowest s   MB")
        for name, each in found.items():
            print(
                f"{name:28} {each.inputs:7,} {each.accepted:9,} "
                f"{1000 * each.seconds / each.inputs:8.2f} "
                f"{each.slowest:10.2f} {each.megabytes:4.0f}"
            )
        total = sum(each.inputs for each in found.values())
        seconds = sum(each.seconds for each in found.values())
        print(f"{total:,} inputs, {seconds / 60:.1f} minutes of the readers")


def test_all_readers_are_tried(readers):
    assert sorted(readers) == sorted(NAMES)
    assert sum(target.many for target in readers.values()) >= 10**6


@pytest.mark.parametrize("name", NAMES)
def test_a_sample(readers, name):
    target = readers[name]
    assert try_input(target, target.good), "the good file is not accepted"
    count = 20 + target.many // 1000
    outcome = try_inputs(target, inputs(target, random.Random(name), count))
    assert not outcome.failures, str(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many(readers, costs, name):
    target = readers[name]
    draw = random.Random(f"{name} again")
    costs[name] = try_inputs(target, inputs(target, draw, target.many))
    assert not costs[name].failures, str(costs[name])


def test_a_header_that_promises_a_terabyte(readers):
    """FLAC's STREAMINFO holds 36 bits of length: all ones."""
    target = readers["flac"]
    data = bytearray(target.good)
    assert data[:4] == b"fLaC"
    data[21] |= 0x0F
    data[22:26] = b"\xff\xff\xff\xff"
    target.place.write_bytes(bytes(data))
    tracemalloc.start()
    for read in (read_audio, audio_info):
        with pytest.raises(AudioError, match="promises 68719476735 samples"):
            read(target.place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEGABYTES * 1e6
