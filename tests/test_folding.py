"""Folding changes the arithmetic, not the embeddings."""

import pytest
import torch

from speechbrain_ram.resnet import ResNet34, folded


@pytest.fixture(scope="module")
def trained():
    """Batch norms as after training: no mean 0, no scale 1."""
    torch.manual_seed(0)
    network = ResNet34(n_mels=20, channels=(8, 8, 16, 16), embedding_dim=32)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 60, 20))
    return network.eval()


@torch.no_grad()
def test_embeddings_are_the_same(trained):
    feats = torch.randn(3, 71, 20)
    lengths = torch.tensor([1.0, 0.5, 0.03])
    before = {name: t.clone() for name, t in trained.state_dict().items()}
    network = folded(trained)
    for given in (None, lengths, torch.ones(3)):
        expected = trained(feats, given)
        found = network(feats, given)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not any(
        isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()
    )
    for name, tensor in trained.state_dict().items():  # left as it was
        assert torch.equal(tensor, before[name])


@torch.no_grad()
def test_lengths_of_1_are_no_lengths(trained):
    feats = torch.randn(2, 40, 20)
    whole = trained(feats)
    # The last: what KaldiFbank.pad gives where nothing is padded.
    for lengths in (torch.ones(2), torch.full((2,), 39.5 / 40)):
        assert torch.equal(trained(feats, lengths), whole)


@pytest.mark.parametrize("n_frames", [8, 17, 203, 300])
@pytest.mark.parametrize("tile", [16, 120, 296])
@torch.no_grad()
def test_tiles_are_not_seen(trained, tile, n_frames):
    """Neither at their seams nor at the ends of a recording."""
    feats = torch.randn(2, n_frames, 20)
    network = folded(trained)
    network.tile = None
    expected = network(feats)
    network.tile = tile
    assert torch.allclose(network(feats), expected, rtol=1e-5, atol=1e-5)


def test_not_while_training():
    with pytest.raises(ValueError, match="training mode.*encoder.eval"):
        folded(ResNet34(channels=(4, 4, 4, 4)))
