"""The recipe on real speech: its preparation, and a short training."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import REPOSITORY, run_recipe

from speechbrain_ram.corpora.synthetic import SyntheticCorpus
from speechbrain_ram.verification.trials import check_utterances, read_trials

RECIPE = REPOSITORY / "recipes" / "SpeechOcean762"


def test_download_becomes_speakers_folders(tmp_path):
    speakers = pd.read_csv(RECIPE / "speakers.tsv", sep="\t", dtype=str)
    trials = (RECIPE / "dev_trials.txt").read_text()
    names = set(re.findall(r"\S+/\S+", trials))
    names |= {f"{s}/{s}0001" for s in speakers.speaker}
    download = tmp_path / "speechocean762"
    for name in names:
        speaker, utterance = name.split("/")
        file = download / "WAVE" / f"SPEAKER{speaker}" / f"{utterance}.WAV"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            soundfile.write(file, np.zeros(160), 16000)
    command = [sys.executable, RECIPE / "prepare.py", download, tmp_path / "d"]
    for _ in range(2):  # again is harmless
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "38000 trials" in done.stdout
    trials = read_trials(tmp_path / "d" / "dev_trials.txt")
    check_utterances(trials, tmp_path / "d" / "dev")
    assert len(list((tmp_path / "d" / "train").iterdir())) == 125
    done = subprocess.run(
        [*command[:2], tmp_path, tmp_path / "e"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "165 of 165 speakers" in done.stderr


@pytest.mark.real
def test_committed_lists_are_those_of_the_data(speechocean):
    ours = (RECIPE / "dev_trials.txt").read_text().split()
    theirs = (speechocean / "dev_trials.txt").read_text()
    assert ours == theirs.replace(".ogg", "").split()
    assert (RECIPE / "speakers.tsv").read_text() == (
        speechocean / "speakers.tsv"
    ).read_text()


@pytest.mark.real
@pytest.mark.slow
def test_real_speech_is_learnt(speechocean, tmp_path):
    """Three narrow epochs already halve the untrained encoder's EER."""
    corpus = SyntheticCorpus(
        speechocean / "train",
        speechocean / "dev",
        speechocean / "dev_trials.txt",
    )
    run = run_recipe(
        corpus,
        tmp_path / "run",
        number_of_epochs=3,
        verify_every=3,
        batch_size=32,
        crop_seconds=2.0,
        warmup_steps=50,
    )
    log = (run / "train_log.txt").read_text()
    rates = [float(rate) for rate in re.findall(r"valid EER: ([\d.]+)", log)]
    assert rates[-1] < rates[0] / 2, rates
