"""One embedding per utterance: batches of like length, read ahead.

The encoder is any callable ``encode(wavs [B, T], lens [B]) -> [B, E]``.
Utterances are sorted by length and batched by the frames that a batch holds
with its padding, so that memory is bounded and little is padded. The result
is the same as one utterance at a time (to 1e-4), given an encoder that honours
relative lengths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from speechbrain_ram.audio import audio_info, pad_waveforms, read_audio

Encoder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class EmbeddingSet:
    """Utterances and their embeddings, row by row.

    Arguments
    ---------
    ids : tuple of str
        U unique utterance names.
    matrix : np.ndarray
        Shape [U, E] float32.
    """

    ids: tuple[str, ...]
    matrix: np.ndarray


def extract(
    encode: Encoder,
    utterances: Sequence[str],
    root: str | os.PathLike,
    sample_rate: int = 16000,
    max_frames_per_batch: int = 6000,
    hop: int = 160,
    resample: bool = False,
    mixdown: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> EmbeddingSet:
    """Embed every utterance once.

    Arguments
    ---------
    encode : callable
        `encode(wavs, lens)` with waveforms [B, T] float32 and relative
        lengths [B], returns embeddings [B, E].
    utterances : sequence of str
        Unique names, paths relative to `root`.
    root : path
        Folder of the recordings.
    sample_rate : int
        In Hz, what the encoder was trained on.
    max_frames_per_batch : int
        Bound on frames of `hop` samples in a batch, padding included. An
        utterance longer than that is a batch of its own.
    hop : int
        Samples from one feature frame to the next.
    resample, mixdown : bool
        As for :func:`speechbrain_ram.audio.read_audio`.
    device : str or torch.device
        Where `encode` wants its input.
    progress : bool
        Whether to show a progress bar on stderr.

    Returns
    -------
    EmbeddingSet
        In the order of `utterances`.

    Raises
    ------
    AudioError
        A recording cannot be used.
    ValueError
        No utterance, or `encode` returns another shape.
    """
    utterances = tuple(utterances)
    if not utterances:
        raise ValueError("No utterance to embed: is the trial list empty?")
    paths = [os.path.join(root, name) for name in utterances]
    reading = {
        "sample_rate": sample_rate,
        "resample": resample,
        "mixdown": mixdown,
    }
    matrix: np.ndarray | None = None
    with ThreadPoolExecutor(max_workers=4) as pool:
        seconds = list(pool.map(lambda p: audio_info(p).duration, paths))
        frames = [int(s * sample_rate) // hop + 1 for s in seconds]
        batches = length_batches(frames, max_frames_per_batch)

        def load(batch: list[int]) -> list[torch.Tensor]:
            return [read_audio(paths[i], **reading) for i in batch]

        bar = tqdm(
            total=len(paths), unit="utt", desc="embed", disable=not progress
        )
        with bar:
            for batch, wavs in zip(
                batches, _ahead(pool, load, batches), strict=True
            ):
                padded, lens = pad_waveforms(wavs, hop)
                with torch.inference_mode():
                    out = encode(padded.to(device), lens.to(device))
                if out.ndim != 2 or len(out) != len(batch):
                    raise ValueError(
                        f"encode must return [{len(batch)}, E] for this "
                        f"batch, got {tuple(out.shape)}."
                    )
                rows = out.float().cpu().numpy()
                if matrix is None:
                    matrix = np.empty((len(paths), rows.shape[1]), np.float32)
                matrix[batch] = rows
                bar.update(len(batch))
    return EmbeddingSet(utterances, matrix)


def length_batches(frames: Sequence[int], max_frames: int) -> list[list[int]]:
    """Group items of like length, longest first.

    Longest first, so that a batch that does not fit into memory fails at
    once, and the progress bar's guess errs on the safe side.

    Arguments
    ---------
    frames : sequence of int
        Length of each item.
    max_frames : int
        Bound on (items in a batch) x (its longest item).

    Returns
    -------
    list of list of int
        Indices; every item is in one batch.

    Example
    -------
    >>> length_batches([10, 30, 11, 29], max_frames=60)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(frames)), key=lambda i: (-frames[i], i))
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        if batches and (len(batches[-1]) + 1) * longest <= max_frames:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = frames[i]
    return batches


def _ahead(
    pool: ThreadPoolExecutor, load: Callable, items: Sequence, depth: int = 4
) -> Iterator:
    """`map` that works at most `depth` items ahead of the consumer."""
    todo = iter(items)
    waiting = [pool.submit(load, item) for item in islice(todo, depth)]
    while waiting:
        done = waiting.pop(0).result()
        waiting += [pool.submit(load, item) for item in islice(todo, 1)]
        yield done
