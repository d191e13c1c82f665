"""The settings of a recipe, checked before anything is built from them.

A command line makes text of what is not YAML: ``--lr 0,1`` is the text
'0,1', ``--mixdown no`` the text 'no', which counts as true. Unchecked, such an
option fails deep inside another library, or is never noticed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import ruamel.yaml
import torch
from hyperpyyaml import resolve_references
from speechbrain.core import RunOptions

from speechbrain_ram.data.names import read_text
from speechbrain_ram.data.plain import PlainError, parse_yaml
from speechbrain_ram.data.synthetic import SYNTHETIC
from speechbrain_ram.losses import FORMS, OBJECTIVES
from speechbrain_ram.training.schedules import DECAYS
from speechbrain_ram.utils import is_number

_OPTIONS = "The options"  # what an error calls them


class _Tagged(str):
    """The tag of a value, such as !new:torch.nn.Linear; nothing is built."""


class _Plain(ruamel.yaml.SafeConstructor):
    """Reads values as they stand."""


_Plain.add_constructor(None, lambda _, node: _Tagged(node.tag))


@dataclass(frozen=True)
class Rule:
    """What a setting may be, as a test and in words."""

    allows: Callable[[Any], bool]
    words: str


def _whole(low: int, high: float = math.inf) -> Rule:
    words = f"a whole number from {low} to {high}"
    if high == math.inf:
        words = f"a whole number, {low} or more,"
    return Rule(
        lambda v: is_number(v) and isinstance(v, int) and low <= v <= high,
        words,
    )


def _between(low: float, high: float, or_equal: bool = True) -> Rule:
    words = f"a number from {low:.4g} to {high:.4g}"
    if not or_equal:
        words = f"a number above {low:.4g} and below {high:.4g}"
    if high == math.inf:
        words = f"a number{', 0 or more,' if or_equal else ' above 0'}"
    return Rule(
        lambda v: (
            is_number(v) and (low <= v <= high if or_equal else low < v < high)
        ),
        words,
    )


def _list(
    rule: Rule, words: str, length: int | None = None, least: int = 1
) -> Rule:
    return Rule(
        lambda v: (
            isinstance(v, list)
            and len(v) >= least
            and len(v) == (length or len(v))
            and all(map(rule.allows, v))
        ),
        words,
    )


def _one_of(names: Sequence[str]) -> Rule:
    return Rule(lambda v: v in names, f"one of {', '.join(names)}")


_TRUTH = Rule(lambda v: isinstance(v, bool), "True or False")
_PATH = Rule(lambda v: isinstance(v, str) and v, "a path (./7, not 7)")
_POSITIVE = _between(0, math.inf, or_equal=False)
_NOT_NEGATIVE = _between(0, math.inf)

_PATHS = (
    "cnceleb1 cnceleb2 corpus corpus_folder data_folder data_root "
    "lists_folder manifests "
    "musan output_folder pretrained rirs save_folder sitw sitw_overlap "
    "trials trials_root voxceleb1 voxceleb2"
)
_SWITCHES = (
    "channels_last drop_test_speakers fused_loss margin_diagnostics "
    "mixdown resample skip_bad std_norm sync_batch_norm tensorboard "
    "verify_untrained"
)

_OBJECTIVES = (*OBJECTIVES, "real-am", "real-aam")

#: Every setting of the recipes that is a number, a truth value, a path, or one
#: of several names.
RULES = {
    **dict.fromkeys(_PATHS.split(), _PATH),
    # Data
    "seed": _whole(0, 2**32 - 1),
    "dev_share": _between(0, 1, or_equal=False),
    "join_below": _POSITIVE,
    "crop_seconds": _POSITIVE,
    "speeds": _list(
        _between(0.5, 2),
        "a list of 1 or more numbers from 0.5 to 2, such as [1.0,0.9,1.1],",
    ),
    "synthetic": _list(
        Rule(lambda v: v in SYNTHETIC, ""),
        f"a list of any of {', '.join(SYNTHETIC)}, such as "
        f"[{SYNTHETIC[0]},{SYNTHETIC[1]}],",
        least=0,
    ),
    "batch_size": _whole(1),
    "num_workers": _whole(0),
    # Objective
    "objective": Rule(
        lambda v: isinstance(v, str) and (v in _OBJECTIVES or "." in v),
        f"one of {', '.join(_OBJECTIVES)} or MODULE.CLASS",
    ),
    "form": _one_of(FORMS),
    "margin": _between(0, math.pi),
    "scale": _POSITIVE,
    "margin_start": _NOT_NEGATIVE,
    "margin_end": _NOT_NEGATIVE,
    "sub_centers": _whole(1),
    # Training
    "number_of_epochs": _whole(1),
    "frozen_epochs": _NOT_NEGATIVE,
    "encoder_lr_factor": _POSITIVE,
    "average_checkpoints": _whole(0),
    "lr": _POSITIVE,
    "lr_decay": _one_of(DECAYS),
    "final_lr": _POSITIVE,
    "lr_gamma": _POSITIVE,
    "warmup_steps": _whole(0),
    "warmup_epochs": _NOT_NEGATIVE,
    "max_grad_norm": _POSITIVE,
    "grad_accumulation_factor": _whole(1),
    "verify_every": _whole(1),
    # Interruption and faults
    "max_hours": _NOT_NEGATIVE,
    "ckpt_interval_minutes": _NOT_NEGATIVE,
    "max_fault_share": _between(0, 1),
    "max_bad_steps": _whole(1),
    # Encoder
    "sample_rate": _whole(1),
    "n_mels": _whole(1),
    "channels": _list(
        _whole(1),
        "a list of 4 whole numbers, one a stage, such as [16,16,32,64],",
        length=4,
    ),
    "embedding_dim": _whole(1),
    **dict.fromkeys(_SWITCHES.split(), _TRUTH),
}

_NULLABLE = """
average_checkpoints channels_last fused_loss join_below lists_folder max_hours
musan pretrained rirs sitw sitw_overlap trials trials_root
"""

#: Those that may be null.
NULLABLE = frozenset(_NULLABLE.split())

_NEEDED = """
batch_size checkpointer compute_cost crop_seconds data_root encoder
epoch_counter facts form learning_rate make_classifier margin max_hours mixdown
modules num_workers objective opt_class output_folder prepare resample scale
seed speeds train_logger verify_every
"""

#: What training reads of every recipe.
NEEDED = tuple(_NEEDED.split())


def check_settings(
    hparams_file: str | os.PathLike,
    overrides: str | Mapping[str, Any] | None = None,
    run_opts: Any = None,
) -> None:
    """Raise a ValueError for a wrong option before the YAML builds anything.

    `overrides` is what `speechbrain.parse_arguments` gives, or keys and values.
    Options of `run_opts` that recipes have as keys too, such as
    --max_grad_norm, are checked likewise.
    """
    where = f"'{os.fspath(hparams_file)}'"
    given = _read(overrides, _OPTIONS) if overrides else {}
    with open(hparams_file, encoding="utf-8") as file:
        recipe = _read(read_text(hparams_file), where)
        _check_names(recipe, given, where)
        try:
            resolved = resolve_references(file, overrides).read()
        except Exception as error:  # of expressions, whatever they compute
            raise ValueError(
                f"{where} cannot be read: a reference (!ref) or a file that "
                f"it includes is wrong ({type(error).__name__}: {error})."
            ) from error
    settings = _read(resolved, where)
    for name in getattr(run_opts, "overridden_args", ()):
        settings[name] = getattr(run_opts, name)
    inner = settings.get("encoder")
    for name, rule in RULES.items():
        if name in settings:
            _check_value(f"--{name}", settings[name], rule, name in NULLABLE)
        elif isinstance(inner, Mapping) and name in inner:
            _check_value(f"'encoder: {name}'", inner[name], rule, False)
    frozen = settings.get("frozen_epochs", 0)
    if 0 < settings.get("number_of_epochs", math.inf) <= frozen:
        raise ValueError(
            f"--frozen_epochs is {frozen} and --number_of_epochs "
            f"{settings['number_of_epochs']}: the encoder would learn nothing. "
            "Give fewer frozen epochs."
        )


def check_device(device: str) -> None:
    """Raise a ValueError unless tensors can be made there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device '{device}' cannot be used: {why}") from None


def _read(yaml: str | Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Keys and values of a YAML's text."""
    if isinstance(yaml, Mapping):
        return yaml
    reader = ruamel.yaml.YAML(typ="safe", pure=True)
    reader.Constructor = _Plain
    try:
        values = parse_yaml(yaml, where.strip("'"), reader)
    except PlainError as error:
        why = getattr(error.__cause__, "problem", None) or ""
        twice = re.match('found duplicate key "(.*?)"', why)
        if twice and where == _OPTIONS:
            raise ValueError(f"--{twice[1]} is given twice.") from None
        raise
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{where} cannot be read: {str(values)!r} is not of the form "
            "NAME: VALUE in a YAML, --NAME VALUE on a command line."
        )
    for name in values:
        if not isinstance(name, str):
            raise ValueError(f"{where} has the key {name!r}, a name is needed.")
    return values


def _check_names(
    recipe: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> None:
    """No key is missing, and no option is one that is not there."""
    missing = [name for name in NEEDED if name not in recipe]
    if missing:
        raise ValueError(
            f"{where} has no {', '.join(missing)}, which every recipe has. "
            "Is it one?"
        )
    options = [name for name in recipe if not name.startswith("__")]
    for name in given:
        if name not in recipe:
            options += [field.name for field in fields(RunOptions)]
            near = get_close_matches(str(name), options, n=1)
            hint = f"Is --{near[0]} meant?" if near else "The file has them."
            raise ValueError(f"There is no option --{name} in {where}. {hint}")
    needed = [
        f"--{name}"
        for name, value in recipe.items()
        if isinstance(value, _Tagged)
        and value == "!PLACEHOLDER"
        and name not in given
    ]
    if needed:
        raise ValueError(f"{where} needs {', '.join(needed)}.")


def _check_value(option: str, value: Any, rule: Rule, nullable: bool) -> None:
    """Say what a setting is, and what it may be."""
    if isinstance(value, _Tagged) or (value is None and nullable):
        return
    if rule.allows(value):
        return
    is_what = "has no value" if value is None else f"is {value!r}"
    text = f"{option} {is_what}; {rule.words} is needed."
    if isinstance(value, str) and re.fullmatch(r"\d+,\d+", value):
        text += " Decimals have a point, not a comma."
    raise ValueError(text)
