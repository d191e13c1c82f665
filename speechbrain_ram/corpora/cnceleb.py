"""CN-Celeb1 and 2 for training, CN-Celeb1's evaluation part for testing.

As the two archives unpack side by side::

    CN-Celeb_flac/data/id00000/singing-01-001.flac      all of CN-Celeb1
    CN-Celeb_flac/dev/dev.lst                           its training speakers
    CN-Celeb_flac/eval/enroll/id00800-enroll.flac       concatenated enrolment
    CN-Celeb_flac/eval/test/id00800-singing-01-001.flac
    CN-Celeb_flac/eval/lists/{enroll.lst,enroll.map,test.lst,trials.lst}
    CN-Celeb2_flac/data/id10000/..., CN-Celeb2_flac/spk.lst

The lists say ``.wav``, the files are ``.flac``; whichever is there is used.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from speechbrain_ram.corpora.convert import frames_of
from speechbrain_ram.corpora.folder import write_split
from speechbrain_ram.data.audio import read_audio
from speechbrain_ram.data.manifest import (
    ManifestError,
    Utterance,
    build_manifest,
    check_outside,
    check_overlap,
    find_recordings,
)
from speechbrain_ram.data.names import read_text
from speechbrain_ram.utils import atomic_path, first_ten
from speechbrain_ram.verification.trials import (
    TrialList,
    check_utterances,
    read_models,
    read_trials,
    write_models,
    write_trials,
)

logger = get_logger(__name__)

# Training speakers of each part: the lists of the second release, and the
# round number that papers give.
_EXPECTED = {"CN-Celeb1": (797, 800), "CN-Celeb2": (1996, 2000)}
_PAPER = (2800, 200)  # speakers to train on, and to test


def prepare_cnceleb(
    data_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    cnceleb1: str = "CN-Celeb_flac",
    cnceleb2: str | None = "CN-Celeb2_flac",
    join_below: float | None = None,
    joined: str | os.PathLike | None = None,
    valid_fraction: float = 0.02,
    seed: int = 1986,
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
    min_duration: float = 0.1,
    verify: bool = False,
    skip_bad: bool = False,
    workers: int | None = None,
) -> tuple[Path, Path]:
    """Write the manifests and both protocols' trials.

    Beside ``train.csv`` and ``valid.csv`` in `output_dir`, with paths
    relative to `data_root`:

    - ``cnceleb-concat.txt``: enrolment with the concatenated recording of
      ``enroll.lst``;
    - ``cnceleb-average.txt`` with ``cnceleb-average.models``: enrolment with
      the average over the utterances of ``enroll.map``.

    Arguments
    ---------
    data_root : path
        The folder that holds both corpora.
    output_dir : path
        Outside of the corpora.
    cnceleb1, cnceleb2 : str
        Their folders, relative to `data_root`, or absolute. None for
        `cnceleb2` trains on CN-Celeb1 alone.
    join_below : float, optional
        Seconds: shorter utterances of one speaker and genre are joined, up
        to this length, into new files.
    joined : path, optional
        The folder of these files, which `join_below` needs; outside of the
        corpora. A run that goes on has another `output_dir`, but the same
        joined files.
    valid_fraction, seed, sample_rate, resample, mixdown, min_duration
        As for :func:`speechbrain_ram.corpora.folder.prepare_folder`.
    verify, skip_bad, workers
        As for :func:`speechbrain_ram.corpora.folder.prepare_folder`.

    Returns
    -------
    train_csv, valid_csv : pathlib.Path

    Raises
    ------
    ManifestError
        Missing folders or lists, a speaker in both corpora, a training
        speaker in the test, `join_below` without `joined`.
    TrialError
        Wrong trial lists, or lists naming files that are not there.
    """
    data_root, output_dir = Path(data_root), Path(output_dir)
    written = _written_folders(output_dir, join_below, joined)
    first = _corpus_folder(data_root, cnceleb1, written)
    parts = {"CN-Celeb1": (first, first / "dev" / "dev.lst")}
    if cnceleb2 is not None:
        second = _corpus_folder(data_root, cnceleb2, written)
        parts["CN-Celeb2"] = (second, second / "spk.lst")

    trials = {
        name: _read_protocol(first, name) for name in ("concat", "average")
    }
    recordings = _training_recordings(data_root, parts, trials)
    rows = build_manifest(
        data_root,
        recordings,
        cache=output_dir / "headers.cache",
        sample_rate=sample_rate,
        resample=resample,
        mixdown=mixdown,
        min_duration=min_duration,
        verify=verify,
        skipped_list=output_dir / "skipped.txt" if skip_bad else None,
        workers=workers,
    )
    if join_below is not None:
        rows = join_short(
            rows,
            data_root,
            joined,
            join_below,
            _genre,
            sample_rate,
            resample,
            mixdown,
        )
    manifests = write_split(rows, output_dir, valid_fraction, seed)
    prefix = os.path.relpath(first, data_root)
    for name, each in trials.items():
        _write_protocol(each, name, prefix, output_dir)
    return manifests


def _training_recordings(data_root, parts, trials) -> list[tuple[str, str]]:
    """List (path, speaker) of all parts; no tested speaker is in them."""
    recordings: list[tuple[str, str]] = []
    listed: dict[str, str] = {}
    for name, (folder, speaker_list) in parts.items():
        speakers = _read_speakers(speaker_list, name)
        for speaker in speakers:
            if listed.setdefault(speaker, name) != name:
                raise ManifestError(
                    f"The speaker '{speaker}' is in CN-Celeb1's dev.lst and "
                    "in CN-Celeb2's spk.lst; one label would stand for two "
                    "people. Do both folders hold the same corpus?"
                )
        recordings += _speaker_recordings(data_root, folder, speakers)
    tested = {
        os.path.basename(u).split("-")[0]
        for u in (*trials["concat"].utterances, *trials["average"].test_ids)
    }
    check_overlap(
        listed, tested, "CN-Celeb's eval part", "Is dev.lst the official list?"
    )
    found = (len({speaker for _, speaker in recordings}), len(tested))
    if found != _PAPER:
        logger.warning(
            "%d speakers train and %d are tested; the paper has %d and %d, the "
            "release 2,793 and 200.",
            *found,
            *_PAPER,
        )
    return recordings


def _written_folders(output_dir, join_below, joined) -> list[Path]:
    """Where something is written: joined recordings need a place to stay."""
    if join_below is not None and joined is None:
        raise ManifestError(
            f"join_below is {join_below}, but `joined`, the folder of the "
            "joined recordings, is not given. Is it a recipe of yours, older "
            "than this version? Add `joined: !ref <manifests>/joined` to its "
            "'prepare'."
        )
    return [output_dir] if joined is None else [output_dir, Path(joined)]


def _corpus_folder(data_root: Path, name: str, written: list[Path]) -> Path:
    """The folder of one part, after a look at it: nothing is written there."""
    folder = data_root / name
    if not (folder / "data").is_dir():
        raise ManifestError(
            f"'{folder}/data' does not exist. Unpack the corpus into "
            f"'{data_root}', or say where it is (--cnceleb1, --cnceleb2)."
        )
    for each in written:
        check_outside(each, folder)
    return folder


def _read_speakers(path: Path, part: str) -> list[str]:
    """Read a list of speakers, one a line, and count them."""
    try:
        speakers = read_text(path).split()
    except FileNotFoundError:
        raise ManifestError(
            f"The list of {part}'s training speakers, '{path}', does not "
            "exist. Is the archive unpacked to the end?"
        ) from None
    if len(set(speakers)) != len(speakers):
        raise ManifestError(f"'{path}' names a speaker twice.")
    if len(speakers) not in _EXPECTED[part]:
        logger.warning(
            "'%s' names %d speakers; the released list has %d, papers say %d.",
            path,
            len(speakers),
            *_EXPECTED[part],
        )
    return speakers


def _speaker_recordings(
    data_root: Path, folder: Path, speakers: list[str]
) -> list[tuple[str, str]]:
    """List (path relative to data_root, speaker) of one part's speakers."""
    found, wanted = find_recordings(folder / "data", (".flac", ".wav")), {}
    for name in found:
        speaker = name.split("/")[0]
        # Toolkits convert in place: of a pair, the release's FLAC is taken.
        wanted.setdefault((speaker, os.path.splitext(name)[0]), name)
    known = set(speakers)
    prefix = os.path.relpath(folder, data_root)
    recordings = [
        (f"{prefix}/data/{name}", speaker)
        for (speaker, _), name in wanted.items()
        if speaker in known
    ]
    missing = sorted(known - {speaker for _, speaker in recordings})
    if missing:
        logger.warning(
            "%d of %d listed speakers have no recordings under '%s': "
            "%s. Is the archive unpacked to the end?",
            len(missing),
            len(known),
            folder,
            first_ten(missing),
        )
    return recordings


def _genre(name: str) -> str:
    """The genre in a file name: ``singing-01-001.flac`` -> ``singing``."""
    return os.path.basename(name).split("-")[0]


def _read_protocol(folder: Path, name: str) -> TrialList:
    """Read the evaluation trials, enrolled in one of the two ways."""
    lists = folder / "eval" / "lists"
    file_name = {"concat": "enroll.lst", "average": "enroll.map"}[name]
    models = read_models(lists / file_name)
    first = next(iter(models.values()))[0]
    below = folder / ("eval" if name == "concat" else "data")
    suffix = None if os.path.isfile(below / first) else ".flac"
    trials = read_trials(
        lists / "trials.lst", form="cnceleb", models=models, suffix=suffix
    )
    tests = tuple(f"eval/{test}" for test in trials.test_ids)
    if name == "average":
        located = dataclasses.replace(
            trials,
            test_ids=tests,
            models={
                model: tuple(f"data/{u}" for u in utterances)
                for model, utterances in trials.models.items()
            },
        )
    else:
        several = [m for m, files in trials.models.items() if len(files) != 1]
        if several:
            raise ManifestError(
                f"'{lists / file_name}' enrols '{several[0]}' with several "
                "recordings, one concatenated recording was expected."
            )
        files = [trials.models[model][0] for model in trials.enrol_ids]
        located = dataclasses.replace(
            trials,
            enrol_ids=tuple(f"eval/{file}" for file in files),
            test_ids=tests,
            models=None,
        )
    check_utterances(located, folder)
    return located


def _write_protocol(
    trials: TrialList, name: str, prefix: str, output_dir: Path
) -> None:
    """Write trials, and models where enrolment is by model."""

    def below_root(names):
        return tuple(f"{prefix}/{each}" for each in names)

    enrol_ids = trials.enrol_ids
    if trials.models is None:
        enrol_ids = below_root(enrol_ids)
    else:
        write_models(
            {m: below_root(names) for m, names in trials.models.items()},
            output_dir / f"cnceleb-{name}.models",
        )
    test_ids = below_root(trials.test_ids)
    located = dataclasses.replace(
        trials, enrol_ids=enrol_ids, test_ids=test_ids
    )
    write_trials(located, output_dir / f"cnceleb-{name}.txt")


# -- Joining short utterances of one kind into longer recordings --------------
#
# A third of CN-Celeb's utterances last less than 2 seconds. Kaldi's and
# WeSpeaker's recipes join those of one speaker and genre up to 5 seconds.


def join_short(
    rows: Iterable[Utterance],
    data_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    join_below: float,
    kind_of: Callable[[str], str],
    sample_rate: int = 16000,
    resample: bool = False,
    mixdown: bool = False,
) -> list[Utterance]:
    """Join the utterances that are shorter than `join_below` seconds.

    Short utterances of one speaker and kind are taken in order and joined
    until they last `join_below`; what is left at the end goes to the last
    group. One that finds no partner stays as it is. The joined ones are FLAC
    files ``OUTPUT_DIR/SPEAKER/NAME-join3.flac``, written once.
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
    reading = (sample_rate, resample, mixdown)

    def write(group: list[Utterance]) -> Utterance:
        stem = os.path.splitext(os.path.basename(group[0].id))[0]
        name = f"{group[0].spk_id}/{stem}-join{len(group)}.flac"
        path = output_dir / name
        frames = frames_of(path)
        expected = sum(row.duration for row in group) * sample_rate
        if abs(frames - expected) > len(group):  # each may be rounded
            samples = np.concatenate(
                [
                    read_audio(r.path(data_root), r.start, r.stop, *reading)
                    for r in group
                ]
            )
            frames = len(samples)
            _write(path, samples, sample_rate)
        seconds = frames / sample_rate
        return Utterance(
            f"joined/{name}", seconds, str(path), 0, frames, group[0].spk_id
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = pool.map(write, joined)
        bar = tqdm(written, total=len(joined), desc="Joining", unit="file")
        return kept + list(bar)


def _write(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write 16-bit FLAC under a temporary name, then rename."""
    with atomic_path(path) as temporary:
        soundfile.write(
            temporary, samples, sample_rate, format="FLAC", subtype="PCM_16"
        )
