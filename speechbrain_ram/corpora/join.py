"""Joining short utterances of one kind into longer recordings.

A third of CN-Celeb's utterances last less than 2 seconds. Kaldi's and
WeSpeaker's recipes join those of one speaker and genre up to 5 seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from speechbrain_ram.atomic import atomic_path
from speechbrain_ram.data.audio import AudioError, audio_info, read_audio
from speechbrain_ram.data.manifest import Utterance


def join_short(
    rows: Iterable[Utterance],
    data_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    join_below: float,
    kind_of: Callable[[str], str],
    sample_rate: int = 16000,
) -> list[Utterance]:
    """Join the utterances that are shorter than a length.

    Short utterances of one speaker and kind are taken in order and joined
    until they last `join_below`; what is left at the end goes to the last
    group. Long utterances stay where they are, and so does a short one that
    finds no partner. Files that are there already are not written again.

    Arguments
    ---------
    rows : iterable of Utterance
        Whole mono recordings of one sample rate.
    data_root : path
        The corpus folder.
    output_dir : path
        Takes the joined FLAC files, ``SPEAKER/NAME-join3.flac``.
    join_below : float
        Seconds.
    kind_of : callable
        From an utterance's ID to its kind; only one kind is joined.
    sample_rate : int
        In Hz.

    Returns
    -------
    list of Utterance
        Of joined and other utterances. ``wav`` of the joined ones is an
        absolute path.
    """
    kept: list[Utterance] = []
    groups: dict[tuple[str, str], list[list[Utterance]]] = {}
    for row in rows:
        if row.duration >= join_below:
            kept.append(row)
            continue
        lists = groups.setdefault((row.spk_id, kind_of(row.id)), [[]])
        if sum(each.duration for each in lists[-1]) >= join_below:
            lists.append([])
        lists[-1].append(row)
    joined = []
    for lists in groups.values():
        last = lists[-1]
        if len(lists) > 1 and sum(r.duration for r in last) < join_below:
            lists[-2].extend(lists.pop())
        kept += [group[0] for group in lists if len(group) == 1]
        joined += [group for group in lists if len(group) > 1]

    output_dir = Path(output_dir).resolve()

    def write(group: list[Utterance]) -> Utterance:
        stem = os.path.splitext(os.path.basename(group[0].id))[0]
        name = f"{group[0].spk_id}/{stem}-join{len(group)}.flac"
        path = output_dir / name
        frames = sum(row.stop - row.start for row in group)
        if not _is_complete(path, frames):
            pieces = [
                read_audio(r.path(data_root), r.start, r.stop, sample_rate)
                for r in group
            ]
            _write(path, np.concatenate(pieces), sample_rate)
        seconds = frames / sample_rate
        return Utterance(
            f"joined/{name}", seconds, str(path), 0, frames, group[0].spk_id
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = pool.map(write, joined)
        bar = tqdm(written, total=len(joined), desc="Joining", unit="file")
        return kept + list(bar)


def _is_complete(path: Path, frames: int) -> bool:
    try:
        return audio_info(path).frames == frames
    except AudioError:
        return False


def _write(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write 16-bit FLAC under a temporary name, then rename."""
    with atomic_path(path) as temporary:
        soundfile.write(
            temporary, samples, sample_rate, format="FLAC", subtype="PCM_16"
        )
