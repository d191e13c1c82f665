"""Speakers who are held out of training, and trials between their utterances.

These trials choose the best checkpoint and make the report of a run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from speechbrain_ram.data.manifest import ManifestError, Utterance
from speechbrain_ram.data.names import session_of
from speechbrain_ram.utils import first_ten
from speechbrain_ram.verification.trials import TrialList


def choose_speakers(
    rows: list[Utterance], share: float, generator: np.random.Generator
) -> set[str]:
    """Draw a share of the speakers, from those with several utterances."""
    if not 0 < share < 1:
        raise ManifestError(
            f"--dev_share is {share}, expected a share between 0 and 1."
        )
    sizes = Counter(row.spk_id for row in rows)
    usable = sorted(speaker for speaker, size in sizes.items() if size > 1)
    count = max(2, round(share * len(sizes)))
    if len(sizes) < 4:
        raise ManifestError(
            "Four speakers are the least, of whom two are held out for trials. "
            f"Found {'is' if len(sizes) == 1 else 'are'} {len(sizes)}: "
            f"{first_ten(sorted(sizes))}. If these are no speakers, is the "
            "corpus given one level too high or too deep?"
        )
    if len(usable) < 2:
        raise ManifestError(
            f"Of {len(sizes)} speakers, {len(usable)} have two utterances or "
            "more. Two such speakers are needed, for trials between "
            "utterances of one speaker. Is the corpus given one level too "
            "high or too deep?"
        )
    most = min(len(usable), len(sizes) - 2)
    if count > most:
        raise ManifestError(
            f"--dev_share {share:g} holds {count} of {len(sizes)} speakers out "
            f"for trials, {most} can be: {len(usable)} have two utterances or "
            "more, and two or more must be left to train on. Give --dev_share "
            f"{math.floor(1e4 * most / len(sizes)) / 1e4:g} or less."
        )
    return set(generator.permutation(usable)[:count].tolist())


def make_trials(
    rows: Sequence[Utterance],
    max_trials: int,
    generator: np.random.Generator,
    max_nontargets: int | None = None,
) -> TrialList:
    """Draw pairs of utterances, at most half of `max_trials` of one speaker,
    and as many of two, or `max_nontargets`.

    Time and memory grow with `max_trials` and the number of utterances, not
    with the number of pairs. No pair is drawn twice. Of a speaker who has
    several sessions, the target trials pair different ones.
    """
    names = tuple(row.id for row in rows)
    sessions = [(row.spk_id, session_of(row.id)) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (sessions[i], i))
    speaker_end = _block_ends([rows[i].spk_id for i in order])
    session_end = _block_ends([sessions[i] for i in order])
    one_session = session_end - _block_begins(session_end) == (
        speaker_end - _block_begins(speaker_end)
    )
    place = np.arange(len(order))
    after = np.where(one_session, place + 1, session_end)
    same = _draw_pairs(after, speaker_end, max(max_trials // 2, 1), generator)
    everyone = np.full(len(order), len(order))
    wanted = max_nontargets or max(len(same), 1)
    different = _draw_pairs(speaker_end, everyone, wanted, generator)
    index = np.array(order)
    parts = [np.sort(index[pairs], axis=1) for pairs in (same, different)]
    pairs = np.concatenate([part[np.lexsort(part.T[::-1])] for part in parts])
    return TrialList(
        names,
        names,
        pairs[:, 0],
        pairs[:, 1],
        np.repeat([1, 0], [len(same), len(different)]),
    )


def _block_ends(keys: Sequence) -> np.ndarray:
    """Where the run of equal keys ends that each one stands in."""
    ends = np.empty(len(keys), np.int64)
    end = len(keys)
    for i in range(len(keys) - 1, -1, -1):
        if i + 1 < len(keys) and keys[i] != keys[i + 1]:
            end = i + 1
        ends[i] = end
    return ends


def _block_begins(ends: np.ndarray) -> np.ndarray:
    return np.searchsorted(ends, ends)


def _draw_pairs(
    first: np.ndarray,
    end: np.ndarray,
    wanted: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Draw pairs (i, j) with first[i] <= j < end[i], [at most wanted, 2].

    Pairs are numbered: those of i come after those of all before i.
    """
    last = np.cumsum(end - first)
    total = int(last[-1])
    if total <= wanted:
        chosen = np.arange(total)
    else:
        chosen = generator.choice(total, wanted, replace=False, shuffle=False)
    i = np.searchsorted(last, chosen, side="right")
    j = first[i] + chosen - (last[i] - (end - first)[i])
    return np.stack([i, j], axis=1)
