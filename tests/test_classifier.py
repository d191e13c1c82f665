"""Sub-centres: classes of several vectors, of which the nearest counts."""

import pytest
import torch
import torch.nn.functional as F
from small_encoder import DIM, SPEAKERS, export_small
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.lobes.models.ECAPA_TDNN import Classifier

from speechbrain_ram.classifier import SubCenterClassifier


def test_one_sub_centre_is_speechbrains_classifier_bit_for_bit():
    torch.manual_seed(3)
    theirs = Classifier(8, out_neurons=5)
    torch.manual_seed(3)
    ours = SubCenterClassifier(8, 5)
    assert torch.equal(ours.weight, theirs.weight)
    x = torch.randn(4, 1, 8)
    found = []
    for classifier in (ours, theirs):
        cosines = classifier(x)
        cosines.square().sum().backward()
        found.append((cosines, classifier.weight.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("n, n_classes, centers", [(1, 2, 2), (5, 7, 3)])
def test_the_nearest_of_a_class_counts(n, n_classes, centers):
    classifier = SubCenterClassifier(6, n_classes, centers)
    x = torch.randn(n, 1, 6)
    cosines = classifier(x)
    expected = [
        [
            max(F.cosine_similarity(row, w, dim=0).item() for w in of_class)
            for of_class in classifier.weight
        ]
        for row in x.squeeze(1)
    ]
    assert cosines.shape == (n, 1, n_classes)
    assert (cosines.squeeze(1) - torch.tensor(expected)).abs().max() < 1e-6
    assert torch.equal(classifier(x.squeeze(1)), cosines)
    cosines[0, 0, 0].backward()  # one vector of one class learns
    grad = classifier.weight.grad
    assert grad.count_nonzero(dim=2).bool().sum() == 1 and grad[0].any()


def test_initialised_as_so_many_rows():
    torch.manual_seed(3)
    rows = Classifier(8, out_neurons=15).weight
    torch.manual_seed(3)
    weight = SubCenterClassifier(8, 5, 3).weight
    assert torch.equal(weight, rows.view(5, 3, 8))


@pytest.mark.parametrize("sizes", [(0, 3, 2), (8, 0, 2), (8, 3, 0)])
def test_sizes_below_one(sizes):
    with pytest.raises(ValueError, match="sub_centers .*label encoder"):
        SubCenterClassifier(*sizes)


def test_speechbrain_loads_an_exported_one(tmp_path):
    classifier = SubCenterClassifier(DIM, len(SPEAKERS), 3)
    folder = export_small(tmp_path / "encoder", classifier=classifier)
    model = EncoderClassifier.from_hparams(str(folder))
    wavs = torch.randn(2, 16000)
    embeddings = model.encode_batch(wavs)
    cosines, best, index, label = model.classify_batch(wavs)
    assert torch.equal(cosines, classifier(embeddings).squeeze(1))
    assert cosines.shape == (2, len(SPEAKERS))
    assert label == [SPEAKERS[i] for i in index]
