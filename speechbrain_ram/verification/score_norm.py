"""Score normalisation with a cohort: z-, t-, s-norm and adaptive s-norm.

A cohort is a set of other speakers' vectors, usually one mean a training
speaker. Comparing each side e (enrolment) and t (test) of a trial with it
gives the means and standard deviations (of the population, ddof 0) that put
the trial's score s on a scale of its own:

========  ===============================================================
z-norm    ``(s - mean(e)) / std(e)``
t-norm    ``(s - mean(t)) / std(t)``
s-norm    the mean of the two (Kenny, 2010)
as-norm1  s-norm with each side's statistics over the `top_n` cohort
          members closest to *that* side
as-norm2  s-norm with each side's statistics over the `top_n` cohort
          members closest to the *other* side
========  ===============================================================

as-norm1 and as-norm2 are adaptive S-norm1 (eq. 7) and S-norm2 (eq. 8) of
Matejka et al., "Analysis of Score Normalization in Multilingual Speaker
Recognition", Interspeech 2017.

Statistics are computed once for each utterance, in blocks of a matrix
product; only as-norm2 depends on the pair and does work for each trial.
"""

from __future__ import annotations

import numpy as np
import torch

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
    """Normalise the scores of a trial list.

    Arguments
    ---------
    scores : np.ndarray
        Shape [N], cosines.
    vectors : np.ndarray
        Shape [V, E], unit rows; see
        :class:`speechbrain_ram.verification.scores.TrialVectors`.
    enrol, test : np.ndarray
        Shape [N], the rows of each trial's sides.
    cohort : np.ndarray
        Shape [C, E], unit rows, centred as `vectors` were, of speakers that
        the trials do not have.
    method : str
        One of :data:`METHODS`, see the table above.
    top_n : int
        Cohort members that the adaptive methods keep.

    Returns
    -------
    np.ndarray
        Shape [N] float32.

    Raises
    ------
    ValueError
        Unknown method, a cohort that is too small for `top_n` or of another
        dimension, or one that gives a standard deviation of zero.

    Example
    -------
    >>> rows = np.float32([[1, 0], [0.6, 0.8]])
    >>> cohort = np.float32([[0, 1], [0.8, 0.6]])
    >>> normalise([0.6], rows, [0], [1], cohort, "z-norm").round(3)
    array([0.5], dtype=float32)
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
    """Mean and standard deviation of each row's scores against a cohort.

    Arguments
    ---------
    vectors, cohort : np.ndarray
        Shapes [V, E] and [C, E], unit rows.
    top_n : int, optional
        Keep each row's highest `top_n` scores only.
    rows : np.ndarray, optional
        Which rows are wanted; the others' statistics are NaN.

    Returns
    -------
    tuple of np.ndarray
        Means and standard deviations, shape [V] float32 each.

    Example
    -------
    >>> mean, std = cohort_statistics(np.eye(2), np.eye(2))
    >>> mean.tolist(), std.tolist()
    ([0.5, 0.5], [0.5, 0.5])
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
