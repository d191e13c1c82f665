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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.logger import get_logger

import speechbrain_ram
from speechbrain_ram.export.architecture import (
    EncoderError,
    fingerprint,
    read_architecture,
    write_architecture,
)
from speechbrain_ram.utils import atomic_folder, atomic_path
from speechbrain_ram.verification.calibration import Decision

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
    """What a folder says, read without executing anything."""

    architecture: dict  # plain data, see export/architecture.py
    weights: dict[str, torch.Tensor]  # state of the embedding model
    fingerprint: str  # of both; checked against what was written
    decision: Decision | None  # where a development list was scored
    facts: dict  # what the model card states


def encoder_section(hyperparams: str | os.PathLike) -> str:
    """The encoder's part of a run's hyperparams.yaml, as YAML of its own."""
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
    """Write the folder, replacing an older one only when it is complete.

    `encoder_yaml` is from :func:`encoder_section`; `mean_embedding`, [E], is
    what ``encode_batch(normalize=True)`` takes off; `decision` is from a
    scored development list; `facts` are for the model card, see :data:`FACTS`.
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

    with atomic_folder(folder, replace=True) as part:
        (part / DESCRIPTION).write_text(
            json.dumps(description, indent=1) + "\n", encoding="utf-8"
        )
        with atomic_path(part / WEIGHTS) as file:
            safetensors.torch.save_file(weights, file)
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
    return folder


def read_folder(folder: str | os.PathLike) -> EncoderFolder:
    """Read what :func:`export_inference` wrote; nothing in it is executed."""
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


# -- The README of an exported encoder: what it is, how good, how to use it ---
#
# In the form that model hubs read: YAML facts on top, then Markdown.

#: What a recipe may say about an encoder; what it does not say is left open.
FACTS = {
    "name": "Name",
    "corpus": "Training corpus",
    "speakers": "Training speakers",
    "objective": "Objective",
    "language": "Languages",
    "note": "Note",  # what must be read before the numbers
    "license": "Licence",  # an SPDX identifier, which hubs read in lower case
}

_CARD = Path(__file__).with_name("model_card.md")


def model_card(
    architecture: Mapping[str, Any],
    facts: Mapping[str, Any],
    decision: Decision | None = None,
) -> str:
    """The README of an encoder, in Markdown, from any of :data:`FACTS`."""
    unknown = sorted(set(facts) - set(FACTS))
    if unknown:
        raise ValueError(
            f"A model card has no {', '.join(unknown)}; it has "
            f"{', '.join(FACTS)}. Is a key misspelt in the YAML?"
        )
    front_end = architecture["compute_features"]
    rows = [
        f"| {title} | {facts.get(key, 'not stated')} |"
        for key, title in FACTS.items()
        if key not in ("name", "note")
    ]
    rows.append(f"| Front-end | `{_describe(front_end)}` |")
    rows.append(f"| Network | `{_describe(architecture['embedding_model'])}` |")
    note = [f"**{facts['note']}**"] if facts.get("note") else []
    card = Template(_CARD.read_text(encoding="utf-8"))
    return card.substitute(
        name=facts.get("name", "Speaker encoder"),
        license_id=str(facts.get("license", "unknown")).lower(),
        rate=architecture["sample_rate"],
        dim=architecture["embedding_dim"],
        facts="\n".join(rows),
        results="\n\n".join([*note, _results(decision)]),
    )


def _results(decision: Decision | None) -> str:
    if decision is None:
        return "No development list was scored, so no threshold is saved."
    rows = [
        f"| threshold at {name} | {value:.3f} |"
        for name, value in decision.thresholds.items()
    ]
    return "\n".join(
        [
            "| | |",
            "| --- | --- |",
            f"| EER | {decision.eer:.2f} % |",
            f"| list | {decision.trials}: {decision.n_target:,} target and "
            f"{decision.n_nontarget:,} non-target trials |",
            *rows,
        ]
    )


def _describe(call: Mapping[str, Any]) -> str:
    """A part of the architecture as a call, `Name(key=value, ...)`."""
    arguments = dict(call["arguments"])
    name = call.get("class") or call.get("function")
    listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name.rpartition('.')[2]}({listed})"


# -- Starting from an encoder that is trained already -------------------------

logger = get_logger(__name__)


def start_from(
    folder: str | os.PathLike,
    encoder_yaml: str,
    embedding_model: torch.nn.Module,
    classifier: torch.nn.Module,
    label_encoder: CategoricalEncoder,
) -> int:
    """Load the weights of an exported folder into a run that begins.

    Speakers whom both know keep their rows of the classifier; the others
    begin anew. So the number of speakers may be another: with the same ones
    this is the start of large-margin fine-tuning, with others of an
    adaptation to another corpus. Returns how many were taken over.
    """
    folder = Path(folder)
    found = read_folder(folder)
    wanted = read_architecture(encoder_yaml)
    if found.architecture != wanted:
        there = found.architecture
        different = sorted(
            f"{key}: {there.get(key)} there, {wanted.get(key)} here"
            for key in {*there, *wanted}
            if there.get(key) != wanted.get(key)
        )
        raise EncoderError(
            f"the encoder in '{folder}' has another architecture: "
            f"{'; '.join(different)}. Give this run the same."
        )
    embedding_model.load_state_dict(found.weights)

    rows = torch.load(folder / "classifier.ckpt", weights_only=True)["weight"]
    known = CategoricalEncoder()
    known.load(folder / "label_encoder.ckpt")
    both = [name for name in label_encoder.lab2ind if name in known.lab2ind]
    with torch.no_grad():
        for name in both:
            row = rows[known.lab2ind[name]]
            classifier.weight[label_encoder.lab2ind[name]] = row
    logger.info(
        "The encoder of '%s' is the start; %d of %d speakers were known to it.",
        folder,
        len(both),
        len(label_encoder),
    )
    return len(both)
