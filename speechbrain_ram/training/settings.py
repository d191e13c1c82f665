"""The settings that a run learns from, as plain data, and where it writes.

A recipe is read as it stands: nothing that it names is built.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ruamel.yaml
from hyperpyyaml import resolve_references

from speechbrain_ram.data.manifest import check_outside

#: Where things lie: their content is compared, not their place.
_PLACES = """
output_folder save_folder manifests data_root data_folder corpus corpus_folder
voxceleb1 voxceleb2 sitw sitw_overlap cnceleb1 cnceleb2 lists
lists_folder trials trials_root pretrained batch_size
"""  # the last as that of all processes together

#: Where nothing is written.
_CORPORA = """
data_root data_folder corpus trials_root sitw voxceleb1 voxceleb2 cnceleb1
cnceleb2
"""

#: How a run is run, and what it tells.
_WAYS = """
number_of_epochs num_workers precision channels_last fused_loss tensorboard
max_hours ckpt_interval_minutes max_fault_share max_bad_steps skip_bad
verify_untrained margin_diagnostics license
"""

#: Options that may change from one command to the next.
FREE = frozenset((_PLACES + _WAYS).split())

#: Folders of noise: whether they are given matters, their place does not.
_ADDED = frozenset(["musan", "rirs"])

#: Objects that teach nothing, or that other parts of the identity describe.
_OBJECTS = """
prepare make_corpus modules epoch_counter facts train_logger checkpointer
corpus_name
"""
_NOT_LEARNED = frozenset(_OBJECTS.split())


def learned_settings(
    hparams_file: str | os.PathLike, overrides: str | Mapping[str, Any]
) -> dict[str, Any]:
    """Everything in a recipe that changes what is learned, as plain data.

    From dotted names, such as ``opt_class.momentum``, to numbers, texts and
    lists of them. Nothing is built or executed. What may change freely
    (:data:`FREE`) is left out wherever the recipe refers to it.
    """
    yaml = ruamel.yaml.YAML()
    if isinstance(overrides, str):
        overrides = yaml.load(overrides) or {}
    recipe = {**yaml.load(Path(hparams_file)), **overrides}
    neutral = {
        key: _neutral(value) for key, value in recipe.items() if key in FREE
    }
    for key in _ADDED & set(recipe):
        if recipe[key] is not None:
            neutral[key] = "given"
    resolved = resolved_recipe(hparams_file, {**overrides, **neutral})
    settings: dict[str, Any] = {}
    for key, node in resolved.items():
        if not (key in FREE or key in _NOT_LEARNED or key.startswith("__")):
            _flatten(node, str(key), settings)
    return settings


def output_folder_of(
    hparams_file: str | os.PathLike, overrides: str | Mapping[str, Any]
) -> Path:
    """Where a recipe would write; loading it makes folders there already.

    Refuses (ManifestError) what would write within the corpus that is read.
    """
    recipe = resolved_recipe(hparams_file, overrides)
    output = Path(recipe["output_folder"])
    if recipe.get("make_corpus") is None:  # else it lies where it is made
        corpus = str(recipe.get("corpus"))
        for key in set(_CORPORA.split()) & set(recipe):
            if not isinstance(recipe[key], str):
                continue
            place = recipe[key]
            if key.startswith("cnceleb"):  # absolute, or within data_folder
                place = os.path.join(recipe.get("data_folder", ""), place)
            # The folder that paths start from may lie around the corpus.
            around = key in ("data_root", "trials_root") and _is_below(
                corpus, place
            )
            for written in ("output_folder", "save_folder", "manifests"):
                if isinstance(recipe.get(written), str) and not around:
                    check_outside(recipe[written], place)
    return output


def resolved_recipe(
    hparams_file: str | os.PathLike, overrides: str | Mapping[str, Any]
) -> Mapping[str, Any]:
    """A recipe with its overrides and without references; nothing is built."""
    with open(hparams_file, encoding="utf-8") as file:
        return ruamel.yaml.YAML().load(resolve_references(file, overrides))


def _is_below(corpus: str, folder: str) -> bool:
    """Whether a corpus, a folder or a table, lies in a folder."""
    real = Path(corpus).resolve()
    return real.exists() and Path(folder).resolve() in real.parents


def _neutral(value: Any) -> Any:
    """Something of the same kind that is the same in every command."""
    if isinstance(value, bool):
        return False
    return 1 if isinstance(value, (int, float)) else "any"


def _flatten(node: Any, name: str, settings: dict[str, Any]) -> None:
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag:
        settings[name] = str(tag)
    if isinstance(node, Mapping):
        for key, value in node.items():
            _flatten(value, f"{name}.{key}", settings)
    elif isinstance(node, list):
        plain = [_plain(each) for each in node]
        settings[name] = [str(tag), *plain] if tag else plain
    elif not tag:
        settings[name] = _plain(node)
    elif getattr(node, "value", None):
        settings[name] = f"{tag} {node.value}"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))  # JSON has no such number
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not hasattr(value, "tag"):  # a date
        return str(value)
    parts: dict[str, Any] = {}
    _flatten(value, "", parts)
    return parts
