"""Tests of thresholds that are measured on one's own recordings."""

import json
import shutil
from itertools import combinations

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from small_encoder import export_small, voice

from speechbrain_ram.cli.main import main
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.verification import bootstrap, calibration
from speechbrain_ram.verification.calibration import Decision


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """SPEAKER/FILE.wav: four recordings of four speakers."""
    root = tmp_path_factory.mktemp("voices")
    for speaker, pitch in (("ada", 260), ("bob", 90), ("cy", 150), ("di", 190)):
        (root / speaker).mkdir()
        for i in range(4):
            wav = voice(0.5, pitch + 4 * i, seed=pitch + i)
            soundfile.write(root / speaker / f"{i}.wav", wav, 16000)
    return root


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_small(tmp_path_factory.mktemp("export") / "encoder")


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "encoder")


def run(folder, *words, code=0):
    words = ["threshold", "-e", folder, "-d", *words]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def test_an_onnx_file_takes_no_thresholds(voices, tmp_path):
    (tmp_path / "encoder.onnx").touch()
    result = run(tmp_path / "encoder.onnx", voices, code=2)
    assert "is an ONNX file, and thresholds are written into" in result.stderr
    assert "encoder.json" not in result.stderr


def pair_scores(folder, voices):
    """Cosines and labels of all pairs, one by one."""
    encoder = SpeakerEncoder.from_folder(folder)
    files = sorted(voices.rglob("*.wav"))
    rows = encoder.embed(files).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = list(combinations(range(len(files)), 2))
    return (
        np.array([rows[i] @ rows[j] for i, j in pairs]),
        np.array([files[i].parent == files[j].parent for i, j in pairs], int),
    )


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_pairs_of_a_folder(folder, voices, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "LEAST_SPEAKERS", 4)
    monkeypatch.setattr(calibration, "ERRORS", 0.9)  # of 96, FAR=1% is measured
    before, old = content(folder), SpeakerEncoder.from_folder(folder).decision
    scores, labels = pair_scores(folder, voices)
    expected = Decision.fit(scores, labels, "all pairs in " + voices.name)
    result = run(folder, voices)
    after = SpeakerEncoder.from_folder(folder)
    assert after.decision.thresholds == pytest.approx(
        expected.thresholds, abs=1e-5
    )
    assert after.decision.trials == expected.trials
    assert (after.decision.n_target, after.decision.n_nontarget) == (24, 96)
    description = json.loads(before["encoder.json"])
    del description["decision"]
    changed = json.loads((folder / "encoder.json").read_text())
    assert changed.items() >= description.items()  # the fingerprint, too
    same = {name for name, b in content(folder).items() if before[name] == b}
    assert before.keys() - same == {"encoder.json", "README.md"}
    card = (folder / "README.md").read_text()
    at_eer = after.decision.thresholds["EER"]
    assert f"| threshold at EER | {at_eer:.3f} |" in card
    assert "imagined" not in card
    assert "than further thresholds need, at FAR=0.1% 900: `speech" in card
    facts = json.loads(run(folder, voices, "--json").stdout)
    low, high = facts["intervals"]["thresholds"]["EER"]
    assert -1 <= low <= facts["thresholds"]["EER"] <= high <= 1
    lines = result.stdout.splitlines()
    counts = "24 same-speaker and 96 different-speaker pairs of 4 speakers"
    assert lines[0].endswith(counts)
    assert lines[1].startswith(f"EER {after.decision.eer:.2f} % [")
    assert lines[2].startswith(f"Threshold EER: cosine {at_eer:.3f} [")
    was = old.thresholds["EER"]
    assert lines[2].endswith(f"; it was {was:.3f}")
    assert "FAR=0.1%: not measured, it needs 900 diff" in lines[4]
    assert lines[-1].endswith("in place of those of imagined.")


def test_what_too_few_pairs_do_not_measure_is_not_saved(folder, voices):
    result = run(folder, voices, "--json")
    facts = json.loads(result.stdout)
    assert facts["not_measured"] == {"FAR=1%": 3000, "FAR=0.1%": 30000}
    assert "errors stand behind the EER" in result.stderr
    assert list(facts["thresholds"]) == ["EER"]
    assert facts["replaced"]["list"] == "imagined"
    assert facts["intervals"] is None and facts["speakers"] == 4
    said = "4 speakers have same-speaker trials, 10 are needed"
    assert said in facts["no_intervals"]
    words = [
        "compare",
        "-e",
        folder,
        voices / "ada/0.wav",
        voices / "bob/0.wav",
    ]
    words = [*map(str, words), "--threshold", "FAR=1%"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2
    assert "No threshold is named 'FAR=1%', there are EER" in refused.stderr
    assert "FAR=1% needs 3,000 different-speaker pairs, 'all" in refused.stderr
    table = (folder / "README.md").read_text().split("## How good it is")[1]
    assert "threshold at FAR" not in table
    assert "need, at FAR=1% 3,000 and at FAR=0.1% 30,000: `spee" in table
    said = CliRunner().invoke(main, ["info", "-e", str(folder)]).stdout
    assert "Threshold FAR=1%: not measured, it needs 3,000 different" in said


def test_a_card_of_an_earlier_version_is_renewed(folder, voices):
    """It has the table, and not what too few pairs did not measure."""
    card = folder / "README.md"
    text = card.read_text()
    start, end = text.index("The list has fewer"), text.index("These numbers")
    card.write_text(text[:start] + text[end:])
    assert "README.md" not in run(folder, voices).stdout
    assert "imagined" not in card.read_text()
    assert "The list has fewer" in card.read_text()


def test_a_list_of_models(folder, voices, tmp_path):
    """As verification takes it, with the models beside it."""
    trials = tmp_path / "trials.txt"
    trials.write_text("1 a ada/2.wav\n0 a bob/0.wav\n0 b ada/2.wav\n")
    models = tmp_path / "trials.models"
    models.write_text("a ada/0.wav ada/1.wav\nb bob/1.wav\n")
    facts = json.loads(run(folder, trials, "--root", voices, "--json").stdout)
    assert (facts["n_target"], facts["n_nontarget"]) == (1, 2)
    assert SpeakerEncoder.from_folder(folder).decision.trials == "trials.txt"


def test_a_card_that_was_edited_stays(folder, voices):
    card = folder / "README.md"
    card.write_text("# Ours\n")
    assert "README.md was changed by hand" in run(folder, voices).stdout
    assert card.read_text() == "# Ours\n"


def test_wrong_input_is_one_line_and_changes_nothing(folder, voices, tmp_path):
    before = content(folder)
    one = tmp_path / "one"
    shutil.copytree(voices / "ada", one / "ada")
    broken = shutil.copytree(voices, tmp_path / "broken")
    (broken / "cy" / "0.wav").write_text("no sound")
    targets = tmp_path / "targets.txt"
    targets.write_text("1 ada/0.wav ada/1.wav\n")
    trials = tmp_path / "trials.txt"
    trials.write_text("1 ada/0.wav ada/1.wav\n0 ada/0.wav bob/1.wav\n")
    for words, says in (
        ([one], "holds 4 recordings of 1 speakers. Two speakers are needed"),
        ([voices / "ada"], "0.wav' lies in no speaker's folder"),
        ([tmp_path / "nothing"], "nothing'"),
        ([broken], "cy/0.wav'"),
        ([targets, "--root", voices], "has 1 targets among 1 trials, both kin"),
        ([trials], "3 of 3 recordings are missing under"),
        ([voices, "--root", voices], "--root belongs to a list"),
    ):
        result = run(folder, *words, code=2)
        assert "Traceback" not in result.stderr
        (line,) = [e for e in result.stderr.splitlines() if "Error" in e]
        assert says in line
    assert content(folder) == before
    result = run(tmp_path, voices, code=2)
    assert "holds no encoder.json, so no threshold can be" in result.stderr
