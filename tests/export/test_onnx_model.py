"""Speaker models in ONNX files, through the commands that take an encoder."""

import hashlib
import json
import os
import sys
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from small_encoder import voice
from wespeaker_model import (
    DIM,
    add_metadata,
    fbank,
    make_state,
    network,
    reference,
    write_onnx,
)

from speechbrain_ram.cli import verify
from speechbrain_ram.cli.main import main
from speechbrain_ram.data.audio import AudioError
from speechbrain_ram.export import onnx_file
from speechbrain_ram.export.limits import EncoderError
from speechbrain_ram.export.onnx_model import OURS
from speechbrain_ram.inference import OnnxEncoder
from speechbrain_ram.verification import plots
from speechbrain_ram.verification.scores import read_scores
from speechbrain_ram.verification.store import StoreError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, TensorProto = onnx.helper, onnx.TensorProto

#: As sherpa-onnx's scripts write it into WeSpeaker's and 3D-Speaker's files.
WESPEAKER = {
    "framework": "wespeaker",
    "language": "English",
    "sample_rate": 16000,
    "output_dim": DIM,
    "normalize_samples": 0,
}
THREE_D = {
    **WESPEAKER,
    "framework": "3d-speaker",
    "normalize_samples": 1,
    "feature_normalize_type": "global-mean",
}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(5)
    return make_state("ResNet18", width=2)


@pytest.fixture(scope="module")
def plain(state, tmp_path_factory):
    """As WeSpeaker exports it, without metadata."""
    path = tmp_path_factory.mktemp("theirs") / "voxceleb.onnx"
    return write_onnx(path, state, "ResNet18")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Recordings of three voices, some of one length, and a list."""
    root = tmp_path_factory.mktemp("world")
    names = []
    for i, pitch in enumerate((95, 150, 230)):
        for k in range(3):
            name = f"s{i}_{k}.wav"
            wave = voice(0.6 + 0.11 * k, pitch + 4 * k, seed=i + 5 * k)
            soundfile.write(root / name, wave, 16000, subtype="FLOAT")
            names.append(name)
    pairs = [(a, b) for a in names for b in names if a < b]
    lines = [f"{int(a[:2] == b[:2])} {a} {b}\n" for a, b in pairs]
    (root / "list.txt").write_text("".join(lines))
    return root


def judged(world, encoder, output, *more):
    words = ["--encoder", encoder, "--trials", world / "list.txt"]
    words += ["--data_root", world, "--output", output, *more]
    return verify.main([str(word) for word in words], "verify")


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def wave_of(path):
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def as_wespeaker(state, wave):
    return reference(state, wave, "ResNet18")


def as_3d_speaker(state, wave, scale=1):
    feats = fbank(wave, scale=scale, window="povey")
    return network(state, feats[None], "ResNet18")[0]


def as_3d_speaker_of_integers(state, wave):
    return as_3d_speaker(state, wave, 2**15)


@pytest.fixture(autouse=True)
def no_pictures():
    with mock.patch.object(plots, "_save"):
        yield


def files(world):
    return sorted(world.glob("*.wav"))


def test_the_command_gives_the_scores_of_wespeaker(
    world, plain, state, tmp_path
):
    judged(world, plain, tmp_path / "out", "--frontend", "wespeaker")
    trials, scores = read_scores(tmp_path / "out" / "list" / "scores.txt")
    each = {f.name: as_wespeaker(state, wave_of(f)) for f in files(world)}
    for i in range(len(trials)):
        a = each[trials.enrol_ids[trials.enrol[i]]]
        b = each[trials.test_ids[trials.test[i]]]
        assert scores[i] == pytest.approx(cosine(a, b), abs=1e-5)
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.startswith("# voxceleb.onnx\n\nvoxceleb.onnx, an ONNX file of ")
    assert "feats [B, T, 80] -> embs [B, 24], at 16000 Hz in onnx" in text
    assert (
        "those of wespeaker: Kaldi's filterbank, 80 bands from 20 to 8000 Hz, "
        "window hamming, inside the recording, samples times 32768, mean of "
        "each band taken off. Recordings are embedded one at a time" in text
    )
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    assert f"SHA-256 of the file: {digest[:12]}." in text


@pytest.mark.parametrize(
    "metadata, frontend, wanted",
    [
        (WESPEAKER, None, as_wespeaker),
        (THREE_D, None, as_3d_speaker),
        ({}, "3d-speaker", as_3d_speaker),
        # what is typed goes before the framework
        (WESPEAKER, "3d-speaker", as_3d_speaker_of_integers),
    ],
)
def test_embeddings_are_those_of_the_toolkit(
    world, plain, state, tmp_path, metadata, frontend, wanted
):
    path = add_metadata(plain, tmp_path / "m.onnx", **metadata)
    rows = OnnxEncoder(path, frontend).embed(files(world))
    for file, row in zip(files(world), rows, strict=True):
        theirs = wanted(state, wave_of(file))
        assert np.abs(row - theirs.numpy()).max() < 1e-4 * theirs.abs().max()


def test_with_sherpa_onnx_features_it_is_what_the_client_gives(
    world, plain, tmp_path
):
    """For WeSpeaker's files the client leaves the mean; 3D-Speaker's say so."""
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    wave = soundfile.read(world / "s0_2.wav", dtype="float32")[0]
    for metadata in (WESPEAKER, THREE_D):
        name = metadata["framework"]
        path = add_metadata(plain, tmp_path / f"{name}.onnx", **metadata)
        config = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(path))
        client = sherpa_onnx.SpeakerEmbeddingExtractor(config)
        stream = client.create_stream()
        stream.accept_waveform(16000, wave)
        stream.input_finished()
        theirs = client.compute(stream)
        ours = OnnxEncoder(path, "sherpa-onnx").embed(world / "s0_2.wav")[0]
        assert cosine(ours, theirs) > 0.99999
        trained_on = OnnxEncoder(path).embed(world / "s0_2.wav")[0]
        assert cosine(trained_on, theirs) < 0.9999


def test_options_in_a_yaml(world, plain, tmp_path):
    file = tmp_path / "verify.yaml"
    file.write_text(
        f"encoder: {plain}\ntrials: {world}/list.txt\ndata_root: {world}\n"
        f"frontend: wespeaker\nsample_rate: 16000\noutput: {tmp_path}/yaml\n"
    )
    verify.main([str(file)], "verify")
    text = (tmp_path / "yaml" / "results.md").read_text()
    assert "Features: those of wespeaker" in text


def test_each_model_and_its_features_have_a_store(
    world, plain, state, tmp_path
):
    judged(world, plain, tmp_path, "--frontend", "wespeaker")
    other = add_metadata(plain, tmp_path / "other.onnx", **WESPEAKER)
    for encoder, frontend in ((plain, "3d-speaker"), (other, "wespeaker")):
        with pytest.raises(StoreError, match="embed again"):
            judged(world, encoder, tmp_path, "--frontend", frontend)


def test_commands_that_take_an_encoder(world, plain, tmp_path):
    def run(*words, code=0):
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == code, done.output
        return done

    encoder = ("-e", plain, "--frontend", "wespeaker")
    a, b = world / "s0_0.wav", world / "s1_0.wav"
    done = run("compare", *encoder, a, b, "--threshold", "-1", "--json")
    score = json.loads(done.stdout)["score"]
    run("embed", *encoder, a, b, "-o", tmp_path / "e.npz")
    rows = np.load(tmp_path / "e.npz")["embeddings"]
    assert cosine(*rows) == pytest.approx(score, abs=1e-5)
    listed, output = world / "list.txt", tmp_path / "scores.txt"
    run("score", *encoder, listed, "--root", world, "-o", output)
    trials, scores = read_scores(output)
    place = (world / "list.txt").read_text().splitlines()
    assert scores[place.index("0 s0_0.wav s1_0.wav")] == pytest.approx(
        score, abs=1e-5
    )
    assert "features" in run("info", *encoder).stdout.lower()
    said = run("export", *encoder, tmp_path / "x.onnx", code=2).stderr
    assert "is an ONNX file already" in said
    said = run("compare", *encoder, a, b, "--device", "cuda", code=2).stderr
    assert "computes on the CPU here" in said
    said = run("compare", *encoder, a, b, code=2).stderr
    assert "No threshold was saved" in said
    said = run(
        *("compare", "-e", world, "--frontend", "wespeaker", a, b), code=2
    ).stderr
    assert "are for files that end with .onnx" in said


# -- files that are not evaluated ---------------------------------------------


def graph(
    *nodes,
    taken=("feats", ["B", "T", 80]),
    given=("embs", ["B", 80]),
    kind=TensorProto.FLOAT,
    weights=(),
    domains=(),
    functions=(),
):
    """A small model; by default the mean of each band is the embedding."""
    nodes = nodes or [
        helper.make_node(
            "ReduceMean", [taken[0]], [given[0]], axes=[1], keepdims=0
        )
    ]
    made = helper.make_model(
        helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info(taken[0], kind, taken[1])],
            [helper.make_tensor_value_info(given[0], kind, given[1])],
            list(weights),
        ),
        functions=list(functions),
        opset_imports=[
            helper.make_opsetid("", 17),
            *(helper.make_opsetid(each, 1) for each in domains),
        ],
    )
    made.ir_version = 8
    return made


def node(kind, taken="feats", given="embs", **attributes):
    return helper.make_node(kind, [taken], [given], **attributes)


def scaled(weight, bands=80):
    """Times a weight; the mean of that is the embedding."""
    times = helper.make_node("Mul", ["feats", "w"], ["x"])
    mean = node("ReduceMean", "x", axes=[1], keepdims=0)
    taken = ("feats", ["B", "T", bands])
    return graph(times, mean, taken=taken, weights=[weight])


def external():
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../etc/passwd")
    return scaled(weight)


def hidden_external():
    """In an attribute of a node in a branch that is never taken."""
    (mean,) = graph().graph.node
    inner = external().graph.initializer[0]
    branch = helper.make_graph(
        [node("Constant", given="c", value=inner)], "b", [], []
    )
    branch.node[0].ClearField("input")
    test = helper.make_tensor("t", TensorProto.BOOL, [], [True])
    fork = helper.make_node(
        "If", ["t"], ["c"], then_branch=branch, else_branch=branch
    )
    return graph(fork, mean, weights=[test])


def looping():
    body = helper.make_graph([node("Identity", "a", "b")], "b", [], [])
    return graph(helper.make_node("Loop", ["", "t"], ["embs"], body=body))


def of_its_own():
    inner = node("ReduceMean", "a", "b", axes=[1], keepdims=0)
    kind = helper.make_function(
        "own", "Mean", ["a"], ["b"], [inner], [helper.make_opsetid("", 17)]
    )
    return graph(node("Mean", domain="own"), functions=[kind], domains=["own"])


def two_inputs():
    """As NeMo's models."""
    made = graph()
    made.graph.input.append(
        helper.make_tensor_value_info("length", TensorProto.INT64, ["B"])
    )
    return made


def only_200_frames():
    """Says that any number is taken; a shape inside says another thing."""
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [1, 200 * 80])
    fold = helper.make_node("Reshape", ["feats", "s"], ["embs"])
    return graph(fold, given=("embs", ["B", 16000]), weights=[shape])


def half():
    return graph(kind=TensorProto.FLOAT16)


def noted(**metadata):
    made = graph()
    for key, value in metadata.items():
        made.metadata_props.add(key=key, value=str(value))
    return made


BANDS = helper.make_tensor("w", TensorProto.FLOAT, [64], [1.0] * 64)
NOTHING = helper.make_tensor("w", TensorProto.FLOAT, [1], [np.nan])
MANY = {"taken": ("feats", ["B", "T", 5000]), "given": ("embs", ["B", 5000])}
STATED = {
    "n_mels": 80,
    "sample_rate": 16000,
    "low_freq": 20.0,
    "high_freq": 0.0,
    "snip_edges": True,
    "preemphasis": 0.97,
    "scale": 1.0,
    "window_type": "povey",
}


def front_end(**changes):
    return noted(front_end=json.dumps({**STATED, **changes}))


@pytest.mark.parametrize(
    "model, match",
    [
        (b"", "not an ONNX file, or was cut off: it holds no graph"),
        (b"RIFF\x00\x00WAVEfmt", "is not an ONNX file, or was cut off"),
        (graph().SerializeToString()[:-9], "was cut off.* copied whole"),
        (two_inputs, r"feats \[B, T, 80\], length \[B\] tensor\(int64\) -> em"),
        (half, r"tensor\(float16\) -> .* Needed is one float32 input"),
        (graph(taken=("x", ["B", 80, "T"])), r"computes x \[B, 80, T\] -> "),
        (graph(taken=("x", ["B", 200, 80])), r"x \[B, 200, 80\].* any length"),
        (graph(taken=("x", [4, "T", 80])), r"x \[4, T, 80\].*dynamic axes\?"),
        (graph(taken=("x", ["B", 3, "T", 80])), r"x \[B, 3, T, 80\] -> "),
        (graph(**MANY), "number of bands is 5000, .* from 1 to 256"),
        (
            scaled(BANDS, "F"),
            r"0.5 s of noise, fed as \[1, 48, 80\], cannot be embedded",
        ),
        (scaled(NOTHING), "the embedding is NaN or infinite"),
        (only_200_frames, "fed as .* cannot be embedded.* of one length"),
        (graph(node("Identity")), r"cannot be embedded: it becomes \[1, 48, "),
        (external, "weights in another file, '../../etc/passwd', which is not"),
        (hidden_external, "keeps weights in another file"),
        (
            graph(node("Mean", domain="evil"), domains=["evil"]),
            "operator 'Mean' of 'evil', .* code for it is not loaded",
        ),
        (graph(node("Nothing")), "is not loaded by onnxruntime 1.*Nothing"),
        (of_its_own, "defines an operator of its own, 'Mean'"),
        (looping, "has the operator Loop, which may never end"),
        (noted(sample_rate="fast"), "sample_rate of the metadata is 'fast'"),
        (noted(sample_rate=8000), "a sample rate of 8000 Hz, --sample_rate is"),
        (noted(output_dim=7), "output_dim is 7, allowed is 80"),
        (noted(normalize_samples=2), "normalize_samples is '2', allowed is"),
        (
            noted(feature_normalize_type="per_feature"),
            "feature_normalize_type is 'per_feature', allowed is '' or 'global",
        ),
        (noted(decision="{"), "m.onnx: decision' is not valid JSON"),
        (noted(decision="[]"), "These are not thresholds and score distribut"),
        (noted(facts="{"), "m.onnx: facts' is not valid JSON"),
        (noted(facts='{"fame": 1}'), "the name of a fact is 'fame'"),
    ],
)
def test_files_that_are_refused(world, tmp_path, model, match):
    path = tmp_path / "m.onnx"
    model = model() if callable(model) else model
    path.write_bytes(
        model if isinstance(model, bytes) else model.SerializeToString()
    )
    with pytest.raises(EncoderError, match=match) as caught:
        judged(
            *(world, path, tmp_path / "out", "--frontend", "wespeaker"),
            *("--sample_rate", "16000"),
        )
    said = str(caught.value)
    assert said.startswith(f"'{path}") and "\n" not in said


@pytest.mark.parametrize(
    "model, match",
    [
        (graph(), r"\(none\) do not say how .* Give --frontend wespeaker or"),
        (noted(framework="nemo"), r"\(the framework 'nemo'\) do not say"),
        (noted(comment=f"{OURS} 1234"), "those of an earlier speechbrain-ram"),
        (front_end(n_mels=81), "front_end.n_mels is 81, allowed is 80"),
        (front_end(sample_rate=8000), "front_end.sample_rate is 8000"),
        (front_end(scale="1"), "front_end.scale is '1', allowed is a number"),
        (front_end(low_freq=9e3), "Mel bands from 9000"),
        (front_end(more=1), "front_end of the metadata is .* needed are"),
        (noted(front_end="[" * 9999), "front_end"),
        (
            graph(taken=("wav", ["B", "N"]), given=("e", ["B"])),
            "0.5 s of noise, fed as .* it becomes",
        ),
    ],
)
def test_files_that_say_nothing_or_nonsense(world, tmp_path, model, match):
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EncoderError, match=match):
        judged(world, path, tmp_path / "out")


def test_what_does_not_go_with_a_file(world, plain, tmp_path):
    path = tmp_path / "m.onnx"
    wave = graph(taken=("wav", ["B", "N"]), given=("e", ["B"]))
    path.write_bytes(wave.SerializeToString())
    for encoder, frontend, match in (
        (path, "wespeaker", "takes waveforms, --frontend wespeaker is for"),
        (plain, "kaldi", "'kaldi', allowed are wespeaker, 3d-speaker, sherpa"),
        (plain, "sherpa-onnx", "no metadata normalize_samples, without which"),
        (tmp_path / "none.onnx", "wespeaker", "ONNX file: No such file"),
    ):
        with pytest.raises(EncoderError, match=match):
            judged(world, encoder, tmp_path, "--frontend", frontend)


def test_files_that_are_too_large_or_never_end(tmp_path):
    huge, pipe = tmp_path / "huge.onnx", tmp_path / "pipe.onnx"
    with open(huge, "wb") as file:
        file.truncate(2**31 + 1)
    os.mkfifo(pipe)
    with pytest.raises(EncoderError, match="2147483649 bytes, at most"):
        OnnxEncoder(huge, "wespeaker")
    with pytest.raises(EncoderError, match="not a regular file"):
        OnnxEncoder(pipe, "wespeaker")


def test_a_graph_gets_half_of_the_memory(tmp_path):
    """However small a file is, it can ask for any amount."""
    assert onnx_file._bounded_memory()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = helper.make_tensor("n", TensorProto.INT64, [1], [memory // 7])
    made = graph(
        node("ConstantOfShape", "n", "x"),  # of four bytes each
        node("ReduceSum", "x", "s", keepdims=0),
        helper.make_node("Add", ["feats", "s"], ["y"]),
        node("ReduceMean", "y", axes=[1], keepdims=0),
        weights=[size],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(EncoderError, match="noise.*Available memory of"):
        OnnxEncoder(path, "wespeaker")


def test_a_recording_that_a_network_cannot_take_is_named(world, tmp_path):
    """One too short for a convolution over 40 frames."""
    state = torch.randn(4, 80, 40).numpy()
    weight = onnx.numpy_helper.from_array(state, "w")
    made = graph(
        node("Transpose", given="x", perm=[0, 2, 1]),
        helper.make_node("Conv", ["x", "w"], ["y"]),
        node("ReduceMean", "y", axes=[2], keepdims=0),
        given=("embs", ["B", 4]),
        weights=[weight],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString())
    encoder = OnnxEncoder(path, "wespeaker")
    wave = voice(0.3)
    soundfile.write(tmp_path / "short.wav", wave, 16000)
    good = world / "s0_0.wav"
    with pytest.raises(AudioError, match="short.wav.*recording of 0.30 s"):
        encoder.embed([good, tmp_path / "short.wav"])
    failures = {}
    rows = encoder.embed([tmp_path / "short.wav", good], failures=failures)
    assert rows.shape == (1, 4) and list(failures) == [0]


def test_the_missing_extra_is_named(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"An ONNX file needs .*\[onnx\]"):
        OnnxEncoder(plain, "wespeaker")
