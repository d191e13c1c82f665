"""The folder that a trained encoder is shipped in.

It is written once and read by two parties. Ours reads ``encoder.json`` and
``encoder.safetensors``: data, of which nothing is executed. SpeechBrain's
``EncoderClassifier`` and ``SpeakerRecognition`` read ``hyperparams.yaml`` and
the ``*.ckpt`` beside it. The folder holds no path: it may be moved, made
read-only or uploaded.
"""

from __future__ import annotations

import ast
import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.logger import get_logger

import speechbrain_ram
from speechbrain_ram.data.plain import (
    JSON_BYTES,
    limited_text,
    parse_json,
    read_json,
)
from speechbrain_ram.export.architecture import (
    fingerprint,
    read_architecture,
    read_hyperparams,
    write_architecture,
)
from speechbrain_ram.export.card import (
    decision_table,
    decision_text,
    model_card,
    read_decision,
    read_facts,
)
from speechbrain_ram.export.limits import EncoderError
from speechbrain_ram.export.weights import (
    check_state,
    first_line,
    read_safetensors,
    read_state,
)
from speechbrain_ram.utils import (
    atomic_folder,
    atomic_path,
    atomic_writer,
    whole_number,
)
from speechbrain_ram.verification.calibration import Decision

#: Of encoder.json; a reader refuses the numbers it does not know.
FORMAT = 1

DESCRIPTION = "encoder.json"
WEIGHTS = "encoder.safetensors"

_LABELS = 2**26  # bytes of label_encoder.ckpt: a million speakers

# What follows the encoder in hyperparams.yaml; {classifier} is filled in.
_TAIL = """
# Cosines to the training speakers, and their names.
classifier: {classifier}
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
    place: str = "the encoder"  # what errors call it


def encoder_section(hyperparams: str | os.PathLike) -> str:
    """The encoder's part of a run's hyperparams.yaml, as YAML of its own."""
    return write_architecture(read_hyperparams(hyperparams))


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
    scored development list; `facts` are for the model card, see export/card.py.
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
        text += _TAIL.format(classifier=_classifier_yaml(classifier.weight))
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


def check_replaceable(folder: str | os.PathLike) -> None:
    """Raise unless :func:`write_decision` can write into a folder."""
    file = Path(folder) / DESCRIPTION
    if not file.is_file():
        raise EncoderError(
            f"'{folder}' holds no {DESCRIPTION}, so no threshold can be "
            "written into it. Is it a run? Give its folder 'inference'."
        )
    if not os.access(folder, os.W_OK):
        raise EncoderError(f"The folder '{folder}' is read-only.")


def write_decision(folder: str | os.PathLike, decision: Decision) -> bool:
    """Replace what :func:`export_inference` wrote of a development list.

    The encoder, and so its fingerprint, stays the same. Returns whether the
    folder's README.md says the new numbers too: it does unless somebody
    changed its table.
    """
    check_replaceable(folder)
    old = read_folder(folder).decision
    file, card = Path(folder) / DESCRIPTION, Path(folder) / "README.md"
    description = {**read_json(file), "decision": decision.to_dict()}
    text = json.dumps(description, indent=1, allow_nan=False) + "\n"
    read_decision(parse_json(text, file)["decision"], f"'{file}'")
    said = limited_text(card, JSON_BYTES) if card.is_file() else ""
    with atomic_writer(file) as opened:
        opened.write(text)
    # Cards of earlier versions have the table alone.
    for before in (decision_text(old), decision_table(old)):
        if said.count(before) == 1:
            with atomic_writer(card) as opened:
                opened.write(said.replace(before, decision_text(decision)))
            return True
    return False


def read_folder(folder: str | os.PathLike) -> EncoderFolder:
    """Read what :func:`export_inference` wrote; nothing in it is executed."""
    folder = Path(folder)
    file = folder / DESCRIPTION
    try:
        description = read_json(file)
        number = description["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(
            f"'{file}' cannot be read: {error!r}. Is '{folder}' an exported "
            "folder, and was it copied whole?"
        ) from error
    if number != FORMAT:
        raise EncoderError(
            f"'{file}' has format {reprlib.repr(number)}, this version of "
            f"speechbrain-ram reads format {FORMAT}. Was it written by a newer "
            "version?"
        )
    architecture = description.get("architecture")
    if not isinstance(architecture, dict):
        raise EncoderError(f"'{file}' has no architecture. Was it edited?")
    weights = read_safetensors(folder / WEIGHTS)
    try:
        actual = fingerprint(architecture, weights)
    except RecursionError as error:
        raise EncoderError(
            f"'{file}': the architecture is lists in lists without end. Was "
            "it edited?"
        ) from error
    written = description.get("fingerprint")
    if actual != written:
        raise EncoderError(
            f"'{file}' and '{folder / WEIGHTS}' do not belong together: the "
            f"fingerprint is {actual[:12]}..., written was "
            f"{reprlib.repr(written)}. Is one of them damaged, or from "
            "another export?"
        )
    return EncoderFolder(
        architecture,
        weights,
        actual,
        read_decision(description.get("decision"), f"'{file}'"),
        read_facts(description.get("facts"), f"'{file}'"),
        f"'{file}'",
    )


def _classifier_yaml(weight: torch.Tensor) -> str:
    """What makes the classifier anew, of weights [C, E] or [C, K, E]."""
    name = "speechbrain.lobes.models.ECAPA_TDNN.Classifier"
    sizes = ["  input_size: !ref <embedding_dim>"]
    sizes += [f"  out_neurons: {len(weight)}"]
    if weight.ndim == 3:
        name = "speechbrain_ram.classifier.SubCenterClassifier"
        sizes += [f"  sub_centers: {weight.shape[1]}"]
    return "\n".join([f"!new:{name}", *sizes])


def _cpu_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights on the CPU, laid out as safetensors wants them."""
    return {
        key: value.detach().cpu().contiguous()
        for key, value in module.state_dict().items()
    }


# -- Starting from an encoder that is trained already -------------------------

logger = get_logger(__name__)


def recipe_options(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The options by which a recipe gets an encoder of this architecture.

    What hparams/encoder.yaml does not state goes to its objects as arguments.
    """
    network = dict(architecture["embedding_model"]["arguments"])
    options = {
        "channels": network.pop("channels", None),
        "embedding_dim": network.pop("embedding_dim", None),
        "frontend": architecture["compute_features"]["arguments"].get("name"),
        "std_norm": architecture["mean_var_norm"]["arguments"].get("std_norm"),
    }
    options = {key: v for key, v in options.items() if v is not None}
    inner = {
        "sample_rate": architecture["sample_rate"],
        "n_mels": network.pop("n_mels", None),
        "embedding_model": network,
    }
    return {**options, "encoder": {k: v for k, v in inner.items() if v}}


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
        raise EncoderError(_contradiction(folder, found.architecture, wanted))
    check_state(embedding_model.state_dict(), found.weights, found.place)
    embedding_model.load_state_dict(found.weights)

    file = folder / "classifier.ckpt"
    rows = read_state(file).get("weight")
    known = _read_labels(folder / "label_encoder.ckpt")
    size = classifier.weight.shape[-1]
    fits = (
        rows is not None
        and rows.ndim in (2, 3)
        and (len(rows), rows.shape[-1]) == (len(known), size)
    )
    if not (fits and rows.is_floating_point() and rows.isfinite().all()):
        raise EncoderError(
            f"'{file}' does not hold {len(known)} speakers of {size} "
            "finite numbers, as label_encoder.ckpt and the embedding have "
            "them. Is one of them from another export, or damaged?"
        )
    both = [name for name in label_encoder.lab2ind if name in known]
    there, here = (
        each.shape[1] if each.ndim == 3 else 1
        for each in (rows, classifier.weight)
    )
    if both and there != here:
        raise EncoderError(
            f"--sub_centers is {here}, but '{file}' has {there} for each of "
            f"its speakers, of whom this run knows {len(both)}. Give "
            f"--sub_centers {there}."
        )
    with torch.no_grad():
        for name in both:
            row = rows[known[name]]
            classifier.weight[label_encoder.lab2ind[name]] = row
    logger.info(
        "The encoder of '%s' is the start; %d of %d speakers were known to it.",
        folder,
        len(both),
        len(label_encoder),
    )
    return len(both)


def _contradiction(folder: Path, there: Mapping, here: Mapping) -> str:
    """Which options of a run do not fit the encoder that it starts from."""
    theirs, ours = recipe_options(there), recipe_options(here)
    inner = theirs.pop("encoder"), ours.pop("encoder")
    names = {f"--{name}": name for name in {*theirs, *ours}}
    wrong = [
        f"{option} is {ours.get(name)}, the encoder has {theirs.get(name)}"
        for option, name in sorted(names.items())
        if ours.get(name) != theirs.get(name)
    ]
    wrong += [
        f"'encoder: {name}' is {inner[1].get(name)}, the encoder has "
        f"{inner[0].get(name)}"
        for name in sorted({*inner[0], *inner[1]})
        if inner[1].get(name) != inner[0].get(name)
    ]
    said = "; ".join(wrong) or "its classes or features are others"
    return (
        f"The encoder in '{folder}' cannot be the start, since this run asks "
        f"for another architecture: {said}. Leave these options out: they are "
        "taken from the folder."
    )


def _read_labels(path: Path) -> dict[str, int]:
    """Speaker -> row, of a file that SpeechBrain's CategoricalEncoder wrote."""
    arrow = CategoricalEncoder.VALUE_SEPARATOR
    end = CategoricalEncoder.EXTRAS_SEPARATOR.strip()
    known: dict[str, int] = {}
    try:
        for line in limited_text(path, _LABELS).split("\n"):
            if line == end:
                break
            # Python's parser is for short texts of others only.
            literal, _, row = line[:1000].rpartition(arrow)
            known[ast.literal_eval(literal)] = whole_number(row)
        if sorted(known.values()) != list(range(len(known))):
            raise ValueError("the rows are not 0, 1, 2 and so on")
    except Exception as error:  # whatever the lines bring about
        raise EncoderError(
            f"'{path}' does not name the speakers of the classifier "
            f"({first_line(error)}). Was it copied whole?"
        ) from error
    return known
