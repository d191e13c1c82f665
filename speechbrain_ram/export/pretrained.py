"""Starting from an encoder that is trained already."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.logger import get_logger

from speechbrain_ram.export.architecture import EncoderError, read_architecture
from speechbrain_ram.export.folder import read_folder

logger = get_logger(__name__)


def start_from(
    folder: str | os.PathLike,
    encoder_yaml: str,
    embedding_model: torch.nn.Module,
    classifier: torch.nn.Module,
    label_encoder: CategoricalEncoder,
) -> int:
    """Load the weights of an exported folder into a run that begins.

    Speakers whom both know keep their rows of the classifier; the others
    begin anew. So the number of speakers may be another: with the same ones
    this is the start of large-margin fine-tuning, with others of an
    adaptation to another corpus.

    Arguments
    ---------
    folder : path
        Written by :func:`speechbrain_ram.export.folder.export_inference`.
    encoder_yaml : str
        What the run trains, from
        :func:`speechbrain_ram.export.folder.encoder_section`.
    embedding_model, classifier : torch.nn.Module
        Changed in place.
    label_encoder : CategoricalEncoder
        The run's speakers.

    Returns
    -------
    int
        How many speakers were taken over.

    Raises
    ------
    EncoderError
        No such folder, damaged, or of another architecture.
    """
    folder = Path(folder)
    found = read_folder(folder)
    wanted = read_architecture(encoder_yaml)
    if found.architecture != wanted:
        there = found.architecture
        different = sorted(
            f"{key}: {there.get(key)} there, {wanted.get(key)} here"
            for key in {*there, *wanted}
            if there.get(key) != wanted.get(key)
        )
        raise EncoderError(
            f"the encoder in '{folder}' is of another architecture: "
            f"{'; '.join(different)}. Give this run the same."
        )
    embedding_model.load_state_dict(found.weights)

    rows = torch.load(folder / "classifier.ckpt", weights_only=True)["weight"]
    known = CategoricalEncoder()
    known.load(folder / "label_encoder.ckpt")
    both = [name for name in label_encoder.lab2ind if name in known.lab2ind]
    with torch.no_grad():
        for name in both:
            row = rows[known.lab2ind[name]]
            classifier.weight[label_encoder.lab2ind[name]] = row
    logger.info(
        "The encoder of '%s' is the start; %d of %d speakers were known to it.",
        folder,
        len(both),
        len(label_encoder),
    )
    return len(both)
