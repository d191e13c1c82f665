"""Holding out utterances for validation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from speechbrain.utils.logger import get_logger

from speechbrain_ram.data.manifest import ManifestError, Utterance

logger = get_logger(__name__)


def split_by_utterance(
    rows: Sequence[Utterance], valid_fraction: float, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Split utterances so that every speaker keeps one for training at least.

    The held-out share is spread over the speakers as evenly as whole
    utterances allow: speakers are put in a random order and each gives what
    brings the running total to its share.

    Arguments
    ---------
    rows : sequence of Utterance
        Of two or more speakers.
    valid_fraction : float
        Share held out, in (0, 1).
    seed : int
        The same seed and rows give the same split.

    Returns
    -------
    train, valid : list of Utterance
        Each in the order of `rows`.

    Raises
    ------
    ManifestError
        One speaker only, no speaker with two utterances, or a share outside
        of (0, 1).
    """
    if not 0 < valid_fraction < 1:
        raise ManifestError(
            f"valid_fraction is {valid_fraction}, expected a share between 0 "
            "and 1, for example 0.1. Was a percentage meant?"
        )
    by_speaker = defaultdict(list)
    for index, row in enumerate(rows):
        by_speaker[row.spk_id].append(index)
    if len(by_speaker) < 2:
        raise ManifestError(
            f"There is one speaker only, '{next(iter(by_speaker), None)}'; "
            "telling speakers apart needs two or more. Is the "
            "corpus folder the one that holds the speakers' folders?"
        )
    single = [s for s, members in by_speaker.items() if len(members) == 1]
    if len(single) == len(by_speaker):
        raise ManifestError(
            "No speaker has two utterances, so that none can be held out for "
            "validation. Is the corpus folder one level too high or deep?"
        )
    if single:
        logger.warning(
            "%d speakers have one utterance each, which is kept for "
            "training: %s",
            len(single),
            ", ".join(sorted(single)[:10]),
        )

    generator = np.random.default_rng(seed)
    speakers = generator.permutation(sorted(by_speaker))
    held_out, seen = set(), 0
    for speaker in speakers:
        members = by_speaker[speaker]
        seen += len(members)
        due = round(seen * valid_fraction) - len(held_out)
        due = min(max(due, 0), len(members) - 1)
        held_out.update(generator.permutation(members)[:due].tolist())
    if not held_out:  # a share below one utterance in all
        largest = max(by_speaker.values(), key=len)
        held_out.add(int(generator.choice(largest)))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    valid = [row for i, row in enumerate(rows) if i in held_out]
    return train, valid
