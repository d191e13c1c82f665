"""Encoders that WeSpeaker trained, as exported folders of ours.

WeSpeaker's ResNet34 has the blocks of ours under other names. What else
differs are options of :class:`speechbrain_ram.resnet.ResNet34` and
:class:`speechbrain_ram.features.KaldiFbank`, which the folder records. Nothing
of the model's folder is executed.
"""

from __future__ import annotations

import io
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.lobes.models.ECAPA_TDNN import Classifier

from speechbrain_ram.data.plain import read_yaml
from speechbrain_ram.export.architecture import (
    check_weights,
    fingerprint,
    write_architecture,
)
from speechbrain_ram.export.encoder import LoadedEncoder
from speechbrain_ram.export.folder import EncoderFolder, export_inference
from speechbrain_ram.export.limits import (
    EncoderError,
    check,
    check_architecture,
    one_of,
    whole,
)
from speechbrain_ram.export.weights import first_line, form_of, read_state
from speechbrain_ram.resnet import ResNet34
from speechbrain_ram.utils import first_ten, one_line

#: Files with the weights, the best first.
WEIGHTS = ("avg_model.pt", "final_model.pt")
CONFIGURATION = "config.yaml"
MEAN = "mean_vec.npy"  # taken off every embedding

#: Depth of the networks that are imported.
MODELS = {"ResNet18": 18, "ResNet34": 34}

# What is not imported, by the beginning of its name, and what it would need.
_NEEDED = {
    "ResNet": "bottleneck blocks",
    "SimAM_ResNet": "SimAM attention in every block",
    "Res2Net": "Res2Net's blocks, which split their channels",
    "ERes2Net": "ERes2Net's blocks, which split their channels",
    "Gemini": "the DF-ResNet's blocks",
    "ECAPA_TDNN": "the ECAPA-TDNN, a network of one-dimensional convolutions",
    "CAMPPlus": "the CAM++ network",
    "XVEC": "the x-vector TDNN",
    "REPVGG": "the RepVGG network",
    "ReDimNet": "the ReDimNet network",
}
_OTHERS = {
    "3dspeaker": (
        "its ResNet34 has a second embedding layer behind the first, which "
        "speechbrain_ram.resnet.ResNet34 has not, another constant in the "
        "pooling and features of unscaled samples"
    ),
    "pyannote": (
        "its files hold pickled classes of its own, which are not executed "
        "here. wespeaker-voxceleb-resnet34-LM is WeSpeaker's model "
        "voxceleb_resnet34_LM: import that one"
    ),
}
_LARGEST_MEAN = 2**20  # bytes


class Configuration(NamedTuple):
    """What a config.yaml says about the encoder."""

    model: str
    n_mels: int
    embedding_dim: int
    sample_rate: int
    objective: str  # for the model card


def import_encoder(
    toolkit: str, source: str | Path, folder: str | Path
) -> dict[str, Any]:
    """Write an exported folder from a model of another toolkit.

    Arguments
    ---------
    toolkit : str
        "wespeaker".
    source : path
        Its model folder: ``avg_model.pt`` or ``final_model.pt``,
        ``config.yaml`` and, where embeddings lose a mean, ``mean_vec.npy``.
    folder : path
        What is written. It must not exist, or be empty.

    Returns
    -------
    dict
        What was imported: output, fingerprint, model, weights, parameters,
        channels, embedding_dim, mean.

    Raises
    ------
    EncoderError
        Another toolkit or network, or files that are damaged or do not fit
        each other. Nothing is written then.
    """
    if toolkit != "wespeaker":
        raise EncoderError(_refusal(toolkit))
    source, folder = Path(source), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EncoderError(
            f"'{folder}' is there already and not an empty folder. Give "
            "another name after --output."
        )
    weights = _weights_file(source)
    told, read = _read(source, weights)
    encoder = LoadedEncoder(read)  # which tries it
    mean = source / MEAN if (source / MEAN).exists() else None
    network = encoder.modules["embedding_model"]
    export_inference(
        folder,
        write_architecture(read.architecture),
        network,
        # WeSpeaker keeps no names for the rows of its projection.
        Classifier(told.embedding_dim, out_neurons=0),
        CategoricalEncoder(),
        torch.zeros(told.embedding_dim),
        facts=_facts(told, weights, mean is not None),
    )
    return {
        "output": str(folder),
        "fingerprint": read.fingerprint,
        "model": told.model,
        "weights": str(weights),
        "parameters": sum(each.numel() for each in network.parameters()),
        "channels": list(network.channels),
        "embedding_dim": told.embedding_dim,
        "mean": None if mean is None else str(mean),
    }


def _read(source: Path, weights: Path) -> tuple[Configuration, EncoderFolder]:
    """A model folder as ours would be read."""
    place = source / CONFIGURATION
    try:
        config = read_yaml(place)
    except OSError as error:
        raise EncoderError(
            f"{one_line(error)}. WeSpeaker writes {CONFIGURATION} beside the "
            "weights."
        ) from error
    except ValueError as error:
        raise EncoderError(str(error)) from error
    told = read_configuration(config, str(place))
    state = read_state(weights, under=("state_dict", "model"))
    architecture = _architecture(told, _channels(state, str(weights)))
    name = f"'{weights}'"
    check_architecture(architecture, name)
    state = renamed(state, told, architecture, str(weights))
    check_weights(architecture, state, name)
    mean = read_mean(source / MEAN, told.embedding_dim)
    if mean is not None:
        state["linear.bias"] = state["linear.bias"] - mean
    found = fingerprint(architecture, state)
    return told, EncoderFolder(architecture, state, found, None, {}, name)


def _refusal(toolkit: str) -> str:
    why = _OTHERS.get(toolkit.lower().replace("-", ""))
    if why is None:
        return (
            f"'{toolkit}' is not a toolkit whose encoders are imported; "
            "'wespeaker' is. Is it misspelt?"
        )
    return f"Encoders of '{toolkit}' are not imported: {why}."


def _weights_file(source: Path) -> Path:
    if not source.is_dir():
        raise EncoderError(
            f"'{source}' is not a folder. Expected a model folder of "
            f"WeSpeaker's, with {' or '.join(WEIGHTS)} and {CONFIGURATION}."
        )
    for name in WEIGHTS:
        if (source / name).exists():
            return source / name
    models = source / "models"
    hint = "Is it another folder?"
    if any((models / name).exists() for name in WEIGHTS):
        hint = f"They are in '{models}': copy {CONFIGURATION} there."
    raise EncoderError(
        f"'{source}' has no {' and no '.join(WEIGHTS)}, WeSpeaker's weights. "
        f"{hint}"
    )


# -- config.yaml ----------------------------------------------------------


def read_configuration(config: Any, name: str) -> Configuration:
    """What is imported of a configuration, or an error that names the rest."""
    model = _value(config, "model", None, name)
    if not isinstance(model, str) or model not in MODELS:
        needed = max(
            (each for each in _NEEDED if str(model).startswith(each)),
            key=len,
            default=None,
        )
        because = f" It would need {_NEEDED[needed]}." if needed else ""
        raise EncoderError(
            f"'{name}': model is {reprlib.repr(model)}; "
            f"{' and '.join(MODELS)} are imported.{because}"
        )
    arguments = _section(config, "model_args", name)
    _only(arguments, "pooling_func", ("TSTP",), name, "another pooling layer")
    _only(
        arguments, "two_emb_layer", (False,), name, "a second embedding layer"
    )
    data = _section(config, "dataset_args", name)
    _only(data, "frontend", ("fbank",), name, "another front-end")
    _only(data, "cmvn", (True,), name, "features without normalisation")
    cmvn = _section(data, "cmvn_args", name)
    needed = "another normalisation of the features"
    _only(cmvn, "norm_mean", (True,), name, needed)
    _only(cmvn, "norm_var", (False,), name, needed)
    bank = _section(data, "fbank_args", name)
    _only(bank, "frame_length", (25, 25.0), name, "other frames")
    _only(bank, "frame_shift", (10, 10.0), name, "other frames")
    bands = _value(bank, "num_mel_bins", 80, name, whole(1, 256))
    taken = _value(arguments, "feat_dim", None, name, whole(1, 256))
    if taken != bands:
        raise EncoderError(
            f"'{name}': feat_dim is {taken}, num_mel_bins {bands}; they must "
            "be equal. Is the configuration that of another model?"
        )
    rate = whole(1_000, 96_000)
    return Configuration(
        model,
        bands,
        _value(arguments, "embed_dim", None, name, whole(1, 8_192)),
        _value(data, "resample_rate", 16_000, name, rate),
        _objective(config),
    )


def _section(config: Mapping, key: str, name: str) -> Mapping:
    found = _value(config, key, {}, name)
    if not isinstance(found, Mapping):
        raise EncoderError(
            f"'{name}': {key} is {reprlib.repr(found)}, KEY: VALUE is needed. "
            "Is it a configuration of WeSpeaker's?"
        )
    return found


def _value(config, key: str, default: Any, name: str, rule=None) -> Any:
    if not isinstance(config, Mapping):
        raise EncoderError(
            f"'{name}' has no KEY: VALUE. Is it a configuration of WeSpeaker's?"
        )
    found = config.get(key, default)
    if rule is not None:
        check(found, rule, key, f"'{name}'")
    return found


def _only(
    config: Mapping, key: str, allowed: tuple, name: str, needed: str
) -> None:
    """Refuse what would need more than the network and front-end of ours."""
    found = config.get(key, allowed[0])
    if not one_of(*allowed).allows(found):
        raise EncoderError(
            f"'{name}': {key} is {reprlib.repr(found)}; {allowed[0]!r} is "
            f"imported. It would need {needed}."
        )


def _objective(config: Mapping) -> str:
    """The name of the training's loss, where it is stated."""
    loss = config.get("projection_args")
    kind = loss.get("project_type") if isinstance(loss, Mapping) else None
    return kind[:100] if isinstance(kind, str) else "not stated"


def _architecture(told: Configuration, channels: list[int]) -> dict:
    """As hparams/encoder.yaml describes such an encoder."""
    shape = {"n_mels": told.n_mels}
    return {
        "sample_rate": told.sample_rate,
        "embedding_dim": told.embedding_dim,
        "compute_features": {
            "function": "speechbrain_ram.features.make_front_end",
            "arguments": {
                "name": "wespeaker",
                "sample_rate": told.sample_rate,
                **shape,
            },
        },
        "mean_var_norm": {
            "class": "speechbrain.processing.features.InputNormalization",
            "arguments": {
                "norm_type": "sentence",
                "std_norm": False,
                "epsilon": 1e-3,
            },
        },
        "embedding_model": {
            "class": "speechbrain_ram.resnet.ResNet34",
            "arguments": {
                **shape,
                "channels": channels,
                "embedding_dim": told.embedding_dim,
                "depth": MODELS[told.model],
                "deviation": "sample",
                "norm_embedding": False,
            },
        },
    }


def _facts(told: Configuration, weights: Path, mean: bool) -> dict[str, Any]:
    note = f"Imported from {weights.name} of WeSpeaker's {told.model}."
    if mean:
        note += f" {MEAN} is taken off every embedding."
    return {
        "name": f"{told.model} of WeSpeaker",
        "speakers": "not stated",
        "objective": told.objective,
        "note": note,
    }


# -- weights --------------------------------------------------------------


def _channels(state: Mapping[str, torch.Tensor], name: str) -> list[int]:
    """Channels of the four stages, by the weights."""
    keys = [f"layer{k}.0.conv1.weight" for k in range(1, 5)]
    missing = [key for key in keys if key not in state]
    if missing:
        prefix = next(
            (
                key.removesuffix(keys[0])
                for key in state
                if key.endswith(keys[0])
            ),
            None,
        )
        hint = "Is it a ResNet of WeSpeaker's?"
        if prefix:
            hint = (
                f"They stand behind '{prefix[:100]}': take that off the keys."
            )
        raise EncoderError(
            f"'{name}' lacks {', '.join(missing)}, which WeSpeaker's ResNets "
            f"have. {hint}"
        )
    return [len(state[key]) if state[key].ndim else 0 for key in keys]


def theirs(key: str) -> str:
    """What WeSpeaker calls a tensor of ours."""
    words = key.split(".")
    if words[0] == "linear":
        return ".".join(["seg_1", *words[1:]])
    if words[0] == "stages":
        words[:2] = [f"layer{int(words[1]) + 1}"]
        words[2] = words[2].replace("norm", "bn")
    else:
        words[0] = {"conv": "conv1", "norm": "bn1"}[words[0]]
    return ".".join(words)


def renamed(
    state: Mapping[str, torch.Tensor],
    told: Configuration,
    architecture: Mapping[str, Any],
    name: str,
) -> dict[str, torch.Tensor]:
    """WeSpeaker's tensors under our names, all that there must be.

    The projection to the training speakers is left out.
    """
    with torch.device("meta"):  # takes no memory
        network = ResNet34(**architecture["embedding_model"]["arguments"])
    wanted = network.state_dict()
    names = {theirs(key): key for key in wanted}
    have = [key for key in state if not key.startswith("projection.")]
    for what, keys in (
        ("lacks", [key for key in names if key not in state]),
        ("also has", [key for key in have if key not in names]),
    ):
        if keys:
            raise EncoderError(
                f"'{name}' {what} {len(keys)} tensors where the "
                f"configuration's {told.model} has its {len(names)}: "
                f"{first_ten([key[:100] for key in keys])}. Is "
                f"{CONFIGURATION} that of another model?"
            )
    found = {
        # The mean of several checkpoints makes numbers of counts.
        ours: state[key].to(torch.int64)
        if key.endswith("num_batches_tracked") and state[key].ndim == 0
        else state[key]
        for key, ours in names.items()
    }
    other = [
        f"{key} is {form_of(found, ours)} instead of {form_of(wanted, ours)}"
        for key, ours in names.items()
        if form_of(found, ours) != form_of(wanted, ours)
    ]
    if other:
        raise EncoderError(
            f"'{name}' has {len(other)} tensors of other forms than the "
            f"configuration's {told.model} with feat_dim {told.n_mels} and "
            f"embed_dim {told.embedding_dim}: {first_ten(other)}. Is "
            f"{CONFIGURATION} that of another model?"
        )
    return found


def read_mean(path: Path, size: int) -> torch.Tensor | None:
    """The mean of embeddings that scoring takes off, where there is a file."""
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_MEAN:
            raise ValueError("it is not a short file")
        content = io.BytesIO(path.read_bytes())
        mean = np.lib.format.read_array(content, allow_pickle=False)
        if mean.shape != (size,) or mean.dtype.kind not in "fiu":
            raise ValueError(
                f"{mean.dtype} of shape {list(mean.shape)}, embed_dim is {size}"
            )
        if not np.isfinite(mean).all():
            raise ValueError("it holds NaN or infinite values")
    except Exception as error:  # whatever the bytes bring about
        raise EncoderError(
            f"'{path}' is not the mean of embeddings: {first_line(error)}. "
            "Was it copied whole, and is it of this model?"
        ) from error
    return torch.from_numpy(mean.astype(np.float32))
