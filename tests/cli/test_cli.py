"""Tests of the command, through its own parser."""

import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from small_encoder import DIM, export_small, voice
from wespeaker_model import write_model

from speechbrain_ram.cli import common as cli_common
from speechbrain_ram.cli.main import main
from speechbrain_ram.cli.recipes import recipe_file
from speechbrain_ram.export.importers import import_encoder
from speechbrain_ram.inference import Segment, SpeakerEncoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_small(tmp_path_factory.mktemp("export") / "encoder")


@pytest.fixture(scope="module")
def encoder(folder):
    return SpeakerEncoder.from_folder(folder)


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """SPEAKER/FILE.wav, three speakers of two recordings."""
    root = tmp_path_factory.mktemp("voices")
    for speaker, pitch in (("ada", 210), ("bob", 110), ("cy", 160)):
        (root / speaker).mkdir()
        for i in range(2):
            wav = voice(1.0, pitch + 3 * i, seed=pitch + i)
            soundfile.write(root / speaker / f"{i}.wav", wav, 16000)
    return root


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.setenv("SPEECHBRAIN_RAM_ENCODER", str(folder))

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return result

    return run


def answer(result):
    """The one JSON object on stdout."""
    return json.loads(result.stdout)


def test_compare_says_it_with_its_exit_code(run, voices, encoder):
    a, b = voices / "ada" / "0.wav", voices / "bob" / "0.wav"
    score = encoder.score(a, b)
    result = run("compare", a, b, "--threshold", score - 0.01)
    assert result.stdout.startswith(f"same speaker: score {score:.3f}")
    assert "of same-speaker pairs score lower" in result.stdout
    result = run("compare", a, b, "--threshold", score + 0.01, code=1)
    assert result.stdout.startswith("different speakers")
    default = run("compare", a, a, "--json")
    facts = answer(default)
    assert facts["same_speaker"] is True
    assert facts["threshold"] == encoder.decision.threshold("EER")
    named = answer(run("compare", a, a, "--json", "--threshold", "FAR=1%"))
    assert named["threshold"] == encoder.decision.threshold("FAR=1%")


def test_every_help_has_an_example_that_is_understood():
    for name, each in main.commands.items():
        text = CliRunner().invoke(main, [name, "--help"]).output
        examples = re.findall(
            rf"^ +speechbrain-ram {name}(?: (.*))?$", text, re.M
        )
        assert examples, name
        for words in examples:
            each.make_context(name, shlex.split(words.rstrip("\\")))


def test_recipes_are_listed_and_found(run, monkeypatch):
    facts = answer(run("recipes", "--json"))
    assert {"synthetic", "own", "voxceleb", "voxceleb-strong"} <= set(facts)
    assert facts["own"]["file"].endswith("YourCorpus/hparams/ram_resnet34.yaml")
    lines = run("recipes").stdout.splitlines()
    assert len(lines) == len(facts) + 1
    assert max(map(len, lines[:-1])) < 120
    for name in facts:
        assert recipe_file(name) == facts[name]["file"]
    assert recipe_file("some/where.yaml") == "some/where.yaml"
    with pytest.raises(ValueError, match="'vox' is neither.*voxceleb, "):
        recipe_file("vox")


@pytest.mark.parametrize(
    "words, says",
    [
        ("train nothing", "'nothing' is neither a YAML file nor a recipe"),
        ("train own", "needs --corpus"),
        ("train synthetic --marign 0.2", "Is --margin meant?"),
        ("train", "Missing argument 'RECIPE'"),
        ("verify --output out", "--encoder is needed"),
        ("verify nothing.yaml", "speechbrain-ram verify: error: 'nothing.yaml"),
    ],
)
def test_wrong_options_of_training_and_verification(run, capfd, words, says):
    result = run(*words.split(), code=2)
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_errors_exit_with_two(run, voices, as_json):
    options = ["--json"] if as_json else []
    a = voices / "ada" / "0.wav"
    result = run("compare", a, voices / "missing.wav", *options, code=2)
    assert "missing.wav' does not exist.\n" in result.stderr
    if as_json:
        assert "missing.wav" in answer(result)["error"]
    else:
        assert result.stdout == ""
    result = run("compare", a, *options, code=2)  # click's own complaint
    assert "Missing argument 'B'" in result.stderr
    if as_json:
        assert answer(result) == {"error": "Missing argument 'B'."}
    run("compare", a, a, "--device", "abacus", *options, code=2)
    run("compare", a, a, "--threshold", "nonsense", *options, code=2)
    run("compare", a, a, "-e", voices, *options, code=2)


def test_a_bug_does_not_look_like_another_speaker(run, voices, monkeypatch):
    def crash(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(SpeakerEncoder, "compare", crash)
    a = voices / "ada" / "0.wav"
    result = run("compare", a, a, code=2)
    assert "a bug" in result.stderr
    result = run("compare", a, a, "--json", code=2)
    assert answer(result) == {"error": "RuntimeError('a bug')"}


def test_an_output_that_cannot_be_written_is_named_at_once(
    run, voices, tmp_path, monkeypatch
):
    monkeypatch.setattr(SpeakerEncoder, "embed", None)  # none computes
    trials = tmp_path / "trials.txt"
    trials.write_text("1 ada/0.wav ada/1.wav\n")
    for words in (
        ("embed", voices, "-o", tmp_path / "out.txt"),
        ("map", voices, "-o", tmp_path / "out.txt"),
        ("export", tmp_path / "out.txt"),
    ):
        result = run(*words, code=2)
        assert "out.txt' does not end with ." in result.stderr
    for words in (
        ("embed", voices, "-o", tmp_path / "no" / "out.npz"),
        ("map", voices, "-o", tmp_path / "no" / "out.png"),
        ("export", tmp_path / "no" / "out.onnx"),
        ("score", trials, "--root", voices, "-o", tmp_path / "no" / "out"),
    ):
        result = run(*words, code=2)
        assert "no' is not a folder, so 'out" in result.stderr


def test_clipping_is_told_on_stderr(run, tmp_path):
    loud = np.clip(30 * voice(1.0), -1, 1)
    soundfile.write(tmp_path / "loud.wav", loud, 16000)
    path = tmp_path / "loud.wav"
    result = run("compare", path, path, "--json")
    assert "Warning:" in result.stderr and "is clipped" in result.stderr
    assert answer(result)["same_speaker"]


def test_embed(run, voices, encoder, tmp_path):
    output = tmp_path / "out.npz"
    extra = voices / "ada" / "1.wav"
    facts = answer(run("embed", voices / "bob", extra, "-o", output, "--json"))
    assert facts["embedded"] == 3 and facts["dimensions"] == DIM
    with np.load(output) as data:
        assert data["fingerprint"] == encoder.fingerprint
        ids, rows = data["ids"].tolist(), data["embeddings"]
    paths = [voices / "bob" / "0.wav", voices / "bob" / "1.wav", extra]
    assert ids == [str(path) for path in paths]
    np.testing.assert_allclose(rows, encoder.embed(paths), atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]


def test_embed_a_manifest(run, voices, encoder, tmp_path):
    manifest = tmp_path / "rows.csv"
    manifest.write_text(
        "ID,duration,wav,start,stop,spk_id\n"
        "part,0.5,$data_root/bob/0.wav,4000,12000,bob\n"
    )
    output = tmp_path / "out.npz"
    run("embed", manifest, "--data-root", voices, "-o", output)
    wav = soundfile.read(voices / "bob" / "0.wav", dtype="float32")[0]
    with np.load(output) as data:
        assert data["ids"].tolist() == ["part"]
        expected = encoder.embed(wav[4000:12000])
        np.testing.assert_allclose(data["embeddings"], expected, atol=1e-4)


def test_embed_manifests_with_one_id(run, voices, tmp_path):
    """Of two recordings none is dropped; one that is named twice is one."""
    one, two, same = (tmp_path / f"{name}.csv" for name in ("one", "two", "3"))
    head = "ID,duration,wav,start,stop,spk_id\n"
    one.write_text(f"{head}x,1,$data_root/bob/0.wav,0,16000,bob\n")
    two.write_text(f"{head}x,1,$data_root/ada/0.wav,0,16000,ada\n")
    same.write_text(one.read_text())
    output = tmp_path / "out.npz"
    options = ["--data-root", voices, "-o", output]
    result = run("embed", one, same, two, *options, code=2)
    said = f"Error: '{one}' and '{two}' have 'x', each for another recording"
    assert result.stderr.startswith(said) and not output.exists()
    run("embed", one, same, *options)
    assert np.load(output)["ids"].tolist() == ["x"]


def test_embed_and_bad_files(run, voices, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_text("no audio")
    output = tmp_path / "out.npz"
    good = voices / "ada" / "0.wav"
    run("embed", good, bad, "-o", output, code=2)
    assert not output.exists()
    result = run("embed", good, bad, "-o", output, "--skip-bad", "--json")
    assert "Left out: '" in result.stderr
    assert "bad.wav" in answer(result)["left_out"][0]
    assert len(np.load(output)["ids"]) == 1


def test_a_folder_with_a_film_in_it(run, voices, tmp_path):
    (tmp_path / "film.mp4").write_bytes(bytes(4) + b"ftyp" + bytes(1000))
    output = tmp_path / "out.npz"
    result = run("embed", tmp_path, "-o", output, code=2)
    assert "film.mp4" in result.stderr
    good = voices / "ada" / "0.wav"
    options = ["--skip-bad", "--json"]
    facts = answer(run("embed", tmp_path, good, "-o", output, *options))
    assert facts["embedded"] == 1 and len(facts["left_out"]) == 1


def test_enrol_identify_forget(run, voices, tmp_path):
    database = tmp_path / "who.db"
    options = ["-d", database]
    # what the gates do is in test_enroll.py
    gates = ["--least-seconds", 0, "--agreement", -1, "--near", 2]
    run("enroll", *options, *gates, "ada", voices / "ada" / "0.wav")
    result = run("enroll", *options, *gates, "ada", voices / "ada" / "1.wav")
    assert result.stdout.startswith("ada: 2 recordings, ")
    words = ["enroll", *options, *gates, "--folders", voices, "--json"]
    facts = answer(run(*words))
    assert facts["speakers"] == {"ada": 4, "bob": 2, "cy": 2}
    file = voices / "bob" / "0.wav"
    result = run("identify", *options, file, "--threshold", "-1", "--json")
    facts = answer(result)
    assert facts["speaker"] == facts["matches"][0]["name"]
    assert len(facts["matches"]) == 3
    scores = [match["score"] for match in facts["matches"]]
    assert scores == sorted(scores, reverse=True)
    result = run("identify", *options, file, "--threshold", "1.1", code=1)
    assert result.stdout.startswith("unknown speaker")
    run("forget", *options, "bob")
    info = answer(run("info", *options, "--json"))
    assert info["enrolled"] == {"ada": 4, "cy": 2}
    text = run("info", *options).stdout
    assert text.endswith("Enrolled (recordings): ada (4), cy (2)\n")
    result = run("forget", *options, "bob", code=2)
    assert "Nobody called 'bob'" in result.stderr
    run("enroll", *options, "ada", code=2)
    run("enroll", *options, code=2)
    result = run("enroll", *options, "--folders", voices / "ada", code=2)
    assert "ada' holds no folders. One for each speaker" in result.stderr


def test_score_and_evaluate(run, voices, encoder, tmp_path):
    trials = tmp_path / "trials.txt"
    trials.write_text("1 ada/0.wav ada/1.wav\n0 ada/0.wav bob/1.wav\n")
    output = tmp_path / "scores.txt"
    run("score", trials, "--root", voices, "-o", output)
    rows = [line.split() for line in output.read_text().splitlines()]
    assert [(r[0], r[1], r[3]) for r in rows] == [
        ("ada/0.wav", "ada/1.wav", "1"),
        ("ada/0.wav", "bob/1.wav", "0"),
    ]
    expected = encoder.score(voices / rows[0][0], voices / rows[0][1])
    assert float(rows[0][2]) == pytest.approx(expected, abs=1e-4)
    trials.write_text("1 ada/0.wav@0-9000 ada/1.wav\n")  # a part
    run("score", trials, "--root", voices, "-o", output)
    part = Segment(voices / "ada/0.wav", 0, 9000)
    expected = encoder.score(part, voices / "ada/1.wav")
    assert float(output.read_text().split()[2]) == pytest.approx(
        expected, abs=1e-4
    )
    trials.with_suffix(".models").write_text("a ada/0.wav ada/1.wav\n")
    trials.write_text("1 a ada/1.wav\n")
    run("score", trials, "--root", voices, "-o", output)
    unit = encoder.embed([voices / "ada/0.wav", voices / "ada/1.wav"])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    model = unit.mean(axis=0) / np.linalg.norm(unit.mean(axis=0))
    who, _, score, _ = output.read_text().split()
    assert who == "a"
    assert float(score) == pytest.approx(model @ unit[1], abs=1e-4)
    trials.with_suffix(".models").unlink()
    output.write_text("a b 0.9 1\na c 0.1 0\n")
    assert "EER 0.000 %" in run("evaluate", output).stdout
    facts = answer(run("evaluate", output, "--json"))[str(output)]
    assert facts["eer"] == 0.0 and facts["n_target"] == 1
    output.write_text("a b 0.1 1\na c 0.9 0\n")
    facts = answer(run("evaluate", output, "--json"))[str(output)]
    assert facts["min_dcf_threshold"]["0.01"] is None  # nothing is accepted
    trials.write_text("1 ada/0.wav nobody/1.wav\n")
    result = run("score", trials, "--root", voices, "-o", output, code=2)
    assert "1 of 2 recordings are missing" in result.stderr


def test_info(run, encoder):
    facts = answer(run("info", "--json"))
    assert facts["fingerprint"] == encoder.fingerprint
    assert facts["embedding_dim"] == DIM
    assert facts["thresholds"] == encoder.decision.thresholds
    decision = encoder.decision
    lines = run("info").stdout.splitlines()
    assert f"Sample rate: {encoder.sample_rate} Hz" in lines
    assert f"EER on it: {decision.eer:.2f} %" in lines
    for name, value in decision.thresholds.items():
        assert f"Threshold {name}: cosine {value:.3f}" in lines
    (line,) = [each for each in lines if each.startswith("Development list")]
    assert line.startswith("Development list: imagined: ")
    assert line.endswith(f" {decision.n_nontarget:,} non-target trials")


def test_export(run, voices, tmp_path):
    pytest.importorskip("onnxruntime")
    output = tmp_path / "e.onnx"
    lines = run("export", output).stdout.splitlines()
    assert lines[0].startswith(f"{output}: ") and lines[0].endswith(" MB")
    assert lines[1].startswith("waveform [batch, samples] -> embedding [batch")
    assert " in onnxruntime 1." in lines[1]
    assert re.fullmatch(r"On 1 and .* by \d\.\de-\d\d at most\.", lines[2])
    facts = answer(run("export", output, "--int8", voices, "--json"))
    assert facts["difference"] < 1e-4
    assert 0.9 < facts["cosine"] < 0.99999  # of the int8 file, on the voices
    assert facts["bytes"] == output.stat().st_size
    other = tmp_path / "s.onnx"
    result = run("export", other, "--for", "sherpa-onnx", code=2)
    assert "Train one with --frontend kaldi" in result.stderr
    assert not other.exists()
    kaldi = export_small(tmp_path / "kaldi", "kaldi")
    done = run("export", other, "--for", "sherpa-onnx", "-e", kaldi, "--json")
    assert answer(done)["client_cosine"] > 0.9999
    source = write_model(tmp_path / "model")
    import_encoder("wespeaker", source, tmp_path / "imported")
    words = ("--for", "sherpa-onnx", "-e", tmp_path / "imported")
    done = run("export", other, *words)
    assert "the client's embeddings have a cosine of 0." in done.stdout


def test_an_export_that_computes_something_else_is_refused(
    run, tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime")
    from speechbrain_ram.export import onnx as onnx_export

    session = onnx_export._session

    def wrong(path):
        one = session(path)
        doubled = lambda *args: [2 * one.run(*args)[0]]  # noqa: E731
        return SimpleNamespace(get_inputs=one.get_inputs, run=doubled)

    monkeypatch.setattr(onnx_export, "_session", wrong)
    result = run("export", tmp_path / "e.onnx", code=2)
    assert "differs from PyTorch by " in result.stderr
    assert not (tmp_path / "e.onnx").exists()


@pytest.mark.parametrize("ending", ["html", "png"])
def test_map(run, voices, tmp_path, ending, monkeypatch):
    pytest.importorskip("sklearn")
    output = tmp_path / f"map.{ending}"
    facts = answer(run("map", voices, "-o", output, "--json"))
    assert (facts["recordings"], facts["speakers"]) == (6, 3)
    assert output.stat().st_size > 1000
    monkeypatch.setattr("speechbrain_ram.cli.similarity_map._LEGEND", 2)
    said = run("map", voices, "-o", output).stdout
    assert ("without a legend" in said) == (ending == "png")


def test_only_the_page_gives_its_memory_back(run, monkeypatch):
    kept = []
    module = sys.modules[main.callback.__module__]
    monkeypatch.setattr(module, "keep_freed_memory", lambda: kept.append(1))
    monkeypatch.setattr("speechbrain_ram.cli.demo.serve", lambda *_: None)
    run("demo")
    assert not kept
    run("recipes")
    assert kept


def test_help_reads_well_and_does_not_wait_for_pytorch():
    script = (
        "import sys, speechbrain_ram.cli.main as cli\n"
        "try: cli.main(['--help'], prog_name='speechbrain-ram')\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for name, sub in main.commands.items():
        line = sub.get_short_help_str(limit=60)
        assert line.endswith(".") and "..." not in line, line
        assert f"  {name} " in result.stdout


def test_without_an_encoder(monkeypatch):
    monkeypatch.delenv("SPEECHBRAIN_RAM_ENCODER", raising=False)
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == cli_common.ERROR
    assert "--encoder" in result.output
