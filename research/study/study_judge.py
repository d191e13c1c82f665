"""The evaluation speakers in two halves, their trials, and the error rates."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_plan import HALVES, METRICS

from speechbrain_ram.data.manifest import find_recordings
from speechbrain_ram.verification.bootstrap import bootstrap_draws
from speechbrain_ram.verification.metrics import eer, min_dcf
from speechbrain_ram.verification.scores import read_scores
from speechbrain_ram.verification.trials import TrialList, write_trials


def speaker_of(utterance: str) -> str:
    """The first folder of a path."""
    return utterance.partition("/")[0]


def halves(data_folder: Path, speakers: Sequence[str]) -> dict[str, str]:
    """Speaker -> 'A' or 'B', alike in gender and age where they are known."""
    about = {}
    table = data_folder / "speakers.tsv"
    if table.exists():
        with open(table, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                about[row["speaker"]] = (row["gender"], int(row["age"]))
    order = sorted(speakers, key=lambda s: (about.get(s, ("", 0)), s))
    return {s: HALVES[i % len(HALVES)] for i, s in enumerate(order)}


def write_study_trials(data_folder: Path, path: Path) -> dict[str, str]:
    """All pairs within each half; returns the halves."""
    utterances = find_recordings(data_folder / "dev")
    speakers = [speaker_of(u) for u in utterances]
    half_of = halves(data_folder, sorted(set(speakers)))
    members = np.array([half_of[s] for s in speakers])
    pairs = []
    for half in HALVES:
        mine = np.flatnonzero(members == half)
        pairs.append(mine[np.stack(np.triu_indices(len(mine), k=1))])
    enrol, test = np.concatenate(pairs, axis=1)
    codes = np.unique(speakers, return_inverse=True)[1]
    labels = (codes[enrol] == codes[test]).astype(np.int8)
    ids = tuple(utterances)
    write_trials(TrialList(ids, ids, enrol, test, labels), path)
    return half_of


def judge(
    scores_file: Path, half_of: dict[str, str], replicates: int
) -> dict[str, Any]:
    """EER, minDCF and their bootstrap draws, on each half."""
    trials, scores = read_scores(scores_file)
    enrol_speakers = np.array([speaker_of(u) for u in trials.enrol_ids])
    test_speakers = np.array([speaker_of(u) for u in trials.test_ids])
    enrol, test = enrol_speakers[trials.enrol], test_speakers[trials.test]
    member = np.array([half_of[s] for s in enrol_speakers])[trials.enrol]
    found: dict[str, Any] = {metric: {} for metric in METRICS}
    found["draws"] = {metric: {} for metric in METRICS}
    for seed, half in enumerate(HALVES):  # their speakers are drawn apart
        mine = member == half
        part = scores[mine], trials.labels[mine]
        found["EER"][half] = round(eer(*part), 4)
        found["minDCF(0.01)"][half] = round(min_dcf(*part, 0.01), 5)
        draws = bootstrap_draws(
            *part, enrol[mine], test[mine], [0.01], replicates, seed
        )
        for metric, digits in zip(METRICS, (2, 4), strict=True):
            found["draws"][metric][half] = draws[metric].round(digits).tolist()
    return found
