"""An encoder's architecture as plain data, read and built without executing.

SpeechBrain describes a model in HyperPyYAML, and loading such a file runs
whatever it names. Here the same file is only parsed: its objects become a
dictionary of class names and numbers, which fits into JSON, and only classes
on a short list are ever built from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import ruamel.yaml
import torch
from ruamel.yaml.scalarbool import ScalarBoolean

from speechbrain_ram.data.plain import (
    YAML_BYTES,
    PlainError,
    limited_text,
    parse_yaml,
)
from speechbrain_ram.export.limits import (
    MOST_PARAMETERS,
    PARTS,
    EncoderError,
    check_architecture,
    read_call,
)
from speechbrain_ram.export.weights import check_state


def read_architecture(text: str, name: str = "hyperparams.yaml") -> dict:
    """Parse the YAML of an encoder into plain data; nothing is executed.

    It needs ``sample_rate``, ``embedding_dim`` and the three parts as ``!new:``
    or ``!apply:`` objects, every reference resolved; all of these may stand
    under ``encoder``, as in a run's hyperparams.yaml. Each part becomes its
    ``arguments`` and a ``class`` (``!new:``) or a ``function`` (``!apply:``).
    """
    try:
        document = parse_yaml(text, name, ruamel.yaml.YAML())
    except PlainError as error:
        raise EncoderError(str(error)) from error
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


def read_hyperparams(path: str | os.PathLike) -> dict:
    """As :func:`read_architecture`, from a run's hyperparams.yaml."""
    try:
        text = limited_text(path, YAML_BYTES)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"'{path}' cannot be read: {error}. Was it copied whole?"
        ) from error
    return read_architecture(text, str(path))


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


def build(
    architecture: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    name: str = "the architecture",
) -> dict[str, torch.nn.Module]:
    """Build the parts, with the network's weights, in evaluation mode."""
    check_weights(architecture, weights, name)
    modules = {part: _build_part(architecture, part, name) for part in PARTS}
    modules["embedding_model"].load_state_dict(weights)
    return modules


def check_weights(
    architecture: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    name: str,
) -> None:
    """Raise an EncoderError unless weights are those of an architecture."""
    check_architecture(architecture, name)
    with torch.device("meta"):  # takes no memory
        network = _build_part(architecture, "embedding_model", name)
    size = sum(each.numel() for each in network.parameters())
    if size > MOST_PARAMETERS:
        raise EncoderError(
            f"{name}: the network has {size} parameters, at most "
            f"{MOST_PARAMETERS} are loaded. Was the file edited?"
        )
    check_state(network.state_dict(), weights, name)


def _build_part(
    architecture: Mapping[str, Any], part: str, name: str
) -> torch.nn.Module:
    make, arguments = read_call(architecture, part, name)
    try:
        return make(**arguments).eval()
    except Exception as error:  # whatever bad arguments bring about
        raise EncoderError(
            f"{name}: '{part}' cannot be built: {make.__qualname__} refuses "
            f"{arguments} ({error}). Was it written by another version?"
        ) from error


def fingerprint(
    architecture: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> str:
    """A name for an encoder: the SHA-256 of architecture and weights.

    Equal names mean equal embeddings.
    """
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for key in sorted(weights):
        # Not contiguous(), which leaves odd strides where a size is 1.
        tensor = weights[key].detach().cpu()
        tensor = tensor.clone(memory_format=torch.contiguous_format)
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
                "arguments": _plain(arguments, name, tagged=True),
            }
    raise EncoderError(
        f"'{part}' in '{name}' is {tag or type(node).__name__!r}, an object "
        "(!new:CLASS) with named arguments is needed."
    )


def _plain(value: Any, name: str, tagged: bool = False) -> Any:
    """A YAML node as JSON's types, or an error where it is more than that."""
    # ruamel gives every collection a tag, an empty one where there is none.
    tag = getattr(value, "tag", None)
    if not tagged and getattr(tag, "value", None) is not None:
        raise EncoderError(
            f"'{name}' has {tag.value!r} where a number, a text or a list of "
            "them is needed. Are its references resolved?"
        )
    if isinstance(value, Mapping):
        return {str(_plain(k, name)): _plain(v, name) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(item, name) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, ScalarBoolean):  # one with an anchor
        return bool(value)
    for kind in (int, float, str):
        if isinstance(value, kind):
            value = kind(value)
            # Python writes no more digits than 4,300.
            if kind is int and abs(value) >= 2**63:
                break
            return value
    raise EncoderError(
        f"'{name}' has a {type(value).__name__} that is not plain data: a "
        "number of 64 bits, a text or a list of them is needed."
    )
