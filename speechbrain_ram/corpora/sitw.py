"""Speakers in the Wild: the core-core trials of its dev and eval parts.

In each part, ``lists/enroll-core.lst`` says which file enrols a model
(``12013 audio/unotx.flac``) and ``keys/core-core.lst`` holds the trials with
their truth (``12013 audio/abcde.flac tgt`` or ``imp``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from speechbrain_ram.data.guards import check_outside
from speechbrain_ram.data.manifest import ManifestError
from speechbrain_ram.verification.trials import (
    TrialError,
    TrialList,
    check_utterances,
    read_models,
    read_trials,
    write_trials,
)


def prepare_sitw(
    sitw_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    parts: Sequence[str] = ("dev", "eval"),
    suffix: str | None = None,
) -> dict[str, Path]:
    """Write the core-core trials in VoxCeleb's form.

    Each model of the core condition is one recording, so that model names
    give way to paths.

    Arguments
    ---------
    sitw_root : path
        The folder with ``dev`` and ``eval``.
    output_dir : path
        Takes ``sitw-dev.txt`` and ``sitw-eval.txt``, whose paths are relative
        to `sitw_root`.
    parts : sequence of str
        Which of the two.
    suffix : str, optional
        Ending of the recordings where they were converted, such as '.wav'.

    Returns
    -------
    dict
        Part -> trial list.

    Raises
    ------
    ManifestError
        A missing folder, or an enrolment that is not one recording.
    TrialError
        Missing or wrong lists, or lists naming files that are not there.
    """
    root, output_dir = Path(sitw_root), Path(output_dir)
    check_outside(output_dir, root)
    located = {part: _read_part(root, part, suffix) for part in parts}
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = {}
    for part, trials in located.items():
        paths[part] = output_dir / f"sitw-{part}.txt"
        write_trials(trials, paths[part])
    return paths


def _read_part(root: Path, part: str, suffix: str | None) -> TrialList:
    """Read one part, with models replaced by their recordings."""
    folder = root / part
    if not folder.is_dir():
        raise ManifestError(
            f"'{folder}' does not exist; SITW has the folders dev and eval. "
            "Is --sitw the folder above them?"
        )
    models = read_models(folder / "lists" / "enroll-core.lst")
    several = [name for name, files in models.items() if len(files) != 1]
    if several:
        raise ManifestError(
            f"'{folder}/lists/enroll-core.lst' enrols '{several[0]}' with "
            f"{len(models[several[0]])} fields, one recording was expected. "
            "Is it the list of the assist condition?"
        )
    trials = read_trials(
        folder / "keys" / "core-core.lst",
        form="sitw",
        models=models,
        suffix=suffix,
    )
    # Two models may be enrolled with one recording (two people in it).
    files = [trials.models[model][0] for model in trials.enrol_ids]
    unique = {name: index for index, name in enumerate(dict.fromkeys(files))}
    column = np.array([unique[name] for name in files], dtype=np.int32)
    located = TrialList(
        tuple(f"{part}/{name}" for name in unique),
        tuple(f"{part}/{name}" for name in trials.test_ids),
        column[trials.enrol],
        trials.test,
        trials.labels,
    )
    try:
        check_utterances(located, root)
    except TrialError as error:
        raise TrialError(f"SITW {part}: {error}") from error
    return located
