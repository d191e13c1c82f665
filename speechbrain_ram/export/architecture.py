"""An encoder's architecture as plain data, read and built without executing.

SpeechBrain describes a model in HyperPyYAML, and loading such a file runs
whatever it names. Here the same file is only parsed: its objects become a
dictionary of class names and numbers, which fits into JSON, and only classes
on a short list are ever built from it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Any

import ruamel.yaml
import torch

#: What an encoder consists of, in the order that data goes through it.
PARTS = ("compute_features", "mean_var_norm", "embedding_model")

#: The only callables that :func:`build` calls. Each takes numbers, strings
#: and lists of them, and none of them opens a file or a connection.
ALLOWED = (
    "speechbrain.lobes.features.Fbank",
    "speechbrain.processing.features.InputNormalization",
    "speechbrain_ram.features.KaldiFbank",
    "speechbrain_ram.features.make_front_end",
    "speechbrain_ram.resnet.ResNet34",
)

# The parser's time grows with the square of their depth: 3,000 take seconds.
_MAX_BRACKETS = 500

#: A setting has no more values than this; real ones have a few.
_MAX_VALUES = 10_000


class EncoderError(ValueError):
    """An encoder cannot be loaded or written; the message says why."""


def read_architecture(text: str, name: str = "hyperparams.yaml") -> dict:
    """Parse the YAML of an encoder into plain data; nothing is executed.

    It needs ``sample_rate``, ``embedding_dim`` and the three parts as ``!new:``
    or ``!apply:`` objects, every reference resolved; all of these may stand
    under ``encoder``, as in a run's hyperparams.yaml. Each part becomes its
    ``arguments`` and a ``class`` (``!new:``) or a ``function`` (``!apply:``).
    """
    if text.count("[") + text.count("{") > _MAX_BRACKETS:
        raise EncoderError(
            f"'{name}' has more than {_MAX_BRACKETS} brackets; a description "
            "of an encoder has ten. Is it damaged?"
        )
    try:
        document = ruamel.yaml.YAML().load(text)
    except (ruamel.yaml.error.YAMLError, ValueError, RecursionError) as error:
        raise EncoderError(f"'{name}' is not valid YAML: {error}") from error
    if isinstance(document, Mapping) and "encoder" in document:
        document = document["encoder"]
    wanted = ("sample_rate", "embedding_dim", *PARTS)
    have = document if isinstance(document, Mapping) else {}
    missing = [key for key in wanted if key not in have]
    if missing:
        raise EncoderError(
            f"'{name}' does not describe an encoder: it has no "
            f"{', '.join(missing)}. Does the recipe !include "
            "hparams/encoder.yaml under the key 'encoder'?"
        )
    return {
        "sample_rate": _plain(document["sample_rate"], name),
        "embedding_dim": _plain(document["embedding_dim"], name),
        **{part: _object(document[part], part, name) for part in PARTS},
    }


def write_architecture(architecture: Mapping[str, Any]) -> str:
    """The YAML that :func:`read_architecture` reads, for SpeechBrain."""
    # JSON's scalars and lists are YAML's.
    lines = [
        f"{key}: {json.dumps(value)}"
        for key, value in architecture.items()
        if key not in PARTS
    ]
    for part in PARTS:
        call = dict(architecture[part])
        arguments = call.pop("arguments")
        tags = {"class": "!new:", "function": "!apply:"}
        ((kind, path),) = call.items()
        lines += ["", f"{part}: {tags[kind]}{path}"]
        lines += [f"  {k}: {json.dumps(v)}" for k, v in arguments.items()]
    return "\n".join(lines) + "\n"


def build(architecture: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
    """Build the parts, without weights, in evaluation mode."""
    return {part: build_part(architecture, part) for part in PARTS}


def build_part(architecture: Mapping[str, Any], part: str) -> torch.nn.Module:
    """One of the parts that :func:`build` makes."""
    try:
        call = dict(architecture[part])
        arguments = dict(call.pop("arguments"))
        (path,) = call.values()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EncoderError(
            f"the architecture does not describe '{part}' by a class or "
            "function and its arguments. Was the file edited or cut off?"
        ) from error
    if path not in ALLOWED:
        raise EncoderError(
            f"'{part}' is a '{path}', which is not loaded from a folder "
            f"for safety; allowed are {', '.join(ALLOWED)}. If you trust "
            "the folder, load it with SpeechBrain's EncoderClassifier, "
            "which executes what its YAML names."
        )
    module_name, _, attribute = path.rpartition(".")
    make = getattr(importlib.import_module(module_name), attribute)
    try:
        return make(**arguments).eval()
    except Exception as error:  # whatever bad arguments bring about
        raise EncoderError(
            f"'{part}' cannot be built: {path} refuses {arguments} "
            f"({error}). Was it written by another version?"
        ) from error


def fingerprint(
    architecture: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> str:
    """A name for an encoder: the SHA-256 of architecture and weights.

    Equal names mean equal embeddings.
    """
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for key in sorted(weights):
        tensor = weights[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _object(node: Any, part: str, name: str) -> dict:
    """A tagged YAML node as its class name and arguments."""
    tag = str(getattr(node, "tag", None) or "")
    for prefix, kind in (("!new:", "class"), ("!apply:", "function")):
        if tag.startswith(prefix):
            # Without arguments the node is a scalar, an empty one.
            arguments = node if getattr(node, "value", True) else {}
            if not isinstance(arguments, Mapping):
                break
            return {
                kind: tag.removeprefix(prefix),
                "arguments": {
                    str(key): _plain(value, name)
                    for key, value in arguments.items()
                },
            }
    raise EncoderError(
        f"'{part}' in '{name}' is {tag or type(node).__name__}, an object "
        "(!new:CLASS) with named arguments is needed."
    )


def _plain(value: Any, name: str, left: list[int] | None = None) -> Any:
    """A YAML node as JSON's types, or an error where it is more than that.

    `left` counts down: aliases of aliases make a short text grow without end.
    """
    left = [_MAX_VALUES] if left is None else left
    left[0] -= 1
    if left[0] < 0:
        raise EncoderError(
            f"'{name}' has a setting of more than {_MAX_VALUES} values. Is it "
            "the YAML of an encoder?"
        )
    # ruamel gives every collection a tag, an empty one where there is none.
    tag = getattr(value, "tag", None)
    if tag is not None and getattr(tag, "value", None) is not None:
        raise EncoderError(
            f"'{name}' has {tag.value} where a number, a text or a list of "
            "them is needed. Are its references resolved?"
        )
    if isinstance(value, Mapping):
        return {str(k): _plain(v, name, left) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(item, name, left) for item in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise EncoderError(f"'{name}' has {value!r}, which is not plain data.")
