"""Bad input gives our own errors: no other exception, no hang, no flood.

Tried here on every change: 15 readers with 100 mutated files and 50 of random
bytes each, 2,250 inputs. `pytest -m slow tests/test_fuzz.py` tries 150,000.
"""

import random
import signal
import tracemalloc

import pytest
from fuzz_targets import mutate, targets, try_input
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechbrain_ram.data.audio import AudioError, audio_info, read_audio

NAMES = [
    *("trials", "models", "scores", "manifest"),
    *("wav", "wav float", "flac", "ogg", "mp3"),
    *("encoder.json", "encoder.safetensors", "edited encoder.json"),
    *("hyperparams.yaml", "embedding_model.ckpt", "CKPT.yaml"),
]
SECONDS = 20  # for one input, on a busy machine
MEGABYTES = 100


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def no_hang():
    """An input that takes longer ends the test with a traceback."""

    def too_long(*_):
        raise TimeoutError(f"an input took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_all_readers_are_tried(readers):
    assert sorted(readers) == sorted(NAMES)
    for target in readers.values():
        assert try_input(target, target.good) or target.place.stem == "trials"


def hold(readers, no_hang, name, inputs):
    target = readers[name]
    tracemalloc.start()
    try:
        for data in inputs:
            no_hang()
            try_input(target, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTES * 1e6


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files(readers, no_hang, name):
    draw = random.Random(name)
    good = readers[name].good
    hold(readers, no_hang, name, (mutate(good, draw) for _ in range(100)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_mutated_files(readers, no_hang, name):
    draw = random.Random(f"{name} again")
    good = readers[name].good
    hold(readers, no_hang, name, (mutate(good, draw) for _ in range(10000)))


@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_random_bytes(readers, no_hang, name, data):
    no_hang()
    try_input(readers[name], data)


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
    target.place.write_bytes(target.good)
    assert peak < MEGABYTES * 1e6
