"""Speaker models in ONNX files, of ours and of other toolkits.

A file takes waveforms [batch, samples], as :func:`.onnx.export_waveform`
writes it, or Kaldi's log-Mel features [batch, frames, bands], as those of
WeSpeaker, 3D-Speaker and sherpa-onnx do. What its metadata state is used:
sherpa-onnx's keys (``framework``, ``sample_rate``, ``output_dim``,
``normalize_samples``, ``feature_normalize_type``) and ours (``front_end``,
``decision``).

Needs the extra ``onnx``.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from speechbrain_ram.data.audio import AudioError
from speechbrain_ram.data.plain import parse_json
from speechbrain_ram.export.card import printable, read_decision, read_facts
from speechbrain_ram.export.limits import (
    LIMITS,
    EncoderError,
    check,
    one_of,
)
from speechbrain_ram.export.onnx_file import (
    described,
    looked_into,
    only_input,
    open_session,
    read_content,
    reason,
)
from speechbrain_ram.features import KaldiFbank, make_front_end

#: Whose features a file takes: what its network was trained on, or what the
#: client sherpa-onnx computes, whatever that was.
FRONT_ENDS = ("wespeaker", "3d-speaker", "sherpa-onnx")

#: How the comment begins of every file that is exported here for sherpa-onnx.
OURS = "speechbrain-ram, fingerprint"

_KALDI = LIMITS["compute_features"]["speechbrain_ram.features.KaldiFbank"]
_DIM = LIMITS["embedding_model"]["speechbrain_ram.resnet.ResNet34"][
    "embedding_dim"
]


class Features(NamedTuple):
    """What a file is fed instead of waveforms."""

    bank: KaldiFbank
    mean: bool  # whether each band loses its mean over the recording
    whose: str

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Waveforms [B, samples] of one length to features [B, T, bands]."""
        features = self.bank(waveforms)
        if self.mean:
            features = features - features.mean(dim=1, keepdim=True)
        return features

    def __str__(self) -> str:
        bank = self.bank
        top = bank.high_freq
        top += 0 if top > 0 else bank.sample_rate / 2
        mean = "taken off" if self.mean else "left to the file"
        edges = "inside the recording" if bank.snip_edges else "mirrored ends"
        return (
            f"those of {self.whose}: Kaldi's filterbank, {bank.n_mels} bands "
            f"from {bank.low_freq:g} to {top:g} Hz, window "
            f"{bank.window_type}, {edges}, samples times {bank.scale:g}, mean "
            f"of each band {mean}"
        )


class OnnxModel:
    """A speaker model in an ONNX file, ready to embed one recording at once.

    Arguments
    ---------
    path : path
        The file, whole: weights in files beside it are refused.
    frontend : str, optional
        One of :data:`FRONT_ENDS`, where the file takes features; what the file
        itself states if not given.
    sample_rate : int, optional
        In Hz; what the file states, or else 16000, if not given.

    Raises
    ------
    EncoderError
        Not such a file, or one that does not say enough; the message says
        what was found.
    ImportError
        The extra ``onnx`` is missing.
    """

    device = "cpu"

    def __init__(
        self,
        path: str | os.PathLike,
        frontend: str | None = None,
        sample_rate: int | None = None,
    ):
        self._path, place = Path(path), f"'{path}'"
        self.place = place
        _check_name(frontend)
        content = read_content(self._path)
        self.digest = hashlib.sha256(content).hexdigest()
        metadata, self.parameters = looked_into(content, place)
        self._session, self.runtime = open_session(content, place)
        del content  # the session has its own
        taken = only_input(self._session, place)
        self._input = taken.name
        self.sample_rate = _rate(metadata, sample_rate, place)
        self.features = None
        if len(taken.shape) == 3:
            bands = taken.shape[2]
            bands = bands if isinstance(bands, int) else 80
            self.features = _features(
                metadata, frontend, bands, self.sample_rate, place
            )
        elif frontend:
            raise EncoderError(
                f"{place} takes waveforms, --frontend {frontend} is for files "
                "that take features. Leave it out."
            )
        decision = _json(metadata.get("decision", "null"), "decision", place)
        self.decision = read_decision(decision, place)
        self.embedding_dim = self._try()
        check(self.embedding_dim, _DIM, "output_dim", place)
        stated = _number(metadata, "output_dim", place)
        if stated is not None:
            check(stated, one_of(self.embedding_dim), "output_dim", place)
        facts = _json(metadata.get("facts", "null"), "facts", place)
        told = read_facts(facts, place)
        notes = [str(told["note"])] if told.get("note") else []
        self.facts = told | {"note": " ".join([*notes, str(self)])}

    @property
    def fingerprint(self) -> str:
        """Of the file and of what it is fed."""
        fed: dict[str, Any] = {"sample_rate": self.sample_rate}
        if self.features is not None:
            fed |= settings(self.features.bank) | {"mean": self.features.mean}
        text = json.dumps([self.digest, fed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @staticmethod
    def pad(
        waveforms: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One waveform as a batch: a graph knows no padding."""
        (alone,) = waveforms
        return alone.unsqueeze(0), torch.ones(1)

    @torch.inference_mode()
    def encode(
        self, waveforms: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Embed waveforms of one length: [B, samples], [B] -> [B, E].

        What the network makes nothing of is an AudioError: a recording may be
        too short for it.
        """
        fed = waveforms if self.features is None else self.features(waveforms)
        wanted = len(waveforms), self.embedding_dim
        try:
            found = self._run(fed)
            if found.shape != wanted:
                raise ValueError(
                    f"the embedding has the shape {list(found.shape)}, "
                    f"{list(wanted)} is needed"
                )
            if not np.isfinite(found).all():
                raise ValueError("the embedding is NaN or infinite")
        except Exception as error:  # whatever the graph brings about
            seconds = waveforms.shape[1] / self.sample_rate
            raise AudioError(
                f"{self.place} does not embed this recording of {seconds:.2f} "
                f"s: {reason(error)}"
            ) from error
        return torch.from_numpy(found)

    def _run(self, fed: torch.Tensor) -> np.ndarray:
        fed = fed.float().contiguous().numpy()
        return self._session.run(None, {self._input: fed})[0]

    @torch.inference_mode()
    def _try(self) -> int:
        """Numbers in the embedding of noise, of two lengths."""
        generator = torch.Generator().manual_seed(0)
        sizes = []
        for seconds in (0.5, 0.7):
            samples = int(seconds * self.sample_rate)
            noise = torch.rand(1, samples, generator=generator) - 0.5
            fed = noise if self.features is None else self.features(noise)
            try:
                found = self._run(fed)
                if found.ndim != 2 or len(found) != 1:
                    raise ValueError(f"it becomes {list(found.shape)}")
                if not np.isfinite(found).all():
                    raise ValueError("the embedding is NaN or infinite")
            except Exception as error:  # whatever the graph brings about
                raise EncoderError(
                    f"{self.place}: {seconds} s of noise, fed as "
                    f"{list(fed.shape)}, cannot be embedded: "
                    f"{reason(error)}. Was the file exported for another "
                    "number of bands, or for recordings of one length?"
                ) from error
            sizes.append(found.shape[1])
        check(sizes[1], one_of(sizes[0]), "the embedding's size", self.place)
        return sizes[0]

    def __str__(self) -> str:
        sides = described(self._session.get_inputs())
        sides += f" -> {described(self._session.get_outputs())}"
        fed = ""
        if self.features is not None:
            fed = f" Features: {self.features}."
        return (
            f"{printable(self._path.name)}, an ONNX file of "
            f"{self.parameters:,} parameters, {sides}, at {self.sample_rate} "
            f"Hz in onnxruntime {self.runtime}.{fed} Recordings are embedded "
            f"one at a time. SHA-256 of the file: {self.digest[:12]}."
        )


def settings(bank: KaldiFbank) -> dict[str, Any]:
    """The arguments that make a filterbank; its frames are of 25 ms."""
    names = ("n_mels", "sample_rate", "low_freq", "high_freq", "snip_edges")
    names += ("preemphasis", "scale", "window_type")
    return {name: getattr(bank, name) for name in names}


def _check_name(frontend: str | None) -> None:
    if frontend is not None and frontend not in FRONT_ENDS:
        raise EncoderError(
            f"--frontend is {reprlib.repr(frontend)}, allowed are "
            f"{', '.join(FRONT_ENDS)}. Is it misspelt?"
        )


# -- what a file says --------------------------------------------------------


def _number(metadata: Mapping[str, str], key: str, place: str) -> int | None:
    """A whole number of the metadata, None where there is none."""
    text = metadata.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise EncoderError(
            f"{place}: {key} of the metadata is {reprlib.repr(text)}, a whole "
            "number is needed. Was it written by hand?"
        )
    return int(text)


def _rate(metadata: Mapping[str, str], asked: int | None, place: str) -> int:
    """In Hz, by the metadata or else the option."""
    told = _number(metadata, "sample_rate", place)
    if None not in (told, asked) and told != asked:
        raise EncoderError(
            f"{place} states a sample rate of {told} Hz, --sample_rate is "
            f"{asked}. Leave it out."
        )
    rate = told if told is not None else asked
    rate = 16_000 if rate is None else rate
    check(rate, _KALDI["sample_rate"], "sample_rate", place)
    return rate


def _json(text: str, key: str, place: str) -> Any:
    try:
        return parse_json(text, f"{place[1:-1]}: {key}")
    except ValueError as error:
        raise EncoderError(str(error)) from error


def _features(
    metadata: Mapping[str, str],
    asked: str | None,
    bands: int,
    rate: int,
    place: str,
) -> Features:
    """The features that a file takes, by option, or as it states them."""
    check(bands, _KALDI["n_mels"], "the number of bands", place)
    ours = metadata.get("front_end")
    if ours is not None and not asked:
        return _stated(ours, bands, rate, place)
    whose = asked or metadata.get("framework")
    states = f"the framework {reprlib.repr(whose)}" if whose else "none"
    if not asked and metadata.get("comment", "").startswith(OURS):
        whose, states = None, "those of an earlier speechbrain-ram"
    if whose not in FRONT_ENDS:
        raise EncoderError(
            f"{place} takes features of {bands} bands, and its metadata "
            f"({states}) do not say how they are computed. Give --frontend "
            f"{' or '.join(FRONT_ENDS)}."
        )
    scale = metadata.get("normalize_samples")
    if scale is not None:
        check(scale, one_of("0", "1"), "normalize_samples", place)
    elif whose == "sherpa-onnx":
        raise EncoderError(
            f"{place} has no metadata normalize_samples, without which "
            "sherpa-onnx does not load it. Give --frontend wespeaker or "
            "3d-speaker."
        )
    kind = metadata.get("feature_normalize_type", "")
    check(kind, one_of("", "global-mean"), "feature_normalize_type", place)
    if whose == "wespeaker":
        bank = make_front_end("wespeaker", bands, rate)
    elif whose == "3d-speaker":
        bank = KaldiFbank(
            bands, rate, high_freq=0.0, snip_edges=True, scale=1.0
        )
    else:
        bank = KaldiFbank(bands, rate)
    if scale is not None:
        bank.scale = 1.0 if scale == "1" else 32768.0
    mean = whose != "sherpa-onnx" or kind == "global-mean"
    return Features(bank, mean, whose)


def _stated(text: str, bands: int, rate: int, place: str) -> Features:
    """The front-end that an export of ours names; its graph normalises."""
    stated = _json(text, "front_end", place)
    wanted = set(settings(KaldiFbank()))
    if not isinstance(stated, dict) or set(stated) != wanted:
        raise EncoderError(
            f"{place}: front_end of the metadata is {reprlib.repr(stated)}, "
            f"needed are {', '.join(sorted(wanted))}. Was it edited?"
        )
    for key, value in stated.items():
        check(value, _KALDI[key], f"front_end.{key}", place)
    check(stated["n_mels"], one_of(bands), "front_end.n_mels", place)
    check(stated["sample_rate"], one_of(rate), "front_end.sample_rate", place)
    try:
        bank = KaldiFbank(**stated)
    except ValueError as error:
        raise EncoderError(f"{place}: {error}") from error
    return Features(bank, False, "the encoder's training")
