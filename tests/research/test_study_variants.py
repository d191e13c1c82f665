"""The study's own losses against formulas in float64 and classes for real."""

import sys

import pytest
import torch
from conftest import REPOSITORY
from speechbrain.nnet.losses import AngularMargin, LogSoftmaxWrapper

from speechbrain_ram.losses import RealAdditiveMargin
from speechbrain_ram.training.diagnostics import (
    MarginDiagnostics,
    satisfied_below,
)

sys.path.insert(0, str(REPOSITORY / "research" / "study"))
from study_variants import (
    HardestOnly,
    OfManyClasses,
    SoftEdgeMargin,
    WithClassesAtZero,
)

N, C, MARGIN, SCALE = 6, 9, 0.2, 30.0


@pytest.fixture
def batch():
    """Cosines that satisfy some classes and not others, and targets."""
    cosines = 0.3 * torch.randn(N, C, dtype=torch.float64)
    targets = torch.arange(N)
    cosines[targets, targets] = torch.linspace(-0.2, 0.9, N).double()
    return cosines.clamp(-1, 1).requires_grad_(), targets


def loss_and_gradient(loss_fn, cosines, targets):
    loss = LogSoftmaxWrapper(loss_fn)(
        cosines.unsqueeze(1), targets.unsqueeze(1)
    )
    return loss, torch.autograd.grad(loss, cosines)[0]


def by_formula(cosines, targets, inside):
    """Mean over samples of log(inside(z)), z [C - 1] of one sample."""
    losses = []
    for row, y in zip(cosines, targets.tolist(), strict=True):
        a = SCALE * (row[y] - MARGIN)
        z = torch.stack([SCALE * row[j] - a for j in range(C) if j != y])
        losses.append(torch.log(inside(z)))
    loss = torch.stack(losses).mean()
    return loss, torch.autograd.grad(loss, cosines)[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_many_classes_are_as_if_they_were_there(batch):
    cosines, targets = batch
    found = loss_and_gradient(OfManyClasses(MARGIN, SCALE, 5000), *batch)
    # The classes that lack, each at the lowest cosine.
    absent = torch.full((N, 5000 - C), -1.0, dtype=torch.float64)
    everybody = torch.cat([cosines, absent], dim=1)
    loss = LogSoftmaxWrapper(RealAdditiveMargin(MARGIN, SCALE))(
        everybody.unsqueeze(1), targets.unsqueeze(1)
    )
    close(found[1], torch.autograd.grad(loss, cosines)[0])
    close(loss - found[0], torch.tensor(1.0 + 5000 - C).double().log())
    same = loss_and_gradient(OfManyClasses(MARGIN, SCALE, C), *batch)
    close(same, loss_and_gradient(RealAdditiveMargin(MARGIN, SCALE), *batch))


@pytest.mark.parametrize(
    "loss_fn",
    [
        AngularMargin(MARGIN, SCALE),
        RealAdditiveMargin(MARGIN, SCALE, "released"),
    ],
)
def test_classes_at_zero_are_as_if_they_were_there(batch, loss_fn):
    cosines, targets = batch
    absent = torch.zeros((N, 5000 - C), dtype=torch.float64)
    everybody = torch.cat([cosines, absent], dim=1)
    loss = LogSoftmaxWrapper(loss_fn)(
        everybody.unsqueeze(1), targets.unsqueeze(1)
    )
    expected = loss, torch.autograd.grad(loss, cosines)[0]
    many = WithClassesAtZero(loss_fn, 5000)
    close(loss_and_gradient(many, *batch), expected)
    same = loss_and_gradient(WithClassesAtZero(loss_fn, C), *batch)
    close(same, loss_and_gradient(loss_fn, *batch))


@pytest.mark.parametrize("sharpness", [1, 2, 8])
def test_soft_edge_is_its_formula(batch, sharpness):
    def inside(z):
        edge = torch.log1p(torch.exp(sharpness * z)) / sharpness
        return 1 + (torch.exp(edge) - 1).sum()

    found = loss_and_gradient(SoftEdgeMargin(MARGIN, SCALE, sharpness), *batch)
    close(found, by_formula(*batch, inside))


def test_soft_edge_lies_between_am_and_hinge(batch):
    am = loss_and_gradient(AngularMargin(MARGIN, SCALE), *batch)
    close(loss_and_gradient(SoftEdgeMargin(MARGIN, SCALE, 1), *batch), am)
    hinge = loss_and_gradient(
        RealAdditiveMargin(MARGIN, SCALE, "hinge"), *batch
    )
    sharp = loss_and_gradient(SoftEdgeMargin(MARGIN, SCALE, 500), *batch)
    torch.testing.assert_close(sharp, hinge, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("hardest", [1, 3, C - 1, 100])
def test_hardest_only_is_its_formula(batch, hardest):
    def inside(z):
        z = z.sort(descending=True).values[:hardest]
        return 1 + (torch.exp(z.clamp(min=0)) - 1).sum()

    found = loss_and_gradient(HardestOnly(MARGIN, SCALE, hardest), *batch)
    close(found, by_formula(*batch, inside))


@pytest.mark.parametrize(
    "loss_fn",
    [
        OfManyClasses(2.0, 30, 5994),
        WithClassesAtZero(AngularMargin(2.0, 30), 5994),
        SoftEdgeMargin(2.0, 30, 4),
        HardestOnly(0.0, 30, 2),
    ],
)
def test_extremes_are_finite(loss_fn):
    cosines = torch.tensor([[1.0, -1, -1], [-1, 1, 1]], requires_grad=True)
    loss, gradient = loss_and_gradient(loss_fn, cosines, torch.tensor([0, 0]))
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize(
    "loss_fn",
    [
        OfManyClasses(MARGIN, SCALE, 5994),
        WithClassesAtZero(AngularMargin(MARGIN, SCALE), 5994),
        SoftEdgeMargin(MARGIN, SCALE, 3),
        HardestOnly(MARGIN, SCALE, 3),
    ],
)
def test_training_can_watch_them(loss_fn, batch):
    """Which asks for the target's logit alone, without other classes."""
    cosines, targets = batch
    cosines = cosines.detach().float()
    own = cosines[range(N), targets]
    below = satisfied_below(loss_fn, cosines, targets)
    torch.testing.assert_close(below, own - MARGIN)
    watch = MarginDiagnostics(loss_fn)
    watch.add(cosines, targets)
    assert len(watch.samples) == 1
