"""RealMargin around SpeechBrain's margin losses and around one of ours."""

import math

import pytest
import torch
from speechbrain.nnet.losses import (
    AdditiveAngularMargin,
    AngularMargin,
    LogSoftmaxWrapper,
)
from torch.nn import functional as F

from speechbrain_ram.losses import (
    FORMS,
    RealAdditiveAngularMargin,
    RealAdditiveMargin,
    RealMargin,
)


def batch():
    """Cosines [12, 9] in float64 and targets [12]."""
    generator = torch.Generator().manual_seed(4)
    cosines = torch.rand(12, 9, generator=generator, dtype=torch.float64)
    return 2 * cosines - 1, torch.randint(0, 9, (12,), generator=generator)


def wrapped(loss_fn, cosines, targets):
    """The loss as SpeechBrain computes it."""
    return LogSoftmaxWrapper(loss_fn)(cosines.unsqueeze(1), targets[:, None])


def cubed(cosines, one_hot):
    """A user's own margin: another curve for the target, and a bias."""
    return 20 * (one_hot * cosines**3 + (1 - one_hot) * cosines) - 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "loss_fn",
    [
        AngularMargin(0.2, 20),
        AdditiveAngularMargin(0.2, 20),
        AdditiveAngularMargin(0.4, 20, easy_margin=True),
        cubed,
    ],
    ids=["am", "aam", "easy", "own"],
)
def test_any_margin_equals_the_table(loss_fn, form):
    cosines, targets = batch()
    trivial = loss_fn(cosines, F.one_hot(targets, 9).to(cosines.dtype))
    expected = 0.0
    for logits, y in zip(trivial.tolist(), targets.tolist(), strict=True):
        a = logits.pop(y)
        terms = {
            "paper": lambda logit, a: math.exp(max(0.0, logit - a)),
            "released": lambda logit, a: math.exp(
                (logit if logit >= a else 0.0) - a
            ),
            "hinge": lambda logit, a: math.expm1(max(0.0, logit - a)),
        }[form]
        expected += math.log1p(sum(terms(logit, a) for logit in logits)) / 12
    loss = wrapped(RealMargin(loss_fn, form), cosines, targets)
    assert float(loss) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "trivial, named",
    [
        (AngularMargin, RealAdditiveMargin),
        (AdditiveAngularMargin, RealAdditiveAngularMargin),
    ],
)
def test_around_the_hosts_classes_it_is_the_named_loss(trivial, named, form):
    cosines, targets = batch()
    found = []
    for loss_fn in (RealMargin(trivial(0.3, 30), form), named(0.3, 30, form)):
        x = cosines.float().requires_grad_()
        loss = wrapped(loss_fn, x, targets)
        loss.backward()
        found.append((loss.detach(), x.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_attributes_are_those_of_the_loss_inside():
    inner = AngularMargin(0.2, 20)
    loss_fn = RealMargin(inner, "hinge")
    assert (loss_fn.margin, loss_fn.scale, loss_fn.form) == (0.2, 20, "hinge")
    loss_fn.margin, loss_fn.scale = 0.3, 25
    assert (inner.margin, inner.scale) == (0.3, 25)
    own = RealMargin(cubed)
    assert not hasattr(own, "margin") and not hasattr(own, "scale")
    assert "form='paper'" in repr(own)


@pytest.mark.parametrize(
    "inner, name",
    [
        (LogSoftmaxWrapper(AngularMargin()), "LogSoftmaxWrapper"),
        (RealAdditiveMargin(0.2, 30), "RealAdditiveMargin"),
        (0.2, "float"),
    ],
)
def test_what_is_no_trivial_margin_is_named(inner, name):
    with pytest.raises(TypeError, match=f"loss_fn is {name}, allowed is what"):
        RealMargin(inner)


def test_what_else_is_wrong_with_any_margin_is_named():
    with pytest.raises(ValueError, match="form is 'max', allowed"):
        RealMargin(AngularMargin(), "max")
    loss_fn = RealMargin(lambda cosines, one_hot: cosines.mean())
    with pytest.raises(ValueError, match=r"shape \(\), .* \(2, 3\).*a loss\?"):
        loss_fn(torch.zeros(2, 3), torch.eye(3)[:2])
