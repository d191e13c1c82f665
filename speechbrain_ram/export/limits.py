"""What an encoder's description may say, before anything is built from it.

A description is a program for memory: a front-end of 1,000,000 bands is two
lines of text and 9 GB. So every argument has a range, and what is outside is
an error that names the file, the field, the value and the range.
"""

from __future__ import annotations

import importlib
import inspect
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from speechbrain_ram.features import FBANK_N_FFT, WINDOWS
from speechbrain_ram.resnet import BLOCKS


class EncoderError(ValueError):
    """An encoder cannot be loaded or written; the message says why."""


class Rule(NamedTuple):
    """What a value may be: in words, and whether it is."""

    words: str
    allows: Callable[[Any], bool]


def number(low: float, high: float) -> Rule:
    """A finite number; True and False are none."""
    return Rule(
        f"a number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and low <= value <= high,
    )


def whole(low: int, high: int) -> Rule:
    """As :func:`number`, without a fraction."""
    return Rule(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def one_of(*choices: Any) -> Rule:
    """One of some values, of the same type: 1 is not True."""
    return Rule(
        " or ".join(map(repr, choices)),
        lambda value: any(
            type(value) is type(each) and value == each for each in choices
        ),
    )


def list_of(count: int, rule: Rule) -> Rule:
    """A list of a fixed length."""
    return Rule(
        f"a list of {count}, each {rule.words}",
        lambda value: (
            type(value) in (list, tuple)
            and len(value) == count
            and all(map(rule.allows, value))
        ),
    )


def either(*rules: Rule) -> Rule:
    """What one of the rules allows."""
    return Rule(
        " or ".join(rule.words for rule in rules),
        lambda value: any(rule.allows(value) for rule in rules),
    )


TEXT = Rule(
    "a text of at most 10000 characters",
    lambda value: type(value) is str and len(value) <= 10_000,
)
_YES_NO = one_of(True, False)
_RATE = whole(1_000, 96_000)
_DIM = whole(1, 8_192)
_N_FFT = 4_096  # at most, and so many samples in a window
_BANK = {
    "n_mels": whole(1, 256),
    "sample_rate": _RATE,
    "win_length": number(1, 200),  # ms
    "hop_length": number(5, 50),
}

# Every argument of every class and function that is ever called, by the part
# of the encoder that it makes. Each takes numbers, texts and lists of them,
# and none opens a file or a connection. What would be learnt (requires_grad)
# or would depend on other recordings (norm_type) is not part of the folder.
LIMITS: dict[str, dict[str, dict[str, Rule]]] = {
    "compute_features": {
        "speechbrain.lobes.features.Fbank": {
            **_BANK,
            "n_fft": whole(2, _N_FFT),
            "f_min": number(0, 48_000),
            "f_max": either(one_of(None), number(0, 48_000)),
            "deltas": one_of(False),
            "context": one_of(False),
            "requires_grad": one_of(False),
            "filter_shape": one_of("triangular", "rectangular", "gaussian"),
            "param_change_factor": number(0, 100),
            "param_rand_factor": number(0, 100),
            "left_frames": whole(0, 100),
            "right_frames": whole(0, 100),
        },
        "speechbrain_ram.features.KaldiFbank": {
            **_BANK,
            "low_freq": number(0, 48_000),
            "high_freq": number(-48_000, 48_000),
            "snip_edges": _YES_NO,
            "preemphasis": number(0, 1),
            "scale": number(1e-6, 1e6),
            "window_type": one_of(*WINDOWS),
        },
        "speechbrain_ram.features.make_front_end": {
            "name": one_of("fbank", "kaldi", "wespeaker"),
            "n_mels": _BANK["n_mels"],
            "sample_rate": _RATE,
        },
    },
    "mean_var_norm": {
        "speechbrain.processing.features.InputNormalization": {
            "mean_norm": one_of(True),
            "std_norm": _YES_NO,
            "norm_type": one_of("sentence"),
            "avg_factor": one_of(None),
            "length_dim": one_of(1),
            "update_until_epoch": whole(0, 1_000_000),
            "avoid_padding_norm": _YES_NO,
            "epsilon": number(1e-30, 1),
            "device": one_of("cpu"),
        },
    },
    "embedding_model": {
        "speechbrain_ram.resnet.ResNet34": {
            "n_mels": _BANK["n_mels"],
            "channels": list_of(4, whole(1, 1_024)),
            "embedding_dim": _DIM,
            "depth": one_of(*BLOCKS),
            "deviation": one_of("population", "sample"),
            "norm_embedding": _YES_NO,
        },
    },
}

#: What an encoder consists of, in the order that data goes through it.
PARTS = tuple(LIMITS)

#: The network's largest size: 1 GB of float32.
MOST_PARAMETERS = 2**28


def check(value: Any, rule: Rule, field: str, name: str) -> None:
    """Raise an EncoderError where a rule does not allow a value."""
    if not rule.allows(value):
        raise EncoderError(
            f"{name}: {field} is {reprlib.repr(value)}, allowed is "
            f"{rule.words}. Was the file edited or cut off?"
        )


def read_call(
    architecture: Mapping[str, Any], part: str, name: str
) -> tuple[Callable, dict[str, Any]]:
    """What makes a part, and its arguments, each of which is allowed."""
    call = architecture.get(part)
    call = call if isinstance(call, Mapping) else {}
    arguments = call.get("arguments")
    kinds = {"class", "function"} & set(call)
    if len(call) != 2 or len(kinds) != 1 or not isinstance(arguments, Mapping):
        raise EncoderError(
            f"{name} does not describe '{part}' by a class or function and "
            "its arguments. Was the file edited or cut off?"
        )
    path = call[kinds.pop()]
    rules = LIMITS[part].get(path) if type(path) is str else None
    if rules is None:
        raise EncoderError(
            f"{name}: '{part}' is a {reprlib.repr(path)}, which is not loaded "
            f"from a folder for safety; allowed are {', '.join(LIMITS[part])}. "
            "If you trust the folder, load it with SpeechBrain's "
            "EncoderClassifier, which executes what its YAML names."
        )
    for key, value in arguments.items():
        if key not in rules:
            raise EncoderError(
                f"{name}: {part} has the argument {reprlib.repr(key)}, which "
                f"{path} does not take; it takes {', '.join(rules)}. Was it "
                "written by another version?"
            )
        check(value, rules[key], f"{part}.{key}", name)
    module_name, _, attribute = path.rpartition(".")
    make = getattr(importlib.import_module(module_name), attribute)
    return make, dict(arguments)


def check_architecture(architecture: Mapping[str, Any], name: str) -> None:
    """Raise an EncoderError for what is not allowed, or does not fit."""
    check(architecture.get("sample_rate"), _RATE, "sample_rate", name)
    check(architecture.get("embedding_dim"), _DIM, "embedding_dim", name)
    given = {}
    for part in PARTS:
        make, arguments = read_call(architecture, part, name)
        given[part] = inspect.signature(make).bind(**arguments)
        given[part].apply_defaults()
        given[part] = given[part].arguments
    front, network = given["compute_features"], given["embedding_model"]
    rate = front["sample_rate"]
    for field, here, there in (
        ("sample_rate", rate, architecture["sample_rate"]),
        ("n_mels", front["n_mels"], network["n_mels"]),
        (
            "embedding_dim",
            network["embedding_dim"],
            architecture["embedding_dim"],
        ),
    ):
        check(here, one_of(there), f"{field} of one part", name)
    window = round(front.get("win_length", 25) * rate / 1000)
    kaldi = "low_freq" in front or front.get("name", "fbank") != "fbank"
    n_fft = _N_FFT if kaldi else front.get("n_fft", FBANK_N_FFT)
    check(window, whole(2, n_fft), "win_length in samples", name)
    if "f_min" in front:
        top = rate // 2 if front["f_max"] is None else front["f_max"]
        check(top, number(front["f_min"] + 1, rate / 2), "f_max", name)
