"""The encoder that verification takes: any command's, or any of SpeechBrain's.

SpeechBrain's loader executes the YAML of a folder, so that it is asked for
with ``--trust_yaml`` only.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from speechbrain.inference.classifiers import EncoderClassifier

from speechbrain_ram.cli.common import Chosen, load_encoder
from speechbrain_ram.data.plain import YAML_BYTES, limited_text
from speechbrain_ram.export.folder import DESCRIPTION
from speechbrain_ram.export.limits import EncoderError
from speechbrain_ram.export.weights import first_line
from speechbrain_ram.inference import OnnxEncoder, SpeakerEncoder
from speechbrain_ram.verification.embedder import Embedder

_YAML = "hyperparams.yaml"
_SAME = 1e-4  # of the largest component: padding has changed nothing


def open_encoder(
    options: argparse.Namespace, device: str
) -> SpeakerEncoder | OnnxEncoder | TrustedEncoder:
    """The encoder that the options of verification name."""
    folder = Path(options.encoder)
    chosen = Chosen(options.encoder, options.frontend, options.sample_rate)
    settings = {
        "resample": options.resample,
        "mixdown": options.mixdown,
        "batch_seconds": options.max_frames and options.max_frames / 100,
    }
    ours = (folder / DESCRIPTION).exists()
    if options.trust_yaml and not (ours or chosen.is_onnx):
        return TrustedEncoder(folder, device, **settings)
    try:
        return load_encoder(chosen, device, **settings)
    except EncoderError as error:
        if ours or chosen.is_onnx or "pretrainer:" not in _yaml(folder):
            raise
        raise EncoderError(
            f"{str(error).split('. If you trust')[0].rstrip('.')}. With "
            "--trust_yaml SpeechBrain's EncoderClassifier loads the folder, "
            f"which executes its {_YAML}: is it from somebody you trust?"
        ) from error


def _yaml(folder: Path) -> str:
    try:
        return limited_text(folder / _YAML, YAML_BYTES)
    except (OSError, ValueError):
        return ""


class TrustedEncoder:
    """What EncoderClassifier makes of a folder, as verification needs it.

    Recordings are batched only where padding does not change an embedding,
    which is tried on noise.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        resample: bool = False,
        mixdown: bool = False,
        batch_seconds: float | None = None,
    ):
        text = _yaml(folder)
        if not text:
            raise EncoderError(
                f"'{folder}' has no {_YAML} that can be read, which "
                "SpeechBrain's EncoderClassifier needs. Is it the right folder?"
            )
        here = {}
        if text.startswith("pretrained_path:") or "\npretrained_path:" in text:
            here["pretrained_path"] = str(folder)  # not a place on a hub
        try:
            self.model = EncoderClassifier.from_hparams(
                str(folder), overrides=here, run_opts={"device": device}
            )
            self.device = device
            self.sample_rate = getattr(self.model.hparams, "sample_rate", 16000)
            self.padded_alike = self._try()
        except Exception as error:  # whatever its YAML brings about
            raise EncoderError(
                f"'{folder}': SpeechBrain's EncoderClassifier does not load "
                f"it, or it embeds no noise: {first_line(error)}"
            ) from error
        self.fingerprint = _checksum(folder)
        self.embedder = Embedder(
            self.encode,
            self.sample_rate,
            resample,
            mixdown,
            device,
            padded,
            batch_seconds if self.padded_alike else 0.0,
        )

    def encode(
        self, waveforms: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Embed a padded batch: [B, samples], [B] -> [B, E]."""
        return self.model.encode_batch(waveforms, lengths).flatten(1)

    @torch.inference_mode()
    def _try(self) -> bool:
        """Whether a recording has one embedding, padded or alone."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(2 * self.sample_rate, generator=generator) - 0.5
        both = [noise, noise[: int(0.7 * len(noise))]]
        together = self.encode(*padded(both))
        alone = torch.cat([self.encode(*padded([wav])) for wav in both])
        if not alone.isfinite().all():
            raise ValueError("the embedding of noise is NaN or infinite")
        most = (together - alone).abs().max()
        return bool(most <= _SAME * alone.abs().max())

    def __str__(self) -> str:
        network = self.model.mods.embedding_model
        size = sum(each.numel() for each in network.parameters())
        how = "in batches" if self.padded_alike else "one at a time"
        why = "does not change" if self.padded_alike else "changes"
        return (
            f"{type(network).__name__} of {size:,} parameters, loaded by "
            f"SpeechBrain's EncoderClassifier. Recordings are embedded {how}: "
            f"padding {why} its embeddings. SHA-256 of the folder: "
            f"{self.fingerprint[:12]}."
        )


def padded(
    waveforms: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros behind, and lengths relative to the longest, as the host has it."""
    samples = torch.tensor([len(wav) for wav in waveforms])
    batch = torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True)
    return batch, samples / samples.max()


def _checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()
