"""Extraction: batches equal single utterances; the store; several ranks."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import (
    InputNormalization,
    make_padding_mask,
)
from survival import PROCESSES

from speechbrain_ram.data.audio import AudioError, pad_waveforms
from speechbrain_ram.data.record import seal
from speechbrain_ram.utils import ahead, leave_group
from speechbrain_ram.verification import embeddings as module
from speechbrain_ram.verification import store as store_module
from speechbrain_ram.verification.embedder import length_batches
from speechbrain_ram.verification.store import (
    EmbeddingSet,
    EmbeddingStore,
    StoreError,
    merge,
)

RATE = 16000
KEYS = ("ids", "matrix", "seconds", "files")  # of a store
OF_LIST = ("store", "progress", "check")


def extract(encode, names, root, **options):
    """Options of the list to the one, those of the encoder to the other."""
    of_list = {k: options.pop(k) for k in OF_LIST if k in options}
    if "max_frames" in options:
        options["batch_seconds"] = options.pop("max_frames") / 100
    embedder = module.Embedder(encode, **options)
    return module.extract(embedder, names, root, **of_list)


class StandIn:
    """The host's front-end, then masked statistics of a few frames' context.

    Padding that leaks by one frame anywhere changes what it returns.
    """

    def __init__(self, dim=24):
        generator = torch.Generator().manual_seed(0)
        self.features = Fbank(n_mels=20)
        self.normalise = InputNormalization(norm_type="sentence")
        self.kernel = torch.randn(dim, 20, 5, generator=generator) / 10
        self.batches = []

    def __call__(self, wavs, lens):
        self.batches.append(tuple(wavs.shape))
        feats = self.normalise(self.features(wavs), lens)
        mask = make_padding_mask(feats, lens).transpose(1, 2)  # [B, 1, T]
        feats = feats.transpose(1, 2) * mask
        out = torch.nn.functional.conv1d(feats, self.kernel, padding=2)
        out = torch.tanh(out) * mask
        mean = out.sum(2) / mask.sum(2)
        spread = ((out - mean[..., None]) * mask).square().sum(2)
        return torch.cat([mean, (spread / mask.sum(2)).sqrt()], 1)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Twelve files, 0.1 to 1.3 s, many not a whole number of hops long."""
    root = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    names = []
    for i in range(12):
        name = f"spk{i % 3}/utt{i}.wav"
        (root / name).parent.mkdir(exist_ok=True)
        samples = 1600 + 1567 * i + (i % 4) * 31
        soundfile.write(root / name, 0.1 * rng.standard_normal(samples), RATE)
        names.append(name)
    return root, names


@pytest.mark.parametrize("hop", [160, 80])
@pytest.mark.parametrize(
    "lengths",
    [[1600], [1600, 1600], [1601, 1599], [320, 159, 160, 161, 1], [4000, 3999]],
)
def test_padded_frames_are_masked_exactly(lengths, hop):
    """The mask that SpeechBrain makes has n // hop + 1 frames for n samples."""
    wavs, lens = pad_waveforms(
        [torch.full((n,), float(i + 1)) for i, n in enumerate(lengths)], hop
    )
    assert wavs.shape[1] % hop == 0
    assert 0 <= wavs.shape[1] - max(lengths) < hop
    frames = wavs.shape[1] // hop + 1
    feats = torch.zeros(len(lengths), frames, 3)
    valid = make_padding_mask(feats, lens).squeeze(-1).sum(1)
    assert valid.tolist() == [n // hop + 1 for n in lengths]
    for i, (row, n) in enumerate(zip(wavs, lengths, strict=True)):
        assert (row[:n] == i + 1).all()
        assert (row[n:] == 0).all()
    full = [n // hop + 1 == frames for n in lengths]
    assert [rel == 1.0 for rel in lens.tolist()] == full


@pytest.mark.parametrize(
    "wavs", [[], [torch.ones(5), torch.ones(0)], [torch.ones(2, 5)]]
)
def test_padding_refuses_what_is_no_waveform(wavs):
    with pytest.raises(AudioError, match=r"shape \[samples\] are needed"):
        pad_waveforms(wavs)


@pytest.mark.parametrize("max_frames", [1, 100, 100_000])
def test_batches_equal_single_utterances(recordings, max_frames):
    root, names = recordings
    encoder = StandIn()
    result = extract(
        encoder, names, root, max_frames=max_frames, progress=False
    )
    assert result.ids == tuple(names)
    assert result.matrix.dtype == np.float32
    for name, row, seconds in zip(
        names, result.matrix, result.seconds, strict=True
    ):
        wav, _ = soundfile.read(root / name, dtype="float32")
        alone = encoder(torch.from_numpy(wav)[None], torch.ones(1))
        np.testing.assert_allclose(row, alone[0].numpy(), atol=1e-5)
        assert seconds == pytest.approx(len(wav) / RATE)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(recordings, threads):
    root, names = recordings
    options = {"max_frames": 1, "progress": False}
    alone = extract(StandIn(), names, root, threads=1, **options)
    inside = []

    class Asking(StandIn):
        def __call__(self, wavs, lens):
            inside.append((threading.get_ident(), torch.get_num_threads()))
            return super().__call__(wavs, lens)

    before = torch.get_num_threads()
    found = extract(Asking(), names, root, threads=threads, **options)
    assert torch.get_num_threads() == before
    assert {n for _, n in inside} == {1}
    assert threading.get_ident() not in {thread for thread, _ in inside}
    assert found.ids == alone.ids
    np.testing.assert_allclose(found.matrix, alone.matrix, atol=1e-5)


def test_an_error_in_a_thread_is_raised(recordings):
    root, names = recordings
    before = torch.get_num_threads()
    options = {"max_frames": 1, "threads": 3, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        extract(Interrupted(), names, root, **options)
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads is 0, allowed is 1 or more"):
        extract(StandIn(), names, root, threads=0)


def test_lengths_relative_to_samples_would_be_off(recordings):
    """What pad_waveforms is for: the usual lengths fail the test above."""
    root, names = recordings
    wavs = [
        torch.from_numpy(soundfile.read(root / n, dtype="float32")[0])
        for n in names
    ]
    encoder = StandIn()
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    usual = torch.tensor([len(w) / padded.shape[1] for w in wavs])
    alone = torch.cat([encoder(w[None], torch.ones(1)) for w in wavs])
    assert (encoder(padded, usual) - alone).abs().max() > 1e-3


def test_batches_are_bounded_and_of_like_length(recordings):
    root, names = recordings
    encoder = StandIn()
    options = {"max_frames": 250, "threads": 1, "progress": False}
    extract(encoder, names, root, **options)
    assert sum(size for size, _ in encoder.batches) == len(names)
    assert len(encoder.batches) < len(names)
    for size, samples in encoder.batches:
        assert size == 1 or size * (samples // 160) <= 250
    longest = [samples for _, samples in encoder.batches]
    assert longest == sorted(longest, reverse=True)


def test_every_item_is_in_one_batch():
    rng = np.random.default_rng(0)
    frames = rng.integers(1, 500, 200).tolist()
    batches = length_batches(frames, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        longest = max(frames[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 1000
    assert len(batches) < 70  # 50,000 frames need at least 50
    assert length_batches([5000, 3], 10) == [[0], [1]]


def test_duplicates_are_embedded_once(recordings):
    root, names = recordings
    encoder = StandIn()
    result = extract(encoder, names[:2] * 3, root, progress=False)
    assert result.ids == tuple(names[:2])
    assert sum(size for size, _ in encoder.batches) == 2


def test_progress_is_shown_on_stderr(recordings, capfd):
    root, names = recordings
    extract(StandIn(), names, root)
    out, err = capfd.readouterr()
    assert out == ""
    assert "embed" in err
    assert "12/12" in err
    extract(StandIn(), names, root, progress=False)
    assert capfd.readouterr() == ("", "")


def test_reading_never_runs_far_ahead():
    started = []

    def load(item):
        started.append(item)
        return item

    with ThreadPoolExecutor(4) as pool:
        for done in ahead(pool, load, range(50), depth=4):
            assert len(started) <= done + 6
    assert started[-1] == 49


def test_broken_files_are_all_named_before_any_is_embedded(tmp_path):
    good = 0.1 * np.cos(np.arange(3200))
    soundfile.write(tmp_path / "good.wav", good, RATE)
    soundfile.write(tmp_path / "slow.wav", good, 8000)
    soundfile.write(tmp_path / "two.wav", np.stack([good, good], 1), RATE)
    (tmp_path / "empty.wav").touch()
    names = ["good.wav", "slow.wav", "two.wav", "empty.wav", "gone.wav"]
    encoder = StandIn()
    with pytest.raises(AudioError) as caught:
        extract(encoder, names, tmp_path, progress=False)
    message = str(caught.value)
    assert "4 of 5 recordings cannot be used" in message
    for part in ("8000 Hz", "2 channels", "0 bytes", "gone.wav' does not"):
        assert part in message
    assert encoder.batches == []
    # and the first two can be allowed
    result = extract(
        encoder,
        names[:3],
        tmp_path,
        resample=True,
        mixdown=True,
        progress=False,
    )
    np.testing.assert_allclose(result.seconds, [0.2, 0.4, 0.2], rtol=1e-6)


def test_what_encoders_may_not_do(recordings):
    root, names = recordings
    with pytest.raises(ValueError, match=r"\[1, E\] .* got \(1, 1, 4\)"):
        extract(
            lambda wavs, lens: torch.zeros(len(wavs), 1, 4),
            names,
            root,
            progress=False,
        )
    with pytest.raises(ValueError, match="No utterance to embed"):
        extract(StandIn(), [], root)


# The store


def test_a_store_is_used_again(recordings, tmp_path):
    root, names = recordings
    store = EmbeddingStore(tmp_path / "new" / "e.safetensors", "encoder 1")
    first = extract(StandIn(), names[:8], root, store=store, progress=False)
    encoder = StandIn()
    again = extract(encoder, names[:8], root, store=store, progress=False)
    assert encoder.batches == []
    assert (again.matrix == first.matrix).all()
    assert (again.seconds == first.seconds).all()
    # more files: only these are embedded, the others stay
    extract(encoder, names[6:], root, store=store, progress=False)
    assert sum(size for size, _ in encoder.batches) == 4
    assert set(store.load().ids) == set(names)
    assert [p.name for p in store.path.parent.iterdir()] == ["e.safetensors"]


def test_a_changed_file_is_embedded_again(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, rng.standard_normal(3200) / 9, RATE)
    store = EmbeddingStore(tmp_path / "e.safetensors", "x")
    names = ["a.wav", "b.wav"]
    first = extract(StandIn(), names, tmp_path, store=store, progress=False)
    soundfile.write(tmp_path / "b.wav", rng.standard_normal(3200) / 9, RATE)
    os.utime(tmp_path / "b.wav", ns=(1, 1))  # same size, another time
    encoder = StandIn()
    second = extract(encoder, names, tmp_path, store=store, progress=False)
    assert sum(size for size, _ in encoder.batches) == 1
    assert (first.matrix[0] == second.matrix[0]).all()
    assert np.abs(first.matrix[1] - second.matrix[1]).max() > 1e-3
    third = extract(encoder, names, tmp_path, store=store, progress=False)
    assert (third.matrix == second.matrix).all()


class Interrupted(StandIn):
    def __call__(self, wavs, lens):
        if len(self.batches) == 5:
            raise KeyboardInterrupt
        return super().__call__(wavs, lens)


def test_an_interrupted_run_goes_on_where_it_stopped(recordings, tmp_path):
    root, names = recordings
    store = EmbeddingStore(tmp_path / "e.safetensors", "x")
    options = {
        "store": store,
        "max_frames": 1,
        "threads": 1,
        "progress": False,
    }
    with pytest.raises(KeyboardInterrupt):
        extract(Interrupted(), names, root, **options)
    assert not store.path.exists()
    assert len(store.load().ids) == 5
    encoder = StandIn()
    result = extract(encoder, names, root, **options)
    assert len(encoder.batches) == 7
    assert not store.parts.exists()
    whole = extract(StandIn(), names, root, **{**options, "store": None})
    np.testing.assert_array_equal(result.matrix, whole.matrix)


def test_what_was_stored_counts_while_parts_are_there(recordings, tmp_path):
    root, names = recordings
    store = EmbeddingStore(tmp_path / "e.safetensors", "x")
    options = {
        "store": store,
        "max_frames": 1,
        "threads": 1,
        "progress": False,
    }
    extract(StandIn(), names[:4], root, **options)
    with pytest.raises(KeyboardInterrupt):
        extract(Interrupted(), names, root, **options)
    assert len(store.load().ids) == 4 + 5
    encoder = StandIn()
    extract(encoder, names, root, **options)
    assert len(encoder.batches) == 3


def test_parts_are_saved_while_it_runs(recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_PARTS", -1)
    root, names = recordings
    store = EmbeddingStore(tmp_path / "e.safetensors", "x")
    seen = []

    class Watching(StandIn):
        def __call__(self, wavs, lens):
            rows = store.load()
            seen.append(0 if rows is None else len(rows.ids))
            return super().__call__(wavs, lens)

    extract(
        Watching(),
        names,
        root,
        store=store,
        max_frames=1,
        threads=1,
        progress=False,
    )
    assert seen == list(range(12))


def test_another_encoders_store_is_refused(recordings, tmp_path):
    root, names = recordings
    path = tmp_path / "e.safetensors"
    extract(
        StandIn(),
        names[:2],
        root,
        store=EmbeddingStore(path, "0123456789abcdef"),
        progress=False,
    )
    other = EmbeddingStore(path, "fedcba9876543210")
    with pytest.raises(
        StoreError, match="another encoder .0123456789ab.*; now it is fedcba"
    ):
        extract(StandIn(), names[:2], root, store=other, progress=False)


def test_other_files_are_no_stores(tmp_path):
    path = tmp_path / "e.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(StoreError, match="cannot be used as a store"):
        EmbeddingStore(path, "x").load()
    save_file({"a": np.zeros(2)}, path)
    with pytest.raises(StoreError, match="cannot be used as a store"):
        EmbeddingStore(path, "x").load()
    save_file(small_arrays(), path)
    with pytest.raises(StoreError, match="no record of what it was made from"):
        EmbeddingStore(path, "x").load()
    save_file(small_arrays(), path, metadata={"record": "[" * 100_000})
    with pytest.raises(StoreError, match="e.safetensors' cannot be used"):
        EmbeddingStore(path, "x").load()
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(StoreError, match="e.safetensors' .* a regular file"):
        EmbeddingStore(path, "x").load()
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="e.safetensors' .* a regular file"):
        EmbeddingStore(path, "x").load()


def small_arrays(ids=b'["a", "b"]', rows=2):
    return {
        "ids": np.frombuffer(ids, np.uint8),
        "matrix": np.ones((rows, 3), np.float32),
        "seconds": np.ones(rows, np.float32),
        "files": np.ones((rows, 3), np.int64),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": np.ones((2, 3))}, r"its matrix are F64 \[2, 3\]"),
        ({"matrix": np.ones((), np.float32)}, r"its matrix are F32 \[\]"),
        ({"matrix": np.ones((2, 0), np.float32)}, r"its matrix is \[2, 0\]"),
        ({"matrix": np.ones((99, 1), np.float32)}, "for 10 bytes of names"),
        ({"matrix": np.ones((3, 3), np.float32)}, "2 recordings need a matrix"),
        ({"seconds": np.ones((2, 1), np.float32)}, "its seconds are F32"),
        ({"files": np.ones((2, 3), np.int32)}, "its files are I32"),
        ({"ids": np.frombuffer(b'["a", 12]', np.uint8)}, "not a list of names"),
        ({"ids": np.frombuffer(b'{"a": 12}', np.uint8)}, "not a list of names"),
        ({"ids": np.frombuffer(b'["a", "a"]', np.uint8)}, "1 recordings need"),
        ({"ids": np.frombuffer(b"[" * 10**5, np.uint8)}, "'ids' is not valid"),
        ({"ids": np.frombuffer(b"\xff" * 99, np.uint8)}, "'ids' is not valid"),
        (
            {"matrix": np.float32([[1, 2, 3], [1, np.nan, 3]])},
            "the embedding of 'b' is NaN or infinite",
        ),
    ],
)
def test_a_stranger_store_is_refused(tmp_path, change, message):
    """Types, shapes and values, where the checksum fits."""
    store = EmbeddingStore(tmp_path / "e.safetensors", "x")
    arrays = {**small_arrays(), **change}
    record = seal(store.made_with, *store_module._content(arrays))
    save_file(arrays, store.path, metadata={"record": record})
    with pytest.raises(StoreError, match=message) as caught:
        store.load()
    assert "e.safetensors' cannot be used" in str(caught.value)


def small_store(folder):
    """A store of two recordings and a square matrix."""
    rows = EmbeddingSet(
        ("s1/a.wav", "s2/b.wav"),
        np.array([[1, 2], [3, 4]], np.float32),
        np.ones(2),
        np.arange(6).reshape(2, 3),
    )
    store = EmbeddingStore(folder / "e.safetensors", "0123456789abcdef")
    store.save(rows)
    return store


def test_any_flipped_bit_is_an_error(tmp_path):
    store = small_store(tmp_path)
    whole = store.path.read_bytes()
    for bit in range(0, 8 * len(whole), 5):  # one in each byte or two
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        store.path.write_bytes(damaged)
        with pytest.raises(StoreError, match="delete it to embed again"):
            store.load()
    store.path.write_bytes(whole)
    assert store.load().matrix.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {**arrays, "matrix": arrays["matrix"].T.copy()},
        lambda arrays: {**arrays, "matrix": arrays["matrix"][::-1].copy()},
        lambda arrays: {**arrays, "matrix": arrays["matrix"].reshape(1, 4)},
        lambda arrays: {**arrays, "ids": arrays["ids"][::-1].copy()},
    ],
)
def test_a_rearranged_store_is_refused(tmp_path, change):
    store = small_store(tmp_path)
    with safe_open(store.path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in KEYS}
        save_file(change(arrays), store.path, metadata=file.metadata())
    with pytest.raises(StoreError, match="is damaged.*another checksum"):
        store.load()


def test_a_set_checks_its_shapes():
    matrix, seconds, files = np.zeros((3, 2)), np.zeros(3), np.zeros((3, 3))
    EmbeddingSet(("a", "b", "c"), matrix, seconds, files)
    with pytest.raises(StoreError, match=r"\[3, E\].*\(2, 3\).*transposed"):
        EmbeddingSet(("a", "b", "c"), matrix.T, seconds, files)
    with pytest.raises(StoreError, match=r"the shapes \[\(3,\)"):
        EmbeddingSet(("a", "b", "c"), seconds, seconds, files)
    with pytest.raises(StoreError, match="2 recordings need .* 3 ids"):
        EmbeddingSet(("a", "b", "a"), matrix, seconds, files)


def test_rows_of_another_corpus_are_not_used(tmp_path):
    """Names, sizes and times are the same, as after `rsync -t`."""
    rng = np.random.default_rng(0)
    for root in ("a", "b"):
        (tmp_path / root).mkdir()
        soundfile.write(
            tmp_path / root / "1.wav", rng.standard_normal(3200) / 9, RATE
        )
        os.utime(tmp_path / root / "1.wav", ns=(1, 1))
    store = EmbeddingStore(tmp_path / "e.safetensors", "x")

    def embed(root, store=store):
        encoder = StandIn()
        folder = tmp_path / root
        found = extract(encoder, ["1.wav"], folder, store=store, progress=False)
        return found.matrix, len(encoder.batches)

    first, n = embed("a")
    assert (n, embed("a")[1]) == (1, 0)
    second, n = embed("b")
    assert n == 1
    np.testing.assert_array_equal(second, embed("b", store=None)[0])
    assert np.abs(first - second).max() > 1e-3
    # the same recording by another way is the same recording
    (tmp_path / "link").symlink_to("b")
    assert embed("link")[1] == 0


def test_a_store_is_as_readable_as_any_new_file(tmp_path):
    rows = EmbeddingSet(("a",), np.zeros((1, 2)), np.zeros(1), np.zeros((1, 3)))
    store = EmbeddingStore(tmp_path / "e.safetensors", "x")
    store.save(rows)
    (tmp_path / "other").touch()
    assert store.path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_of_two_rows_of_a_name_the_last_stays():
    def one(value, *ids):
        n = len(ids)
        return EmbeddingSet(
            ids, np.full((n, 2), value), np.zeros(n), np.zeros((n, 3))
        )

    joined = merge([one(1.0, "a", "b"), one(2.0, "b", "c")])
    assert joined.ids == ("a", "b", "c")
    assert joined.matrix[:, 0].tolist() == [1, 2, 2]
    assert merge([]) is None


# Several ranks


def extract_together(rank, folder, root, fail):
    """One of two ranks; writes its matrix, or its error."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet {fail}"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=2
    )
    names = [f"spk{i % 3}/utt{i}.wav" for i in range(12)]
    encoder = calls = StandIn()
    if fail and rank == 1:

        def encoder(wavs, lens):
            raise ValueError("out of luck")

    class LateStore(EmbeddingStore):
        """On rank 1, read when rank 0 could have done its share."""

        def load(self):
            time.sleep(2 * rank)
            return super().load()

    try:
        result = extract(
            encoder,
            names,
            root,
            store=LateStore(folder / "e.safetensors", "x"),
            max_frames=1,
            progress=False,
        )
    except Exception as error:
        (folder / f"error{rank}").write_text(str(error))
    else:
        np.savez(
            folder / f"{rank}.npz", matrix=result.matrix, n=len(calls.batches)
        )
    leave_group()


def launch(folder, root, fail):
    ranks = [
        PROCESSES.Process(
            target=extract_together, args=(rank, folder, root, fail)
        )
        for rank in range(2)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(timeout=120)
        assert each.exitcode == 0


def test_two_ranks_share_the_work(recordings, tmp_path):
    root, names = recordings
    # an error on one rank is an error on both, and loses no finished row
    launch(tmp_path, root, True)
    for rank in range(2):
        error = (tmp_path / f"error{rank}").read_text()
        assert "Rank 1 failed: out of luck" in error
    store = EmbeddingStore(tmp_path / "e.safetensors", "x")
    assert len(store.load().ids) == 6
    # the next run has the other rank's half to do, and shares it
    launch(tmp_path, root, False)
    alone = extract(StandIn(), names, root, progress=False)
    for rank in range(2):
        saved = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_allclose(saved["matrix"], alone.matrix, atol=1e-5)
        assert saved["n"] == 3
    assert set(store.load().ids) == set(names)
    assert not store.parts.exists()


@pytest.mark.parametrize("threads", [1, 2])
def test_leaving_between_batches_keeps_what_is_done(
    recordings, tmp_path, threads
):
    root, names = recordings
    store = EmbeddingStore(tmp_path / "e.safetensors", "x")
    looked_at, done = len(names), 3

    def check():
        check.calls += 1
        if check.calls > looked_at + done:
            raise SystemExit(75)

    check.calls = 0
    with pytest.raises(SystemExit):
        extract(
            StandIn(),
            names,
            root,
            max_frames=1,
            progress=False,
            store=store,
            threads=threads,
            check=check,
        )
    assert len(store.load().ids) == done


LONG = """
import sys
import numpy as np, soundfile, torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization
from speechbrain_ram.resnet import ResNet34, folded
from speechbrain_ram.utils import keep_freed_memory
from speechbrain_ram.verification.embedder import Embedder
from speechbrain_ram.verification.embeddings import extract

def peak():
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024

def encode(wavs, lens):
    return network(normalise(features(wavs), lens), lens).squeeze(1)

keep_freed_memory()
seconds, count = map(int, sys.argv[1:])
names = [f"{i}.wav" for i in range(count)]
for name in names:
    noise = np.random.default_rng(0).standard_normal(seconds * 16000) / 10
    soundfile.write(name, noise.astype(np.float32), 16000)
features, network = Fbank(n_mels=80), folded(ResNet34().eval())
normalise = InputNormalization(norm_type="sentence")
before = peak()
extract(Embedder(encode), names, ".", progress=False)
print(peak(), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize(
    ("seconds", "count"),
    [
        (240, 1),
        pytest.param(240, 2, marks=pytest.mark.slow),
        pytest.param(600, 2, marks=pytest.mark.slow),
    ],
)
def test_memory_for_long_recordings(tmp_path, seconds, count):
    """At full width, of a whole process; one stage of 240 s is 1 GB."""
    root = Path(module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(seconds), str(count)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    whole, more = map(int, done.stdout.split())  # MB
    assert whole < 1800
    assert more < 700 * count


@pytest.mark.real
def test_real_speech_in_batches_and_alone():
    corpus = os.environ.get("SPEECHOCEAN762")
    if not corpus:
        pytest.skip("SPEECHOCEAN762 is not set: real speech was NOT embedded")
    root = Path(corpus) / "dev"
    names = [str(p.relative_to(root)) for p in sorted(root.glob("*/*.ogg"))]
    names = names[::25]
    batched = extract(StandIn(), names, root, progress=False)
    alone = extract(StandIn(), names, root, max_frames=1, progress=False)
    np.testing.assert_allclose(batched.matrix, alone.matrix, atol=1e-4)
