"""From a folder to an encoder that computes; nothing in it is executed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from speechbrain_ram.export.architecture import (
    build,
    check_weights,
    fingerprint,
    read_hyperparams,
)
from speechbrain_ram.export.folder import (
    DESCRIPTION,
    EncoderFolder,
    read_folder,
)
from speechbrain_ram.export.limits import EncoderError
from speechbrain_ram.export.weights import first_line, read_state
from speechbrain_ram.resnet import folded
from speechbrain_ram.training.checkpoints import (
    CheckpointError,
    SafeCheckpointer,
)
from speechbrain_ram.verification.embedder import Padding


class LoadedEncoder:
    """A front-end and an encoder, ready to embed padded batches."""

    def __init__(self, folder: EncoderFolder, device: str = "cpu"):
        self.modules = build(folder.architecture, folder.weights, folder.place)
        self.facts = folder.facts
        self.architecture = folder.architecture
        self.weights = folder.weights
        self.sample_rate: int = folder.architecture["sample_rate"]
        self.embedding_dim: int = folder.architecture["embedding_dim"]
        self.fingerprint = folder.fingerprint
        self.decision = folder.decision
        self.device = device
        try:
            for module in self.modules.values():
                module.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            raise EncoderError(
                f"the device '{device}' cannot be used: {reason} Try 'cpu'."
            ) from error
        # What computes; not what is exported or looked into.
        self._network = folded(self.modules["embedding_model"])
        self._try(folder.place)

    def _try(self, place: str) -> None:
        """Raise an EncoderError unless half a second becomes an embedding."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(1, self.sample_rate // 2, generator=generator) - 0.5
        try:
            embedding = self.encode(noise, torch.ones(1))
        except Exception as error:  # whatever the parts do to each other
            raise EncoderError(
                f"{place}: half a second of noise cannot be embedded: "
                f"{first_line(error)} Do front-end and network fit?"
            ) from error
        if embedding.shape != (1, self.embedding_dim):
            raise EncoderError(
                f"{place}: the embedding of one recording has the shape "
                f"{list(embedding.shape)}, [1, {self.embedding_dim}] is needed."
            )
        if not torch.isfinite(embedding).all():
            raise EncoderError(
                f"{place}: the embedding of noise is NaN or infinite. Are the "
                "weights those of a trained encoder?"
            )

    @property
    def parameters(self) -> int:
        """Of the network."""
        network = self.modules["embedding_model"]
        return sum(each.numel() for each in network.parameters())

    @property
    def pad(self) -> Padding | None:
        """How the front-end batches waveforms; None is the host's way."""
        return getattr(self.modules["compute_features"], "pad", None)

    @torch.inference_mode()
    def encode(
        self, waveforms: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Embed a padded batch: [B, samples], [B] -> [B, E]."""
        waveforms = waveforms.to(self.device)
        lengths = lengths.to(self.device)
        feats = self.modules["compute_features"](waveforms)
        feats = self.modules["mean_var_norm"](feats, lengths)
        return self._network(feats, lengths).squeeze(1)


def read_encoder(path: str | os.PathLike) -> EncoderFolder:
    """Read an exported folder, a run's best checkpoint, or one ``CKPT+...``.

    Nothing in it is executed.
    """
    path = Path(path)
    if not path.is_dir():
        raise EncoderError(
            f"'{path}' is not a folder. Expected an exported folder, a run's "
            "output folder or one of its checkpoints."
        )
    if os.path.lexists(path / DESCRIPTION):
        return read_folder(path)
    if not (path / "embedding_model.ckpt").is_file():
        path = _best_checkpoint(path)
    hyperparams = _folder_above(path, "hyperparams.yaml") / "hyperparams.yaml"
    architecture = read_hyperparams(hyperparams)
    state = read_state(path / "embedding_model.ckpt")
    place = f"'{path}' and '{hyperparams}'"
    check_weights(architecture, state, place)  # before memory is taken
    name = fingerprint(architecture, state)
    return EncoderFolder(architecture, state, name, None, {}, place)


def _folder_above(path: Path, name: str) -> Path:
    """The nearest folder, `path` or above it, that holds a file."""
    for folder in (path, *path.resolve().parents):
        if (folder / name).is_file():
            return folder
    raise EncoderError(f"no {name} in '{path}' or above it.")


def _best_checkpoint(run: Path) -> Path:
    """The run's checkpoint of lowest EER, or error, or else the newest."""
    if (run / "save").is_dir():  # SpeechBrain would make one
        checkpoints = SafeCheckpointer(run / "save")  # skips damaged ones
        try:
            for key in ("EER", "error", None):
                best = checkpoints.find_checkpoint(min_key=key)
                if best is not None:
                    return best.path
        except CheckpointError as error:
            raise EncoderError(str(error)) from error
    raise EncoderError(
        f"'{run}' is neither an exported folder (no {DESCRIPTION}) nor a run "
        "with checkpoints that can be read (save/CKPT+*)."
    )
