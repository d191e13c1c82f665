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
    make_objective,
    set_margin,
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


class Curved(torch.nn.Module):
    """A user's own margin, which forward() reads."""

    def __init__(self, margin, scale):
        super().__init__()
        self.margin, self.scale = margin, scale

    def forward(self, cosines, one_hot):
        target = cosines**3 - self.margin
        return self.scale * (one_hot * target + (1 - one_hot) * cosines)


class Scalar(Curved):
    """A loss instead of logits."""

    def forward(self, cosines, one_hot):
        return super().forward(cosines, one_hot).mean()


class Learnt(Curved):
    """With a scale that no optimiser would know of."""

    def __init__(self, margin, scale):
        super().__init__(margin, scale)
        self.scale = torch.nn.Parameter(torch.tensor(float(scale)))


class Frozen(Curved):
    """One that is turned into something else when it is made."""

    def __init__(self, margin, scale):
        super().__init__(margin, scale)
        self.taken = margin

    def forward(self, cosines, one_hot):
        return self.scale * (cosines - self.taken * one_hot)


OWN = "test_real_margin.Curved"
HOSTS = "speechbrain.nnet.losses.AdditiveAngularMargin"


@pytest.mark.parametrize(
    "name, trivial",
    [
        (f"real-{OWN}", Curved),
        (f"real-{HOSTS}", AdditiveAngularMargin),
        ("real-aam", AdditiveAngularMargin),
        ("real-am", AngularMargin),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_an_objective_by_the_name_of_its_class(name, trivial, form):
    cosines, targets = batch()
    one_hot = F.one_hot(targets, 9).to(cosines.dtype)
    found = make_objective(name, 0.3, 20.0, form)
    expected = RealMargin(trivial(0.3, 20.0), form)
    assert type(found) is RealMargin and type(found.loss_fn) is trivial
    assert torch.equal(found(cosines, one_hot), expected(cosines, one_hot))
    alone = make_objective(name.removeprefix("real-"), 0.3, 20.0, form)
    assert type(alone) is trivial  # without a real margin


@pytest.mark.parametrize(
    "name, message",
    [
        ("real-ram", "objective is 'real-ram', allowed are softmax"),
        ("real-softmax", "objective is 'real-softmax', allowed are softmax"),
        ("real-", "objective is '', allowed are softmax"),
        ("real-real-am", "objective is 'real-real-am', allowed are softmax"),
        (3, "objective is 3, allowed"),
        ("real-nowhere.Loss", "is 'nowhere.Loss', a class .* none in the fold"),
        ("torch.nn.Linear", "'torch.nn.Linear', .*argument 'margin'"),
        ("test_real_margin.batch", "that takes margin and scale, .* needed: "),
        (5.5, "objective is 5.5, allowed"),
        ("collections.OrderedDict", "is needed: TypeError: .*not callable"),
        (
            "real-collections.OrderedDict",
            "is needed: TypeError: .*not callable",
        ),
        ("test_real_margin.Scalar", "of cosines .* does not make logits"),
        ("test_real_margin.Learnt", "parameters or buffers, which stay"),
    ],
)
def test_a_name_that_is_no_objective(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_objective(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["am", "aam", "ram", "raam", "real-am", "real-aam", f"real-{OWN}"]
)
def test_another_margin_is_that_of_a_new_loss(name):
    """AdditiveAngularMargin computes from its margin when it is made."""
    cosines, targets = batch()
    one_hot = F.one_hot(targets, 9).to(cosines.dtype)
    loss_fn, parts = make_objective(name, 0.1, 20.0), []
    inner = getattr(loss_fn, "loss_fn", loss_fn)
    for margin in (0.0, 0.3):
        set_margin(loss_fn, margin)
        parts.append(loss_fn(cosines, one_hot))
        fresh = make_objective(name, margin, 20.0)
        assert torch.equal(parts[-1], fresh(cosines, one_hot))
    assert getattr(loss_fn, "loss_fn", loss_fn) is inner
    assert not torch.equal(*parts)


def test_an_easy_margin_stays_one():
    loss_fn = RealMargin(AdditiveAngularMargin(0.4, 20, easy_margin=True))
    loss_fn.margin = 0.2
    cosines, targets = batch()
    one_hot = F.one_hot(targets, 9).to(cosines.dtype)
    fresh = RealMargin(AdditiveAngularMargin(0.2, 20, easy_margin=True))
    assert torch.equal(loss_fn(cosines, one_hot), fresh(cosines, one_hot))


@pytest.mark.parametrize(
    "loss_fn, message",
    [
        (RealMargin(cubed), "RealMargin has no attribute `margin` .*end 0"),
        (Frozen(0.2, 20), "Frozen gives the same logits .*__init__"),
        (RealMargin(Frozen(0.2, 20)), "Frozen gives the same logits"),
    ],
)
def test_a_margin_that_cannot_rise(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        set_margin(loss_fn, 0.0)
