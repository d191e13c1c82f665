"""From a folder to an encoder that computes; nothing in it is executed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from speechbrain_ram.export.architecture import (
    EncoderError,
    build,
    build_part,
    fingerprint,
    read_architecture,
)
from speechbrain_ram.export.folder import (
    DESCRIPTION,
    EncoderFolder,
    read_folder,
)
from speechbrain_ram.resnet import folded
from speechbrain_ram.training.checkpoints import (
    CheckpointError,
    SafeCheckpointer,
)
from speechbrain_ram.verification.embeddings import Padding


class LoadedEncoder:
    """A front-end and an encoder, ready to embed padded batches."""

    def __init__(self, folder: EncoderFolder, device: str = "cpu"):
        self.facts = folder.facts
        self.architecture = folder.architecture
        self.weights = folder.weights
        self.sample_rate = _size(folder.architecture, "sample_rate")
        self.embedding_dim = _size(folder.architecture, "embedding_dim")
        self.fingerprint = folder.fingerprint
        self.decision = folder.decision
        self.device = device
        _check_sizes(folder)
        self.modules = build(folder.architecture)
        self.modules["embedding_model"].load_state_dict(folder.weights)
        try:
            for module in self.modules.values():
                module.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            raise EncoderError(
                f"the device '{device}' cannot be used: {reason} Try 'cpu'."
            ) from error
        # What computes; not what is exported or looked into.
        self._network = self.modules["embedding_model"]
        if torch.device(device).type == "cpu":
            self._network = folded(self._network)

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
    if (path / DESCRIPTION).exists():
        return read_folder(path)
    if not (path / "embedding_model.ckpt").is_file():
        path = _best_checkpoint(path)
    hyperparams = _folder_above(path, "hyperparams.yaml") / "hyperparams.yaml"
    try:
        text = hyperparams.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"'{hyperparams}' cannot be read: {error}. Was it copied whole?"
        ) from error
    architecture = read_architecture(text, str(hyperparams))
    weights_file = path / "embedding_model.ckpt"
    try:
        # weights_only refuses a pickle that would call anything.
        state = torch.load(weights_file, map_location="cpu", weights_only=True)
        if not all(isinstance(each, torch.Tensor) for each in state.values()):
            raise TypeError("not all of it are tensors")
    except Exception as error:  # of the unpickler, whatever the bytes say
        raise EncoderError(
            f"'{weights_file}' holds no plain weights: {error}"
        ) from error
    name = fingerprint(architecture, state)
    return EncoderFolder(architecture, state, name, None, {})


def _size(architecture: dict, key: str) -> int:
    value = architecture.get(key)
    if type(value) is not int or value < 1:
        raise EncoderError(
            f"the architecture has {key} {value!r}, a whole number above 0 is "
            "needed. Was the file edited or cut off?"
        )
    return value


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
        "with checkpoints (no save/CKPT+*)."
    )


def _check_sizes(folder: EncoderFolder) -> None:
    """Refuse an architecture that the weights are not of."""
    # No memory is taken on the meta device: an edited file cannot ask for more
    # than the weights' own size.
    with torch.device("meta"):
        model = build_part(folder.architecture, "embedding_model")
    wanted = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    have = {key: tuple(t.shape) for key, t in folder.weights.items()}
    for key in sorted(wanted.keys() | have.keys()):
        if wanted.get(key) != have.get(key):
            raise EncoderError(
                "the weights do not fit the architecture: it has "
                f"'{key}' of shape {wanted.get(key)}, they {have.get(key)}. "
                "Was the run continued with other settings?"
            )
