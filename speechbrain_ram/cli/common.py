"""What the commands share: options, JSON or text, exit codes."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import click

from speechbrain_ram.utils import (
    ERROR,
    is_user_error,
    json_text,
    number,
    one_line,
    printable,
)

# PyTorch is imported where it is needed: --help must not wait for it.

INTERRUPTED = 130  # as shells have it

FRONTEND = (
    "Features of an .onnx file: wespeaker, 3d-speaker, sherpa-onnx.  "
    "[default: what it states]"
)
SAMPLE_RATE = "Of an .onnx file.  [default: what it states, or 16000]"


def command(function: Callable) -> Callable:
    """Add --json; print what a command returns; turn errors into exit 2.

    The command returns (facts, text) or (facts, text, exit code).
    """

    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    @wraps(function)
    def run(as_json: bool, **options: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                facts, text, *code = function(**options)
        except click.ClickException:
            raise
        except Exception as error:
            mendable = is_user_error(error)
            message = one_line(error) if mendable else repr(error)
            if as_json:
                _print_json({"error": message})
            if mendable:
                click.echo(f"Error: {message}", err=True)
            else:
                traceback.print_exc()
            # Python would exit with 1, which says "another speaker".
            sys.exit(ERROR)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        if as_json:
            _print_json(facts)
        else:
            click.echo(printable(text))
        sys.exit(*code)

    return run


class JsonGroup(click.Group):
    """Commands whose wrong use is an object on stdout too, with --json."""

    def invoke(self, ctx: click.Context) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            if as_json:
                _print_json({"error": error.format_message()})
            raise


def _print_json(value: Any) -> None:
    """A threshold that nothing reaches is null."""
    click.echo(json_text(value))


class Chosen(NamedTuple):
    """An encoder, as the options name it."""

    path: str
    frontend: str | None = None
    sample_rate: int | None = None

    @property
    def is_onnx(self) -> bool:
        """Whether it is an ONNX file; all others are folders."""
        is_folder = os.path.isdir(self.path)
        return self.path.lower().endswith(".onnx") and not is_folder


def encoder_option(function: Callable) -> Callable:
    """Add --encoder and what an ONNX file may not say; gives `chosen`."""

    @click.option(
        "-e",
        "--encoder",
        required=True,
        metavar="FOLDER|FILE",
        envvar="SPEECHBRAIN_RAM_ENCODER",
        show_envvar=True,
        help="Exported folder, a run's output folder, or an .onnx file.",
    )
    @click.option("--frontend", metavar="NAME", help=FRONTEND)
    @click.option("--sample-rate", type=int, metavar="HZ", help=SAMPLE_RATE)
    @wraps(function)
    def run(
        encoder: str, frontend: str | None, sample_rate: int | None, **options
    ) -> Any:
        chosen = Chosen(encoder, frontend, sample_rate)
        return function(chosen=chosen, **options)

    return run


data_root_option = click.option(
    "--data-root",
    default=".",
    show_default=True,
    metavar="FOLDER",
    help="What $data_root stands for in a manifest.",
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Such as cuda:0."
)
database_option = click.option(
    "-d",
    "--database",
    required=True,
    metavar="FILE",
    envvar="SPEECHBRAIN_RAM_DATABASE",
    show_envvar=True,
    help="File of enrolled speakers; the first enrolment creates it.",
)
threshold_option = click.option(
    "--threshold",
    metavar="NUMBER|NAME",
    help="Least score of one speaker: a number, EER or FAR=1%.  [default: EER]",
)


def load_encoder(chosen: Chosen, device: str = "cpu", **settings: Any):
    """A SpeakerEncoder or an OnnxEncoder, by what is there."""
    from speechbrain_ram.inference import OnnxEncoder, SpeakerEncoder

    if not chosen.is_onnx:
        if chosen.frontend or chosen.sample_rate:
            raise ValueError(
                "--frontend and the sample rate are for files that end with "
                f".onnx; '{chosen.path}' states its own. Leave them out."
            )
        return SpeakerEncoder.from_folder(chosen.path, device, **settings)
    if device != "cpu":
        raise ValueError(
            f"--device is '{device}', but '{chosen.path}' is an ONNX file, "
            "which onnxruntime computes on the CPU here. Leave it out."
        )
    settings.pop("batch_seconds", None)  # each recording is embedded alone
    return OnnxEncoder(*chosen, **settings)


def open_database(path: str, encoder, new: bool = False):
    """The database; one that is not there is an error unless it may be new."""
    from speechbrain_ram.verification.enrolment import EnrolmentDatabase

    if not new and not os.path.lexists(path):
        raise ValueError(
            f"'{path}' does not exist, so nobody is enrolled in it. Is it the "
            "right database?"
        )
    return EnrolmentDatabase(path, encoder.fingerprint, encoder.embedding_dim)


def check_output(path: str, *endings: str) -> None:
    """Say before hours of work that the result cannot be written."""
    if endings and not path.lower().endswith(endings):
        raise ValueError(f"'{path}' does not end with {' or '.join(endings)}.")
    parent = Path(path).parent
    if not parent.is_dir():
        raise ValueError(
            f"'{parent}' is not a folder, so '{Path(path).name}' cannot be "
            "written into it."
        )
    if not os.access(parent, os.W_OK):
        raise ValueError(f"The folder '{parent}' is read-only.")


def number_or_name(threshold: str | None) -> float | str | None:
    """A finite number, or else a threshold's name, or none."""
    try:
        return None if threshold is None else number(threshold)
    except ValueError:
        return threshold


def recordings(inputs: Iterable[str], data_root: str) -> dict[str, Any]:
    """Files, folders and manifests as recordings by unique names."""
    found: dict[str, Any] = {}
    given_by: dict[str, str] = {}
    for item in inputs:
        for name, recording in _recordings_of(item, data_root):
            if found.setdefault(name, recording) != recording:
                raise ValueError(
                    f"'{given_by[name]}' and '{item}' have '{name:.200}', each "
                    "for another recording, but names must be unique. Are they "
                    "of two corpora? Give one at a time."
                )
            given_by.setdefault(name, item)
    return found


def _recordings_of(item: str, data_root: str) -> Iterator[tuple[str, Any]]:
    """The names and recordings of one file, folder or manifest."""
    from speechbrain_ram.data.manifest import find_recordings, read_manifest
    from speechbrain_ram.inference import Segment

    if os.path.isdir(item):
        for name in find_recordings(item):
            yield os.path.join(item, name), Path(item) / name
    elif item.endswith(".csv"):
        for row in read_manifest(item):
            yield row.id, Segment(row.path(data_root), row.start, row.stop)
    else:
        yield item, Path(item)


def _show_warning(message, category, *_) -> None:
    """Ours only: those of PyTorch are not for people at a command line."""
    from speechbrain_ram.data.recordings import RecordingWarning

    if issubclass(category, RecordingWarning):
        click.echo(f"Warning: {printable(str(message))}", err=True)
