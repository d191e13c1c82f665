"""The options of verification, on the command line and in a YAML."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import ruamel.yaml
from ruamel.yaml.constructor import ConstructorError

from speechbrain_ram.data.plain import read_yaml
from speechbrain_ram.utils import needs_extra, printable
from speechbrain_ram.verification.metrics import P_TARGETS
from speechbrain_ram.verification.report import file_name
from speechbrain_ram.verification.scores import METHODS
from speechbrain_ram.verification.trials import FORMS

REPLICATES = 1000  # of the bootstrap
QUALITIES = ("duration", "magnitude", "cohort_mean")

_DESCRIPTION = """Score trial lists with an encoder, and write a report on each.

    speechbrain-ram verify --encoder FOLDER --trials LIST [LIST ...] \\
        --data_root DIR --output DIR
    speechbrain-ram verify verify.yaml --device cuda:0
    speechbrain-ram verify --scores a=one/scores.txt b=two/scores.txt \\
        --output DIR
    torchrun --nproc_per_node=2 --no-python speechbrain-ram verify verify.yaml

Every option may also stand in a YAML under its name; the command line wins.
Each recording is embedded once, whatever lists it is in, and kept in
OUTPUT/embeddings.safetensors for the next run. OUTPUT/results.md sums up, and
OUTPUT/LIST/ has each list's scores and report.
"""


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"True or False is needed, got {text}")
    return text == "True"


#: A switch, typed alone or as in a training: ``--mixdown True``.
_SWITCH: dict[str, Any] = {
    "nargs": "?",
    "type": _truth,
    "const": True,
    "default": False,
    "metavar": "True",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def print_usage(self, file: Any = None) -> None:
        """Nothing: `error` asks for it."""

    def error(self, message: str) -> NoReturn:
        """As argparse; a YAML's text stands in some messages."""
        super().error(printable(message))


def parse(
    argv: Sequence[str], program: str | None = None
) -> argparse.Namespace:
    """Command line over YAML over defaults."""
    parser = _Parser(
        prog=program,
        description=_DESCRIPTION,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("hparams", nargs="?", help="YAML with any of the options below")
    add("--encoder", help="exported folder, run, checkpoint, or .onnx file")
    text = "features of an .onnx file: wespeaker, 3d-speaker or sherpa-onnx\n"
    add("--frontend", help=text + "(default: what it states)")
    text = "of an .onnx file, in Hz (default: what it states, or 16000)"
    add("--sample_rate", type=count, help=text)
    text = "take any folder of SpeechBrain's EncoderClassifier; executes YAML"
    add("--trust_yaml", **_SWITCH, help=text)
    add("--trials", nargs="+", default=[], metavar="LIST")
    add("--data_root", help="folder that the names in the lists start from")
    add("--output", help="folder for scores, reports and embeddings")
    add("--name", help="what the system is called (default: its folder)")
    add("--form", default="voxceleb", choices=list(FORMS))
    add("--models", help="enrolment list (default: LIST.models if there)")
    add("--kaldi", help="Kaldi directory whose utterances the lists name")
    add("--strip_prefix", default="", help="taken off names in the lists")
    add("--suffix", help="ending that all names shall have, such as .flac")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    text = "frames of 10 ms in a batch (default: 6000 on a GPU, else 200)"
    add("--max_frames", type=count, help=text)
    add("--resample", **_SWITCH, help="allow other sample rates")
    add("--mixdown", **_SWITCH, help="allow several channels")
    add("--store", help="embeddings file (default: in OUTPUT)")
    add("--cohort", help="manifest of training speakers")
    add("--cohort_root", help="its corpus folder (default: DATA_ROOT)")
    add("--cohort_per_speaker", type=count, help="recordings (default: all)")
    add("--center", **_SWITCH, help="subtract the cohort's mean")
    text = "and make speakers vary alike in all directions (WCCN)"
    add("--whiten", **_SWITCH, help=text)
    add("--normalise", choices=METHODS, help="score normalisation")
    add("--top_n", type=count, default=300, help="of adaptive normalisation")
    add("--calibrate_on", metavar="LIST", help="fit calibration on a list")
    add("--qualities", nargs="*", default=[], choices=QUALITIES)
    add("--calibration_prior", type=prior, default=0.01)
    add("--p_targets", nargs="+", type=prior, default=list(P_TARGETS))
    text = f"replicates for intervals (default: {REPLICATES}), 0 for none"
    add("--bootstrap", type=count_or_none, metavar="N", help=text)
    add("--seed", type=int, default=0, help="of the bootstrap")
    text = "regular expression (default: LIST.spk2utt, or the first folder)"
    add("--speaker_pattern", help=text)
    add("--speakers", help="table of speakers, by which trials are grouped")
    add("--group_by", nargs="*", default=["gender"], metavar="COLUMN")
    add("--scores", nargs="*", default=[], metavar="NAME=FILE")
    options = parser.parse_args(argv)
    if options.hparams:
        given = parser.parse_args(in_yaml(parser, options.hparams))
        options = parser.parse_args(argv, given)
    check_options(parser, options)
    return options


class _Reference(str):
    """What stands behind !ref, such as <data_root>/lists."""


class _Options(ruamel.yaml.SafeConstructor):
    """Plain values, and references to them; every other tag is refused."""

    def reference(self, node: ruamel.yaml.Node) -> _Reference:
        return _Reference(self.construct_scalar(node))

    def refuse(self, node: ruamel.yaml.Node) -> None:
        raise ConstructorError(
            problem=f"the tag {node.tag}: options are plain values, nothing "
            "is built from them",
            problem_mark=node.start_mark,
        )


_Options.add_constructor("!ref", _Options.reference)
_Options.add_constructor(None, _Options.refuse)


def in_yaml(parser, path: str) -> list[str]:
    """The options in a YAML as a command line, so that both are checked."""
    reader = ruamel.yaml.YAML(typ="safe", pure=True)
    reader.Constructor = _Options
    try:
        values = read_yaml(path, reader)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"'{path}' cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"'{path}' cannot be read: it has no OPTION: VALUE.")
    if "trust_yaml" in values:
        parser.error(
            f"'{path}' has trust_yaml, which a file cannot give: it may be "
            "somebody else's. Type --trust_yaml."
        )
    known = set(vars(parser.parse_args([]))) - {"hparams"}
    unknown = set(values) - known
    if unknown:
        parser.error(f"'{path}' has unknown keys: {sorted(map(str, unknown))}")

    def text(name: str, value: Any) -> str:
        if isinstance(value, (dict, list)):
            parser.error(
                f"'{path}': {name} is {str(value)[:80]}; a value or a list of "
                "values is needed."
            )
        if not isinstance(value, _Reference):
            return str(value)
        for key in re.findall("<(.*?)>", value):
            if not isinstance(values.get(key), (str, int, float)):
                parser.error(f"'{path}': {name} refers to <{key}>, no value.")
            if isinstance(values[key], _Reference):
                parser.error(f"'{path}': {name} refers to a reference, {key}.")
        return re.sub("<(.*?)>", lambda key: str(values[key[1]]), value)

    arguments = []
    for name, value in values.items():
        if isinstance(value, list):
            value = _items(parser, path, name, value)
        if value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, list):
            listed = [text(name, each) for each in value]
            for item, each in zip(listed, value, strict=True):
                if item.startswith("-") and isinstance(each, str):
                    _refuse_option(parser, path, name, item)
            arguments += [f"--{name}", *listed]
        elif value is not None and value is not False:
            arguments.append(f"--{name}={text(name, value)}")
            if arguments[-1] == f"--{name}=--":
                _refuse_option(parser, path, name, "--")
    return arguments


def _items(parser, path: str, name: str, value: list) -> Any:
    """The list of an option that takes several values, else its one value."""
    if isinstance(parser.get_default(name), list):
        return value
    if len(value) != 1 or isinstance(value[0], list):
        parser.error(f"'{path}': {name} is {value!s:.80}; it takes one value.")
    return value[0]


def _refuse_option(parser, path: str, name: str, item: str) -> NoReturn:
    """What a YAML says is never taken for an option, such as --trust_yaml."""
    parser.error(
        f"'{path}': {name} has '{item:.80}', which would be taken for an "
        "option. Options are keys of their own; write a path as './-...'."
    )


def count(text: str, least: int = 1) -> int:
    """1 or more."""
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"{least} or more is needed, got {text}"
        )
    return int(text)


def count_or_none(text: str) -> int:
    """0 or more."""
    return count(text, 0)


def prior(text: str) -> float:
    """A probability between 0 and 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(
            f"a prior lies strictly between 0 and 1, got {text}"
        )
    return number


def check_options(parser, options: argparse.Namespace) -> None:
    """Say at once which options do not go together."""
    if not options.output:
        parser.error("--output is needed")
    try:
        with needs_extra("A report", "report"):
            import matplotlib  # noqa: F401
    except ImportError as error:
        parser.error(str(error))
    names = [argument.partition("=")[0] for argument in options.scores]
    if not options.encoder:
        if not options.scores or options.trials:
            parser.error("--encoder is needed, or --scores without --trials")
        check_names(parser, names)
        return
    if not options.trials or not options.data_root:
        parser.error("--trials and --data_root are needed with --encoder")
    if options.scores and len(options.trials) > 1:
        parser.error("--scores can be compared on one list of trials only")
    needs_cohort = options.normalise or "cohort_mean" in options.qualities
    centred = options.center or options.whiten
    if (needs_cohort or centred) and not options.cohort:
        parser.error(
            "--normalise, --center, --whiten and cohort_mean need --cohort"
        )
    if options.qualities and not options.calibrate_on:
        parser.error("--qualities need --calibrate_on")
    if not options.name:
        folder = Path(options.encoder).resolve()
        generic = folder.name in ("inference", "save")
        options.name = folder.parent.name if generic else folder.name
    names.append(options.name)
    if options.normalise:
        names.append("cosine")
    check_names(parser, names)


def check_names(parser, names: list[str]) -> None:
    """Systems are told apart by their names, also in file names."""
    files = Counter(map(file_name, names))
    twice = [name for name in names if files[file_name(name)] > 1]
    if twice:
        parser.error(
            f"two systems need two names, got '{twice[0]}' and '{twice[1]}'; "
            "--name and --scores NAME=FILE name them"
        )
