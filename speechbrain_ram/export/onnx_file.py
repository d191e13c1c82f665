"""An ONNX file, looked into before onnxruntime sees it, and its session.

onnxruntime computes what a graph says, with its own operators. A file that
would need more than itself (weights in another file, operators from elsewhere)
or might never end is refused. Needs the extra ``onnx``.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from speechbrain_ram.export.card import printable
from speechbrain_ram.export.limits import EncoderError
from speechbrain_ram.export.weights import first_line, open_regular
from speechbrain_ram.utils import needs_extra

# Whose operators onnxruntime brings itself.
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
_ENDLESS = ("Loop", "Scan", "SequenceMap")  # a few bytes that never end


def read_content(path: Path) -> bytes:
    """The bytes of a regular file of bounded size."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            return file.read()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise EncoderError(
            f"'{path}' cannot be read as an ONNX file: {why}."
        ) from error


def looked_into(content: bytes, place: str) -> tuple[dict[str, str], int]:
    """Metadata and number of parameters; refused is what needs more."""
    with needs_extra("An ONNX file", "onnx"):
        import onnx
    try:
        model = onnx.ModelProto.FromString(content)
        if not model.graph.node:
            raise ValueError("it holds no graph")
    except Exception as error:  # protobuf's DecodeError, whose class moves
        raise EncoderError(
            f"{place} is not an ONNX file, or was cut off: "
            f"{first_line(error)}. It has {len(content)} bytes; was it copied "
            "whole?"
        ) from error
    for part in _parts(model):
        kind = part.DESCRIPTOR.name
        if kind == "TensorProto" and (
            part.external_data or part.data_location == part.EXTERNAL
        ):
            where = {entry.key: entry.value for entry in part.external_data}
            raise EncoderError(
                f"{place} keeps weights in another file, "
                f"{reprlib.repr(where.get('location', ''))}, which is not "
                "opened. Write them into one file, with onnx.load and "
                "onnx.save."
            )
        if kind == "FunctionProto":
            raise EncoderError(
                f"{place} defines an operator of its own, "
                f"{reprlib.repr(part.name)}, which is not run. Put its nodes "
                "into the graph, with onnx.inliner.inline_local_functions."
            )
        if kind == "NodeProto" and part.domain not in _DOMAINS:
            raise EncoderError(
                f"{place} needs the operator {reprlib.repr(part.op_type)} of "
                f"{reprlib.repr(part.domain)}, which is not part of "
                "onnxruntime; code for it is not loaded."
            )
        if kind == "NodeProto" and part.op_type in _ENDLESS:
            raise EncoderError(
                f"{place} has the operator {part.op_type}, which may never "
                "end and is not run. Export the model without loops."
            )
    sizes = [
        int(np.prod(tensor.dims, dtype=object))
        for tensor in model.graph.initializer
    ]
    return {each.key: each.value for each in model.metadata_props}, sum(sizes)


def _parts(message: Any) -> Iterator[Any]:
    """A message of protobuf and all that are in it, graphs in graphs too."""
    todo = [message]
    while todo:
        part = todo.pop()
        yield part
        if part.DESCRIPTOR.name == "TensorProto":
            continue  # its numbers would be copied
        for field, value in part.ListFields():
            if field.message_type is not None:
                todo += [value] if hasattr(value, "ListFields") else value


@cache
def _bounded_memory() -> bool:
    """Whether all graphs together have at most half of the memory.

    A small graph can ask for any amount. onnxruntime takes such a limit once
    in a process.
    """
    import onnxruntime as ort

    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    where = ort.OrtMemoryInfo(
        "Cpu",
        ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        ort.OrtMemType.DEFAULT,
    )
    limit = {"max_mem": most, "arena_extend_strategy": -1}
    limit |= {"initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    try:
        ort.create_and_register_allocator(where, ort.OrtArenaCfg(limit))
    except Exception:  # somebody else did so in this process
        return False
    return True


def open_session(content: bytes, place: str) -> tuple[Any, str]:
    """A session of onnxruntime on the CPU, and its version."""
    with needs_extra("An ONNX file", "onnx"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    # Several recordings are computed at once instead.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # one would be kept for every length
    options.log_severity_level = 4  # what is wrong is raised
    if _bounded_memory():
        options.add_session_config_entry("session.use_env_allocators", "1")
    # What was looked into is an ONNX file: no other format hides in it.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its classes have no common one
        raise EncoderError(
            f"{place} is not loaded by onnxruntime {onnxruntime.__version__}: "
            f"{reason(error)}"
        ) from error
    return session, onnxruntime.__version__


def reason(error: BaseException) -> str:
    """What onnxruntime says, without where in its source it says so."""
    text = str(error).rpartition("Status Message: ")[2]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^/\S+:\d+ .*?\) ", "", text)
    return first_line(ValueError(text) if text else error)


def only_input(session: Any, place: str) -> Any:
    """What a speaker model takes; it has one output, too."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    ends = [*inputs, *outputs]
    fits = len(inputs) == len(outputs) == 1 and all(
        end.type == "tensor(float)" for end in ends
    )
    if fits:
        batch, *rest = inputs[0].shape or [0]
        some = len(rest) in (1, 2) and not isinstance(rest[0], int)
        fits = some and (batch == 1 or not isinstance(batch, int))
    if not fits:
        raise EncoderError(
            f"{place} computes {described(inputs)} -> {described(outputs)}. "
            "Needed is one float32 input, waveforms [batch, samples] or "
            "features [batch, frames, bands], of any length, and one output, "
            "[batch, numbers]. Is it a speaker model, exported with dynamic "
            "axes?"
        )
    return inputs[0]


def described(ends: Sequence[Any]) -> str:
    """Inputs or outputs by name and shape, as onnxruntime has them."""
    some = []
    for end in ends[:4]:
        kind = "" if end.type == "tensor(float)" else f" {end.type}"
        shape = ", ".join(map(str, end.shape))
        some.append(f"{end.name} [{shape}]{kind}"[:120])
    some += ["..."] * (len(ends) > 4)
    return printable(", ".join(some))
