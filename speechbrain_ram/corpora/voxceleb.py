"""VoxCeleb2 for training, VoxCeleb1-O, -E and -H for testing.

The folders are taken as the archives unpack: below each root, whatever holds
folders named ``idXXXXX`` holds speakers, so that ``dev/wav``, ``dev/aac``,
``wav`` or the root itself all do. The official trial lists are looked for
under their own names beside the audio.

==== ======================== ========================= =====================
list original                 cleaned (the default)     speakers
==== ======================== ========================= =====================
O    ``veri_test.txt``        ``veri_test2.txt``        40, VoxCeleb1 test
E    ``list_test_all.txt``    ``list_test_all2.txt``    1,251, all VoxCeleb1
H    ``list_test_hard.txt``   ``list_test_hard2.txt``   1,190 of VoxCeleb1
==== ======================== ========================= =====================
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from speechbrain.utils.logger import get_logger

from speechbrain_ram.corpora.folder import write_split
from speechbrain_ram.data.manifest import (
    ManifestError,
    build_manifest,
    check_outside,
    check_overlap,
    find_recordings,
)
from speechbrain_ram.data.names import read_text
from speechbrain_ram.utils import first_ten
from speechbrain_ram.verification.trials import (
    TrialError,
    TrialList,
    check_utterances,
    read_models,
    read_trials,
    write_trials,
)

logger = get_logger(__name__)

#: List -> file of the original and of the cleaned trials, with their numbers.
LISTS = {
    "O": (("veri_test.txt", 37720), ("veri_test2.txt", 37611)),
    "E": (("list_test_all.txt", 581480), ("list_test_all2.txt", 579818)),
    "H": (("list_test_hard.txt", 552536), ("list_test_hard2.txt", 550894)),
}

#: Where VoxCeleb's makers publish the lists.
LISTS_URL = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/"

_SPEAKER = re.compile(r"id[0-9]{5}\Z")
_VOXCELEB2_DEV = (5994, 1092009)  # speakers, utterances


def prepare_voxceleb(
    train_root: str | os.PathLike,
    test_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    lists: Sequence[str] = ("O", "E", "H"),
    cleaned: bool = True,
    lists_folder: str | os.PathLike | None = None,
    sitw_root: str | os.PathLike | None = None,
    sitw_overlap: str | os.PathLike | None = None,
    drop_test_speakers: bool = False,
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
    """Write the manifests and the trial lists of a VoxCeleb experiment.

    Beside ``train.csv`` and ``valid.csv`` in `output_dir`: ``vox1-O.txt``,
    ``vox1-E.txt``, ``vox1-H.txt`` with paths relative to `test_root`, and
    ``sitw-dev.txt``, ``sitw-eval.txt`` relative to `sitw_root`.

    Arguments
    ---------
    train_root : path
        VoxCeleb2, converted to WAV or FLAC; its ``test`` folder is left out.
        VoxCeleb1 is possible too, for tests on list O.
    test_root : path
        VoxCeleb1: ``wav/`` with both archives in it, or ``dev/wav/`` and
        ``test/wav/``. List O needs the test archive only.
    output_dir : path
        Outside of the corpora.
    lists : sequence of str
        Which of O, E and H.
    cleaned : bool
        The cleaned lists, or the original ones (``vox1-O-original.txt``).
    lists_folder : path, optional
        Where the lists are; by default `test_root` or its ``meta`` folder.
    sitw_root : path, optional
        SITW, with ``dev`` and ``eval``.
    sitw_overlap : path, optional
        ``voxceleb1_sitw_overlap.txt`` of OpenSLR 49, with one VoxCeleb1
        speaker a line, by name or by id; needed only to test on SITW what
        learned VoxCeleb1. Names need ``vox1_meta.csv``, beside this list or
        where the trial lists are.
    drop_test_speakers : bool
        Leave the lists' speakers out of training instead of raising.
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
        Missing folders, AAC files that are not converted yet, a training
        speaker in a test.
    TrialError
        Missing lists, or lists naming files that are not there.
    """
    train_root, output_dir = Path(train_root), Path(output_dir)
    test_root = Path(test_root)
    for root in (train_root, test_root):
        check_outside(output_dir, root)
    # Trials first: they fail within seconds, headers take minutes.
    trials = {}
    for name in lists:
        path = _find_list(name, cleaned, test_root, lists_folder)
        trials[name] = _locate(read_trials(path), test_root, path)
    recordings = _training_recordings(train_root)
    recordings = _without_tested(recordings, trials, drop_test_speakers)
    if sitw_root is not None:
        folders = _list_folders(test_root, lists_folder)
        recordings = _without_sitw(recordings, sitw_overlap, folders)
        prepare_sitw(sitw_root, output_dir)

    rows = build_manifest(
        train_root,
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
    _compare_with_voxceleb2({row.spk_id for row in rows}, len(rows))
    manifests = write_split(rows, output_dir, valid_fraction, seed)
    for name, each in trials.items():
        suffix = "" if cleaned else "-original"
        write_trials(each, output_dir / f"vox1-{name}{suffix}.txt")
    return manifests


def find_speaker_folders(root: str | os.PathLike) -> list[str]:
    """Folders that hold folders of speakers (``idXXXXX``), relative to `root`.

    It looks three folders deep; '' is `root` itself.
    """
    found, level = [], [""]
    for _ in range(4):
        deeper = []
        for relative in level:
            with os.scandir(os.path.join(root, relative)) as entries:
                folders = [e.name for e in entries if e.is_dir()]
            if any(map(_SPEAKER.match, folders)):
                found.append(relative)
            else:
                deeper += [
                    os.path.join(relative, name)
                    for name in folders
                    if not name.startswith(".")
                ]
        level = deeper
    return sorted(found)


def _speaker_of(name: str) -> str:
    """The speaker in a path: its last component that looks like one."""
    parts = name.split("/")
    return next((p for p in reversed(parts[:-1]) if _SPEAKER.match(p)), "")


def _training_recordings(root: Path) -> list[tuple[str, str]]:
    """List (path, speaker) of the development part."""
    names = find_recordings(root, (".wav", ".flac", ".m4a"))
    development = [n for n in names if "test" not in n.split("/")[:-1]]
    recordings = [(n, _speaker_of(n)) for n in development]
    recordings = [r for r in recordings if r[1]]
    if not recordings:
        raise ManifestError(
            f"'{root}' holds {len(names)} recordings, but none in a training "
            "speaker's folder (idXXXXX, not below 'test'). Is it VoxCeleb's "
            "dev part? Other corpora go through corpora.folder."
        )
    chosen: dict[str, tuple[str, str]] = {}
    for name, speaker in sorted(recordings, key=lambda each: _is_m4a(each[0])):
        key = os.path.splitext(name[name.index(speaker) :])[0]
        first, _ = chosen.setdefault(key, (name, speaker))
        # Toolkits convert in place: of such a pair, the m4a is not needed.
        if first != name and (_is_m4a(first) or not _is_m4a(name)):
            raise ManifestError(
                f"'{root}' holds the same utterance twice: '{first}' "
                f"and '{name}'. Point --voxceleb2 at one of the two folders."
            )
    left = sum(_is_m4a(name) for name, _ in chosen.values())
    if left:
        logger.warning(
            "%d of %d utterances under '%s' are m4a, whose crops take long to "
            "decode in every epoch. Convert them once: "
            "speechbrain-ram convert %s CONVERTED_FOLDER",
            left,
            len(chosen),
            root,
            root,
        )
    return sorted(chosen.values())


def _without_tested(recordings, trials, drop) -> list[tuple[str, str]]:
    """Leave out speakers of the trial lists, or raise where there are some."""
    for name, each in trials.items():
        tested = {_speaker_of(u) for u in each.utterances}
        if drop:
            recordings = [r for r in recordings if r[1] not in tested]
            continue
        check_overlap(
            {speaker for _, speaker in recordings},
            tested,
            f"VoxCeleb1-{name}",
            "VoxCeleb1-E and -H test all of VoxCeleb1: train on VoxCeleb2 "
            "for them. For list O leave its 40 speakers out "
            "(`--drop_test_speakers True`).",
        )
    return recordings


def _is_m4a(name: str) -> bool:
    return name.lower().endswith(".m4a")


def _compare_with_voxceleb2(speakers: set[str], utterances: int) -> None:
    """Say so when VoxCeleb2 is not complete."""
    if any(speaker >= "id10000" for speaker in speakers):
        return  # VoxCeleb1's numbers begin there: another experiment
    if (len(speakers), utterances) != _VOXCELEB2_DEV:
        logger.warning(
            "Training has %d speakers and %d utterances; all of VoxCeleb2 dev "
            "has %d and %d. Was something not unpacked or converted?",
            len(speakers),
            utterances,
            *_VOXCELEB2_DEV,
        )


def _without_sitw(recordings, sitw_overlap, folders) -> list[tuple[str, str]]:
    """Leave out VoxCeleb1 speakers who are in SITW."""
    if all(speaker < "id10000" for _, speaker in recordings):
        return recordings  # VoxCeleb2 dev shares no speaker with SITW
    if sitw_overlap is None:
        raise ManifestError(
            "Training has VoxCeleb1 speakers, 60 of whom are also in SITW "
            "under other names. Give `--sitw_overlap FILE`, the list "
            "voxceleb1_sitw_overlap.txt of OpenSLR 49, or leave --sitw out."
        )
    both = _speaker_ids(Path(sitw_overlap), folders)
    dropped = {r[1] for r in recordings} & both
    logger.info("%d speakers of SITW are left out of training", len(dropped))
    return [r for r in recordings if r[1] not in both]


def _speaker_ids(path: Path, folders: list[Path]) -> set[str]:
    """Read a list of VoxCeleb1 speakers, who go by name or by id."""
    listed = read_text(path).split()
    if all(map(_SPEAKER.match, listed)):
        return set(listed)
    id_of = {each: each for each in listed if _SPEAKER.match(each)}
    for folder in (path.parent, *folders):
        meta = folder / "vox1_meta.csv"
        if meta.is_file():
            for number, line in enumerate(read_text(meta).split("\n"), 1):
                fields = re.split(r"[\t, ]+", line)  # both are about
                if _SPEAKER.match(fields[0]):
                    if len(fields) < 2:
                        place = f"'{meta}', line {number}"
                        raise ManifestError(f"{place}: '{line}' has no name.")
                    id_of[fields[1]] = fields[0]
            break
    strangers = [each for each in listed if each not in id_of]
    if strangers:
        raise ManifestError(
            f"'{path}' names {len(strangers)} speakers whose ids are not "
            f"known: {first_ten(strangers)}. Is vox1_meta.csv "
            "of VoxCeleb1 beside the list, and complete?"
        )
    return {id_of[each] for each in listed}


def _list_folders(test_root: Path, lists_folder) -> list[Path]:
    """Where lists may be."""
    if lists_folder is not None:
        return [Path(lists_folder)]
    return [test_root, test_root / "meta", test_root.parent]


def _find_list(name, cleaned, test_root: Path, lists_folder) -> Path:
    """Find one official list."""
    if name not in LISTS:
        raise TrialError(
            f"VoxCeleb1's lists are {', '.join(LISTS)}, got '{name}'."
        )
    file_name = LISTS[name][bool(cleaned)][0]
    folders = _list_folders(test_root, lists_folder)
    for folder in folders:
        if (folder / file_name).is_file():
            return folder / file_name
    raise TrialError(
        f"The list {file_name} of VoxCeleb1-{name} is not in "
        f"{' or '.join(map(repr, map(str, folders)))}. Get it from "
        f"{LISTS_URL}{file_name}, or leave list {name} out."
    )


def _locate(trials: TrialList, root: Path, path: Path) -> TrialList:
    """Turn a list's names into paths below `root`, and check them."""
    if not root.is_dir():
        raise ManifestError(
            f"The VoxCeleb1 folder '{root}' does not exist. Is --voxceleb1 "
            "spelled right?"
        )
    folder_of: dict[str, str] = {}
    for folder in find_speaker_folders(root):
        for entry in os.scandir(root / folder):
            folder_of.setdefault(entry.name, folder)

    first = trials.utterances[0]
    first = os.path.join(folder_of.get(first.split("/")[0], ""), first)
    suffix = os.path.splitext(first)[1]
    if not os.path.isfile(root / first):  # converted to save space?
        flac = (root / first).with_suffix(".flac")
        suffix = ".flac" if os.path.isfile(flac) else suffix

    def rename(name: str) -> str:
        stem = os.path.splitext(name)[0]
        folder = folder_of.get(name.split("/")[0], "")
        return os.path.join(folder, stem + suffix)

    located = dataclasses.replace(
        trials,
        enrol_ids=tuple(map(rename, trials.enrol_ids)),
        test_ids=tuple(map(rename, trials.test_ids)),
    )
    try:
        check_utterances(located, root)
    except TrialError as error:
        raise TrialError(
            f"The list '{path}' does not fit: {error} VoxCeleb1-E and -H need "
            "both archives of VoxCeleb1 unpacked, O the test archive."
        ) from error
    expected = {n: size for pair in LISTS.values() for n, size in pair}
    if len(trials) != expected.get(path.name, len(trials)):
        logger.warning(
            "'%s' has %d trials, the published list has %d.",
            path,
            len(trials),
            expected[path.name],
        )
    return located


# -- Speakers in the Wild: the core-core trials of its dev and eval parts -----
#
# ``lists/enroll-core.lst`` enrols models, ``12013 audio/unotx.flac``, and
# ``keys/core-core.lst`` holds trials, ``12013 audio/abcde.flac tgt`` (or imp).


def prepare_sitw(
    sitw_root: str | os.PathLike, output_dir: str | os.PathLike
) -> None:
    """Write ``sitw-dev.txt`` and ``sitw-eval.txt``, relative to `sitw_root`.

    Each model of the core condition is one recording, whose path takes the
    place of the model's name.
    """
    root, output_dir = Path(sitw_root), Path(output_dir)
    check_outside(output_dir, root)
    located = {part: _read_part(root, part) for part in ("dev", "eval")}
    output_dir.mkdir(parents=True, exist_ok=True)
    for part, trials in located.items():
        write_trials(trials, output_dir / f"sitw-{part}.txt")


def _read_part(root: Path, part: str) -> TrialList:
    """Read one part, with models replaced by their recordings."""
    folder = root / part
    if not folder.is_dir():
        raise ManifestError(
            f"'{folder}' does not exist; SITW has the folders dev and eval. "
            "Is --sitw the folder above them?"
        )
    models = read_models(folder / "lists" / "enroll-core.lst")
    several = [name for name, files in models.items() if len(files) != 1]
    if several:
        raise ManifestError(
            f"'{folder}/lists/enroll-core.lst' enrols '{several[0]}' with "
            f"{len(models[several[0]])} fields, one recording was expected. "
            "Is it the list of the assist condition?"
        )
    trials = read_trials(
        folder / "keys" / "core-core.lst", form="sitw", models=models
    )
    # Two models may be enrolled with one recording (two people in it).
    files = [trials.models[model][0] for model in trials.enrol_ids]
    unique = {name: index for index, name in enumerate(dict.fromkeys(files))}
    column = np.array([unique[name] for name in files], dtype=np.int32)
    located = TrialList(
        tuple(f"{part}/{name}" for name in unique),
        tuple(f"{part}/{name}" for name in trials.test_ids),
        column[trials.enrol],
        trials.test,
        trials.labels,
    )
    try:
        check_utterances(located, root)
    except TrialError as error:
        raise TrialError(f"SITW {part}: {error}") from error
    return located
