"""Every form of the real margin against the formula it claims to be."""

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
    equivalent_am_margin,
    make_objective,
    paper_margin_for,
    real_margin_logits,
)

CLASSES = {"additive": RealAdditiveMargin, "angular": RealAdditiveAngularMargin}


def naive_loss(cosines, target, margin, scale, form, kind):
    """One sample, one class at a time, in Python floats."""
    c_y = cosines[target]
    if kind == "additive":
        a = scale * (c_y - margin)
    else:
        theta = math.acos(min(max(c_y, -1 + 1e-7), 1 - 1e-7))
        if theta + margin < math.pi:
            a = scale * math.cos(theta + margin)
        else:  # the linear continuation
            a = scale * (c_y - margin * math.sin(margin))
    total = 0.0
    for j, c_j in enumerate(cosines):
        if j == target:
            continue
        z = scale * c_j - a
        if form == "paper":
            total += math.exp(max(0.0, z))
        elif form == "released":
            total += math.exp(z) if z >= 0 else math.exp(-a)
        else:
            total += math.exp(max(0.0, z)) - 1
    return math.log1p(total)


def batch(n, c, seed=0, low=-1.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(n, c, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, c, (n,), generator=generator)
    return low + (high - low) * cosines, targets


def wrapped(loss_fn, cosines, targets):
    """The loss as SpeechBrain computes it."""
    return LogSoftmaxWrapper(loss_fn)(cosines.unsqueeze(1), targets[:, None])


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n, c", [(1, 2), (3, 7), (17, 31), (2, 5994)])
@pytest.mark.parametrize("margin, scale", [(0.0, 30), (0.2, 30), (0.5, 64)])
def test_forms_equal_the_naive_formula(kind, form, n, c, margin, scale):
    cosines, targets = batch(n, c, seed=n * c)
    loss = wrapped(CLASSES[kind](margin, scale, form), cosines, targets)
    expected = sum(
        naive_loss(row.tolist(), int(y), margin, scale, form, kind)
        for row, y in zip(cosines, targets, strict=True)
    )
    expected /= n
    # LogSoftmaxWrapper turns the targets into float32, the logits stay.
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("form", FORMS)
def test_float32_is_close_to_float64(kind, form):
    cosines, targets = batch(8, 1000, seed=3)
    loss_fn = CLASSES[kind](0.3, 30, form)
    single = wrapped(loss_fn, cosines.float(), targets)
    assert single.dtype == torch.float32
    double = wrapped(loss_fn, cosines, targets)
    assert float(single) == pytest.approx(float(double), rel=2e-5)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target_cosine", [1.0, -1.0])
def test_cosines_at_the_ends(kind, form, target_cosine):
    cosines = torch.tensor([[target_cosine, 1.0, -1.0, 0.0]])
    cosines.requires_grad_()
    loss = wrapped(CLASSES[kind](0.3, 30, form), cosines, torch.tensor([0]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(cosines.grad).all()
    expected = naive_loss(cosines[0].tolist(), 0, 0.3, 30, form, kind)
    # The angle of a float32 cosine of 1 is known to 5e-5 only.
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(kind, form):
    cosines, targets = batch(4, 6, seed=5, low=-0.9, high=0.9)
    cosines.requires_grad_()
    one_hot = F.one_hot(targets, 6).double()
    loss_fn = CLASSES[kind](0.25, 8.0, form)

    def loss(x):
        logits = loss_fn(x, one_hot)
        return -(F.log_softmax(logits, dim=1) * one_hot).sum() / len(x)

    assert torch.autograd.gradcheck(loss, cosines)


@pytest.mark.parametrize("c", [2, 125, 5994])
def test_paper_never_goes_below_log_c(c):
    cosines = torch.full((3, c), -1.0)
    cosines[:, 0] = 1.0
    cosines.requires_grad_()
    loss = wrapped(RealAdditiveMargin(0.3, 30), cosines, torch.zeros(3).long())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(c), rel=1e-6)
    # ... although nothing is left to learn: rounding, times the scale.
    assert cosines.grad.abs().max() < 1e-4


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("c", [2, 125, 5994])
def test_hinge_is_exactly_zero_once_separated(kind, c):
    cosines = torch.full((3, c), 0.1)
    cosines[:, 1] = 0.9
    cosines.requires_grad_()
    loss_fn = CLASSES[kind](0.3, 30, "hinge")
    loss = wrapped(loss_fn, cosines, torch.ones(3).long())
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.count_nonzero(cosines.grad) == 0


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("form", FORMS)
def test_satisfied_classes_have_zero_gradient(kind, form):
    cosines = torch.tensor([[0.5, 0.45, 0.1, -0.3]], requires_grad=True)
    loss_fn = CLASSES[kind](0.2, 30, form)
    wrapped(loss_fn, cosines, torch.tensor([0])).backward()
    assert cosines.grad[0, 1] > 1e-3  # violates
    assert torch.count_nonzero(cosines.grad[0, 2:]) == 0  # satisfied
    assert cosines.grad[0, 0] < 0


def test_only_released_still_pulls_on_a_satisfied_target():
    pull = {}
    for form in FORMS:
        cosines = torch.tensor([[0.35, 0.0, 0.0]], requires_grad=True)
        loss_fn = RealAdditiveMargin(0.3, 30, form)
        wrapped(loss_fn, cosines, torch.tensor([0])).backward()
        pull[form] = float(cosines.grad[0, 0])
    assert pull["paper"] == pytest.approx(0, abs=1e-5)
    assert pull["hinge"] == 0
    assert pull["released"] < -1


@pytest.mark.parametrize("form", FORMS)
def test_ties_at_the_margin(form):
    # 0.75 - 0.25 - 0.5 is 0 in binary: z is exactly 0 for class 1.
    cosines = torch.tensor([[0.75, 0.5, 0.0]], requires_grad=True)
    loss_fn = RealAdditiveMargin(0.25, 32, form)
    loss = wrapped(loss_fn, cosines, torch.tensor([0]))
    loss.backward()
    expected = naive_loss([0.75, 0.5, 0.0], 0, 0.25, 32, form, "additive")
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert torch.isfinite(cosines.grad).all()
    if form != "released":  # there a tie is kept, not set to 0
        assert cosines.grad[0, 1] == 0


@pytest.mark.parametrize("excess", [1e-7, 1e-6, 1e-4])
def test_hinge_is_finite_just_inside_the_margin(excess):
    cosines = torch.tensor([[0.75, 0.5 + excess]], dtype=torch.float64)
    cosines.requires_grad_()
    loss_fn = RealAdditiveMargin(0.25, 32, "hinge")
    loss = wrapped(loss_fn, cosines, torch.tensor([0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(32 * excess, rel=1e-2)
    assert float(cosines.grad[0, 1]) == pytest.approx(32, rel=1e-2)


@pytest.mark.parametrize(
    "real, trivial",
    [
        (RealAdditiveMargin, AngularMargin),
        (RealAdditiveAngularMargin, AdditiveAngularMargin),
    ],
)
@pytest.mark.parametrize("form", ["paper", "released"])
def test_equals_the_trivial_margin_when_every_class_violates(
    real, trivial, form
):
    cosines = torch.rand(16, 40, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(16) % 40
    cosines[torch.arange(16), targets] = -0.2  # the rest is above 0
    grads = []
    for loss_fn in (real(0.3, 30, form), trivial(0.3, 30)):
        x = cosines.clone().requires_grad_()
        loss = wrapped(loss_fn, x, targets)
        loss.backward()
        grads.append((loss, x.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_hinge_and_paper_differ_by_c_minus_1_inside_the_logarithm():
    cosines, targets = batch(5, 50, seed=9)
    losses = {}
    for form in ("paper", "hinge"):
        loss_fn = RealAdditiveMargin(0.3, 4, form)
        losses[form] = torch.stack(
            [
                wrapped(loss_fn, cosines[i : i + 1], targets[i : i + 1])
                for i in range(5)
            ]
        )
    inside = losses["paper"].exp() - losses["hinge"].exp()
    assert torch.allclose(inside, torch.full_like(inside, 49), rtol=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_autocast_keeps_float32(kind, form):
    cosines = torch.rand(4, 300).bfloat16().requires_grad_()
    targets = torch.arange(4)
    loss_fn = CLASSES[kind](0.3, 30, form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = loss_fn(cosines, F.one_hot(targets, 300))
        loss = wrapped(loss_fn, cosines, targets)
    assert logits.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(cosines.grad).all()
    plain = wrapped(loss_fn, cosines.detach().double(), targets)
    assert float(loss.detach()) == pytest.approx(float(plain), rel=1e-4)


def one_formula(cosines, one_hot, margin, scale, form, kind):
    """Both named losses in one expression, without a class or a module."""
    with torch.autocast("cpu", enabled=False):
        if cosines.dtype != torch.float64:
            cosines = cosines.float()
        one_hot = one_hot.to(cosines.dtype)
        if kind == "additive":
            logits = scale * (cosines - margin * one_hot)
        else:
            cosines = cosines.clamp(-1 + 1e-7, 1 - 1e-7)
            sines = (1.0 - cosines.pow(2)).sqrt()
            turned = cosines * math.cos(margin) - sines * math.sin(margin)
            beyond = cosines - math.sin(math.pi - margin) * margin
            target = torch.where(
                cosines > math.cos(math.pi - margin), turned, beyond
            )
            logits = scale * (one_hot * target + (1.0 - one_hot) * cosines)
        return real_margin_logits(logits, one_hot, form)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16]
)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("margin", [0, 0.3, 1.2])
def test_bits_are_those_of_one_formula(kind, form, dtype, autocast, margin):
    cosines, targets = batch(40, 31, seed=2)
    cosines[0], cosines[1] = 1.0, -1.0
    cosines[2, targets[2]] = -0.99  # beyond the turn of an angular margin
    one_hot = F.one_hot(targets, 31)
    loss_fn = CLASSES[kind](margin, 30, form)
    found = []
    for function in (
        loss_fn,
        lambda x, y: one_formula(x, y, float(margin), 30.0, form, kind),
    ):
        x = cosines.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = function(x, one_hot)
            loss = F.cross_entropy(logits, targets)
        loss.backward()
        found.append((logits.detach(), x.grad))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found[0][0].dtype == wide
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_the_margin_of_a_named_loss_can_change(cls):
    cosines, targets = batch(12, 9, seed=4)
    one_hot = F.one_hot(targets, 9)
    expected = cls(0.4, 20, "hinge")(cosines, one_hot)
    by_value = cls(0.1, 20, "hinge")
    before = by_value(cosines, one_hot)
    by_value.margin = 0.4
    by_schedule = cls(0.1, 30, "hinge")  # as the training Brain does it
    by_schedule.__dict__.update(cls(0.4, 20, "hinge").__dict__)
    for loss_fn in (by_value, by_schedule):
        assert torch.equal(loss_fn(cosines, one_hot), expected)
        assert not torch.equal(before, expected)
        assert repr(loss_fn) == (
            f"{cls.__name__}(margin=0.4, scale=20.0, form='hinge')"
        )


@pytest.mark.parametrize("scale", [1.0, 64.0, 1000.0])
@pytest.mark.parametrize("form", FORMS)
def test_extreme_scales_stay_finite(form, scale):
    cosines = torch.tensor([[-1.0, 1.0, 1.0], [1.0, -1.0, -1.0]])
    cosines.requires_grad_()
    loss_fn = RealAdditiveMargin(2.0, scale, form)
    loss = wrapped(loss_fn, cosines, torch.tensor([0, 0]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(cosines.grad).all()


@pytest.mark.parametrize("cls", CLASSES.values())
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"margin": -0.1, "scale": 30}, r"margin is -0\.1, allowed is 0 to"),
        ({"margin": 2.5, "scale": 30}, r"margin is 2\.5, allowed is 0 to"),
        ({"margin": math.nan, "scale": 30}, "margin is nan"),
        ({"margin": "0.2", "scale": 30}, "a number is needed. Is it quoted"),
        ({"margin": 0.2, "scale": 0}, "scale is 0, allowed is above 0"),
        ({"margin": 0.2, "scale": math.inf}, "scale is inf"),
        ({"margin": 0.2, "scale": True}, "scale is True, a number"),
        ({"margin": 0.2, "scale": 30, "form": "max"}, "form is 'max'"),
    ],
)
def test_bad_settings_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_wrong_shapes_are_named():
    loss_fn = RealAdditiveMargin(0.2, 30)
    with pytest.raises(ValueError, match=r"\[N, C\], got \(2, 1, 3\)"):
        loss_fn(torch.zeros(2, 1, 3), torch.zeros(2, 3))


def test_make_objective_builds_the_hosts_baselines():
    assert type(make_objective("am", 0.2)) is AngularMargin
    assert type(make_objective("aam", 0.2)) is AdditiveAngularMargin
    assert make_objective("softmax", 0.2).margin == 0
    assert make_objective("ram", 0.2, form="hinge").form == "hinge"
    assert isinstance(make_objective("raam"), RealAdditiveAngularMargin)
    with pytest.raises(ValueError, match="objective is 'arcface', allowed"):
        make_objective("arcface")
    with pytest.raises(ValueError, match="form is 'Paper', allowed"):
        make_objective("am", form="Paper")


@pytest.mark.parametrize("n_classes", [2, 24, 5994, 7205])
def test_equivalent_margins_are_each_others_inverse(n_classes):
    worth = equivalent_am_margin(0.3, 30, n_classes)
    assert worth == pytest.approx(0.3 - math.log(n_classes) / 30)
    assert paper_margin_for(worth, 30, n_classes) == pytest.approx(0.3)


@pytest.mark.parametrize("n_classes", [125, 7205])
@pytest.mark.parametrize("margin", [0.1, 0.2, 0.3])
def test_the_equivalent_margin_pulls_alike(margin, n_classes):
    """Naive float64: pull on the target of AM at m, equation 12 shifted."""
    generator = torch.Generator().manual_seed(3)
    others = torch.randn(64, n_classes - 1, generator=generator).double() / 10
    c_y = 0.4 + margin / 2
    shifted = paper_margin_for(margin, 30, n_classes)
    am = (30 * (others - c_y + margin)).exp()
    paper = (30 * (others - c_y + shifted)).clamp(min=0).exp()
    violates = paper > 1
    am_pull = (am.sum(1) / (1 + am.sum(1))).mean()
    paper_pull = ((paper * violates).sum(1) / (1 + paper.sum(1))).mean()
    assert float(paper_pull) == pytest.approx(float(am_pull), abs=0.06)
    # ... and is what the package computes.
    cosines = torch.cat([torch.full((64, 1), c_y).double(), others], 1)
    cosines.requires_grad_()
    loss_fn = RealAdditiveMargin(shifted, 30)
    wrapped(loss_fn, cosines, torch.zeros(64).long()).backward()
    assert -float(cosines.grad[:, 0].sum()) / 30 == pytest.approx(
        float(paper_pull), abs=1e-6
    )
