"""Ship an encoder without PyTorch: ONNX for servers, phones and browsers.

Two graphs, both with dynamic batch and length, float32 or int8:

- :func:`export_waveform`: waveform [batch, samples] in, embedding out; the
  front-end is inside. For servers: onnxruntime and ten lines of code.
- :func:`export_sherpa`: Kaldi filterbank [batch, frames, 80] in, embedding
  out, with the metadata that sherpa-onnx reads (Python, Android, iOS,
  WebAssembly), which computes the filterbank itself. Such an encoder is
  trained with ``--frontend kaldi``.

All recordings of a batch must have one length: there is no padding mask.
Needs the extra ``onnx``: ``pip install "speechbrain-ram[onnx]"``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from speechbrain_ram.export.architecture import EncoderError
from speechbrain_ram.export.encoder import LoadedEncoder
from speechbrain_ram.export.onnx_file import described
from speechbrain_ram.export.onnx_model import OURS, settings
from speechbrain_ram.features import KaldiFbank
from speechbrain_ram.utils import atomic_path, needs_extra

#: Of the ONNX operators; onnxruntime 1.14 and later know it.
OPSET = 18


class _Chain(torch.nn.Module):
    """The parts of an encoder one after the other, for equal lengths."""

    def __init__(self, *parts: torch.nn.Module):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x.squeeze(1)


def export_waveform(encoder: LoadedEncoder, path: str | os.PathLike) -> Path:
    """Write waveform -> embedding.

    The input is ``waveform``, [batch, samples], float32 in [-1, 1]; the output
    ``embedding``, [batch, embedding_dim]. Sample rate, fingerprint, facts,
    thresholds and the decision that they belong to are in the metadata.
    """
    metadata = {
        "sample_rate": encoder.sample_rate,
        "output_dim": encoder.embedding_dim,
        "fingerprint": encoder.fingerprint,
        "facts": json.dumps(encoder.facts),
    }
    if encoder.decision is not None:
        metadata["thresholds"] = json.dumps(encoder.decision.thresholds)
        metadata["decision"] = json.dumps(encoder.decision.to_dict())
    chain = _Chain(*(encoder.modules[part] for part in encoder.modules))
    shape = (2, encoder.sample_rate)
    return _export(chain, shape, ("waveform", "samples"), metadata, path)


def export_sherpa(encoder: LoadedEncoder, path: str | os.PathLike) -> Path:
    """Write features -> embedding, for sherpa-onnx's extractor.

    The encoder must be trained on :class:`speechbrain_ram.features.KaldiFbank`.
    Its defaults are those of the client; with another window, other ends of
    the bands or of the recording (WeSpeaker's), the client's embeddings are
    near the encoder's but not equal: :func:`agreement` with
    :func:`client_front_end` says how near.
    """
    front_end = encoder.modules["compute_features"]
    reference = client_front_end(encoder)
    same = isinstance(front_end, KaldiFbank) and all(
        getattr(front_end, name) == getattr(reference, name)
        for name in ("n_mels", "window", "hop", "preemphasis")
    )
    if not same or front_end.scale not in (1.0, 32768.0):
        raise EncoderError(
            "sherpa-onnx computes Kaldi's filterbank with its own settings, "
            f"this encoder was trained on {type(front_end).__name__}, or with "
            "other settings. Train one with --frontend kaldi."
        )
    metadata = {
        "framework": "wespeaker",  # what its extractor calls this interface
        # for people, but the client refuses a file without
        "language": encoder.facts.get("language") or "not stated",
        "comment": f"{OURS} {encoder.fingerprint}",
        "sample_rate": encoder.sample_rate,
        "output_dim": encoder.embedding_dim,
        # 0 multiplies the client's samples in [-1, 1] by 32768 first
        "normalize_samples": int(front_end.scale == 1.0),
        # what the encoder was trained on, which the client does not ask for
        "front_end": json.dumps(settings(front_end)),
        "facts": json.dumps(encoder.facts),
    }
    chain = _Chain(
        encoder.modules["mean_var_norm"], encoder.modules["embedding_model"]
    )
    shape = (2, 200, front_end.n_mels)
    return _export(chain, shape, ("features", "frames"), metadata, path)


def client_front_end(encoder: LoadedEncoder) -> KaldiFbank:
    """The filterbank that sherpa-onnx computes for an encoder."""
    scale = getattr(encoder.modules["compute_features"], "scale", 32768.0)
    return KaldiFbank(sample_rate=encoder.sample_rate, scale=scale)


def quantise(
    source: str | os.PathLike,
    path: str | os.PathLike,
    examples: Iterable[np.ndarray],
) -> Path:
    """Write an int8 variant of an exported file: faster, and smaller.

    The convolutions are quantised (weights by channel, activations by ranges
    seen on examples); front-end, normalisation and pooling stay float32. The
    examples are :func:`graph_inputs`; a hundred utterances of real speech are
    plenty.
    """
    name = _session(source).get_inputs()[0].name
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    feeds = ({name: np.asarray(e, np.float32)} for e in examples)

    class Examples(CalibrationDataReader):
        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(feeds, None)

    with atomic_path(path) as temporary, _without_advice():
        quantize_static(
            str(source),
            str(temporary),
            Examples(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return Path(path)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without onnxruntime's advice to prepare the file, which is for programs.

    It is logged by the root logger.
    """
    root = logging.getLogger()

    def heeded(record: logging.LogRecord) -> bool:
        return "Please consider" not in str(record.msg)

    root.addFilter(heeded)
    try:
        yield
    finally:
        root.removeFilter(heeded)


#: Exporters by the client that the file is for.
EXPORTS = {"server": export_waveform, "sherpa-onnx": export_sherpa}


def graph_inputs(
    encoder: LoadedEncoder,
    path: str | os.PathLike,
    waveforms: Iterable[np.ndarray],
    front_end: torch.nn.Module | None = None,
) -> Iterator[np.ndarray]:
    """What an exported graph is fed for waveforms [samples], one a batch.

    [1, samples], or [1, frames, bands] where the client computes the features,
    by the encoder's `front_end` if no other one is given.
    """
    front_end = front_end or encoder.modules["compute_features"]
    takes_features = _session(path).get_inputs()[0].name == "features"
    for waveform in waveforms:
        batch = torch.as_tensor(waveform, dtype=torch.float32).unsqueeze(0)
        if takes_features:
            batch = front_end(batch.to(encoder.device)).cpu()
        yield batch.numpy()


def agreement(
    encoder: LoadedEncoder,
    path: str | os.PathLike,
    waveforms: Iterable[np.ndarray],
    front_end: torch.nn.Module | None = None,
) -> tuple[float, float]:
    """Run an exported graph in onnxruntime and compare it with PyTorch.

    Returns the largest difference of any embedding's component, relative to
    the largest component of that embedding where that is above 1; and the
    least cosine of two embeddings of one recording.
    """
    waveforms = list(waveforms)
    session = _session(path)
    name = session.get_inputs()[0].name
    worst, cosine = 0.0, 1.0
    for waveform, fed in zip(
        waveforms,
        graph_inputs(encoder, path, waveforms, front_end),
        strict=True,
    ):
        (theirs,) = session.run(None, {name: fed})
        batch = torch.as_tensor(waveform, dtype=torch.float32).unsqueeze(0)
        ours = encoder.encode(batch, torch.ones(1)).cpu().numpy()
        error = np.abs(ours - theirs).max() / max(1, np.abs(ours).max())
        worst = max(worst, float(error))
        lengths = np.linalg.norm(ours) * np.linalg.norm(theirs)
        cosine = min(cosine, float((ours * theirs).sum() / lengths))
    return worst, cosine


def signature(path: str | os.PathLike) -> str:
    """What an exported graph takes and gives, and which runtime says so."""
    session = _session(path)
    taken, given = session.get_inputs(), session.get_outputs()
    _, onnxruntime = _import_onnx()
    return (
        f"{described(taken)} -> {described(given)} in onnxruntime "
        f"{onnxruntime.__version__}"
    )


def _session(path: str | os.PathLike):
    _, onnxruntime = _import_onnx()
    return onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )


def _export(
    chain: torch.nn.Module,
    shape: tuple[int, ...],
    names: tuple[str, str],
    metadata: Mapping[str, object],
    path: str | os.PathLike,
) -> Path:
    """Trace a chain on the CPU and write it with its metadata."""
    onnx, _ = _import_onnx()
    # The exporter logs which packages are missing, though none is needed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    device = next(chain.parameters()).device
    name, axis = names
    batch = torch.export.Dim("batch", min=1)
    # A tenth of a second at least, in either unit.
    length = torch.export.Dim(axis, min=shape[1] // 10)
    try:
        program = torch.onnx.export(
            chain.cpu().eval(),
            (torch.randn(shape),),
            input_names=[name],
            output_names=["embedding"],
            dynamic_shapes=({0: batch, 1: length},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    finally:
        chain.to(device)
    model = program.model_proto
    model.ir_version = min(model.ir_version, 9)  # older runtimes stop there
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=str(value))
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    return Path(path)


def _import_onnx():
    with needs_extra("Export to ONNX", "onnx"):
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  used by the exporter
    return onnx, onnxruntime
