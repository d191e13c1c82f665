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


def rates(
    trials: TrialList, scores: np.ndarray, replicates: int, seed: int
) -> dict[str, Any]:
    """EER, minDCF and their bootstrap draws, on one list.

    Calls with one seed, on one list, see the same draws of speakers.
    """
    enrol = np.array([speaker_of(u) for u in trials.enrol_ids])[trials.enrol]
    test = np.array([speaker_of(u) for u in trials.test_ids])[trials.test]
    draws = bootstrap_draws(
        scores, trials.labels, enrol, test, [0.01], replicates, seed
    )
    return {
        "EER": round(eer(scores, trials.labels), 4),
        "minDCF(0.01)": round(min_dcf(scores, trials.labels, 0.01), 5),
        "draws": {
            metric: draws[metric].round(digits).tolist()
            for metric, digits in zip(METRICS, (2, 4), strict=True)
        },
    }


def part_of_half(
    trials: TrialList, half_of: dict[str, str], half: str
) -> tuple[TrialList, np.ndarray]:
    """The trials of one half, and which they are, shape [N]."""
    member = np.array([half_of[speaker_of(u)] for u in trials.enrol_ids])
    mine = member[trials.enrol] == half
    ids = trials.enrol_ids, trials.test_ids
    pairs = trials.enrol[mine], trials.test[mine]
    return TrialList(*ids, *pairs, trials.labels[mine]), mine


def judge(
    scores_file: Path, half_of: dict[str, str], replicates: int
) -> dict[str, Any]:
    """EER, minDCF and their bootstrap draws, on each half."""
    trials, scores = read_scores(scores_file)
    found: dict[str, Any] = {metric: {} for metric in METRICS}
    found["draws"] = {metric: {} for metric in METRICS}
    for seed, half in enumerate(HALVES):  # their speakers are drawn apart
        part, mine = part_of_half(trials, half_of, half)
        one = rates(part, scores[mine], replicates, seed)
        for metric in METRICS:
            found[metric][half] = one[metric]
            found["draws"][metric][half] = one["draws"][metric]
    return found
