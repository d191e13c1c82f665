"""Use a trained encoder: embed, compare, decide.

:class:`SpeakerEncoder` takes files and gives embeddings and decisions. It
loads exported folders and the checkpoints of runs without executing anything
that is in them; SpeechBrain's own classes load the same folder, and execute
its YAML. :class:`OnnxEncoder` is the same for the model in an ONNX file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from speechbrain_ram.data.audio import AudioError
from speechbrain_ram.data.recordings import (
    Piece,
    Recording,
    Segment,
    audible,
    describe,
    is_recording,
    speech_seconds,
)
from speechbrain_ram.export.architecture import EncoderError
from speechbrain_ram.export.encoder import LoadedEncoder, read_encoder
from speechbrain_ram.export.folder import (
    EncoderFolder,
    encoder_section,
    export_inference,
)
from speechbrain_ram.export.onnx_model import OnnxModel
from speechbrain_ram.verification.calibration import Decision
from speechbrain_ram.verification.embedder import Embedder, Encoder, Padding

__all__ = [
    "Comparison",
    "EncoderError",
    "OnnxEncoder",
    "Segment",
    "SpeakerEncoder",
    "encoder_section",
    "export_inference",
]


@dataclass(frozen=True)
class Comparison:
    """What is known about two recordings."""

    score: float  # cosine of their embeddings
    threshold: float  # scores from here on count as one speaker
    same_speaker: bool
    #: Natural log-likelihood ratio, where the encoder is calibrated: above 0
    #: the recordings speak for one speaker.
    llr: float | None = None
    #: Share of the development list's same-speaker pairs that scored lower,
    #: and of its different-speaker pairs that scored higher.
    targets_below: float | None = None
    nontargets_above: float | None = None

    def told(self) -> list[str]:
        """The numbers in words: of the pair, then of the development list."""
        numbers = f"score {self.score:.3f}, threshold {self.threshold:.3f}"
        if self.llr is not None:
            numbers += f", log-likelihood ratio {self.llr:+.1f}"
        if self.targets_below is None or self.nontargets_above is None:
            return [numbers]
        return [
            numbers,
            f"On the development list {_percent(self.targets_below)} of "
            f"same-speaker pairs score lower, {_percent(self.nontargets_above)}"
            " of different-speaker pairs score higher.",
        ]


def _percent(share: float) -> str:
    return "under 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


class _Recordings:
    """What every encoder does with recordings: embed, score, decide."""

    encode: Encoder
    embedding_dim: int
    decision: Decision | None
    sample_rate: int
    device: str
    resample: bool
    mixdown: bool
    batch_seconds: float | None

    @property
    def pad(self) -> Padding | None:
        """How waveforms become a batch; None is the host's way."""
        return None

    @property
    def embedder(self) -> Embedder:
        """How this encoder embeds."""
        return Embedder(
            self.encode,
            self.sample_rate,
            self.resample,
            self.mixdown,
            self.device,
            self.pad,
            self.batch_seconds,
        )

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

        embedder = self.embedder
        planned: dict[int, list[Piece]] = {}
        for position, item in enumerate(items):
            try:
                planned[position] = embedder.plan(item, position)
            except AudioError as error:
                failed(position, error)
        samples = {i: sum(p.samples for p in planned[i]) for i in planned}
        batches = embedder.batches(samples)
        embeddings = np.zeros((len(items), self.embedding_dim), np.float32)
        with (
            tqdm(
                total=len(planned),
                unit="rec",
                desc="embed",
                disable=not progress,
            ) as bar,
            embedder.embedding(
                batches, planned.pop, names.__getitem__, warn=True
            ) as embedded,
        ):
            for batch, rows, errors in embedded:
                for position, why in errors.items():
                    failed(position, AudioError(why))
                for position, row in rows.items():
                    embeddings[position] = row
                bar.update(len(batch))
        if failures is not None:
            failures.update(sorted(bad.items()))
        good = [i for i in range(len(items)) if i not in bad]
        embeddings = embeddings[good]
        # A zero embedding has no cosine with anything.
        if not (np.isfinite(embeddings).all() and embeddings.any(axis=1).all()):
            raise EncoderError(
                "the encoder returns NaN, infinite or zero embeddings. Did its "
                "training diverge?"
            )
        return embeddings

    def speech_seconds(self, recording: Recording) -> float:
        """Seconds of a recording without its pauses, by the level alone.

        Parts within 30 dB of the loud ones count, see
        :func:`speechbrain_ram.data.recordings.speech_seconds`. An AudioError
        says what :meth:`embed` would.
        """
        heard = audible(
            self.embedder.plan(recording), describe(recording, 0), warn=False
        )
        return sum(speech_seconds(each, self.sample_rate) for each in heard)

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
        known: list[float | None] = []
        if self.decision is not None:
            known = [self.decision.llr(score), *self.decision.shares(score)]
        return Comparison(score, least, score >= least, *known)

    def threshold(self, value: float | str | None = None) -> float:
        """A threshold by its name, the default one, or the number given."""
        if value is not None and not isinstance(value, str):
            return float(value)  # NumPy's and PyTorch's numbers, too
        if self.decision is None:
            raise ValueError(
                "No threshold was saved with this encoder, because no "
                "development list was scored. Give one, in "
                "Python threshold=0.5, on the command line --threshold 0.5."
            )
        return self.decision.threshold("EER" if value is None else value)


class SpeakerEncoder(LoadedEncoder, _Recordings):
    """Recordings in, embeddings and decisions out.

    Files of another sample rate are resampled and several channels averaged,
    unless that is forbidden. A recording longer than 240 s is cut into equal
    windows, whose embeddings are averaged; silent windows are left out.
    Recordings are batched by length, and every embedding is the one that the
    recording has alone, and in verification.

    Silence, recordings under 0.1 s and unreadable files raise an AudioError
    that names them; clipping gives a warning. No NaN is ever returned.

    Arguments
    ---------
    folder : EncoderFolder
        From :func:`speechbrain_ram.export.encoder.read_encoder`.
    device : str
        Such as 'cpu' or 'cuda:0'.
    resample, mixdown : bool
        Whether files of another rate, or of several channels, are converted.
    batch_seconds : float, optional
        As for :class:`speechbrain_ram.verification.embedder.Embedder`.
    """

    def __init__(
        self,
        folder: EncoderFolder,
        device: str = "cpu",
        resample: bool = True,
        mixdown: bool = True,
        batch_seconds: float | None = None,
    ):
        super().__init__(folder, device)
        self.resample = resample
        self.mixdown = mixdown
        self.batch_seconds = batch_seconds

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike, device: str = "cpu", **options
    ) -> SpeakerEncoder:
        """Load an exported folder, or a run; nothing in it is executed.

        Arguments
        ---------
        path : path
            An exported folder; or a run's output folder, whose best
            checkpoint is taken; or one checkpoint folder (``CKPT+...``).
        device : str
            Such as 'cpu' or 'cuda:0'.
        **options
            As for the class.

        Returns
        -------
        SpeakerEncoder

        Raises
        ------
        EncoderError
            Nothing there, damaged, of another version, or weights of another
            architecture.
        """
        return cls(read_encoder(path), device, **options)


class OnnxEncoder(OnnxModel, _Recordings):
    """The speaker model in an ONNX file, used as :class:`SpeakerEncoder` is.

    It takes waveforms, as ``speechbrain-ram export`` writes it, or Kaldi's
    features, as the models of WeSpeaker, 3D-Speaker and sherpa-onnx do, which
    are computed here. onnxruntime computes on the CPU, each recording alone.

    Arguments
    ---------
    path : path
        The file.
    frontend : str, optional
        Whose features it takes: "wespeaker" or "3d-speaker" as their networks
        are trained; "sherpa-onnx" as that client computes them. What the
        file's metadata state, if not given.
    sample_rate : int, optional
        In Hz. What the file's metadata state, or else 16000, if not given.
    resample, mixdown : bool
        Whether files of another rate, or of several channels, are converted.

    Raises
    ------
    EncoderError
        Not a speaker model in an ONNX file, or its features are not known.
    ImportError
        The extra ``onnx`` is missing.
    """

    batch_seconds = 0.0  # each recording alone: a graph knows no padding

    def __init__(
        self,
        path: str | os.PathLike,
        frontend: str | None = None,
        sample_rate: int | None = None,
        resample: bool = True,
        mixdown: bool = True,
    ):
        super().__init__(path, frontend, sample_rate)
        self.resample = resample
        self.mixdown = mixdown
