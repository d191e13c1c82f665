"""The fused loss of classes with several vectors, of which the nearest counts.

Against the plain path (the classifier's cosines, SpeechBrain's wrapper) and
against the formulas in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import LogSoftmaxWrapper
from training.test_fused import (
    IN_FLOAT32,
    LargestTensors,
    assert_close,
    fused_loss,
    gradients,
    objective,
)

from speechbrain_ram.classifier import SubCenterClassifier
from speechbrain_ram.losses import FORMS, make_objective
from speechbrain_ram.training import fused as fused_module
from speechbrain_ram.training.diagnostics import (
    effective_classes,
    nearest_others,
    satisfied_below,
    satisfied_share,
    target_cosines,
)
from speechbrain_ram.training.fused import (
    FusedMarginClassifier,
    make_classifier,
)

CASES = [(name, "paper") for name in ("softmax", "am", "aam")]
CASES += [(name, form) for name in ("ram", "raam") for form in FORMS]
CASES += [("real aam", "hinge")]
each_objective = pytest.mark.parametrize("name, form", CASES)
a_few = pytest.mark.parametrize(
    "name, form", [("am", "paper"), *(("raam", form) for form in FORMS)]
)


def batch(n, n_classes, centers, dim, dtype=torch.float32, near=0.0, seed=0):
    """Embeddings, weights [C, K, E], labels; each leans on one sub-centre."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_classes, centers, dim, dtype=dtype, generator=draw)
    labels = torch.randint(n_classes, (n,), generator=draw)
    x = torch.randn(n, dim, dtype=dtype, generator=draw)
    which = torch.randint(centers, (n,), generator=draw)
    return x + near * weight[labels, which], weight, labels


def naive_loss(x, weight, labels, loss_fn):
    """Cosine by cosine, and the table of losses.py."""
    total = 0.0
    for row, label in zip(x, labels.tolist(), strict=True):
        cosines = torch.stack(
            [
                torch.stack([row @ w / row.norm() / w.norm() for w in of_class])
                .sort()
                .values[-1]
                for of_class in weight
            ]
        )
        one = torch.ones(1, 1, dtype=cosines.dtype)
        a = loss_fn(cosines[label].view(1, 1), one).squeeze()
        others = torch.cat([cosines[:label], cosines[label + 1 :]])
        z = loss_fn.scale * others - a
        form = getattr(loss_fn, "form", None)
        if form == "paper":
            terms = z.clamp(min=0).exp()
        elif form == "released":
            terms = torch.where(z > 0, z.exp(), (-a).exp())
        elif form == "hinge":
            terms = torch.expm1(z.clamp(min=0))
        else:
            terms = z.exp()
        total = total + torch.log1p(terms.sum())
    return total / len(labels)


@each_objective
@pytest.mark.parametrize("chunk", [1, 4])
def test_equals_the_formulas_in_float64(name, form, chunk):
    """Chunks of 4 of 11 classes with 3 rows: the last one is cut off."""
    loss_fn = objective(name, 0.2, 15.0, form)
    x, weight, labels = batch(6, 11, 3, 8, torch.float64, near=0.4)
    labels[:4] = torch.tensor([0, 3, 4, 10])  # borders of chunks
    ours = gradients(
        lambda x, w: fused_loss(x, w, labels, loss_fn, chunk), x, weight
    )
    naive = gradients(lambda x, w: naive_loss(x, w, labels, loss_fn), x, weight)
    assert_close(ours, naive, 2e-6 if name in IN_FLOAT32 else 1e-11)


@each_objective
@pytest.mark.parametrize(
    "n, n_classes, centers, chunk, near",
    [
        (1, 2, 2, 1, 0.3),
        (3, 2, 10, 5, 4.0),
        (70, 129, 3, 64, 0.3),
        (5, 300, 4, None, 4.0),
    ],
)
def test_equals_the_plain_path(name, form, n, n_classes, centers, chunk, near):
    loss_fn = objective(name, 0.3, 30.0, form)
    x, weight, labels = batch(n, n_classes, centers, 16, near=near)
    ours = FusedMarginClassifier(16, n_classes, loss_fn, chunk, centers)
    plain = SubCenterClassifier(16, n_classes, centers)
    ours.weight.data.copy_(weight)
    plain.load_state_dict(ours.state_dict())
    wrapper, targets = LogSoftmaxWrapper(loss_fn), labels.unsqueeze(1)

    def run(classifier, loss_of):
        classifier.weight.grad = None
        inputs = x.clone().unsqueeze(1).requires_grad_()  # [N, 1, E]
        loss = loss_of(inputs)
        loss.backward()
        return loss.detach(), inputs.grad, classifier.weight.grad

    assert_close(
        run(ours, lambda x: ours(x, targets)),
        run(plain, lambda x: wrapper(plain(x), targets)),
        1e-5,
    )
    assert torch.equal(ours(x.unsqueeze(1)), plain(x.unsqueeze(1)))

    _, margins = ours(x, labels, with_margins=True)
    cosines = plain(x).squeeze(1).detach().requires_grad_()
    one_hot = F.one_hot(labels, n_classes).to(cosines.dtype)
    F.cross_entropy(loss_fn(cosines, one_hot), labels).backward()
    below = satisfied_below(loss_fn, cosines, labels)
    for found, expected, allowed in [
        (margins.cosine, target_cosines(cosines, labels), 1e-6),
        (margins.nearest, nearest_others(cosines, labels), 1e-6),
        (margins.satisfied, satisfied_share(cosines, labels, below), 1e-6),
        (
            margins.gradient_classes,
            effective_classes(cosines.grad, labels),
            2e-3,  # the wrapper's path loses what is 1e-7 of the largest
        ),
    ]:
        assert (found - expected).abs().max() <= allowed


@a_few
def test_gradcheck(name, form):
    loss_fn = objective(name, 0.2, 5.0, form)
    x, weight, labels = batch(3, 5, 2, 3, torch.float64, seed=3)
    inputs = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: fused_loss(x, w, labels, loss_fn, 3), inputs
    )


@pytest.mark.parametrize("form", FORMS)
def test_ties_within_a_class(form):
    """One of two equal rows learns, as on the plain path: the first."""
    loss_fn = make_objective("ram", 0.3, 30.0, form)
    x, weight, labels = batch(4, 5, 3, 8, torch.float64, near=0.3)
    weight[:, 1] = weight[:, 0]

    def plain(x, w):
        classifier = SubCenterClassifier(8, 5, 3)
        classifier.weight.data = classifier.weight.data.double()
        cosines = torch.func.functional_call(classifier, {"weight": w}, (x,))
        one_hot = F.one_hot(labels, 5).double()
        return F.cross_entropy(loss_fn(cosines.squeeze(1), one_hot), labels)

    def fused(x, w):
        return fused_loss(x, w, labels, loss_fn, 2)

    def of_twins(loss, x, w):
        """Both rows' gradient together: rounding decides which row has it."""
        parts = [each.clone() for each in gradients(loss, x, w)]
        parts[2][:, 0] += parts[2][:, 1]
        parts[2][:, 1] = 0
        return parts

    assert_close(of_twins(fused, x, weight), of_twins(plain, x, weight), 1e-11)
    # Small whole numbers are exact whatever is summed first.
    x, weight = torch.eye(2), torch.tensor([[[2.0, 0]] * 2, [[0, 2.0]] * 2])
    x[0, 1] = 1.0
    labels = torch.tensor([0, 1])
    _, _, grad = gradients(fused, x, weight)
    assert grad[0, 0].any() and not grad[0, 1].any()


@pytest.mark.parametrize("form", FORMS)
def test_backward_visits_violated_classes_only(form, monkeypatch):
    """Of 40 separated classes of 2 rows, samples 0 and 1 violate two."""
    weight = torch.eye(80).view(40, 2, 80)
    x = torch.eye(80)[:16:2].clone()  # on top of the first rows of 8 classes
    x[0, 11] = x[1, 1] = 0.9  # the second rows of classes 5 and 0
    labels = torch.arange(8)
    visited = []
    gradient = fused_module.gradient

    def spy(x, w, *args):
        visited.append(w)
        return gradient(x, w, *args)

    monkeypatch.setattr(fused_module, "gradient", spy)
    loss_fn = make_objective("ram", 0.2, 30.0, form)
    ours = gradients(
        lambda x, w: fused_loss(x, w, labels, loss_fn, 7), x, weight
    )
    rows = torch.cat(visited).argmax(dim=1)
    assert rows.tolist() == [0, 1, 10, 11]
    naive = gradients(lambda x, w: naive_loss(x, w, labels, loss_fn), x, weight)
    assert_close(ours, naive, 2e-6)
    assert ours[2][8:].eq(0).all()  # satisfied, and nobody's target


@a_few
def test_one_row_a_class_is_what_it_was_bit_for_bit(name, form):
    """[C, 1, E] and [C, E] take the same steps."""
    loss_fn = objective(name, 0.3, 30.0, form)
    x, weight, labels = batch(9, 23, 1, 16, near=0.5)

    def loss(x, w):
        return fused_loss(x, w, labels, loss_fn, 7)

    three = gradients(loss, x, weight)
    two = gradients(loss, x, weight.squeeze(1))
    assert torch.equal(three[0], two[0]) and torch.equal(three[1], two[1])
    assert torch.equal(three[2].squeeze(1), two[2])


@a_few
def test_no_large_matrix_beside_the_weight_gradient(name, form):
    x, weight, labels = batch(32, 4_000, 3, 16)
    x.requires_grad_(), weight.requires_grad_()
    with LargestTensors() as made:
        loss_fn = objective(name, 0.2, 30.0, form)
        fused_loss(x, weight, labels, loss_fn, 100).backward()
    weight_bytes = weight.untyped_storage().nbytes()
    known = {weight.data_ptr(), x.data_ptr(), weight.grad.data_ptr()}
    others = [s for place, s in made.sizes.items() if place not in known]
    # [N, 3 chunk] is 5 % of the weights here.
    assert max(others) <= 0.125 * weight_bytes


def test_chunks_keep_their_bytes(monkeypatch):
    """By default so many classes that their rows' cosines make 8 MB."""
    shapes = []
    excess = fused_module.excess

    def spy(x, w, *args):
        shapes.append(len(x) * len(w))
        return excess(x, w, *args)

    monkeypatch.setattr(fused_module, "excess", spy)
    x, weight, labels = batch(64, 20_000, 5, 4)
    fused_loss(x, weight, labels, make_objective("ram"))
    assert len(shapes) > 1 and max(shapes) <= 2**21


def test_which_classifier():
    loss_fn = make_objective("ram")
    kinds = {
        (fused, centers): type(make_classifier(8, 4, loss_fn, fused, centers))
        for fused in (False, True)
        for centers in (1, 3)
    }
    assert kinds == {
        (False, 1): Classifier,
        (False, 3): SubCenterClassifier,
        (True, 1): FusedMarginClassifier,
        (True, 3): FusedMarginClassifier,
    }
    assert make_classifier(8, 4, loss_fn, True, 3).weight.shape == (4, 3, 8)


def test_weights_of_a_wrong_shape():
    classifier = FusedMarginClassifier(
        4, 5, make_objective("ram"), sub_centers=2
    )
    with pytest.raises(ValueError, match=r"\[C, K, E\] .*\(5, 2, 4\)"):
        classifier(torch.ones(2, 3), torch.tensor([0, 4]))
