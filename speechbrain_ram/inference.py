"""Ship a trained encoder, and load one.

:func:`export_inference` writes one folder that SpeechBrain's own
``EncoderClassifier`` and ``SpeakerRecognition`` load offline, from anywhere:
it holds no path. :func:`load_encoder` reads such a folder, or the checkpoint
of a run, for verification.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import ruamel.yaml
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.checkpoints import Checkpointer

# What follows the encoder in an exported hyperparams.yaml. The indentation
# is HyperPyYAML's; {n_speakers} is the only thing filled in.
_TAIL = """
# Cosines to the training speakers, and their names.
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
  input_size: !ref <embedding_dim>
  out_neurons: {n_speakers}
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder

# encode_batch(normalize=True) takes the training speakers' mean off.
mean_var_norm_emb: !new:speechbrain.processing.features.InputNormalization
  norm_type: global
  std_norm: False

modules:
  compute_features: !ref <compute_features>
  mean_var_norm: !ref <mean_var_norm>
  embedding_model: !ref <embedding_model>
  mean_var_norm_emb: !ref <mean_var_norm_emb>
  classifier: !ref <classifier>

# Files are looked for beside this one, as NAME.ckpt.
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables:
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
    mean_var_norm_emb: !ref <mean_var_norm_emb>
    label_encoder: !ref <label_encoder>
"""


class EncoderError(ValueError):
    """An encoder cannot be loaded or written; the message says why."""


def encoder_section(hyperparams: str | os.PathLike) -> str:
    """Cut the encoder out of a run's resolved hyperparams.yaml.

    Arguments
    ---------
    hyperparams : path
        The file that SpeechBrain writes into the output folder, with every
        reference and override resolved. Its key ``encoder`` is what
        ``hparams/encoder.yaml`` became.

    Returns
    -------
    str
        A YAML document of its own: sizes, front-end and encoder.
    """
    yaml = ruamel.yaml.YAML()
    yaml.width = 80
    with open(hyperparams, encoding="utf-8") as file:
        document = yaml.load(file)
    if "encoder" not in document:
        raise EncoderError(
            f"'{hyperparams}' has no key 'encoder'. Does the recipe !include "
            "hparams/encoder.yaml under that name?"
        )
    stream = ruamel.yaml.compat.StringIO()
    yaml.dump(document["encoder"], stream)
    return stream.getvalue()


def export_inference(
    folder: str | os.PathLike,
    encoder_yaml: str,
    embedding_model: torch.nn.Module,
    classifier: torch.nn.Module,
    label_encoder: CategoricalEncoder,
    mean_embedding: torch.Tensor,
) -> Path:
    """Write the folder that SpeechBrain's inference classes load.

    Written under a temporary name and renamed when complete, so that an
    interrupted export leaves no half of a folder.

    Arguments
    ---------
    folder : path
        Replaced if it exists.
    encoder_yaml : str
        From :func:`encoder_section`.
    embedding_model, classifier : torch.nn.Module
        Trained, on any device.
    label_encoder : CategoricalEncoder
        The names of the classifier's rows.
    mean_embedding : torch.Tensor
        Shape [E]: what ``encode_batch(normalize=True)`` takes off.

    Returns
    -------
    pathlib.Path
        The folder.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        text = "# Written by speechbrain_ram.inference.export_inference.\n\n"
        text += encoder_yaml + _TAIL.format(n_speakers=len(label_encoder))
        (part / "hyperparams.yaml").write_text(text, encoding="utf-8")
        for name, module in (
            ("embedding_model", embedding_model),
            ("classifier", classifier),
        ):
            state = {k: v.cpu() for k, v in module.state_dict().items()}
            torch.save(state, part / f"{name}.ckpt")
        mean = mean_embedding.detach().float().cpu()
        torch.save(
            {"count": 1, "glob_mean": mean, "glob_std": torch.ones_like(mean)},
            part / "mean_var_norm_emb.ckpt",
        )
        label_encoder.save(part / "label_encoder.ckpt")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


class LoadedEncoder:
    """A front-end and an encoder, ready to embed.

    Arguments
    ---------
    hparams : dict
        Loaded from a folder's YAML: ``sample_rate``, ``embedding_dim``,
        ``compute_features``, ``mean_var_norm``, ``embedding_model``.
    device : str
        Where to compute.
    fingerprint : str
        Changes when the weights or the YAML change.
    """

    def __init__(self, hparams: dict, device: str, fingerprint: str):
        self.sample_rate = hparams["sample_rate"]
        self.embedding_dim = hparams["embedding_dim"]
        self.device = device
        self.fingerprint = fingerprint
        names = ("compute_features", "mean_var_norm", "embedding_model")
        self.modules = {name: hparams[name].to(device) for name in names}
        for module in self.modules.values():
            module.eval()

    @torch.inference_mode()
    def encode(
        self, waveforms: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Embed a padded batch: [B, samples], [B] -> [B, E]."""
        waveforms = waveforms.to(self.device)
        lengths = lengths.to(self.device)
        feats = self.modules["compute_features"](waveforms)
        feats = self.modules["mean_var_norm"](feats, lengths)
        return self.modules["embedding_model"](feats, lengths).squeeze(1)


def load_encoder(path: str | os.PathLike, device: str = "cpu") -> LoadedEncoder:
    """Load an encoder for verification.

    Arguments
    ---------
    path : path
        An exported folder; or a run's output folder, whose best checkpoint
        is taken; or one checkpoint folder (``CKPT+...``) of a run. Loading a
        YAML executes what it names: load only folders that you trust.
    device : str
        Such as 'cpu' or 'cuda:0'.

    Returns
    -------
    LoadedEncoder

    Raises
    ------
    EncoderError
        Nothing there, or weights of another architecture.
    """
    path = Path(path)
    if not path.is_dir():
        raise EncoderError(
            f"'{path}' is not a folder. Expected an exported folder, a run's "
            "output folder or one of its checkpoints."
        )
    if (path / "embedding_model.ckpt").is_file():
        weights = path / "embedding_model.ckpt"
        run = _folder_above(path, "hyperparams.yaml")
    else:
        run = path
        weights = _best_checkpoint(path) / "embedding_model.ckpt"
    yaml_file = run / "hyperparams.yaml"
    text = yaml_file.read_text(encoding="utf-8")
    if not (run / "embedding_model.ckpt").is_file():
        text = encoder_section(yaml_file)
    hparams = load_hyperpyyaml(text)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    try:
        hparams["embedding_model"].load_state_dict(state)
    except RuntimeError as error:
        raise EncoderError(
            f"'{weights}' does not fit the architecture in '{yaml_file}'. "
            f"Was the run continued with other settings? ({error})"
        ) from error
    digest = hashlib.sha256(text.encode())
    digest.update(weights.read_bytes())
    return LoadedEncoder(hparams, device, digest.hexdigest())


def _folder_above(path: Path, name: str) -> Path:
    """The nearest folder, `path` or above it, that holds a file."""
    for folder in (path, *path.resolve().parents):
        if (folder / name).is_file():
            return folder
    raise EncoderError(f"no {name} in '{path}' or above it.")


def _best_checkpoint(run: Path) -> Path:
    """The run's checkpoint of lowest EER, or error, or else the newest."""
    checkpoints = Checkpointer(run / "save")
    for key in ("EER", "error", None):
        best = checkpoints.find_checkpoint(min_key=key)
        if best is not None:
            return best.path
    raise EncoderError(
        f"'{run}' is neither an exported folder (no embedding_model.ckpt) nor "
        "a run with checkpoints (no save/CKPT+*)."
    )
