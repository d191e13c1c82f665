"""From embeddings to scores: cosine similarity over a trial list.

Embeddings come as one matrix [U, E] with the U names of its rows. Each row is
optionally centred with the mean of the training set ("sub-mean"), then scaled
to unit length; a model's vector is the mean of its utterances' unit vectors,
scaled to unit length again. The score of a trial is the dot product of its
two sides. Nothing of the size [trials, E] is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speechbrain_ram.trials import TrialList

# Rows gathered at a time: two blocks of [4096, 512] float32 stay in the cache
_CHUNK = 4096


def score_trials(
    trials: TrialList,
    ids: Sequence[str],
    matrix: np.ndarray,
    mean: np.ndarray | None = None,
) -> np.ndarray:
    """Cosine score of every trial.

    Arguments
    ---------
    trials : TrialList
        N trials.
    ids : sequence of str
        Names of the rows of `matrix`, a superset of `trials.utterances`.
    matrix : np.ndarray
        Shape [U, E], one embedding an utterance.
    mean : np.ndarray, optional
        Shape [E], subtracted from every embedding first.

    Returns
    -------
    np.ndarray
        Shape [N] float32, in [-1, 1], in the order of `trials`.

    Raises
    ------
    ValueError
        An utterance has no row, or its embedding is zero, NaN or infinite.

    Example
    -------
    >>> trials = TrialList(("a",), ("b", "c"), [0, 0], [0, 1], [1, 0])
    >>> embeddings = np.array([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    >>> score_trials(trials, ["a", "b", "c"], embeddings).tolist()
    [1.0, 0.0]
    """
    enrol, test = trial_vectors(trials, ids, matrix, mean)
    return cosine_scores(enrol, test, trials.enrol, trials.test)


def trial_vectors(
    trials: TrialList,
    ids: Sequence[str],
    matrix: np.ndarray,
    mean: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the unique enrolment and test sides.

    Arguments
    ---------
    trials, ids, matrix, mean
        As for :func:`score_trials`.

    Returns
    -------
    tuple of np.ndarray
        Shapes [len(trials.enrol_ids), E] and [len(trials.test_ids), E],
        float32. Use `trials.enrol` and `trials.test` as indices into them.
    """
    rows = {name: row for row, name in enumerate(ids)}
    lost = [name for name in trials.utterances if name not in rows]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(trials.utterances)} utterances have no "
            f"embedding: {', '.join(lost[:10])}. Were the embeddings "
            "extracted for another list?"
        )

    def vectors(names: Sequence[str]) -> np.ndarray:
        picked = matrix[[rows[name] for name in names]]
        return unit_length(picked, mean, names)

    test = vectors(trials.test_ids)
    if trials.models is None:
        return vectors(trials.enrol_ids), test
    enrol = np.stack(
        [vectors(trials.models[m]).mean(axis=0) for m in trials.enrol_ids]
    )
    return unit_length(enrol, names=trials.enrol_ids), test


def unit_length(
    matrix: np.ndarray,
    mean: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Centre rows and scale them to length 1.

    Arguments
    ---------
    matrix : np.ndarray
        Shape [U, E].
    mean : np.ndarray, optional
        Shape [E].
    names : sequence of str, optional
        What the rows are called in an error.

    Returns
    -------
    np.ndarray
        Shape [U, E] float32, a copy.

    Raises
    ------
    ValueError
        A row is zero, NaN or infinite, so that it has no direction.

    Example
    -------
    >>> unit_length(np.array([[3.0, 4.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    matrix = np.array(matrix, dtype=np.float32)
    if mean is not None:
        matrix -= np.asarray(mean, dtype=np.float32)
    lengths = np.sqrt(np.einsum("ue,ue->u", matrix, matrix))
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if bad.size:
        first = bad[0] if names is None else f"'{names[bad[0]]}'"
        raise ValueError(
            f"{bad.size} of {len(matrix)} embeddings are zero, NaN or "
            f"infinite, the first is {first}. Is that recording silent, or "
            "did training diverge?"
        )
    matrix /= lengths[:, None]
    return matrix


def cosine_scores(
    enrol: np.ndarray,
    test: np.ndarray,
    enrol_idx: np.ndarray,
    test_idx: np.ndarray,
) -> np.ndarray:
    """Dot products of chosen pairs of rows.

    Where most pairs of rows are wanted, blocks of the whole product are
    computed and picked from; else the rows are gathered, 4,096 at a time.

    Arguments
    ---------
    enrol, test : np.ndarray
        Shapes [A, E] and [B, E], unit rows.
    enrol_idx, test_idx : np.ndarray
        Shape [N], indices of rows.

    Returns
    -------
    np.ndarray
        Shape [N] float32.

    Example
    -------
    >>> rows = np.eye(2, dtype=np.float32)
    >>> cosine_scores(rows, rows, np.array([0, 0]), np.array([0, 1])).tolist()
    [1.0, 0.0]
    """
    scores = np.empty(len(enrol_idx), dtype=np.float32)
    for start in range(0, len(scores), _CHUNK):
        part = slice(start, start + _CHUNK)
        left, right = enrol[enrol_idx[part]], test[test_idx[part]]
        np.einsum("ne,ne->n", left, right, out=scores[part])
    return scores
