"""From manifests to SpeechBrain datasets of fixed-length crops.

Training sees a random crop of every utterance, validation its centre. Only
the crop is read from the disk. Where a training crop begins is a function of
(seed, epoch, utterance ID) and of nothing else: neither the number of workers
or processes, nor the order of the batches, nor the point where a run was
resumed changes it.
"""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
import torchaudio
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CategoricalEncoder

from speechbrain_ram.data.audio import Audio, as_floats, is_packed
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    read_manifest,
)

#: What each item of the datasets holds.
OUTPUT_KEYS = ("id", "sig", "spk_id_encoded")


class CropDataset(DynamicItemDataset):
    """A SpeechBrain dataset whose `sig` is one crop of fixed length.

    Items hold ``id`` (str), ``sig`` (float32 ``[crop_samples]``) and
    ``spk_id_encoded`` (int64 ``[1]``).

    The epoch lies in shared memory, so that :meth:`set_epoch` reaches
    DataLoader workers that are running already (``persistent_workers``) as
    well as those forked later. Call it before the epoch's iteration begins.

    Arguments
    ---------
    rows : list of Utterance
        The utterances.
    data_root : path
        The corpus folder.
    label_encoder : CategoricalEncoder
        Knows every speaker of `rows`.
    crop_seconds : float
        Length of every item; shorter utterances are repeated end to end.
    sample_rate : int
        In Hz, of the items.
    random_crops : bool
        Random crops that change with the epoch, or the centre always.
    seed : int
        Of the random crops.
    resample, mixdown : bool
        Whether files of another rate, or of several channels, are converted
        while reading.
    speeds : sequence of float
        Play every utterance at each of these speeds. Pitch moves along, so
        that all but 1.0 count as other utterances by other speakers.
    augment : callable, optional
        From a crop [crop_samples] and a key of seed, epoch and utterance to
        a crop, such as
        :class:`speechbrain_ram.data.augmentation.RandomAugmentation`. Random
        crops only.

    Example
    -------
    >>> import numpy, soundfile
    >>> path = str(getfixture("tmp_path") / "a.wav")
    >>> soundfile.write(path, numpy.zeros(24000), 16000)
    >>> rows = [Utterance("a", 1.5, path, 0, 24000, "anna")]
    >>> encoder = CategoricalEncoder()
    >>> encoder.update_from_iterable(["anna"])
    >>> item = CropDataset(rows, "/", encoder, crop_seconds=2.0)[0]
    >>> item["sig"].shape, item["spk_id_encoded"]
    (torch.Size([32000]), tensor([0]))
    """

    def __init__(
        self,
        rows: list[Utterance],
        data_root: str | os.PathLike,
        label_encoder: CategoricalEncoder,
        crop_seconds: float = 2.0,
        sample_rate: int = 16000,
        random_crops: bool = True,
        seed: int = 1986,
        resample: bool = False,
        mixdown: bool = False,
        speeds: Sequence[float] = (1.0,),
        augment: Callable[[torch.Tensor, str], torch.Tensor] | None = None,
    ):
        _check_speeds(speeds)
        if not crop_seconds * sample_rate >= 1:
            raise ValueError(
                f"crop_seconds is {crop_seconds}: shorter than one sample. "
                "Training usually takes crops of 2 seconds."
            )
        self.crop_samples = round(crop_seconds * sample_rate)
        self.sample_rate = sample_rate
        self.audio = Audio(sample_rate, resample, mixdown)
        self.random_crops = random_crops
        self.seed = seed
        self.augment = augment if random_crops else None
        self._as_stored = False
        try:
            self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        except RuntimeError as error:
            raise OSError(
                f"/dev/shm is full: {error}. Free some of it, or give it more "
                "room (docker run --shm-size 8g)."
            ) from error
        data = Columns(rows, data_root, speeds)
        labels = {
            speaker: label_encoder.encode_label_torch(speaker).reshape(1)
            for speaker in data.speakers
        }
        super().__init__({"": data.item(0)})  # which learns the keys from it
        self.data, self.data_ids = data, data.ids
        self.add_dynamic_item(
            self._read_crop,
            ["id", "path", "start", "stop", "speed"],
            "sig",
        )
        self.add_dynamic_item(labels.__getitem__, "spk_id", "spk_id_encoded")
        self.set_output_keys(OUTPUT_KEYS)

    def __getitem__(self, index: int) -> dict:
        # The host's looks the ID up.
        item = {"id": self.data_ids[index], **self.data.item(index)}
        return self.pipeline.compute_outputs(item)

    def as_stored(self, index: int) -> dict:
        """An item whose `sig` is int16 where its file holds just that.

        Half the bytes for a loader's worker to hand over, and for a GPU to be
        sent. :func:`.audio.as_floats` makes the `sig` of the item of it.
        """
        self._as_stored = True
        try:
            return self[index]
        finally:
            self._as_stored = False

    @property
    def epoch(self) -> int:
        """The epoch whose random crops are read."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random crops of an epoch."""
        self._epoch.fill_(epoch)

    def _read_crop(
        self,
        utterance_id: str,
        path: str,
        start: int,
        stop: int,
        speed: float,
    ) -> torch.Tensor:
        """Read one crop, [crop_samples]."""
        rate = self.sample_rate
        if self.audio.resample and not is_packed(path):
            rate = self.audio.info(path).sample_rate
        wanted = math.ceil(self.crop_samples * speed * rate / self.sample_rate)
        spare = stop - start - wanted
        if spare > 0:
            share = self._position(utterance_id) if self.random_crops else 0.5
            start += int(share * (spare + 1))
            stop = start + wanted
        waveform = self.audio.read(path, start, stop, True)
        if speed != 1 or self.augment is not None or not self._as_stored:
            waveform = as_floats(waveform)
        if speed != 1:
            waveform = torchaudio.functional.resample(
                waveform, round(speed * self.sample_rate), self.sample_rate
            )
        if len(waveform) < self.crop_samples:
            repeats = math.ceil(self.crop_samples / len(waveform))
            waveform = waveform.repeat(repeats)
        crop = waveform[: self.crop_samples]
        if self.augment is not None:
            crop = self.augment(crop, f"{self._key(utterance_id)}/augment")
        return crop

    def _key(self, utterance_id: str) -> str:
        """What everything random about a crop is a function of."""
        return f"{self.seed}/{self.epoch}/{utterance_id}"

    def _position(self, utterance_id: str) -> float:
        """A number in [0, 1) from seed, epoch and utterance alone.

        A hash, not a random generator, has no state that workers could share or
        that a checkpoint would have to keep.
        """
        key = self._key(utterance_id).encode()
        digest = hashlib.blake2b(key, digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48


# -- A million utterances in a few objects -------------------------------------
#
# Python counts, in each object, who uses it, so that a forked worker that only
# looks at a million of them writes to all of them, and gets its own copy of the
# memory. Arrays and one long string are shared by all workers.


class Texts(Sequence):
    """Strings, in one buffer."""

    def __init__(self, texts: Iterable[str]):
        buffer, ends = bytearray(), array("q", [0])
        for text in texts:
            buffer += text.encode("utf-8", "surrogatepass")
            ends.append(len(buffer))
        self._bytes, self._ends = bytes(buffer), np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        text = self._bytes[self._ends[i] : self._ends[i + 1]]
        return text.decode("utf-8", "surrogatepass")


class Columns(Mapping):
    """Utterances at each speed, ID to item; what is in an item is a column."""

    def __init__(
        self,
        rows: Sequence[Utterance],
        data_root: str | os.PathLike,
        speeds: Sequence[float],
    ):
        self._speeds = list(speeds)
        self._paths = Texts(row.path(data_root) for row in rows)
        self._starts = np.array([row.start for row in rows], np.int64)
        self._stops = np.array([row.stop for row in rows], np.int64)
        names = sorted({row.spk_id for row in rows})
        number = {name: i for i, name in enumerate(names)}
        self._speakers = np.array([number[row.spk_id] for row in rows])
        self.speakers = [at_speed(n, speed) for speed in speeds for n in names]
        self.ids = Texts(
            at_speed(row.id, speed) for speed in speeds for row in rows
        )

    def item(self, index: int) -> dict:
        """What is known of an utterance at a speed, by position."""
        speed, row = divmod(range(len(self))[index], len(self._paths))
        n_speakers = len(self.speakers) // len(self._speeds)
        return {
            "path": self._paths[row],
            "start": int(self._starts[row]),
            "stop": int(self._stops[row]),
            "speed": self._speeds[speed],
            "spk_id": self.speakers[speed * n_speakers + self._speakers[row]],
        }

    @cached_property
    def _positions(self) -> dict[str, int]:
        """By ID: only for those who ask so, as the host's filters do."""
        return {name: i for i, name in enumerate(self.ids)}

    def __getitem__(self, name: str) -> dict:
        return self.item(self._positions[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def _check_speeds(speeds: Sequence[float]) -> None:
    if not speeds or not all(0.5 <= speed <= 2 for speed in speeds):
        raise ValueError(
            f"speeds is {list(speeds)}, one or more numbers from 0.5 to 2 "
            "are needed, such as [1.0, 0.9, 1.1]."
        )


def at_speed(name: str, speed: float) -> str:
    """Name an utterance or a speaker who is played at another speed."""
    return name if speed == 1 else f"{name}@{speed:g}"


def original_speakers(
    label_encoder: CategoricalEncoder, speeds: Sequence[float]
) -> tuple[CategoricalEncoder, torch.Tensor]:
    """Leave out the speakers that only a change of speed made.

    Returns the labels of the real speakers, in the same order, and their labels
    before, int64 [number of real speakers].
    """
    known = label_encoder.lab2ind
    made = {
        at_speed(name, speed)
        for name in known
        for speed in speeds
        if speed != 1
    }
    names = sorted(set(known) - made, key=known.get)
    original = CategoricalEncoder()
    original.update_from_iterable(names)
    original.expect_len(len(names))
    return original, torch.tensor([known[name] for name in names])


def speaker_labels(
    train_csv: str | os.PathLike, speeds: Sequence[float] = (1.0,)
) -> CategoricalEncoder:
    """Number the training speakers in sorted order, once for each speed."""
    _check_speeds(speeds)
    speakers = sorted({row.spk_id for row in read_manifest(train_csv)})
    if len(speakers) < 2:
        raise ManifestError(
            f"'{train_csv}' holds one speaker only, '{speakers[0]}'; training "
            "needs two or more."
        )
    labels = CategoricalEncoder()
    labels.update_from_iterable(
        at_speed(speaker, speed) for speed in speeds for speaker in speakers
    )
    labels.expect_len(len(labels))
    return labels


def speaker_datasets(
    train_csv: str | os.PathLike,
    valid_csv: str | os.PathLike,
    data_root: str | os.PathLike,
    crop_seconds: float = 2.0,
    sample_rate: int = 16000,
    label_encoder: CategoricalEncoder | None = None,
    seed: int = 1986,
    resample: bool = False,
    mixdown: bool = False,
    speeds: Sequence[float] = (1.0,),
    augment: Callable[[torch.Tensor, str], torch.Tensor] | None = None,
) -> tuple[CropDataset, CropDataset, CategoricalEncoder]:
    """Make the training and validation datasets and the speaker labels.

    The options are those of :class:`CropDataset`; `speeds` and `augment`
    concern training only, and each speed but 1.0 adds as many speakers as there
    are. Without a `label_encoder`, such as that of a run that is continued, a
    new one numbers the training speakers. Its length is the number of classes.
    """
    _check_speeds(speeds)
    train_rows, valid_rows = read_manifest(train_csv), read_manifest(valid_csv)
    if label_encoder is None:
        label_encoder = speaker_labels(train_csv, speeds)
    for path, rows in ((train_csv, train_rows), (valid_csv, valid_rows)):
        unknown = {row.spk_id for row in rows} - set(label_encoder.lab2ind)
        if unknown:
            raise ManifestError(
                f"'{path}' has {len(unknown)} speakers that the "
                f"{len(label_encoder)} labels do not know, for example "
                f"'{min(unknown)}'. Do the manifests, and the run that is "
                "continued, belong together?"
            )
    train, valid = (
        CropDataset(
            rows,
            data_root,
            label_encoder,
            crop_seconds=crop_seconds,
            sample_rate=sample_rate,
            random_crops=random_crops,
            seed=seed,
            resample=resample,
            mixdown=mixdown,
            speeds=speeds if random_crops else (1.0,),
            augment=augment,
        )
        for rows, random_crops in ((train_rows, True), (valid_rows, False))
    )
    return train, valid, label_encoder
