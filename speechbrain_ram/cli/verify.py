"""Verify speakers: any encoder, any trial lists, scores and a report.

Called by ``speechbrain-ram verify`` and ``verify_speakers.py``; the options are
in verify_options.py. Each recording is embedded once, whatever lists it is in,
and kept in OUTPUT/embeddings.safetensors for the next run. OUTPUT/results.md
sums up, and OUTPUT/LIST/ has each list's scores and report.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from speechbrain_ram.cli.trusted import open_encoder
from speechbrain_ram.cli.verify_options import REPLICATES, parse
from speechbrain_ram.corpora.tables import kaldi_parts
from speechbrain_ram.data.manifest import (
    Utterance,
    embedding_names,
    read_manifest,
)
from speechbrain_ram.data.names import missing_hint
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.training.options import check_device
from speechbrain_ram.utils import (
    atomic_writer,
    first_ten,
    keep_freed_memory,
    leave_group,
    one_line_errors,
    printable,
    rank,
)
from speechbrain_ram.verification.bootstrap import Interval, too_few_speakers
from speechbrain_ram.verification.calibration import (
    Calibration,
    fit_calibration,
    pair_quality,
)
from speechbrain_ram.verification.embeddings import extract
from speechbrain_ram.verification.metrics import Metrics
from speechbrain_ram.verification.report import (
    System,
    results_table,
    with_intervals,
    write_report,
)
from speechbrain_ram.verification.scores import (
    TrialVectors,
    cohort_statistics,
    normalise,
    read_scores,
    speaker_means,
    trial_vectors,
    within_whitening,
    write_scores,
)
from speechbrain_ram.verification.speakers import (
    TrialSpeakers,
    check_speakers,
    known_speakers,
    read_speaker_table,
    trial_groups,
    trial_speakers,
)
from speechbrain_ram.verification.store import EmbeddingSet, EmbeddingStore
from speechbrain_ram.verification.trials import (
    TrialError,
    TrialList,
    check_recordings,
    read_list_and_models,
    speakers_beside,
)

logger = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """All that verification reads besides sound and the encoder."""

    lists: dict[str, TrialList]
    dev: list[TrialList]  # one to calibrate on, or none
    places: dict[str, str]  # utterance -> where it is
    known: dict[str, tuple]  # list -> speakers and groups
    cohort: list[Utterance]
    others: dict[str, System]  # that the encoder is compared with


def main(argv: Sequence[str], program: str | None = None) -> dict[str, Metrics]:
    """From options to reports; returns the metrics of each list."""
    options = parse(argv, program)
    output = Path(options.output)
    if not options.encoder:
        trials, systems = read_systems(options.scores)
        known = about(options, trials, {})
        result = report(options, output, "Scores", trials, systems, *known)
        print(printable(results_table(*result)))
        return result[0]
    output.mkdir(parents=True, exist_ok=True)
    given = read_inputs(options)
    encoder = open_encoder(options, own_device(options.device))
    embeddings = embed(
        options,
        encoder,
        list(given.places.values()),
        options.data_root,
        options.store or output / "embeddings.safetensors",
    )
    if options.kaldi:
        embeddings = embeddings.renamed(given.places)
    centre, cohort = embed_cohort(options, encoder, given.cohort)
    follower = rank() > 0
    leave_group()
    if follower:
        return {}

    calibration = None
    for trials in given.dev:
        stages, qualities = score(options, trials, embeddings, centre, cohort)
        calibration = fit_calibration(
            stages[-1], trials.labels, qualities, options.calibration_prior
        )
        calibration.save(output / "calibration.json")

    results, intervals = {}, {}
    for name, trials in given.lists.items():
        scored = score(options, trials, embeddings, centre, cohort)
        folder = output / name
        folder.mkdir(exist_ok=True)
        systems = written(options, folder, trials, *scored, calibration)
        systems |= given.others
        metrics, spread = report(
            options, folder, name, trials, systems, *given.known[name]
        )
        results[name] = metrics[options.name]
        intervals[name] = spread[options.name]
    table = results_table(results, intervals)
    ours = isinstance(encoder, SpeakerEncoder)
    which = "" if ours else f"{encoder}\n\n"
    with atomic_writer(output / "results.md") as file:
        file.write(f"# {options.name}\n\n{which}{table}")
    print(printable(table))
    return results


def read_inputs(options: argparse.Namespace) -> Inputs:
    """Find everything that can be wrong with the input before the work."""
    names = list_names(options.trials)
    lists = {
        name: read_list(options, path)
        for name, path in zip(names, options.trials, strict=True)
    }
    dev = []
    if options.calibrate_on:
        dev = [read_list(options, options.calibrate_on)]
    parts = {}
    if options.kaldi:
        parts = kaldi_parts(options.kaldi, options.data_root)
    places = locate(options, [*dev, *lists.values()], parts)
    check_recordings(dict.fromkeys(places.values()), options.data_root)
    cohort = read_cohort(options)
    spoken_by = {name: part.speaker for name, part in parts.items()}
    known = {
        name: about(options, trials, spoken_by or speakers_beside(path))
        for path, (name, trials) in zip(
            options.trials, lists.items(), strict=True
        )
    }
    others = {}
    if options.scores:
        trials, others = read_systems(options.scores)
        check_same(next(iter(lists.values())), trials, "--scores")
    return Inputs(lists, dev, places, known, cohort, others)


def written(
    options,
    folder: Path,
    trials: TrialList,
    stages: list[np.ndarray],
    qualities: dict[str, np.ndarray],
    calibration: Calibration | None,
) -> dict[str, System]:
    """Write the final scores of a list; what is reported of it."""
    final = stages[-1]
    scale = "Normalised score" if options.normalise else "Cosine score"
    if calibration:
        final = calibration.apply(final, qualities)
        scale = "Log-likelihood ratio"
    write_scores(trials, final, folder / "scores.txt")
    systems = {options.name: System(final, bool(calibration), scale)}
    if len(stages) > 1:
        systems["cosine"] = System(stages[0], scale="Cosine score")
    return systems


def locate(options, lists: list[TrialList], parts) -> dict[str, str]:
    """Where each utterance is: its own name, or as a Kaldi directory says."""
    names = [name for trials in lists for name in trials.utterances]
    if not options.kaldi:
        return {name: name for name in names}
    unknown = [name for name in dict.fromkeys(names) if name not in parts]
    if unknown:
        raise TrialError(
            f"{len(unknown)} utterances of the list are not in "
            f"'{options.kaldi}', for example '{unknown[0]}'. Do the two belong "
            "together?"
        )
    return {name: parts[name].name for name in names}


def read_list(options: argparse.Namespace, path: str) -> TrialList:
    """Read a trial list as the options say."""
    return read_list_and_models(
        path,
        options.form,
        options.models,
        options.strip_prefix,
        options.suffix,
    )


def list_names(paths: list[str]) -> list[str]:
    """File names without ending, with their folders' where two are alike."""
    stems = Counter(Path(path).stem for path in paths)
    names = [
        Path(p).stem
        if stems[Path(p).stem] == 1
        else f"{Path(p).resolve().parent.name}_{Path(p).stem}"
        for p in paths
    ]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two trial lists would both be called '{twice[0]}'")
    return names


def read_systems(arguments: list[str]) -> tuple[TrialList, dict[str, System]]:
    """Read NAME=FILE score files; all must be of one list of trials."""
    first, systems = None, {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals:
            raise ValueError(f"--scores needs NAME=FILE, got '{argument}'")
        trials, scores = read_scores(path)
        if first is None:
            first = trials
        check_same(first, trials, path)
        systems[name] = System(scores)
    return first, systems


def check_same(one: TrialList, other: TrialList, path: str) -> None:
    """Two systems are compared only on the same trials in the same order."""
    same = len(one) == len(other) and (one.labels == other.labels).all()
    for side in ("enrol", "test"):
        if not same:
            break
        rows = {n: i for i, n in enumerate(getattr(one, f"{side}_ids"))}
        names = getattr(other, f"{side}_ids")
        table = np.array([rows.get(name, -1) for name in names])
        same = (table[getattr(other, side)] == getattr(one, side)).all()
    if not same:
        raise ValueError(
            f"'{path}' holds other trials, or in another order, than the list "
            "that it is compared on"
        )


def own_device(device: str) -> str:
    """Join the other ranks if torchrun started us; each takes its GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    return device


def embed(options, encoder, names, root, store) -> EmbeddingSet:
    """Embeddings of these recordings, old or new."""
    return extract(
        encoder.embedder,
        names,
        root,
        store=EmbeddingStore(store, encoder.fingerprint),
    )


def read_cohort(options) -> list[Utterance]:
    """The training utterances whose speakers are the cohort."""
    if not options.cohort:
        return []
    rows, seen = [], Counter()
    for row in read_manifest(options.cohort):
        seen[row.spk_id] += 1
        if seen[row.spk_id] <= (options.cohort_per_speaker or np.inf):
            rows.append(row)
    adaptive = (options.normalise or "").startswith("as-norm")
    chosen = adaptive or "cohort_mean" in options.qualities
    if chosen and options.top_n > len(seen):
        raise ValueError(
            f"--top_n {options.top_n} is more than the {len(seen)} speakers "
            f"of the cohort '{options.cohort}'"
        )
    root = options.cohort_root or options.data_root
    paths = [row.path(root) for row in rows]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(rows)} recordings of the cohort are "
            f"missing: {first_ten(missing)}.{missing_hint(root, missing)} "
            "Is --cohort_root right?"
        )
    return rows


def embed_cohort(
    options, encoder, rows: list[Utterance]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """What to centre and whiten with, and one unit vector a speaker."""
    if not rows:
        return {}, None
    names = embedding_names(rows)
    embeddings = embed(
        options,
        encoder,
        names,
        options.cohort_root or options.data_root,
        Path(options.output) / "cohort.safetensors",
    )
    place = {name: i for i, name in enumerate(embeddings.ids)}
    matrix = embeddings.matrix[[place[name] for name in names]]
    speakers = [row.spk_id for row in rows]
    centre = {}
    if options.center or options.whiten:
        centre["mean"] = matrix.mean(axis=0, dtype=np.float64)
    if options.whiten:
        centre["whitening"] = within_whitening(matrix, speakers)
    return centre, speaker_means(matrix, speakers, **centre)[1]


def score(
    options, trials: TrialList, embeddings: EmbeddingSet, centre, cohort
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Cosines, then normalised ones if asked for; and quality measures."""
    sides = trial_vectors(trials, embeddings.ids, embeddings.matrix, **centre)
    stages = [sides.cosines()]
    if options.normalise:
        stages.append(
            normalise(
                stages[0],
                sides.vectors,
                sides.enrol,
                sides.test,
                cohort,
                options.normalise,
                options.top_n,
            )
        )
    return stages, measures(options, trials, sides, embeddings, cohort)


def measures(
    options, trials: TrialList, sides: TrialVectors, embeddings, cohort
) -> dict[str, np.ndarray]:
    """Quality measures of each trial, by name; see calibration.py."""
    rows = {name: row for row, name in enumerate(embeddings.ids)}
    members = [(name,) for name in trials.utterances]
    if trials.models:
        members += [trials.models[model] for model in trials.enrol_ids]
    members = [[rows[name] for name in each] for each in members]
    lengths = np.linalg.norm(embeddings.matrix, axis=1)
    found = {}
    for quality in options.qualities:
        if quality == "duration":
            seconds = [embeddings.seconds[each].sum() for each in members]
            values = np.log(seconds)
        elif quality == "magnitude":
            values = [lengths[each].mean() for each in members]
        else:
            values = cohort_statistics(sides.vectors, cohort, options.top_n)[0]
        found |= pair_quality(quality, values, sides.enrol, sides.test)
    return found


def about(
    options, trials: TrialList, spoken_by: Mapping[str, str]
) -> tuple[TrialSpeakers | None, dict[str, np.ndarray]]:
    """Who speaks in a list, as far as it is known, and its groups."""
    speakers, rule = None, (options.speaker_pattern, spoken_by)
    if options.bootstrap is None:
        speakers = known_speakers(trials, *rule)
    elif options.bootstrap:
        speakers = trial_speakers(trials, *rule)
        check_speakers(trials, speakers)
    if not options.speakers:
        return speakers, {}
    table = read_speaker_table(options.speakers)
    who = speakers or trial_speakers(trials, *rule)
    return speakers, trial_groups(trials.labels, who, table, options.group_by)


def report(
    options,
    folder: Path,
    title: str,
    trials: TrialList,
    systems: dict[str, System],
    speakers: TrialSpeakers | None,
    groups: dict[str, np.ndarray],
) -> tuple[dict[str, Metrics], dict[str, dict[str, Interval]]]:
    """Intervals where the speakers are known, then the folder."""
    notes = []
    if speakers:
        few = too_few_speakers(trials.labels, speakers.enrol, speakers.test)
        if few:
            notes = [few]
            logger.warning("%s: %s", printable(title), few)
        systems = with_intervals(
            systems,
            trials,
            speakers,
            options.p_targets,
            REPLICATES if options.bootstrap is None else options.bootstrap,
            options.seed,
            groups,
        )
    metrics = write_report(
        folder, title, trials, systems, groups, options.p_targets, notes
    )
    return metrics, {name: each.intervals for name, each in systems.items()}


def run(argv: Sequence[str], program: str) -> NoReturn:
    """Verify and leave; after a user's error with one line and status 2."""
    keep_freed_memory()
    with one_line_errors(program):
        main(argv, program)
    sys.exit()
