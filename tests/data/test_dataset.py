"""Crops: what is read, from where, and that nothing else matters."""

import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.encoder import CategoricalEncoder

from speechbrain_ram.data.audio import Audio, AudioError, read_audio
from speechbrain_ram.data.dataset import (
    Columns,
    CropDataset,
    original_speakers,
    speaker_datasets,
)
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    write_manifest,
)
from speechbrain_ram.training.faults import Batch, SkipUnreadable

RATE = 16000


def ramp(start, length):
    """Samples that tell where they come from."""
    return (np.arange(start, start + length) / 2**20).astype(np.float32)


@pytest.fixture
def corpus(tmp_path):
    """Ramps of several lengths: (folder, train.csv, valid.csv)."""
    root = tmp_path / "corpus"
    rows = []
    for i, length in enumerate([100, 1600, 3199, 3200, 3201, 16000, 80000]):
        speaker = "ab"[i % 2]
        path = root / speaker / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, ramp(0, length), RATE, subtype="FLOAT")
        name = f"{speaker}/{i}.wav"
        rows.append(
            Utterance(
                name, length / RATE, f"$data_root/{name}", 0, length, speaker
            )
        )
    write_manifest(rows, tmp_path / "train.csv")
    write_manifest(rows, tmp_path / "valid.csv")
    return root, tmp_path / "train.csv", tmp_path / "valid.csv"


def datasets(corpus, **settings):
    root, train_csv, valid_csv = corpus
    settings = {"crop_seconds": 0.2, **settings}
    return speaker_datasets(train_csv, valid_csv, root, **settings)


def starts(data):
    """Where each crop begins, in samples."""
    return [round(float(item["sig"][0]) * 2**20) for item in data]


def test_items(corpus):
    train, valid, encoder = datasets(corpus)
    assert len(encoder) == 2
    assert encoder.encode_label("a") == 0
    for data in (train, valid):
        for item in data:
            assert set(item) == {"id", "sig", "spk_id_encoded"}
            assert item["sig"].shape == (3200,)
            assert item["sig"].dtype == torch.float32
            label = encoder.encode_label(item["id"][0])
            assert item["spk_id_encoded"].tolist() == [label]


def test_crops_are_consecutive_samples_of_their_file(corpus):
    lengths = [100, 1600, 3199, 3200, 3201, 16000, 80000]
    for data in datasets(corpus)[:2]:
        for item, length in zip(data, lengths, strict=True):
            start = round(float(item["sig"][0]) * 2**20)
            assert 0 <= start <= max(length - 3200, 0)
            whole = np.tile(ramp(0, length), 3200 // length + 2)
            assert np.array_equal(item["sig"], whole[start : start + 3200])


def test_validation_crops_are_the_centre(corpus):
    valid = datasets(corpus)[1]
    assert starts(valid) == [0, 0, 0, 0, 1, 6400, 38400]
    valid.set_epoch(9)
    assert starts(valid)[-1] == 38400


def test_random_crops_cover_the_file_evenly(corpus):
    train = datasets(corpus)[0]
    found = []
    for epoch in range(1000):
        train.set_epoch(epoch)
        found.append(round(float(train[5]["sig"][0]) * 2**20))
    counts, _ = np.histogram(found, bins=8, range=(0, 12801))
    # Chi-squared with 7 degrees of freedom: 24.3 is the 0.1 % point.
    assert ((counts - 125) ** 2 / 125).sum() < 24.3
    edge = {0, 1}
    seen = set()
    for epoch in range(60):
        train.set_epoch(epoch)
        seen.add(round(float(train[4]["sig"][0]) * 2**20))
    assert seen == edge  # 3201 samples: both places, and no third


def test_crops_depend_on_seed_epoch_and_id_alone(corpus):
    train = datasets(corpus)[0]
    train.set_epoch(3)
    third = starts(train)
    train.set_epoch(4)
    fourth = starts(train)
    assert third[5:] != fourth[5:]
    train.set_epoch(3)
    assert starts(train) == third

    again = datasets(corpus)[0]  # a resumed run
    again.set_epoch(3)
    torch.manual_seed(99)
    assert [starts([again[i]])[0] for i in (6, 5)] == [third[6], third[5]]
    other = datasets(corpus, seed=2)[0]
    other.set_epoch(3)
    assert starts(other)[5:] != third[5:]
    # Pinned: a changed hash would change every published run.
    assert train._position("a/6.wav") == pytest.approx(PINNED, abs=1e-12)


PINNED = 0.666953876888378


@pytest.mark.parametrize(
    "loader",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
    ],
    ids=["none", "forked", "persistent"],
)
def test_workers_see_the_epoch(corpus, loader):
    train = datasets(corpus)[0]
    batches = make_dataloader(train, batch_size=4, **loader)
    for epoch in (1, 2, 1):
        train.set_epoch(epoch)
        found = torch.cat([batch.sig.data for batch in batches])
        assert torch.equal(found, torch.stack([i["sig"] for i in train]))
    batch = next(iter(batches))
    assert batch.sig.data.shape == (4, 3200)
    assert torch.equal(batch.sig.lengths, torch.ones(4))
    assert batch.spk_id_encoded.data.tolist() == [[0], [1], [0], [1]]


def test_only_the_crop_is_read(corpus, monkeypatch):
    asked = []
    original = Audio.read

    def spy(audio, path, start, stop, as_stored):
        asked.append(stop - start)
        return original(audio, path, start, stop, as_stored)

    monkeypatch.setattr(Audio, "read", spy)
    list(datasets(corpus)[0])
    assert asked == [100, 1600, 3199, 3200, 3200, 3200, 3200]


def test_segments_of_a_long_file(tmp_path):
    """Start and stop of the manifest bound every crop."""
    path = tmp_path / "long.wav"
    soundfile.write(path, ramp(0, 80000), RATE, subtype="FLOAT")
    rows = [Utterance("a", 0.5, str(path), 40000, 48000, "a")]
    encoder = CategoricalEncoder()
    encoder.update_from_iterable("a")
    data = CropDataset(rows, "/", encoder, crop_seconds=0.4)
    for epoch in range(50):
        data.set_epoch(epoch)
        assert 40000 <= starts(data)[0] <= 48000 - 6400


@pytest.mark.parametrize("rate", [1, 44_101, 2**31 - 1])
def test_rates_of_damaged_headers_take_no_memory(tmp_path, rate):
    """The filter from 44,101 to 16,000 Hz alone would be 2.8 GB."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(1000), rate)
    message = (
        f"{rate} Hz, which cannot be converted to 16000 Hz.*damaged"
        if 1000 < rate < 384_000
        else f"is damaged: its header says 1 channels at {rate} Hz"
    )
    with pytest.raises(AudioError, match=message):
        read_audio(path, resample=True)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_other_rates(tmp_path, rate):
    """A tone keeps its pitch; crops have the right length all the same."""
    path = tmp_path / "a.wav"
    time = np.arange(2 * rate) / rate
    soundfile.write(path, np.sin(2 * np.pi * 1000 * time), rate)
    rows = [Utterance("a", 2.0, str(path), 0, 2 * rate, "a")]
    encoder = CategoricalEncoder()
    encoder.update_from_iterable("a")
    with pytest.raises(AudioError, match=f"sample rate of {rate} Hz"):
        CropDataset(rows, "/", encoder)[0]
    for seconds in (0.777, 2.0, 3.0):
        data = CropDataset(
            rows, "/", encoder, crop_seconds=seconds, resample=True
        )
        crop = data[0]["sig"]
        assert len(crop) == round(seconds * RATE)
        spectrum = torch.fft.rfft(crop * torch.hann_window(len(crop))).abs()
        peak = int(spectrum.argmax()) * RATE / len(crop)
        assert abs(peak - 1000) < 2


def test_stereo_only_when_asked(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.tile([0.5, -0.25], (RATE, 1)), RATE)
    rows = [Utterance("a", 1.0, str(path), 0, RATE, "a")]
    encoder = CategoricalEncoder()
    encoder.update_from_iterable("a")
    with pytest.raises(AudioError, match="2 channels"):
        CropDataset(rows, "/", encoder)[0]
    mixed = CropDataset(rows, "/", encoder, mixdown=True)[0]["sig"]
    assert torch.allclose(mixed, torch.tensor(0.125))


def test_labels_are_saved_as_text_and_come_back(corpus, tmp_path):
    encoder = datasets(corpus)[2]
    encoder.save(tmp_path / "labels.txt")
    text = (tmp_path / "labels.txt").read_text()
    assert text.startswith("'a' => 0\n'b' => 1\n")
    loaded = CategoricalEncoder()
    loaded.load(tmp_path / "labels.txt")
    train, _, used = datasets(corpus, label_encoder=loaded)
    assert used is loaded
    assert train[1]["spk_id_encoded"].tolist() == [1]


def test_speakers_that_do_not_belong(corpus, tmp_path):
    root, train_csv, _ = corpus
    stranger = Utterance("c", 1.0, "$data_root/c.wav", 0, 9, "cleo")
    write_manifest([stranger], tmp_path / "other.csv")
    message = "1 speakers that the 2 labels do not know, for example 'cleo'"
    with pytest.raises(ManifestError, match=message):
        speaker_datasets(train_csv, tmp_path / "other.csv", root)
    with pytest.raises(ManifestError, match="one speaker only, 'cleo'"):
        speaker_datasets(tmp_path / "other.csv", train_csv, root)


@pytest.mark.parametrize("seconds", [0, -1.0, 1e-6, float("nan")])
def test_impossible_crops(corpus, seconds):
    with pytest.raises(ValueError, match=f"crop_seconds is {seconds}"):
        datasets(corpus, crop_seconds=seconds)


def test_missing_file_is_named(corpus):
    train = datasets(corpus)[0]
    (corpus[0] / "b" / "1.wav").unlink()
    with pytest.raises(AudioError, match="b/1.wav' does not exist"):
        train[1]


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_moves_the_pitch(tmp_path, speed):
    path = tmp_path / "a.wav"
    time = np.arange(3 * RATE) / RATE
    soundfile.write(path, np.sin(2 * np.pi * 1000 * time), RATE)
    rows = [Utterance("a", 3.0, str(path), 0, 3 * RATE, "a")]
    encoder = CategoricalEncoder()
    encoder.update_from_iterable([f"a@{speed}"])
    (item,) = CropDataset(rows, "/", encoder, speeds=[speed])
    assert item["id"] == f"a@{speed}"
    crop = item["sig"]
    assert len(crop) == 2 * RATE
    spectrum = torch.fft.rfft(crop * torch.hann_window(len(crop))).abs()
    assert abs(int(spectrum.argmax()) / 2 - 1000 * speed) < 2


def test_speeds_make_speakers_of_their_own(corpus):
    train, valid, encoder = datasets(corpus)
    fast, same_valid, more = datasets(corpus, speeds=(1.0, 0.9, 1.1))
    assert len(fast) == 3 * len(train) and len(same_valid) == len(valid)
    assert len(more) == 3 * len(encoder)
    names, rows = original_speakers(more, (1.0, 0.9, 1.1))
    assert names.lab2ind == encoder.lab2ind
    assert [more.ind2lab[int(row)] for row in rows] == list(encoder.lab2ind)
    labels = {int(item["spk_id_encoded"]) for item in fast}
    assert labels == set(range(len(more)))


@pytest.mark.parametrize("speeds", [(), (0.0,), (1.0, 9)])
def test_impossible_speeds(corpus, speeds):
    with pytest.raises(ValueError, match="numbers from 0.5 to 2 are needed"):
        datasets(corpus, speeds=speeds)


def test_augmentation_of_training_crops_alone(corpus):
    """It is given the crop, and a key of seed, epoch and utterance."""
    seen = []

    def augment(crop, key):
        seen.append((len(crop), key))
        return -crop

    train, valid, _ = datasets(corpus, augment=augment)
    plain = datasets(corpus)[0]
    train.set_epoch(5)
    plain.set_epoch(5)
    assert torch.equal(train[6]["sig"], -plain[6]["sig"])
    assert seen == [(3200, "1986/5/a/6.wav/augment")]
    assert valid[6]["sig"].max() > 0
    assert len(seen) == 1


def test_columns_hold_what_a_dict_of_dicts_would(tmp_path):
    names = ["b/é.wav", "a/\udcff.wav", "c/long" * 9]  # of any bytes
    rows = [
        Utterance(name, 1.0, f"$data_root/{name}", i, i + 9, name[0])
        for i, name in enumerate(names)
    ]
    data = Columns(rows, tmp_path, [1.0, 0.9])
    assert dict(data) == {
        f"{name}{mark}": {
            "path": f"{tmp_path}/{name}",
            "start": i,
            "stop": i + 9,
            "speed": speed,
            "spk_id": f"{name[0]}{mark}",
        }
        for speed, mark in ((1.0, ""), (0.9, "@0.9"))
        for i, name in enumerate(names)
    }
    ids = [*names, *(f"{name}@0.9" for name in names)]
    assert list(data) == list(data.ids) == data.ids[:] == ids
    assert data.ids[-1] == ids[-1] and data.ids[1:4] == ids[1:4]
    assert data.speakers == ["a", "b", "c", "a@0.9", "b@0.9", "c@0.9"]
    for beyond in (6, -7):
        with pytest.raises(IndexError):
            data.ids[beyond]
        with pytest.raises(IndexError):
            data.item(beyond)
    with pytest.raises(KeyError):
        data["d/1.wav"]


def test_the_hosts_filters_work_on_columns(corpus):
    train = datasets(corpus)[0]
    long = train.filtered_sorted(key_min_value={"stop": 3201}, sort_key="stop")
    long.set_output_keys(["id", "stop"])
    assert [item["stop"] for item in long] == [3201, 16000, 80000]
    assert [item["id"] for item in long] == ["a/4.wav", "b/5.wav", "a/6.wav"]
    assert len(train.overfit_test(2, 5)) == 5


def test_columns_cost_few_bytes_an_utterance(tmp_path):
    n = 20_000
    rows = [
        Utterance(
            f"id{i % 99:05d}/{i:07d}.wav",
            4.0,
            f"$data_root/{i}",
            0,
            9,
            f"{i % 99}",
        )
        for i in range(n)
    ]
    tracemalloc.start()
    data = Columns(rows, "/corpus", [1.0, 0.9, 1.1])
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == 3 * n
    assert taken / len(data) < 70  # a dict for each took 500


def _all_16_bits(tmp_path, **options):
    """Every 16-bit value, in a WAV file: a dataset of it."""
    samples = np.arange(-(2**15), 2**15, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    soundfile.write(tmp_path / "b.flac", samples, RATE)
    rows = [
        Utterance(name, 4.096, f"$data_root/{name}", 0, len(samples), "s")
        for name in ("a.wav", "b.flac")
    ]
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(["s", "s@0.9"])
    encoder.expect_len(2)
    return CropDataset(rows, tmp_path, encoder, crop_seconds=4.096, **options)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_16_bits_travel_as_they_are_stored(tmp_path, n_workers):
    data = _all_16_bits(tmp_path)
    stored = data.as_stored(0)["sig"]
    assert stored.dtype == torch.int16 and len(stored.unique()) == 2**16
    expected, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert np.array_equal(data[0]["sig"], expected)  # float32, as promised
    loader = torch.utils.data.DataLoader(
        SkipUnreadable(data), 1, collate_fn=Batch, num_workers=n_workers
    )
    wav, flac = (batch.data for batch in loader)
    assert wav.sig.data.dtype == torch.int16
    assert flac.sig.data.dtype == torch.float32  # decoded by libsndfile
    for batch in (wav, flac):
        batch = batch.to("cpu")
        assert batch.sig.data.dtype == torch.float32
        assert np.array_equal(batch.sig.data[0], expected)
        assert batch.spk_id_encoded.data.dtype == torch.int64


def test_a_batch_of_both_is_of_floats(tmp_path):
    data = SkipUnreadable(_all_16_bits(tmp_path))
    batch = Batch([data[0], data[1]]).data
    assert batch.sig.data.dtype == torch.float32
    assert torch.equal(batch.sig.data[0], batch.sig.data[1])


@pytest.mark.parametrize(
    "change", [{"speeds": [0.9]}, {"augment": lambda crop, key: crop * 0.5}]
)
def test_changed_samples_travel_as_floats(tmp_path, change):
    data = _all_16_bits(tmp_path, **change)
    stored = data.as_stored(0)["sig"]
    assert stored.dtype == torch.float32
    assert torch.equal(stored, data[0]["sig"])
