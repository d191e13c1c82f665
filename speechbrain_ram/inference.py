"""Use a trained encoder: embed, compare, decide.

:class:`SpeakerEncoder` is for people: files in, embeddings and decisions out.
:func:`load_encoder` is what it and the verification scripts stand on. Both
load exported folders and the checkpoints of runs without executing anything
that is in them; SpeechBrain's own classes load the same folder, and execute
its YAML.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from speechbrain_ram.data.audio import AudioError, pad_waveforms
from speechbrain_ram.data.recordings import (
    Piece,
    Recording,
    Segment,
    describe,
    is_recording,
    is_silent,
    split_into_pieces,
    warn_of_clipping,
)
from speechbrain_ram.export.architecture import EncoderError
from speechbrain_ram.export.encoder import LoadedEncoder, load_encoder
from speechbrain_ram.export.folder import encoder_section, export_inference
from speechbrain_ram.utils import in_threads, n_threads
from speechbrain_ram.verification.calibration import Decision
from speechbrain_ram.verification.embeddings import length_batches

__all__ = [
    "Comparison",
    "EncoderError",
    "LoadedEncoder",
    "Segment",
    "SpeakerEncoder",
    "encoder_section",
    "export_inference",
    "load_encoder",
]


@dataclass(frozen=True)
class Comparison:
    """What is known about two recordings.

    Arguments
    ---------
    score : float
        Cosine of their embeddings, in [-1, 1].
    threshold : float
        Scores from here on count as one speaker.
    same_speaker : bool
        The decision.
    llr : float, optional
        Natural log-likelihood ratio, where the encoder is calibrated: above 0
        the recordings speak for one speaker.
    targets_below, nontargets_above : float, optional
        Share of the development list's same-speaker pairs that scored lower,
        and of its different-speaker pairs that scored higher.
    """

    score: float
    threshold: float
    same_speaker: bool
    llr: float | None = None
    targets_below: float | None = None
    nontargets_above: float | None = None


class SpeakerEncoder:
    """Recordings in, embeddings and decisions out.

    Files of another sample rate are resampled and several channels averaged,
    unless that is forbidden. A recording longer than `window_seconds` is cut
    into equal windows, whose embeddings are averaged; silent windows are left
    out. Recordings are batched by length, and every embedding is the one that
    the recording has alone.

    Silence, recordings under 0.1 s and unreadable files raise an AudioError
    that names them; clipping gives a warning. No NaN is ever returned.

    Arguments
    ---------
    encoder : LoadedEncoder
        From :func:`load_encoder`.
    resample, mixdown : bool
        Whether files of another rate, or of several channels, are converted.
    window_seconds : float
        Longest piece that is embedded at once.
    batch_seconds : float, optional
        Bound on the audio of a batch, padding included. By default 60 on a
        GPU, and 2 on a CPU, whose caches a larger batch does not fit.
    """

    def __init__(
        self,
        encoder: LoadedEncoder,
        resample: bool = True,
        mixdown: bool = True,
        window_seconds: float = 60.0,
        batch_seconds: float | None = None,
    ):
        self.encoder = encoder
        self.sample_rate = encoder.sample_rate
        self.embedding_dim = encoder.embedding_dim
        self.fingerprint = encoder.fingerprint
        self.decision: Decision | None = encoder.decision
        self.resample = resample
        self.mixdown = mixdown
        self.window_seconds = window_seconds
        if batch_seconds is None:
            on_cpu = torch.device(encoder.device).type == "cpu"
            batch_seconds = 2.0 if on_cpu else 60.0
        self.batch_seconds = batch_seconds

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike, device: str = "cpu", **options
    ) -> SpeakerEncoder:
        """Load an exported folder, or a run; nothing in it is executed.

        Arguments
        ---------
        path : path
            As for :func:`load_encoder`.
        device : str
            Such as 'cpu' or 'cuda:0'.
        **options
            As for the class.

        Returns
        -------
        SpeakerEncoder
        """
        return cls(load_encoder(path, device), **options)

    def embed(
        self,
        recordings: Recording | Iterable[Recording],
        progress: bool = False,
        failures: dict[int, str] | None = None,
    ) -> np.ndarray:
        """Embed one recording or many.

        Arguments
        ---------
        recordings : Recording, or iterable of them
            Paths, open files, arrays and others, as
            :mod:`speechbrain_ram.data.recordings` lists them. An array is
            mono, of shape [samples], at `sample_rate`, in [-1, 1] or of
            integers; ``(array, rate)`` says another rate.
        progress : bool
            Whether to show a progress bar on stderr.
        failures : dict, optional
            If given, a recording that cannot be used leaves its position and
            the reason here, and no row, instead of raising.

        Returns
        -------
        np.ndarray
            Shape [N, E], float32, finite, in the order given. Their lengths
            are as the network gives them.

        Raises
        ------
        AudioError
            A recording cannot be used.
        EncoderError
            The encoder itself returns NaN, or zeros.
        """
        single = is_recording(recordings)
        items = [recordings] if single else list(recordings)
        names = [describe(item, i) for i, item in enumerate(items)]
        bad: dict[int, str] = {}

        def failed(position: int, error: AudioError) -> None:
            if failures is None:
                raise error
            bad[position] = str(error)

        pieces: list[Piece] = []
        options = (
            self.sample_rate,
            self.window_seconds,
            self.resample,
            self.mixdown,
        )
        for position, item in enumerate(items):
            try:
                pieces += split_into_pieces(item, position, *options)
            except AudioError as error:
                failed(position, error)
        sums = np.zeros((len(items), self.embedding_dim))
        counts = np.zeros((len(items), 1))
        batches = length_batches(
            [piece.samples for piece in pieces],
            int(self.batch_seconds * self.sample_rate),
        )
        pad = self.encoder.pad or partial(
            pad_waveforms, hop=self.sample_rate // 100
        )

        def embed_batch(batch: list[int]):
            """Whose pieces were heard, their rows, and what failed."""
            heard, wavs, failed_here = [], [], []
            for piece in (pieces[index] for index in batch):
                try:
                    wav = piece.load()
                    warn_of_clipping(wav, names[piece.recording])
                except AudioError as error:
                    failed_here.append((piece.recording, error))
                    continue
                if not is_silent(wav):
                    heard.append(piece.recording)
                    wavs.append(wav)
            rows = self.encoder.encode(*pad(wavs)) if wavs else None
            return heard, rows, failed_here

        threads = n_threads(self.encoder.device)
        with tqdm(
            total=len(pieces), unit="piece", desc="embed", disable=not progress
        ) as bar:
            done = in_threads(embed_batch, batches, threads)
            for batch, (heard, rows, failed_here) in zip(
                batches, done, strict=True
            ):
                for recording, error in failed_here:
                    failed(recording, error)
                if heard:
                    np.add.at(sums, heard, rows.double().cpu().numpy())
                    np.add.at(counts, heard, 1)
                bar.update(len(batch))
        for position, count in enumerate(counts):
            if count == 0 and position not in bad:
                why = "holds only silence. Was the microphone muted?"
                failed(position, AudioError(f"{names[position]} {why}"))
        if failures is not None:
            failures.update(sorted(bad.items()))
        good = [i for i in range(len(items)) if i not in bad]
        embeddings = (sums[good] / counts[good]).astype(np.float32)
        # A zero embedding has no cosine with anything.
        if not (np.isfinite(embeddings).all() and embeddings.any(axis=1).all()):
            raise EncoderError(
                "the encoder returns NaN, infinite or zero embeddings. Did its "
                "training diverge?"
            )
        return embeddings

    def score(self, a: Recording, b: Recording) -> float:
        """Cosine of two recordings' embeddings, in [-1, 1]."""
        left, right = self.embed([a, b]).astype(np.float64)
        cosine = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        return float(np.clip(cosine, -1.0, 1.0))

    def same_speaker(
        self, a: Recording, b: Recording, threshold: float | str | None = None
    ) -> bool:
        """Decide whether two recordings are of one speaker.

        Arguments
        ---------
        a, b : path, Segment, np.ndarray or torch.Tensor
            The recordings.
        threshold : float or str, optional
            The least cosine that counts as one speaker, or the name of one
            that was saved at training: "EER" (the default) or "FAR=1%".

        Returns
        -------
        bool

        Raises
        ------
        ValueError
            No threshold was saved and none is given.
        """
        return self.compare(a, b, threshold).same_speaker

    def compare(
        self, a: Recording, b: Recording, threshold: float | str | None = None
    ) -> Comparison:
        """Score, decision and what the development list says about them.

        Arguments
        ---------
        a, b, threshold
            As for :meth:`same_speaker`.

        Returns
        -------
        Comparison
        """
        least = self.threshold(threshold)
        score = self.score(a, b)
        result = Comparison(score, least, score >= least)
        if self.decision is None:
            return result
        return Comparison(
            score,
            least,
            score >= least,
            self.decision.llr(score),
            *self.decision.shares(score),
        )

    def threshold(self, value: float | str | None = None) -> float:
        """A threshold by its name, the default one, or the number given."""
        if isinstance(value, (int, float)):
            return float(value)
        if self.decision is None:
            raise ValueError(
                "No threshold was saved with this encoder, because no "
                "development list was scored. Give one, in "
                "Python threshold=0.5, on the command line --threshold 0.5."
            )
        return self.decision.threshold("EER" if value is None else value)
