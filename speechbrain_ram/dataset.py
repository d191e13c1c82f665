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

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CategoricalEncoder

from speechbrain_ram.audio import audio_info, read_audio
from speechbrain_ram.corpora.manifest import (
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
    ):
        if not crop_seconds * sample_rate >= 1:
            raise ValueError(
                f"crop_seconds is {crop_seconds}: shorter than one sample. "
                "Training usually takes crops of 2 seconds."
            )
        self.crop_samples = round(crop_seconds * sample_rate)
        self.sample_rate = sample_rate
        self.random_crops = random_crops
        self.seed = seed
        self.resample = resample
        self.mixdown = mixdown
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        labels = {
            speaker: label_encoder.encode_label_torch(speaker).reshape(1)
            for speaker in {row.spk_id for row in rows}
        }
        super().__init__(
            {
                row.id: {
                    "path": row.path(data_root),
                    "start": row.start,
                    "stop": row.stop,
                    "spk_id": row.spk_id,
                }
                for row in rows
            }
        )
        self.add_dynamic_item(
            self._read_crop, ["id", "path", "start", "stop"], "sig"
        )
        self.add_dynamic_item(labels.__getitem__, "spk_id", "spk_id_encoded")
        self.set_output_keys(OUTPUT_KEYS)

    @property
    def epoch(self) -> int:
        """The epoch whose random crops are read."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random crops of an epoch.

        Arguments
        ---------
        epoch : int
            Counted as the training loop counts.
        """
        self._epoch.fill_(epoch)

    def _read_crop(
        self, utterance_id: str, path: str, start: int, stop: int
    ) -> torch.Tensor:
        """Read one crop, [crop_samples]."""
        rate = audio_info(path).sample_rate if self.resample else None
        rate = rate or self.sample_rate
        wanted = math.ceil(self.crop_samples * rate / self.sample_rate)
        spare = stop - start - wanted
        if spare > 0:
            share = self._position(utterance_id) if self.random_crops else 0.5
            start += int(share * (spare + 1))
            stop = start + wanted
        waveform = read_audio(
            path, start, stop, self.sample_rate, self.resample, self.mixdown
        )
        repeats = math.ceil(self.crop_samples / len(waveform))
        return waveform.repeat(repeats)[: self.crop_samples]

    def _position(self, utterance_id: str) -> float:
        """A number in [0, 1) from seed, epoch and utterance alone.

        A hash, not a random generator: there is no state that workers could
        share or that a checkpoint would have to keep.
        """
        text = f"{self.seed}/{self.epoch}/{utterance_id}"
        digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48


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
) -> tuple[CropDataset, CropDataset, CategoricalEncoder]:
    """Make the training and validation datasets and the speaker labels.

    Arguments
    ---------
    train_csv, valid_csv : path
        Manifests.
    data_root : path
        The corpus folder.
    crop_seconds : float
        Length of every item.
    sample_rate : int
        In Hz.
    label_encoder : CategoricalEncoder, optional
        A fitted one, for example of the run that is continued. By default a
        new one numbers the training speakers in sorted order. Its length is
        the number of classes; ``label_encoder.save(path)`` writes it as text.
    seed : int
        Of the random crops.
    resample, mixdown : bool
        Whether files of another rate, or of several channels, are converted
        while reading.

    Returns
    -------
    train, valid : CropDataset
    label_encoder : CategoricalEncoder

    Raises
    ------
    ManifestError
        A bad manifest, or speakers that the labels do not know.
    """
    train_rows, valid_rows = read_manifest(train_csv), read_manifest(valid_csv)
    if label_encoder is None:
        label_encoder = CategoricalEncoder()
        label_encoder.update_from_iterable(
            sorted({row.spk_id for row in train_rows})
        )
        label_encoder.expect_len(len(label_encoder))
        if len(label_encoder) < 2:
            raise ManifestError(
                f"'{train_csv}' holds one speaker only, "
                f"'{train_rows[0].spk_id}'; training needs two or more."
            )
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
        )
        for rows, random_crops in ((train_rows, True), (valid_rows, False))
    )
    return train, valid, label_encoder
