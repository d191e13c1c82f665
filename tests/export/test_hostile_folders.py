"""Folders of others: whatever they say, an error in words, soon, in bounds."""

import io
import json
import math
import os
import resource
import shutil
import struct
import time
import zipfile

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from small_encoder import export_small

from speechbrain_ram.cli.main import main
from speechbrain_ram.export.architecture import fingerprint
from speechbrain_ram.export.card import printable
from speechbrain_ram.export.limits import LIMITS, EncoderError
from speechbrain_ram.inference import SpeakerEncoder

HUGE = 10**400
FBANK = "speechbrain.lobes.features.Fbank"
KALDI = "speechbrain_ram.features.KaldiFbank"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return export_small(tmp_path_factory.mktemp("good") / "encoder")


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "encoder")


@pytest.fixture
def bounded():
    """No test takes long, or much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 500_000  # KB
    assert time.process_time() - begin < 20


def rewrite(folder, change):
    """Edit encoder.json; the fingerprint is that of what it says then."""
    file = folder / "encoder.json"
    description = json.loads(file.read_text())
    change(description)
    weights = safetensors.torch.load_file(folder / "encoder.safetensors")
    if isinstance(description.get("architecture"), dict):
        architecture = description["architecture"]
        description["fingerprint"] = fingerprint(architecture, weights)
    file.write_text(json.dumps(description))


def refused(folder, match):
    with pytest.raises(EncoderError, match=match) as caught:
        SpeakerEncoder.from_folder(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert message.isprintable() and len(message) < 1500
    return message


WRONG = [True, None, "80", [80], {"a": 1}, 80.0, math.nan, HUGE, -1, 0]


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(("compute_features", "n_mels", v) for v in [*WRONG, 10**6, 257]),
        *(("compute_features", "sample_rate", v) for v in [*WRONG, 50, 10**9]),
        *(
            ("compute_features", "name", v)
            for v in [None, 1, "mfcc", ["kaldi"]]
        ),
        *(("mean_var_norm", "norm_type", v) for v in ["global", "batch", 1]),
        *(("mean_var_norm", "std_norm", v) for v in [1, 0, "True", None]),
        *(("mean_var_norm", "epsilon", v) for v in ["1", 0, math.nan, HUGE]),
        ("mean_var_norm", "length_dim", 2),
        ("mean_var_norm", "device", "cuda:7"),
        *(("embedding_model", "n_mels", v) for v in WRONG),
        *(("embedding_model", "embedding_dim", v) for v in [*WRONG, 10**12]),
        *(
            ("embedding_model", "channels", v)
            for v in [4, None, [], [4] * 3, [4] * 5, [4, 4, 4, True], [1e9] * 4]
        ),
        *(("embedding_model", "depth", v) for v in [*WRONG, 50, 10**6]),
        *(("embedding_model", "deviation", v) for v in [True, None, "biased"]),
        *(("embedding_model", "norm_embedding", v) for v in [None, 1, "True"]),
        ("embedding_model", "channels", [[4], 4, 4, 4]),
        ("embedding_model", "channels", [HUGE, 4, 4, 4]),
    ],
)
def test_arguments_out_of_range(copy, part, key, value, bounded):
    def change(description):
        description["architecture"][part]["arguments"][key] = value

    rewrite(copy, change)
    finite = not (isinstance(value, float) and math.isnan(value))
    refused(copy, f"{part}.{key} is .* allowed is" if finite else "not valid")


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        *((FBANK, "n_fft", v) for v in [10**9, 0, 399, "512"]),
        *((FBANK, "win_length", v) for v in [10**7, 0, 300, "25"]),
        *((FBANK, "hop_length", v) for v in [0, 1e-9, 10**9, -10]),
        *((FBANK, "f_max", v) for v in [8001, 0, -1, "8000"]),
        *((FBANK, "f_min", v) for v in [8000, -1, HUGE]),
        *((FBANK, key, True) for key in ("deltas", "context", "requires_grad")),
        (FBANK, "filter_shape", "square"),
        (FBANK, "left_frames", 10**9),
        *((KALDI, "win_length", v) for v in [10**7, 0, True]),
        *((KALDI, "hop_length", v) for v in [0, 1e-9, 10**9]),
        *((KALDI, "sample_rate", v) for v in [10**8, 8000]),
        *((KALDI, "low_freq", v) for v in [8000, -1, HUGE]),
        *((KALDI, "high_freq", v) for v in [8001, -8000, "0"]),
        (KALDI, "snip_edges", "yes"),
        *((KALDI, "window_type", v) for v in ["hann", None, 7]),
        (KALDI, "scale", 0),
        (KALDI, "preemphasis", 2),
        (KALDI, "bands", 80),
        (FBANK, "\x1b[2J", 80),
    ],
)
def test_arguments_of_other_front_ends(copy, path, key, value, bounded):
    def change(description):
        arguments = {"n_mels": 80, key: value}
        if path == FBANK:
            arguments.setdefault("n_fft", 512)
        call = {"class": path, "arguments": arguments}
        description["architecture"]["compute_features"] = call

    rewrite(copy, change)
    refused(copy, "allowed is|does not take|are not inside|sample_rate of")


def test_what_may_be_said_is_built(copy):
    def change(description):
        arguments = {"n_mels": 80, "f_max": 7600, "win_length": 20}
        call = {"class": FBANK, "arguments": arguments}
        description["architecture"]["compute_features"] = call

    rewrite(copy, change)
    encoder = SpeakerEncoder.from_folder(copy)
    assert encoder.modules["compute_features"].compute_STFT.n_fft == 400


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sample_rate": 8000}, "sample_rate of one part is 16000, .* 8000"),
        ({"sample_rate": 1e4}, "sample_rate is 10000.0, allowed is a whole"),
        ({"embedding_dim": 17}, "embedding_dim of one part is 16, .* 17"),
        ({"embedding_dim": None}, "embedding_dim is None"),
        ({"compute_features": {}}, "does not describe 'compute_features'"),
        ({"mean_var_norm": None}, "does not describe 'mean_var_norm'"),
        (
            {"embedding_model": {"class": KALDI, "arguments": {}}},
            "'embedding_model' is a .*KaldiFbank', which is not loaded",
        ),
        (
            {"embedding_model": {"class": ["a"], "arguments": {}}},
            "'embedding_model' is a .'a'., which is not loaded",
        ),
    ],
)
def test_parts_that_do_not_fit(copy, changes, match):
    rewrite(copy, lambda d: d["architecture"].update(changes))
    refused(copy, match)


def test_bands_of_front_end_and_network(copy):
    def change(description):
        parts = description["architecture"]
        parts["compute_features"]["arguments"]["n_mels"] = 40

    rewrite(copy, change)
    refused(copy, "n_mels of one part is 40, allowed is 80")


def test_more_parameters_than_any_encoder_has(copy, bounded):
    def change(description):
        network = description["architecture"]["embedding_model"]
        network["arguments"]["channels"] = [1024] * 4

    rewrite(copy, change)
    refused(copy, "parameters, at most 268435456 are loaded")


def test_every_argument_has_a_range():
    """A new argument of the host is not allowed until somebody looks."""
    import importlib
    import inspect

    for calls in LIMITS.values():
        for path, rules in calls.items():
            module, _, name = path.rpartition(".")
            make = getattr(importlib.import_module(module), name)
            assert set(rules) == set(inspect.signature(make).parameters), path


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"format": ' + "[" * 900 + "]" * 900 + "}",
        '{"format": 1, "architecture": ' + "[" * 990 + "]" * 990 + "}",
        '{"format": 1, "architecture": {"a": ' + "[" * 980 + "]" * 980 + "}}",
        '{"format": ' + "9" * 5000 + "}",
        '{"format": 1e999}',
        '{"format": NaN}',
        '{"format": "\\u001b[2J"}',
        '{"format": 1, "architecture": {}}',
        '{"format": 1}',
        "7",
        '{"format": 1, "architecture": {"\\ud800": 1}}',
        '"' + "a" * 2_000_000 + '"',
        "\0",
    ],
)
def test_descriptions_that_are_none(copy, text, bounded):
    (copy / "encoder.json").write_text(text)
    refused(copy, "encoder.json'")


@pytest.mark.parametrize("name", ["encoder.json", "encoder.safetensors"])
def test_what_is_no_regular_file(copy, name):
    file = copy / name
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
    ):
        file.unlink(missing_ok=True)
        make(file)
        refused(copy, "regular file|Is a directory")
        file.rmdir() if file.is_dir() else file.unlink()
    file.symlink_to("nowhere")
    refused(copy, "cannot be read")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10**8) + b"{" * 1000,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 10) + b"[" * 10,
        struct.pack("<Q", 67)
        + b'{"w":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}   '
        + b"\0" * 4,
        struct.pack("<Q", 64)
        + b'{"w":{"dtype":"X99","shape":[1],"data_offsets":[0,4]}}          '
        + b"\0" * 4,
    ],
)
def test_safetensors_that_are_none(copy, content, bounded):
    (copy / "encoder.safetensors").write_bytes(content)
    refused(copy, "cannot be read|do not belong together")


def damaged(key, change):
    def edit(weights):
        weights[key] = change(weights[key])

    return edit


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda w: w.pop("norm.bias"),
            "'norm.bias' it has .*they have nothing",
        ),
        (lambda w: w.update(x=torch.ones(1)), "for 'x' it has nothing"),
        (damaged("norm.bias", torch.Tensor.double), "they have float64 of"),
        (damaged("norm.bias", torch.Tensor.half), "they have float16 of shape"),
        (damaged("norm.bias", lambda t: t[:2].clone()), r"of shape \[2\]"),
        (damaged("norm.bias", lambda t: t * math.nan), "'norm.bias' hold NaN"),
        (
            damaged("linear.bias", lambda t: t + math.inf),
            "hold NaN or infinite",
        ),
        (damaged("norm.running_var", lambda t: t - 9), "embedding of noise is"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_weights_that_do_not_fit(copy, change, match, kind):
    weights = safetensors.torch.load_file(copy / "encoder.safetensors")
    change(weights)
    if kind == "ckpt":
        torch.save(weights, copy / "embedding_model.ckpt")
        (copy / "encoder.json").unlink()
    else:
        safetensors.torch.save_file(weights, copy / "encoder.safetensors")
        rewrite(copy, lambda description: None)
    refused(copy, match)


def zipped(**how):
    """A checkpoint's archive, packed in another way."""

    def edit(content):
        file = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(content)) as source,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target,
        ):
            for entry in source.infolist():
                target.writestr(entry.filename, source.read(entry))
        return file.getvalue()

    return edit


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-10] + b"\xff" * 10,
        lambda content: b"\x80\x02" + b"]" * 10**6,
        zipped(),
    ],
)
def test_checkpoints_that_are_none(copy, change, bounded):
    file = copy / "embedding_model.ckpt"
    (copy / "encoder.json").unlink()
    file.write_bytes(change(file.read_bytes()))
    refused(copy, "does not hold plain weights")


@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        7,
        {"a": 1},
        {1: torch.ones(1)},
        {"a": torch.ones(1, device="meta")},
        {"a": torch.ones(1).to_sparse()},
    ],
)
def test_checkpoints_of_something_else(copy, state):
    (copy / "encoder.json").unlink()
    torch.save(state, copy / "embedding_model.ckpt")
    refused(copy, "does not hold plain weights")


def test_a_tensor_that_repeats_one_number(copy, bounded):
    """It says 10^12 numbers and stores one."""
    (copy / "encoder.json").unlink()
    state = torch.load(copy / "embedding_model.ckpt")
    state["linear.bias"] = torch.ones(1).expand(10**12)
    torch.save(state, copy / "embedding_model.ckpt")
    refused(copy, r"they have float32 of shape \[1000000000000\]")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("n_target", v) for v in [0, -1, True, "4", None, 1.5, HUGE, [4]]),
        ("n_nontarget", 0),
        *(("eer", v) for v in ["3", None, True, [3], HUGE]),
        *(("thresholds", v) for v in [None, [0.5], {"EER": "0.5"}, 7]),
        *(("thresholds", {"EER": v}) for v in [None, True, 1e999, [1], HUGE]),
        *(("targets", v) for v in [None, [0] * 99, ["0"] * 100, [-1] * 100, 5]),
        ("nontargets", [HUGE] * 100),
        ("nontargets", [[0]] * 100),
        *(("trials", v) for v in [None, 7, ["a"]]),
        *(("calibration", v) for v in [7, [], {}, {"features": ["score"]}]),
        ("another", 1),
    ],
)
def test_decisions_that_are_none(copy, key, value, bounded):
    rewrite(copy, lambda d: d["decision"].update({key: value}))
    refused(copy, "not thresholds|not valid")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", ["1"]),
        ("weights", [1, 2]),
        ("weights", [[1]]),
        ("bias", None),
        ("bias", True),
        ("features", ["score", "seconds"]),
        ("p_target", 2),
    ],
)
def test_calibrations_that_are_none(copy, key, value):
    rewrite(copy, lambda d: d["decision"]["calibration"].update({key: value}))
    refused(copy, "not thresholds|needs more than a score")


@pytest.mark.parametrize(
    "facts",
    [7, ["a"], "a", {"fingerprint": "a"}, {"corpus": {"a": 1}}, {"\x1b": 1}]
    + [{"note": "a" * 20_000}, {"speakers": 1e999}, {"note": [["a"]]}],
)
def test_facts_that_are_none(copy, facts):
    rewrite(copy, lambda d: d.update(facts=facts))
    refused(copy, "allowed is|not valid")


def test_a_terminal_finds_nothing_to_obey(copy):
    evil = "a\x1b[2J\r\nb\u202e\x9b"
    facts = {"corpus": evil, "language": ["de", evil], "speakers": 3}

    def change(description):
        description["facts"] = facts
        description["decision"]["trials"] = evil
        description["decision"]["thresholds"][evil] = 0.5

    rewrite(copy, change)
    encoder = SpeakerEncoder.from_folder(copy)
    assert encoder.facts["corpus"] == r"a\x1b[2J b\u202e\x9b"
    assert encoder.facts["language"] == r"de, a\x1b[2J b\u202e\x9b"
    assert encoder.facts["speakers"] == 3
    done = CliRunner().invoke(main, ["info", "-e", str(copy)])
    assert done.exit_code == 0
    assert done.output.replace("\n", "").isprintable()
    assert printable("Zo\u00eb \u4e2d, 30 %") == "Zo\u00eb \u4e2d, 30 %"


def yaml_of(copy, text):
    (copy / "encoder.json").unlink()
    (copy / "hyperparams.yaml").write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "b" * 30_000_000,
        "- 1\n" * 300_000,
        "[" * 250_000,
        "- " * 100_000,
        "a: &a [1, 1]\n" + "b: [*a" + ", *a" * 9_000 + "]",
        "a: &a [*a]",
        "\0",
        "!!python/object/apply:os.abort []",
        "? [a, b]\n: c",
        "a: !%1b[2J b",
    ],
)
def test_yaml_that_would_take_long(copy, text, bounded):
    yaml_of(copy, text)
    refused(copy, "hyperparams.yaml")


@pytest.mark.parametrize(
    "value",
    ["0x" + "f" * 20_000, "9" * 5000, "2026-01-01", "!!binary aGk=", ".nan"]
    + ["&a true", "{0x" + "f" * 20_000 + ": 1}", "!%1b%5b2J [1]", '"\\e[2J"'],
)
def test_values_that_yaml_knows_and_an_encoder_does_not(copy, value):
    text = (copy / "hyperparams.yaml").read_text()
    yaml_of(copy, text.replace("n_mels: 80", f"n_mels: {value}"))
    refused(copy, "plain data|valid YAML|allowed is|where a number|n_mels is")
