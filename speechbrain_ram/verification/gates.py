"""What must be so before a speaker's model can be relied on.

Recordings that are enrolled under one name are to be of one speaker: each is
compared with the others. Scores are cosines, whose scale is the encoder's, so
a gate is best one of its folder's thresholds, not a number of its own.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence

import numpy as np

from speechbrain_ram.utils import first_ten

_NAME = 1000  # characters


class EnrolmentError(ValueError):
    """The database or what is put into it is wrong; the message says why."""


def is_name(name: object) -> bool:
    """Whether it may name a speaker."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= _NAME
        and name == name.strip()
        and name.isprintable()
    )


def checked_name(name: str) -> str:
    """The name, or an EnrolmentError."""
    if not is_name(name):
        raise EnrolmentError(
            f"{reprlib.repr(name)} is not a name for a speaker: one printable "
            f"line of at most {_NAME} characters, without spaces around it, "
            "is needed."
        )
    return name


def agreements(
    units: np.ndarray, enrolled: np.ndarray | None = None
) -> np.ndarray:
    """Cosine of each recording with the sum of the others, shape [N].

    `units` [N, E] have length 1; `enrolled` [E] is the sum of those that are
    enrolled already. A recording without others agrees: infinity.
    """
    if enrolled is None:
        enrolled = np.zeros(units.shape[1], units.dtype)
        if len(units) == 1:
            return np.array([np.inf])
    others = units.sum(axis=0) + enrolled - units
    lengths = np.maximum(np.linalg.norm(others, axis=1), 1e-6)
    return np.einsum("ne,ne->n", units, others) / lengths


def misfits(
    units: np.ndarray, least: float, enrolled: np.ndarray | None = None
) -> dict[int, float]:
    """Recordings that score below `least` with the others, by their place.

    They are taken away one at a time, the lowest score first, until those left
    agree: one wrong recording lowers the scores of the others, too. Of two
    that disagree nobody can tell which is the wrong one, so both are named.
    Arguments are those of :func:`agreements`.
    """
    left, found = list(range(len(units))), {}
    while left:
        scores = agreements(units[left], enrolled)
        worst = int(scores.argmin())
        if scores[worst] >= least:
            break
        away = [left[worst]]
        if enrolled is None and len(left) == 2:
            away = list(left)
        found |= {i: float(scores[worst]) for i in away}
        left = [i for i in left if i not in away]
    return found


def refuse_misfits(
    wrong: Mapping[str, Mapping[int, float]],
    least: float,
    called: Mapping[str, Sequence[str]],
) -> None:
    """Raise an EnrolmentError that names the misfits of all speakers."""
    named = []
    for speaker, found in wrong.items():
        for i, score in found.items():
            name = called[speaker][i] if called else f"recording {i + 1}"
            named.append(f"'{name}' of '{speaker}' ({score:.3f})")
    if named:
        raise EnrolmentError(
            "Recordings do not fit the others of their speaker by a score of "
            f"{least:.3f} or more: {first_ten(named)}. Is somebody else in "
            "them, or much noise? Nobody was enrolled. Leave them out, or give "
            "a lower agreement (--agreement)."
        )
