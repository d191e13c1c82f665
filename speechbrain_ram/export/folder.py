"""The folder that a trained encoder is shipped in.

It is written once and read by two parties. Ours reads ``encoder.json`` and
``encoder.safetensors``: data, of which nothing is executed. SpeechBrain's
``EncoderClassifier`` and ``SpeakerRecognition`` read ``hyperparams.yaml`` and
the ``*.ckpt`` beside it. The folder holds no path: it may be moved, made
read-only or uploaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from speechbrain.dataio.encoder import CategoricalEncoder

import speechbrain_ram
from speechbrain_ram.export.architecture import (
    EncoderError,
    fingerprint,
    read_architecture,
    write_architecture,
)
from speechbrain_ram.export.model_card import model_card
from speechbrain_ram.verification.decision import Decision

#: Of encoder.json; a reader refuses the numbers it does not know.
FORMAT = 1

DESCRIPTION = "encoder.json"
WEIGHTS = "encoder.safetensors"

# What follows the encoder in hyperparams.yaml; {n_speakers} is filled in.
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


@dataclass(frozen=True, eq=False)
class EncoderFolder:
    """What a folder says, read without executing anything.

    Arguments
    ---------
    architecture : dict
        Plain data, see :mod:`speechbrain_ram.export.architecture`.
    weights : dict of str to torch.Tensor
        State of the embedding model.
    fingerprint : str
        Of both; checked against what was written.
    decision : Decision, optional
        Thresholds and score distributions, where a list was scored.
    facts : dict
        What the model card states.
    """

    architecture: dict
    weights: dict[str, torch.Tensor]
    fingerprint: str
    decision: Decision | None
    facts: dict


def encoder_section(hyperparams: str | os.PathLike) -> str:
    """Cut the encoder out of a run's hyperparams.yaml, as YAML of its own.

    Arguments
    ---------
    hyperparams : path
        The file that SpeechBrain writes into the output folder, with every
        reference and override resolved. Its key ``encoder`` is what
        ``hparams/encoder.yaml`` became.

    Returns
    -------
    str
        Sizes, front-end and encoder.

    Raises
    ------
    EncoderError
        There is no such key.
    """
    text = Path(hyperparams).read_text(encoding="utf-8")
    return write_architecture(read_architecture(text, str(hyperparams)))


def export_inference(
    folder: str | os.PathLike,
    encoder_yaml: str,
    embedding_model: torch.nn.Module,
    classifier: torch.nn.Module,
    label_encoder: CategoricalEncoder,
    mean_embedding: torch.Tensor,
    decision: Decision | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write the folder.

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
    decision : Decision, optional
        From a scored development list.
    facts : mapping, optional
        For the model card, see :data:`speechbrain_ram.export.model_card.FACTS`.

    Returns
    -------
    pathlib.Path
        The folder.
    """
    folder = Path(folder)
    architecture = read_architecture(encoder_yaml)
    weights = _cpu_state(embedding_model)
    facts = {"speakers": len(label_encoder), **(facts or {})}
    description = {
        "format": FORMAT,
        "written_by": f"speechbrain-ram {speechbrain_ram.__version__}",
        "fingerprint": fingerprint(architecture, weights),
        "architecture": architecture,
        "decision": None if decision is None else decision.to_dict(),
        "facts": facts,
    }
    card = model_card(architecture, facts, decision)

    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        (part / DESCRIPTION).write_text(
            json.dumps(description, indent=1) + "\n", encoding="utf-8"
        )
        safetensors.torch.save_file(weights, part / WEIGHTS)
        (part / "README.md").write_text(card, encoding="utf-8")
        text = f"# Written by {description['written_by']}, for SpeechBrain.\n\n"
        text += write_architecture(architecture)
        text += _TAIL.format(n_speakers=len(label_encoder))
        (part / "hyperparams.yaml").write_text(text, encoding="utf-8")
        torch.save(weights, part / "embedding_model.ckpt")
        torch.save(_cpu_state(classifier), part / "classifier.ckpt")
        mean = mean_embedding.detach().float().cpu()
        torch.save(
            {"count": 1, "glob_mean": mean, "glob_std": torch.ones_like(mean)},
            part / "mean_var_norm_emb.ckpt",
        )
        label_encoder.save(part / "label_encoder.ckpt")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def read_folder(folder: str | os.PathLike) -> EncoderFolder:
    """Read an exported folder; nothing in it is executed.

    Arguments
    ---------
    folder : path
        Written by :func:`export_inference`.

    Returns
    -------
    EncoderFolder

    Raises
    ------
    EncoderError
        A file is missing, damaged, of another format number, or does not
        belong to the others.
    """
    folder = Path(folder)
    file = folder / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        number = description["format"]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,  # brackets without end
    ) as error:
        raise EncoderError(
            f"'{file}' cannot be read: {error!r}. Is '{folder}' an exported "
            "folder, and was it copied whole?"
        ) from error
    if number != FORMAT:
        raise EncoderError(
            f"'{file}' has format {number}, this version of speechbrain-ram "
            f"reads format {FORMAT}. Was it written by a newer version?"
        )
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise EncoderError(
            f"'{folder / WEIGHTS}' cannot be read: {error}. Was it copied "
            "whole?"
        ) from error
    architecture = description.get("architecture")
    if not isinstance(architecture, dict):
        raise EncoderError(f"'{file}' has no architecture. Was it edited?")
    actual = fingerprint(architecture, weights)
    if actual != description.get("fingerprint"):
        raise EncoderError(
            f"'{file}' and '{folder / WEIGHTS}' do not belong together: the "
            f"fingerprint is {actual[:12]}..., written was "
            f"{str(description.get('fingerprint'))[:12]}... Is one of them "
            "damaged, or from another export?"
        )
    decision = description.get("decision")
    try:
        decision = None if decision is None else Decision.from_dict(decision)
    except ValueError as error:
        raise EncoderError(f"'{file}': {error}") from error
    facts = description.get("facts") or {}
    return EncoderFolder(architecture, weights, actual, decision, facts)


def _cpu_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights on the CPU, laid out as safetensors wants them."""
    return {
        key: value.detach().cpu().contiguous()
        for key, value in module.state_dict().items()
    }
