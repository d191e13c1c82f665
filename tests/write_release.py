"""Write what test_compatibility.py reads: once for each release.

    python tests/write_release.py tests/data/release_0.1.0

An interrupted run of a tiny network, its two newest checkpoints included, an
exported folder, and the embedding that it gives.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import run_recipe
from speechbrain.utils.checkpoints import Checkpointer
from survival import OPTIONS

from speechbrain_ram.corpora.synthetic import make_synthetic
from speechbrain_ram.inference import SpeakerEncoder

CORPUS = {
    "n_speakers": 6,
    "n_utterances": 5,
    "n_test_speakers": 4,
    "n_test_utterances": 4,
    "min_seconds": 0.8,
    "max_seconds": 1.2,
}
SETTINGS = {
    "channels": [2, 2, 2, 2],
    "embedding_dim": 8,
    "channels_last": False,
    "ckpt_interval_minutes": 0,
}


def release_run(corpus, folder, **overrides):
    """A run of the tiny network."""
    settings = {**SETTINGS, **overrides}
    dimension = settings.pop("embedding_dim")
    settings["encoder"] = {"embedding_dim": dimension}
    return run_recipe(corpus, folder, *OPTIONS, **settings)


def waveform():
    """What the embedding is of."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 16000, generator=generator) * 0.1


def main(target):
    target = Path(target)
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_synthetic(Path(folder) / "corpus", **CORPUS)
        run = release_run(corpus, Path(folder) / "run")
        target.mkdir(parents=True)
        for name in ("save", "inference"):
            shutil.copytree(run / name, target / name)
    for old in Checkpointer(target / "save").find_checkpoints()[2:]:
        shutil.rmtree(old.path)
    encoder = SpeakerEncoder.from_folder(target / "inference")
    embedding = encoder.encode(waveform(), torch.ones(1))
    np.save(target / "embedding.npy", embedding.numpy())


if __name__ == "__main__":
    main(sys.argv[1])
