"""Guards: nobody both trains and tests, nothing is written into a corpus."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from speechbrain_ram.data.manifest import ManifestError


def check_overlap(
    train_speakers: Iterable[str],
    test_speakers: Iterable[str],
    test_name: str,
    remedy: str = "Leave them out of training.",
) -> None:
    """Raise when a speaker is both trained on and tested on.

    Arguments
    ---------
    train_speakers, test_speakers : iterable of str
        Identities in one naming scheme.
    test_name : str
        What the test is called, for the message.
    remedy : str
        What to do about it.

    Raises
    ------
    ManifestError
        Names the first speakers and says how many there are.

    Example
    -------
    >>> check_overlap(["id1", "id2"], ["id3"], "my test")
    >>> check_overlap(["id1", "id3"], ["id3"], "my test")
    Traceback (most recent call last):
    ...
    speechbrain_ram.data.manifest.ManifestError: 1 training speakers are \
also in my test: id3. Its results would be worthless. Leave them out of \
training.
    """
    both = sorted(set(train_speakers) & set(test_speakers))
    if both:
        more = ", ..." if len(both) > 5 else ""
        raise ManifestError(
            f"{len(both)} training speakers are also in {test_name}: "
            f"{', '.join(both[:5])}{more}. Its results would be worthless. "
            f"{remedy}"
        )


def check_outside(output: str | os.PathLike, corpus: str | os.PathLike) -> None:
    """Raise when an output folder lies within a corpus.

    Arguments
    ---------
    output, corpus : path
        Folders, which need not exist.

    Raises
    ------
    ManifestError
        Names both.

    Example
    -------
    >>> check_outside("results", "/data/corpus")
    """
    if Path(output).resolve().is_relative_to(Path(corpus).resolve()):
        raise ManifestError(
            f"The output folder '{output}' lies within the corpus "
            f"'{corpus}', where nothing is ever written. Choose another."
        )
