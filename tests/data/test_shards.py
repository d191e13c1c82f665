"""Shards against the loose recordings that they were packed from."""

import json
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataloader import make_dataloader

from speechbrain_ram.cli.main import main
from speechbrain_ram.data import dataset, shards
from speechbrain_ram.data.audio import (
    Audio,
    AudioError,
    is_packed,
    read_audio,
)
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    read_manifest,
    write_manifest,
)
from speechbrain_ram.data.record import read_recorded, write_recorded
from speechbrain_ram.data.shards import at_rate, pack_shards


@pytest.fixture
def corpus(tmp_path):
    """Nine noises of 0.2 to 0.6 s, in FLAC and WAV, dots in their names."""
    draw = np.random.default_rng(0)
    root, rows = tmp_path / "corpus", []
    for number in range(9):
        ending = ("flac", "wav")[number % 2]
        name = f"s{number % 3}/a.b{number}.{ending}"
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = draw.integers(-32768, 32768, draw.integers(3200, 9600))
        soundfile.write(path, samples.astype(np.int16), 16000)
        seconds = len(samples) / 16000
        rows.append(
            Utterance(
                name, seconds, f"$data_root/{name}", 0, len(samples), name[:2]
            )
        )
    write_manifest(rows, tmp_path / "loose.csv")
    return tmp_path


def pack(corpus, output="shards", **kwargs):
    kwargs = {"shard_bytes": 40_000, "progress": False, **kwargs}
    return pack_shards(
        corpus / "loose.csv", corpus / "corpus", corpus / output, **kwargs
    )


def test_samples_order_and_speakers_are_the_same(corpus):
    loose = read_manifest(corpus / "loose.csv")
    packed = read_manifest(pack(corpus))
    assert [row.id for row in packed] == [row.id for row in loose]
    assert [row.spk_id for row in packed] == [row.spk_id for row in loose]
    assert len({row.wav.partition("#")[0] for row in packed}) > 2
    for here, there in zip(packed, loose, strict=True):
        path = there.path(corpus / "corpus")
        assert (here.start, here.stop) == (there.start, there.stop)
        assert torch.equal(read_audio(here.wav, 0, here.stop), read_audio(path))
        assert torch.equal(
            read_audio(here.wav, 100, 1700), read_audio(path, 100, 1700)
        )


def test_batches_of_the_loader_are_the_same(corpus):
    """The same crops in the same order, whatever the workers."""
    pack(corpus)
    epochs = []
    for manifest, workers in (
        (corpus / "loose.csv", 0),
        (corpus / "shards" / "manifest.csv", 0),
        (corpus / "shards" / "manifest.csv", 2),
    ):
        crops, _, _ = dataset.speaker_datasets(
            manifest, manifest, corpus / "corpus", crop_seconds=0.25
        )
        crops.set_epoch(3)
        order = torch.Generator().manual_seed(5)
        loader = make_dataloader(
            crops,
            batch_size=4,
            shuffle=True,
            generator=order,
            num_workers=workers,
        )
        epochs.append(list(loader))
    for packed in epochs[1:]:
        for ours, loose in zip(packed, epochs[0], strict=True):
            assert ours.id == loose.id
            assert torch.equal(ours.sig.data, loose.sig.data)
            assert torch.equal(
                ours.spk_id_encoded.data, loose.spk_id_encoded.data
            )


def test_webdataset_reads_the_shards(corpus):
    wds = pytest.importorskip("webdataset")
    packed = {row.id: row for row in read_manifest(pack(corpus))}
    files = sorted(str(p) for p in (corpus / "shards").glob("*.tar"))
    seen = set()
    for sample in wds.WebDataset(files, shardshuffle=False):
        label = json.loads(sample["json"])
        row = packed[label["id"]]
        samples = np.frombuffer(sample["wav"][44:], "<i2") / 32768
        assert label["spk_id"] == row.spk_id
        assert np.array_equal(samples, read_audio(row.wav, 0, row.stop))
        seen.add(row.id)
    assert seen == set(packed)


def test_an_interrupted_packing_goes_on(corpus, monkeypatch):
    whole = pack(corpus, "whole").parent
    calls = []

    def unplugged(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise OSError("unplugged")
        return read_audio(*args, **kwargs)

    monkeypatch.setattr(shards, "read_audio", unplugged)
    with pytest.raises(OSError, match="unplugged"):
        pack(corpus)
    assert not (corpus / "shards" / "manifest.csv").exists()
    before = {p: p.stat() for p in (corpus / "shards").glob("*.tar")}
    assert before
    calls[:] = [None] * 10
    manifest = pack(corpus)
    assert all(p.stat() == stat for p, stat in before.items())
    for tar in whole.glob("*.tar"):  # the same bytes, whoever packs them
        assert tar.read_bytes() == (manifest.parent / tar.name).read_bytes()
    assert not list(manifest.parent.glob(".*"))


def test_shards_can_be_moved(corpus):
    pack(corpus).parent.rename(corpus / "moved")
    old = read_manifest(corpus / "moved" / "manifest.csv")[0]
    with pytest.raises(AudioError, match="moved since"):
        read_audio(old.wav, 0, old.stop)
    row = read_manifest(pack(corpus, "moved"))[0]
    loose = read_manifest(corpus / "loose.csv")[0].path(corpus / "corpus")
    assert torch.equal(read_audio(row.wav, 0, row.stop), read_audio(loose))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("list of utterances", {"seed": 2}),
        ("list of utterances", {"shard_bytes": 50_000}),
        ("sample_rate .16000; now it is 8000", {"sample_rate": 8000}),
        ("resample .False; now it is True", {"resample": True}),
        ("mixdown .False; now it is True", {"mixdown": True}),
    ],
)
def test_other_shards_in_the_folder(corpus, name, change):
    manifest = pack(corpus)
    before = manifest.read_bytes()
    with pytest.raises(
        ManifestError, match=f"another {name}.*another folder.*or delete"
    ):
        pack(corpus, **change)
    assert manifest.read_bytes() == before


def test_shards_of_another_corpus(corpus):
    """Same names and lengths tell nothing: the place does."""
    pack(corpus)
    (corpus / "corpus").rename(corpus / "first")
    (corpus / "corpus").symlink_to("first")
    with pytest.raises(ManifestError, match="another data_root .*/corpus; now"):
        pack(corpus)
    (corpus / "corpus").unlink()
    (corpus / "first").rename(corpus / "corpus")
    pack(corpus)


def test_a_corrected_manifest_does_not_keep_old_labels(corpus):
    manifest = pack(corpus)
    rows = read_manifest(corpus / "loose.csv")
    rows[3] = rows[3]._replace(spk_id="corrected")
    write_manifest(rows, corpus / "loose.csv")
    with pytest.raises(ManifestError, match="another list of speakers.*delete"):
        pack(corpus)
    for path in manifest.parent.glob("shard-*"):
        path.unlink()
    again = read_manifest(pack(corpus))
    assert [row.spk_id for row in again] == [row.spk_id for row in rows]
    labels = {}
    for tar in manifest.parent.glob("*.tar"):
        with tarfile.open(tar) as file:
            for name in file.getnames():
                if name.endswith(".json"):
                    label = json.load(file.extractfile(name))
                    labels[label["id"]] = label["spk_id"]
    assert labels == {row.id: row.spk_id for row in rows}


@pytest.mark.parametrize("damage", ["gone", "cut", "no record"])
def test_a_shard_that_is_not_whole_is_made_again(corpus, damage):
    manifest = pack(corpus)
    listed, tar = manifest.read_bytes(), manifest.parent / "shard-000001.tar"
    whole = tar.read_bytes()
    others = {
        path: path.stat()
        for path in manifest.parent.glob("*.tar")
        if path != tar
    }
    if damage == "gone":
        tar.unlink()
    elif damage == "cut":
        tar.write_bytes(whole[:1000])
    else:
        tar.write_bytes(b"by an older version")
        tar.with_suffix(".json").unlink()
    pack(corpus)
    assert tar.read_bytes() == whole
    assert manifest.read_bytes() == listed
    assert all(path.stat() == stat for path, stat in others.items())


def test_a_damaged_record_is_refused(corpus):
    record = pack(corpus).parent / "shard-000000.json"
    text = record.read_text()
    record.write_text(text.replace("\n[[", "\n[[1"))
    with pytest.raises(ManifestError, match="000.tar.*is damaged.*or delete"):
        pack(corpus)


@pytest.mark.parametrize("change", ["fewer", "beyond", "negative", "none"])
def test_a_record_that_somebody_has_sealed(corpus, change):
    """Its checksum is right; its samples are not in the tar."""
    path = pack(corpus).parent / "shard-000000.json"
    made_with = json.loads(path.read_text().partition("\n")[0])["made_with"]
    whole, *places = read_recorded(path, made_with, int, int)
    rows = {
        "fewer": [whole, *places[1:]],
        "beyond": [whole, *places[1:], [places[0][0], 10**400]],
        "negative": [whole, *places[1:], [-44, 100]],
        "none": [],
    }[change]
    write_recorded(path, made_with, rows)
    with pytest.raises(ManifestError, match="cannot be kept: it is damaged"):
        pack(corpus)


def test_never_into_the_corpus(corpus):
    with pytest.raises(ManifestError, match="lies within the corpus"):
        pack(corpus, "corpus/shards")


def test_a_rate_that_nobody_reads(corpus):
    for rate in (0, -1, 384_001, 8000.5):
        with pytest.raises(ValueError, match=f"sample_rate is {rate}, whole"):
            pack(corpus, sample_rate=rate, resample=True)
    assert not (corpus / "shards").exists()


def test_shards_of_another_rate_than_the_encoder(corpus):
    """Even where others are resampled: their speed would be another."""
    (row, *_) = read_manifest(pack(corpus))
    read = Audio(8000, resample=True).read
    with pytest.raises(AudioError, match="packed at 16000 Hz, 8000 Hz is need"):
        read(row.wav, 0, row.stop)
    (row, *_) = read_manifest(
        pack(corpus, "half", sample_rate=8000, resample=True)
    )
    assert len(read(row.wav, 0, row.stop)) == row.stop


def test_truncated_shard(corpus):
    row = read_manifest(pack(corpus))[0]
    tar = corpus / row.wav.partition("#")[0]
    offset = int(row.wav.partition("#")[2])
    with open(tar, "r+b") as file:
        file.truncate(offset + 1000)
    with pytest.raises(AudioError, match="truncated.*500 could be read"):
        read_audio(row.wav, 0, row.stop)


def test_yaml(corpus):
    yaml = f"""
prepare: !name:speechbrain_ram.data.shards.prepare_shards
    prepare: !name:speechbrain_ram.corpora.folder.prepare_folder
        data_root: {corpus}/corpus
        output_dir: {corpus}/manifests
    data_root: {corpus}/corpus
    output_dir: {corpus}/manifests
    shards: {corpus}/shards
    progress: False
"""
    prepare = load_hyperpyyaml(yaml)["prepare"]
    train_csv, valid_csv = prepare()
    assert all(is_packed(row.wav) for row in read_manifest(train_csv))
    assert not any(is_packed(row.wav) for row in read_manifest(valid_csv))
    # The rate is that of what is prepared and of what is packed.
    with pytest.raises(ManifestError, match="16000 Hz, 8000 Hz is needed"):
        at_rate(prepare, 8000)()
    prepare.keywords["prepare"].keywords["resample"] = True
    prepare.keywords.update(resample=True, shards=corpus / "at8")
    for row in read_manifest(at_rate(prepare, 8000)()[0]):
        assert row.duration == row.stop / 8000


def test_a_prepare_of_ones_own_need_not_take_a_rate():
    def prepare(output_dir):
        return output_dir

    assert at_rate(prepare, 8000) is prepare


def test_command_line(corpus):
    folders = [corpus / "loose.csv", corpus / "corpus", corpus / "o"]
    options = ["--mixdown", "True", "--resample"]
    result = CliRunner().invoke(main, ["pack", *map(str, folders), *options])
    assert result.exit_code == 0, result.output
    manifest = result.stdout.strip()
    assert len(read_manifest(manifest)) == 9
    with tarfile.open(corpus / "o" / "shard-000000.tar") as file:
        assert len(file.getnames()) == 18
