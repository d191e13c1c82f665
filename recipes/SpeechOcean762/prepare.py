#!/usr/bin/env python3
"""Arrange the download of speechocean762 (OpenSLR 101) as speakers' folders.

    python recipes/SpeechOcean762/prepare.py DOWNLOAD DATA_FOLDER

DOWNLOAD is the folder that holds ``WAVE/SPEAKER0001/000010011.WAV`` and so
on. DATA_FOLDER gets links, no copies: ``train/0001/000010011.wav`` (125
speakers), ``dev/...`` (40 other speakers), and ``dev_trials.txt``.
"""

import argparse
import os
from pathlib import Path

import pandas as pd

from speechbrain_ram.utils import atomic_writer, one_line_errors

HERE = Path(__file__).parent


def prepare(download: Path, data_folder: Path) -> None:
    """Link the recordings and write the trial list."""
    speakers = pd.read_csv(HERE / "speakers.tsv", sep="\t", dtype=str)
    folders = {}
    for speaker in speakers.speaker:
        folders[speaker] = download / "WAVE" / f"SPEAKER{speaker}"
    missing = [str(f) for f in folders.values() if not f.is_dir()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(folders)} speakers are not in "
            f"'{download}', for example '{missing[0]}'. Is it the folder "
            "'speechocean762' of the unpacked download?"
        )
    n_linked = 0
    for speaker, split in zip(speakers.speaker, speakers.split, strict=True):
        target = data_folder / split / speaker
        target.mkdir(parents=True, exist_ok=True)
        for recording in sorted(folders[speaker].glob("*.[Ww][Aa][Vv]")):
            link = target / f"{recording.stem}.wav"
            if not link.is_symlink():
                os.symlink(recording.resolve(), link)
            n_linked += 1
    trials = (HERE / "dev_trials.txt").read_text().splitlines()
    with atomic_writer(data_folder / "dev_trials.txt") as file:
        for line in trials:
            label, enrol, test = line.split()
            file.write(f"{label} {enrol}.wav {test}.wav\n")
    print(f"{n_linked} recordings, {len(trials)} trials in '{data_folder}'")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("download", type=Path)
    parser.add_argument("data_folder", type=Path)
    arguments = parser.parse_args()
    with one_line_errors(Path(__file__).name):
        prepare(arguments.download, arguments.data_folder)
