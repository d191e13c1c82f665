"""Tests of the gates of enrolment, and of the margin, as commands."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from small_encoder import export_small, voice

from speechbrain_ram.cli.main import main
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.verification.calibration import Decision
from speechbrain_ram.verification.gates import agreements
from speechbrain_ram.verification.scores import unit_length


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An encoder, and SPEAKER/FILE.wav: three recordings of two speakers."""
    root = tmp_path_factory.mktemp("world")
    export_small(root / "encoder")
    for speaker, pitch in (("ada", 260), ("bob", 90)):
        (root / "voices" / speaker).mkdir(parents=True)
        for i in range(3):
            wav = voice(1.0, pitch + i, seed=pitch + i)
            soundfile.write(root / "voices" / speaker / f"{i}.wav", wav, 16000)
    return root


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHBRAIN_RAM_ENCODER", str(world / "encoder"))
    monkeypatch.setenv("SPEECHBRAIN_RAM_DATABASE", str(tmp_path / "who.db"))
    monkeypatch.chdir(world / "voices")

    def run(words, code=0):
        result = CliRunner().invoke(main, words.split())
        assert result.exit_code == code, result.output
        return result

    return run


#: All gates open.
OPEN = "--least-seconds 0 --agreement -1 --near 2"


def enrolled(run):
    return json.loads(run("info --json -d who.db").stdout)


def test_too_little_speech_is_refused(run, tmp_path):
    files = "ada/0.wav ada/1.wav"
    result = run(f"enroll ada {files} --least-seconds 4", code=2)
    assert "'ada' has 2.0 s in 2 recordings; 4 s are needed" in result.stderr
    assert not (tmp_path / "who.db").exists()
    gates = "--agreement -1 --near 2"
    result = run(f"enroll ada {files} {gates} --least-seconds 1.5")
    assert result.stdout == "ada: 2 recordings, 2.0 s of speech added\n"
    # whom there is speech enough of may get a short recording more
    run(f"enroll ada ada/2.wav {gates} --least-seconds 4")


def test_a_recording_of_somebody_else_is_named(run, world, tmp_path):
    files = ["ada/0.wav", "ada/1.wav", "bob/0.wav"]
    encoder = SpeakerEncoder.from_folder(world / "encoder")
    scores = agreements(unit_length(encoder.embed(files)))
    assert scores.argmin() == 2
    gate = (scores[2] + scores[:2].min()) / 2
    words = f"enroll ada {' '.join(files)} --least-seconds 0 --near 2"
    result = run(f"{words} --agreement {gate}", code=2)
    assert "Recordings do not fit the others" in result.stderr
    assert f"'bob/0.wav' of 'ada' ({scores[2]:.3f})." in result.stderr
    assert not (tmp_path / "who.db").exists()
    result = run(f"{words} --agreement {gate} --json", code=2)
    assert "'bob/0.wav' of 'ada'" in json.loads(result.stdout)["error"]
    run(f"{words} --agreement {scores[2] - 0.01}")


def test_a_second_name_is_warned_of(run):
    run(f"enroll ada ada/0.wav ada/1.wav {OPEN}")
    words = "enroll eve ada/1.wav ada/0.wav --least-seconds 0 --agreement -1"
    result = run(f"{words} --near 0.99 --json")
    assert (
        "Warning: 'eve' is nearly 'ada', who is enrolled too: score 1.000"
        in (result.stderr)
    )
    (pair,) = json.loads(result.stdout)["near"]
    assert (pair["speaker"], pair["other"]) == ("eve", "ada")
    # who is enrolled already was warned of then
    assert "nearly" not in run(f"{words} --near 0.99").stderr


def test_folders_that_are_one_person_are_warned_of_once(run, world, tmp_path):
    for name in ("ann", "zoe"):
        (tmp_path / "two" / name).mkdir(parents=True)
        wav = (world / "voices" / "ada" / "0.wav").read_bytes()
        (tmp_path / "two" / name / "a.wav").write_bytes(wav)
    result = run(f"enroll --folders {tmp_path / 'two'} {OPEN} --near 0.9")
    assert result.stderr.count("is nearly") == 1
    assert "ann: 1 recordings" in result.stdout


def test_hidden_folders_are_passed_over(run, world, tmp_path):
    shutil.copytree(world / "voices", tmp_path / "people")
    (tmp_path / "people" / ".git").mkdir()
    (tmp_path / "people" / ".git" / "config").write_text("no recording")
    run(f"enroll --folders {tmp_path / 'people'} {OPEN}")
    facts = json.loads(run("info --json").stdout)
    assert set(facts["enrolled"]) == {"ada", "bob"}


@pytest.mark.parametrize("words", ["forget ada", "info", "identify ada/0.wav"])
def test_a_database_that_is_not_there(run, tmp_path, words):
    """It is named, and not made."""
    result = run(words, code=2)
    path = tmp_path / "who.db"
    assert f"'{path}' does not exist, so nobody is enrolled" in result.stderr
    assert "Is it the right database?" in result.stderr
    assert not path.exists()


def test_a_small_lead_is_unsure(run):
    run(f"enroll ada ada/0.wav {OPEN}")
    words = "identify ada/1.wav --threshold -1"
    facts = json.loads(run(f"{words} --margin 1 --json").stdout)
    assert facts["verdict"] == "known" and facts["margin"] is None
    run(f"enroll bob bob/0.wav {OPEN}")
    result = run(f"{words} --margin 0 --top 1 --json")
    facts = json.loads(result.stdout)
    lead = facts["margin"]
    assert facts["speaker"] == "ada" and lead > 0
    assert len(facts["matches"]) == 1
    run(f"{words} --margin {lead - 1e-3}")
    result = run(f"{words} --margin {lead + 1e-3}", code=1)
    assert result.stdout.startswith("unsure: ada or bob\nthreshold -1.000, ma")
    facts = json.loads(
        run(f"{words} --margin {lead + 1e-3} --json", code=1).stdout
    )
    assert facts["verdict"] == "unsure" and facts["speaker"] is None
    words = "identify ada/1.wav --threshold 1.1"
    facts = json.loads(run(f"{words} --margin 1.5 --json", code=1).stdout)
    assert facts["verdict"] == "unknown"


def test_an_encoder_without_thresholds_says_what_is_not_checked(run, tmp_path):
    export_small(tmp_path / "bare", decision=False)
    words = f"-e {tmp_path / 'bare'} ada ada/0.wav bob/0.wav --least-seconds 0"
    result = run(f"enroll {words}")
    assert "so --agreement and --near are not checked" in result.stderr
    result = run(f"enroll {words} --agreement 0.9999 --near 2", code=2)
    assert "of 'ada' (" in result.stderr


def test_without_a_false_alarm_rate_near_is_not_checked(run, tmp_path):
    """At the EER it would warn of most people."""
    few = np.append(np.linspace(0, 0.6, 20), [0.5, 0.9])
    decision = Decision.fit(few, [0] * 20 + [1, 1], "few")
    export_small(tmp_path / "few", decision=decision)
    words = f"-e {tmp_path / 'few'} ada ada/0.wav --least-seconds 0 --json"
    result = run(f"enroll {words}")
    assert "no threshold at a false-alarm rate is saved" in result.stderr
    assert "so --near is not checked" in result.stderr
    assert list(json.loads(result.stdout)["gates"]) == [
        "least_seconds",
        "agreement",
    ]


def test_the_gates_are_those_of_the_encoder(run, world):
    decision = SpeakerEncoder.from_folder(world / "encoder").decision
    low, high = (
        decision.llr(each) for each in (0.3, 0.3 + decision.llr_step())
    )
    assert high - low == pytest.approx(1)
    words = "enroll ada ada/0.wav --least-seconds 0 --json"
    gates = json.loads(run(words).stdout)["gates"]
    assert gates["agreement"] == pytest.approx(
        decision.threshold("EER") - 2 * decision.llr_step()
    )
    assert gates["near"] == decision.threshold("FAR=1%")
    facts = json.loads(run("identify ada/0.wav --json").stdout)
    assert facts["least_margin"] == decision.llr_step()
    gates = json.loads(run(f"{words} --agreement FAR=1%").stdout)["gates"]
    assert gates["agreement"] == decision.threshold("FAR=1%")


@pytest.mark.parametrize(
    "words, says",
    [
        ("enroll ada ada/0.wav --least-seconds nan", "--least-seconds is nan"),
        ("enroll ada ada/0.wav --agreement nan", "threshold is named 'nan'"),
        (
            "enroll ada ada/0.wav --near FAR=7%",
            "threshold is named 'FAR=7%'",
        ),
        ("identify ada/0.wav --margin nan", "--margin is nan, not 0 or more"),
        ("enroll ada none.wav", "none.wav' does not exist"),
    ],
)
def test_wrong_gates_are_one_line(run, tmp_path, words, says):
    result = run(words, code=2)
    (line,) = [each for each in result.stderr.splitlines() if "Error" in each]
    assert says in line
    assert not (tmp_path / "who.db").exists()


def test_seconds_are_those_of_speech(world):
    encoder = SpeakerEncoder.from_folder(world / "encoder")
    speech = voice(2.0)
    pause = 1e-3 * np.random.default_rng(0).standard_normal(48000)
    with_pause = np.concatenate([speech, pause]).astype(np.float32)
    assert encoder.speech_seconds(speech) == pytest.approx(2.0, abs=0.2)
    assert encoder.speech_seconds(with_pause) == pytest.approx(2.0, abs=0.2)
    assert encoder.speech_seconds(0.1 * with_pause) == pytest.approx(
        encoder.speech_seconds(with_pause), abs=0.05
    )
