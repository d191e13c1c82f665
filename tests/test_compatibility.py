"""What earlier releases wrote can still be read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from write_release import release_run, waveform

from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.training.checkpoints import SafeCheckpointer
from speechbrain_ram.training.run import RunError

RELEASES = sorted((Path(__file__).parent / "releases").glob("release_*"))


@pytest.fixture(params=RELEASES, ids=lambda folder: folder.name)
def release(request):
    return request.param


def test_the_first_release_is_there():
    assert RELEASES[0].name == "release_0.1.0"
    files = [each for each in RELEASES[0].rglob("*") if each.is_file()]
    assert sum(each.stat().st_size for each in files) < 600_000


def test_checkpoints_are_whole_by_their_checksums(release):
    found = SafeCheckpointer(release / "save").find_checkpoints()
    assert len(found) >= 2
    assert all(each.meta["format"] == 1 for each in found)


def test_exported_folder_gives_the_same_embedding(release):
    encoder = SpeakerEncoder.from_folder(release / "inference")
    embedding = encoder.encode(waveform(), torch.ones(1)).numpy()
    expected = np.load(release / "embedding.npy")
    np.testing.assert_allclose(embedding, expected, atol=1e-4)


def test_a_run_of_unknown_identity_is_not_continued(
    release, tiny_corpus, tmp_path
):
    """The first release did not write down what a run is."""
    run = tmp_path / "run"
    shutil.copytree(release / "save", run / "save")
    with pytest.raises(RunError, match="its data and settings are unknown"):
        release_run(tiny_corpus, run, number_of_epochs=3)
