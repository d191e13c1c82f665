"""From embeddings to scores: cosine similarity over a trial list.

Embeddings come as one matrix [U, E] with the U names of its rows. Each row is
optionally centred with the mean of the training set ("sub-mean"), whitened
within speakers, then scaled to unit length; a model's vector is the mean of its
utterances' unit vectors, scaled to unit length again. The score of a trial is
the dot product of its two sides. Nothing of the size [trials, E] is ever built.

A score file has one trial a line, ``ENROL TEST SCORE LABEL``, in the order of
its trial list.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from speechbrain_ram.utils import first_ten, number
from speechbrain_ram.verification.fields import FieldReader, UniqueNames
from speechbrain_ram.verification.trials import TrialList, write_trials

_FIELDS = ("enrol", "test", "score", "label")

# Rows gathered at a time: two blocks of [4096, 512] float32 stay in the cache
_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class TrialVectors:
    """The two sides of every trial, as rows of one matrix."""

    vectors: np.ndarray  # [V, E] float32, unit rows: utterances, models
    enrol: np.ndarray  # [N] int32, rows of `vectors`
    test: np.ndarray  # [N] int32

    def cosines(self) -> np.ndarray:
        """Cosine score of every trial, shape [N] float32."""
        scores = np.empty(len(self.enrol), dtype=np.float32)
        for start in range(0, len(scores), _CHUNK):
            part = slice(start, start + _CHUNK)
            left = self.vectors[self.enrol[part]]
            right = self.vectors[self.test[part]]
            np.einsum("ne,ne->n", left, right, out=scores[part])
        return scores


def score_trials(
    trials: TrialList,
    ids: Sequence[str],
    matrix: np.ndarray,
    mean: np.ndarray | None = None,
) -> np.ndarray:
    """Cosine score of every trial, shape [N] float32.

    The arguments are those of :func:`trial_vectors`.
    """
    return trial_vectors(trials, ids, matrix, mean).cosines()


def trial_vectors(
    trials: TrialList,
    ids: Sequence[str],
    matrix: np.ndarray,
    mean: np.ndarray | None = None,
    whitening: np.ndarray | None = None,
) -> TrialVectors:
    """Unit vectors of the utterances and models that a list names.

    `ids` names the rows of `matrix` [U, E] and holds at least the utterances
    of the list; `mean` [E] is subtracted from every embedding first, which is
    then multiplied by `whitening` [E, E], of :func:`within_whitening`. An
    utterance on both sides gets one row.
    """
    known = {name: row for row, name in enumerate(ids)}
    names = trials.utterances
    lost = [name for name in names if name not in known]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(names)} utterances have no embedding: "
            f"{first_ten(lost)}. Were the embeddings extracted for "
            "another list?"
        )
    picked = matrix[[known[name] for name in names]]
    vectors = unit_length(picked, mean, names, whitening)
    rows = {name: row for row, name in enumerate(names)}
    test_rows = np.array([rows[n] for n in trials.test_ids], np.int32)
    if trials.models is None:
        enrol_rows = np.array([rows[n] for n in trials.enrol_ids], np.int32)
    else:
        models = np.stack(
            [
                vectors[[rows[name] for name in trials.models[model]]].mean(0)
                for model in trials.enrol_ids
            ]
        )
        enrol_rows = np.arange(len(models), dtype=np.int32) + len(vectors)
        models = unit_length(models, names=trials.enrol_ids)
        vectors = np.concatenate([vectors, models])
    return TrialVectors(
        vectors, enrol_rows[trials.enrol], test_rows[trials.test]
    )


def unit_length(
    matrix: np.ndarray,
    mean: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    whitening: np.ndarray | None = None,
) -> np.ndarray:
    """Subtract `mean` [E] from rows [U, E], multiply them by `whitening`
    [E, E], scale them to length 1: a copy, float32.

    A row without direction (zero, NaN, infinite) is a ValueError that calls it
    by its name in `names`.
    """
    matrix = np.array(matrix, dtype=np.float32)
    if mean is not None:
        matrix -= np.asarray(mean, dtype=np.float32)
    if whitening is not None:
        matrix = matrix @ np.asarray(whitening, dtype=np.float32)
    lengths = np.sqrt(np.einsum("ue,ue->u", matrix, matrix))
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if bad.size:
        first = f"row {bad[0]}" if names is None else f"'{names[bad[0]]}'"
        raise ValueError(
            f"{bad.size} of {len(matrix)} embeddings are zero, NaN or "
            f"infinite, the first is {first}. Is that recording silent, or "
            "did training diverge?"
        )
    matrix /= lengths[:, None]
    return matrix


def speaker_means(
    matrix: np.ndarray,
    speakers: Sequence[str],
    mean: np.ndarray | None = None,
    whitening: np.ndarray | None = None,
) -> tuple[tuple[str, ...], np.ndarray]:
    """One unit vector a speaker: the usual cohort for score normalisation.

    `speakers` says whose utterance each row of `matrix` is; `mean` and
    `whitening` as for :func:`trial_vectors`. Returns the names in order of
    appearance, and the means of their unit vectors, scaled to length 1.
    """
    names, codes = _speakers_of(matrix, speakers)
    sums = np.zeros((len(names), matrix.shape[1]), dtype=np.float32)
    np.add.at(sums, codes, unit_length(matrix, mean, whitening=whitening))
    return names, unit_length(sums, names=names)


def within_whitening(matrix: np.ndarray, speakers: Sequence[str]) -> np.ndarray:
    """A map [E, E] after which speakers vary alike in all directions.

    Within-class covariance normalisation (Hatch, Kajarekar and Stolcke,
    Interspeech 2006): with S the covariance of embeddings around their
    speaker's mean, W W^T is the inverse of S + trace(S)/E I. The second half
    keeps directions in which few speakers were seen from being blown up.

    `speakers` says whose embedding each row of `matrix` [U, E] is. Raises a
    ValueError where no speaker has two that differ.
    """
    names, codes = _speakers_of(matrix, speakers)
    size = matrix.shape[1]
    means = np.zeros((len(names), size))
    np.add.at(means, codes, matrix)
    means /= np.bincount(codes)[:, None]
    scatter = np.zeros((size, size))
    for start in range(0, len(matrix), _CHUNK):
        part = slice(start, start + _CHUNK)
        difference = matrix[part] - means[codes[part]]
        scatter += difference.T @ difference
    share = scatter.trace() / size
    if not share > 0:
        raise ValueError(
            f"whitening needs speakers with two embeddings that differ, got "
            f"{len(matrix)} embeddings of {len(names)} speakers. Is "
            "--cohort_per_speaker 1, or has each one recording?"
        )
    root = np.linalg.cholesky(scatter / share + np.eye(size))
    return np.linalg.inv(root).T


def _speakers_of(
    matrix: np.ndarray, speakers: Sequence[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names in order of appearance, and each row's."""
    if len(matrix) != len(speakers):
        raise ValueError(
            f"one speaker an embedding is needed, got {len(matrix)} "
            f"embeddings and {len(speakers)} speakers."
        )
    column = UniqueNames()
    column.add(np.array(speakers, dtype=object))
    return column.finish()


def write_scores(
    trials: TrialList, scores: np.ndarray, path: str | os.PathLike
) -> None:
    """Write ``ENROL TEST SCORE LABEL``, one trial a line.

    Scores have the digits that give the same number back when they are read.
    """
    if len(scores) != len(trials):
        raise ValueError(
            f"one score a trial is needed, got {len(scores)} scores for "
            f"{len(trials)} trials."
        )
    write_trials(trials, path, _FIELDS, scores)


def read_scores(path: str | os.PathLike) -> tuple[TrialList, np.ndarray]:
    """Read what :func:`write_scores` writes: the trials, and float64 scores."""

    def problem(fields: dict[str, str]) -> str | None:
        try:
            number(fields["score"])
        except ValueError:
            return f"has the score '{fields['score']}'"
        if fields["label"] not in ("0", "1"):
            return f"has the label '{fields['label']}'"
        return None

    lines = FieldReader(
        path, _FIELDS, problem, "a finite number as SCORE and LABEL 1 or 0."
    )
    columns = {name: UniqueNames() for name in ("enrol", "test", "label")}
    scores = []
    for chunk in lines.chunks():
        for name, column in columns.items():
            column.add(chunk[name])
        try:
            # no 1_0 and no digits of other scripts, which Python takes
            if not set("".join(chunk["score"])) <= set("+-.0123456789eE"):
                raise lines.first_bad_line()
            scores.append(chunk["score"].astype(np.float64))
        except ValueError as error:
            raise lines.first_bad_line() from error
        known = set(columns["label"].ids) <= {"0", "1"}
        if not (known and np.isfinite(scores[-1]).all()):
            raise lines.first_bad_line()
    label_ids, codes = columns["label"].finish()
    labels = np.array([int(text) for text in label_ids], np.int8)[codes]
    enrol_ids, enrol = columns["enrol"].finish()
    test_ids, test = columns["test"].finish()
    trials = TrialList(enrol_ids, test_ids, enrol, test, labels)
    return trials, np.concatenate(scores)


# -- Score normalisation with a cohort: z-, t-, s-norm and adaptive s-norm ----
#
# A cohort is a set of other speakers' vectors, usually one mean a training
# speaker. Comparing each side e (enrolment) and t (test) of a trial with it
# gives the means and standard deviations (of the population, ddof 0) that put
# the trial's score s on a scale of its own:
#
# ========  ===============================================================
# z-norm    ``(s - mean(e)) / std(e)``
# t-norm    ``(s - mean(t)) / std(t)``
# s-norm    the mean of the two (Kenny, 2010)
# as-norm1  s-norm with each side's statistics over the `top_n` cohort
#           members closest to *that* side
# as-norm2  s-norm with each side's statistics over the `top_n` cohort
#           members closest to the *other* side
# ========  ===============================================================
#
# as-norm1 and as-norm2 are adaptive S-norm1 (eq. 7) and S-norm2 (eq. 8) of
# Matejka et al., "Analysis of Score Normalization in Multilingual Speaker
# Recognition", Interspeech 2017.
#
# Statistics are computed once for each utterance, in blocks of a matrix
# product; only as-norm2 depends on the pair and does work for each trial.

METHODS = ("z-norm", "t-norm", "s-norm", "as-norm1", "as-norm2")

_ROWS = 2048  # rows compared with the whole cohort at a time
_TRIALS = 4096  # trials of as-norm2 at a time: [4096, top_n] cohort scores


def normalise(
    scores: np.ndarray,
    vectors: np.ndarray,
    enrol: np.ndarray,
    test: np.ndarray,
    cohort: np.ndarray,
    method: str = "as-norm1",
    top_n: int = 300,
) -> np.ndarray:
    """Normalise cosines [N] with one of the :data:`METHODS`: shape [N]
    float32.

    `enrol` and `test` are the rows of `vectors` [V, E] of each trial's sides,
    as in :class:`TrialVectors`. `cohort` [C, E] holds unit rows, centred as
    `vectors` were, of speakers that the trials do not have; adaptive methods
    keep `top_n`.
    """
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got '{method}'."
        )
    adaptive = method.startswith("as-norm")
    size = top_n if adaptive else len(cohort)
    if not 2 <= size <= len(cohort):
        raise ValueError(
            f"'{method}' needs a cohort of at least "
            f"{max(top_n, 2) if adaptive else 2} speakers, got {len(cohort)}"
            + (f" with top_n={top_n}." if adaptive else ".")
        )
    if cohort.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"the cohort has {cohort.shape[1]} dimensions, the embeddings "
            f"{vectors.shape[1]}. Do they come from one encoder?"
        )
    enrol, test = np.asarray(enrol), np.asarray(test)
    scores = np.asarray(scores, dtype=np.float32)
    if method == "as-norm2":
        nearest = _nearest(vectors, cohort, top_n)
        sides = _cross_statistics(vectors, cohort, enrol, test, nearest)
    else:
        sides = []
        if method != "t-norm":
            sides.append(enrol)
        if method != "z-norm":
            sides.append(test)
        keep = top_n if adaptive else None
        mean, std = cohort_statistics(
            vectors, cohort, keep, np.unique(np.concatenate(sides))
        )
        sides = [(mean[rows], std[rows]) for rows in sides]
    total = np.zeros_like(scores)
    for mean, std in sides:
        if not (std > 0).all():
            raise ValueError(
                "the cohort scores of an utterance are all the same, so that "
                "it cannot be normalised. Does the cohort repeat one speaker?"
            )
        total += (scores - mean) / std
    return total / len(sides)


def cohort_statistics(
    vectors: np.ndarray,
    cohort: np.ndarray,
    top_n: int | None = None,
    rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [V] of each row's scores against a cohort.

    Over the highest `top_n` scores, if given; NaN for rows not in `rows`.
    """
    rows = np.arange(len(vectors)) if rows is None else rows
    mean = np.full(len(vectors), np.nan, dtype=np.float32)
    std = mean.copy()
    for part, block in _blocks(vectors, cohort, rows):
        if top_n is not None:
            block = block.topk(top_n, dim=1, sorted=False).values
        spread, centre = torch.std_mean(block, dim=1, correction=0)
        mean[part], std[part] = centre.numpy(), spread.numpy()
    return mean, std


def _blocks(vectors: np.ndarray, cohort: np.ndarray, rows: np.ndarray):
    """Yield some rows at a time and their scores against the cohort."""
    others = torch.as_tensor(cohort, dtype=torch.float32).T
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        block = torch.as_tensor(vectors[part], dtype=torch.float32)
        yield part, block @ others


def _nearest(vectors: np.ndarray, cohort: np.ndarray, top_n: int) -> np.ndarray:
    """Indices of each row's closest cohort members, shape [V, top_n]."""
    nearest = np.empty((len(vectors), top_n), dtype=np.int32)
    for part, block in _blocks(vectors, cohort, np.arange(len(vectors))):
        top = block.topk(top_n, dim=1, sorted=False).indices
        nearest[part] = top.numpy()
    return nearest


def _cross_statistics(
    vectors: np.ndarray,
    cohort: np.ndarray,
    enrol: np.ndarray,
    test: np.ndarray,
    nearest: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and deviation of each trial's sides, over the other's nearest."""
    sides = []
    for side, other in ((enrol, test), (test, enrol)):
        order = np.argsort(side, kind="stable")
        sides.append((side, other, order, np.empty((2, len(side)), np.float32)))
    both = np.unique(np.concatenate([enrol, test]))
    for part, block in _blocks(vectors, cohort, both):
        for side, other, order, found in sides:
            first, last = np.searchsorted(
                side, [part[0], part[-1] + 1], sorter=order
            )
            for start in range(first, last, _TRIALS):
                trials = order[start : min(start + _TRIALS, last)]
                local = torch.from_numpy(np.searchsorted(part, side[trials]))
                chosen = torch.from_numpy(nearest[other[trials]]).long()
                picked = block[local[:, None], chosen]
                spread, centre = torch.std_mean(picked, dim=1, correction=0)
                found[:, trials] = torch.stack([centre, spread]).numpy()
    return [(found[0], found[1]) for *_, found in sides]
