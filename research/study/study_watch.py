"""How a training's encoder verifies, every few epochs.

A grid with `watch_every` trains with :class:`SparingCheckpointer`, which
leaves the encoders of those epochs. This script, which run.py calls after a
training, embeds with each, and writes the error rates on every list and what
the bootstrap makes of them to OUTPUT/watched/EPOCH.json:

    python research/study/study_watch.py OUTPUT DATA_FOLDER TRIALS \\
        [--also FOLDER] [--every 4] [--replicates 300]

Interrupted, it goes on with the epochs that lack. Nothing is chosen here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_judge import halves, part_of_half, rates, speaker_of
from study_plan import HALVES

from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.training.checkpoints import SafeCheckpointer
from speechbrain_ram.utils import atomic_writer
from speechbrain_ram.verification.scores import score_trials
from speechbrain_ram.verification.trials import (
    TrialList,
    check_utterances,
    read_trials,
)

#: The checkpointer of a watched run, as the recipe's key takes it. Arguments
#: are in lists, because a mapping would be merged with the recipe's.
CHECKPOINTER = (
    "!new:study_watch.SparingCheckpointer [{every}, !ref <save_folder>, "
    '{{embedding_model: !ref "<encoder[embedding_model]>", '
    "epoch_counter: !ref <epoch_counter>}}]"
)


def is_watched(meta: Mapping[str, Any], every: int) -> bool:
    """Whether a checkpoint is the end of an epoch that is looked at."""
    epoch = meta.get("epoch", 0) if meta.get("end-of-epoch") else 0
    return epoch > 0 and epoch % every == 0


class SparingCheckpointer(SafeCheckpointer):
    """Never deletes the end of each `every`-th epoch.

    Arguments
    ---------
    every : int
    *args, **kwargs
        As for :class:`speechbrain_ram.training.checkpoints.SafeCheckpointer`.
    """

    def __init__(self, every: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.every = every

    def delete_checkpoints(
        self, *, ckpt_predicate: Callable | None = None, **how
    ) -> None:
        """As the base class, among the others."""

        def may_go(checkpoint) -> bool:
            if is_watched(checkpoint.meta, self.every):
                return False
            return ckpt_predicate is None or ckpt_predicate(checkpoint)

        super().delete_checkpoints(ckpt_predicate=may_go, **how)


def lists_of(
    data_folder: Path, trials_file: Path, also: Path | None
) -> dict[str, tuple[TrialList, Path]]:
    """Name -> trials and the folder of their recordings.

    The halves, and `also` by the name of its folder. Raises a ValueError or
    an AudioError where trials or recordings lack.
    """
    trials = read_trials(trials_file)
    speakers = sorted({speaker_of(u) for u in trials.utterances})
    half_of = halves(data_folder, speakers)
    lists = {
        half: (part_of_half(trials, half_of, half)[0], data_folder / "dev")
        for half in HALVES
    }
    if also is not None:
        if not (also / "trials.txt").is_file():
            raise ValueError(
                f"--also is '{also}', which has no trials.txt. Give the "
                "folder of the second test set, or none."
            )
        lists[also.name] = read_trials(also / "trials.txt"), also
    for each, root in lists.values():
        check_utterances(each, root)
    return lists


def watched_checkpoints(output: Path, every: int) -> Iterator[tuple[int, Path]]:
    """Epochs and their checkpoints, in order."""
    found = SafeCheckpointer(output / "save").list_checkpoints()
    places = {
        each.meta["epoch"]: each.path
        for each in found
        if is_watched(each.meta, every)
    }
    yield from sorted(places.items())


def look(
    encoder: SpeakerEncoder,
    lists: Mapping[str, tuple[TrialList, Path]],
    replicates: int,
) -> dict[str, dict]:
    """EER, minDCF and EER's draws on every list, by its name."""
    found = {}
    for seed, (name, (trials, root)) in enumerate(lists.items()):
        ids = trials.utterances
        matrix = encoder.embed([root / u for u in ids])
        scores = score_trials(trials, ids, matrix)
        one = rates(trials, np.asarray(scores), replicates, seed)
        found[name] = {**one, "draws": one["draws"]["EER"]}
    return found


def read_watched(output: Path) -> list[dict[str, Any]]:
    """What was written for each epoch, in order."""
    files = sorted((output / "watched").glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="of a training")
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("trials", type=Path)
    parser.add_argument("--also", type=Path)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--replicates", type=int, default=300)
    args = parser.parse_args(arguments)
    lists = lists_of(args.data_folder, args.trials, args.also)
    for epoch, checkpoint in watched_checkpoints(args.output, args.every):
        file = args.output / "watched" / f"{epoch:04d}.json"
        if file.exists():
            continue
        encoder = SpeakerEncoder.from_folder(
            checkpoint, resample=False, mixdown=False
        )
        found = {"epoch": epoch, "lists": look(encoder, lists, args.replicates)}
        with atomic_writer(file) as stream:
            json.dump(found, stream)
        print(
            f"epoch {epoch}: "
            + ", ".join(
                f"{n} {v['EER']:.2f}" for n, v in found["lists"].items()
            )
        )


if __name__ == "__main__":
    sys.exit(main())
