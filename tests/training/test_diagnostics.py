"""Diagnostics against loops, NumPy and what is known of the losses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from speechbrain.nnet.losses import LogSoftmaxWrapper

from speechbrain_ram.losses import make_objective
from speechbrain_ram.training.diagnostics import (
    MarginDiagnostics,
    Margins,
    cosine_margins,
    effective_classes,
    loss_floor,
    nearest_others,
    satisfied_below,
    satisfied_share,
    target_cosines,
)

OBJECTIVES = [
    ("softmax", "paper"),
    ("am", "paper"),
    ("aam", "paper"),
    ("ram", "paper"),
    ("ram", "released"),
    ("ram", "hinge"),
    ("raam", "paper"),
]
MARGIN = 0.3


def random_batch(n=7, n_classes=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cosines = 2 * torch.rand(n, n_classes, generator=generator) - 1
    targets = torch.randint(n_classes, (n,), generator=generator)
    return cosines, targets


def naive_threshold(objective, target_cosine):
    if objective in ("am", "ram"):
        return target_cosine - MARGIN
    if objective in ("aam", "raam"):
        angle = math.acos(target_cosine)
        if angle + MARGIN > math.pi:
            return target_cosine - math.sin(MARGIN) * MARGIN
        return math.cos(angle + MARGIN)
    return target_cosine


def gradient_of(loss_fn, cosines, targets):
    cosines = cosines.clone().requires_grad_()
    one_hot = F.one_hot(targets, cosines.shape[1]).to(cosines.dtype)
    F.cross_entropy(loss_fn(cosines, one_hot), targets).backward()
    return cosines.grad


@pytest.mark.parametrize("objective, form", OBJECTIVES)
def test_an_epoch_against_loops(objective, form):
    loss_fn = make_objective(objective, MARGIN, form=form)
    seen = MarginDiagnostics(loss_fn)
    shares, margins, within, nearest, between, counts = ([] for _ in range(6))
    for seed in range(3):
        cosines, targets = random_batch(seed=seed)
        gradient = gradient_of(loss_fn, cosines, targets)
        seen.add(cosines, targets)
        seen.add_gradient(1024 * gradient, targets)  # as a GradScaler does
        for row, grads, y in zip(
            cosines.double().tolist(),
            gradient.double().tolist(),
            targets.tolist(),
            strict=True,
        ):
            others = [c for j, c in enumerate(row) if j != y]
            threshold = naive_threshold(objective, row[y])
            kept = [c <= threshold for c in others]
            shares.append(sum(kept) / len(kept))
            margins.append(row[y] - max(others))
            within.append(math.degrees(math.acos(row[y])))
            degrees = [math.degrees(math.acos(c)) for c in others]
            nearest.append(min(degrees))
            between += degrees
            sizes = [abs(g) for j, g in enumerate(grads) if j != y]
            squares = sum(g * g for g in sizes)
            counts.append(sum(sizes) ** 2 / squares if squares else 0.0)
    expected = {
        "satisfied": np.mean(shares),
        "margin_p05": np.quantile(margins, 0.05),
        "margin_p50": np.quantile(margins, 0.5),
        "margin_p95": np.quantile(margins, 0.95),
        "gradient_classes": np.mean(counts),
        "above_floor": 9.0 - loss_floor(loss_fn, 11),
        "angle_within": np.mean(within),
        "angle_within_std": np.std(within),
        "angle_nearest": np.mean(nearest),
        "angle_between": np.mean(between),
        "angle_between_std": np.std(between),
    }
    summary = seen.summary(mean_loss=9.0)
    assert set(summary) == set(expected)
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, rel=2e-4, abs=2e-4), name


def test_satisfied_classes_are_those_without_gradient():
    """The definition agrees with what form paper's gradient does."""
    cosines, targets = random_batch(50, 20)
    loss_fn = make_objective("ram", MARGIN)
    gradient = gradient_of(loss_fn, cosines, targets)
    none = (gradient == 0).sum(dim=1) - (
        gradient.gather(1, targets[:, None])[:, 0] == 0
    ).long()
    below = satisfied_below(loss_fn, cosines, targets)
    share = satisfied_share(cosines, targets, below)
    assert torch.equal((share * 19).round().long(), none)
    assert 0 < share.mean() < 1


def test_ties_and_softmax_count_as_the_losses_do():
    cosines = torch.tensor([[0.75, 0.5, 0.5000001]])
    targets = torch.tensor([0])
    below = satisfied_below(make_objective("ram", 0.25), cosines, targets)
    assert satisfied_share(cosines, targets, below).item() == 0.5
    # softmax has no margin: the target itself is at its own threshold
    below = satisfied_below(make_objective("softmax"), cosines, targets)
    assert satisfied_share(cosines, targets, below).item() == 1.0


def test_effective_classes():
    targets = torch.tensor([0, 0, 0])
    gradient = torch.zeros(3, 6)
    gradient[0, 1:5] = 1e-30  # squares vanish in float32
    gradient[1, 0] = -1  # the target alone
    gradient[2, 1:3] = torch.tensor([3.0, 1.0])
    found = effective_classes(gradient, targets)
    assert found.tolist() == pytest.approx([4, 0, 1.6])


def test_margins_are_signed():
    cosines = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    found = cosine_margins(cosines, torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([-0.8, 0.8])


@pytest.mark.parametrize("objective, form", OBJECTIVES)
def test_no_cosines_lie_below_the_floor(objective, form):
    loss_fn = make_objective(objective, MARGIN, scale=4.0, form=form)
    floor = loss_floor(loss_fn, 6)
    generator = torch.Generator().manual_seed(3)
    cosines = 2 * torch.rand(4000, 6, generator=generator).double() - 1
    cosines[:2000, 0] = 1
    cosines[:1000, 1:] -= 0.7 * (cosines[:1000, 1:] + 1)
    one_hot = torch.zeros_like(cosines)
    one_hot[:, 0] = 1
    losses = F.cross_entropy(
        loss_fn(cosines, one_hot),
        torch.zeros(4000, dtype=torch.long),
        reduction="none",
    )
    assert losses.min() >= floor - 1e-9
    assert losses.min() < floor + 0.1  # and it is not far below either


def test_known_floors():
    for n_classes in (2, 125):
        paper = make_objective("ram", 0.2)
        assert loss_floor(paper, n_classes) == pytest.approx(
            math.log(n_classes)
        )
        hinge = make_objective("ram", 0.2, form="hinge")
        assert loss_floor(hinge, n_classes) == 0
        released = make_objective("ram", 0.2, 5.0, "released")
        assert loss_floor(released, n_classes) == pytest.approx(
            math.log(1 + (n_classes - 1) * math.exp(-5 * 0.8))
        )


def test_nothing_added_nothing_said():
    seen = MarginDiagnostics(make_objective("am", 0.2))
    assert seen.summary(mean_loss=1.0) == {}
    seen.add(*random_batch())
    assert "gradient_classes" not in seen.summary(mean_loss=1.0)
    seen.reset()
    assert seen.summary(mean_loss=1.0) == {}


def test_bfloat16_cosines_and_no_graph():
    seen = MarginDiagnostics(make_objective("am", 0.2))
    cosines, targets = random_batch()
    seen.add(cosines.bfloat16().requires_grad_(), targets)
    assert seen.samples[0].dtype == torch.float32
    assert not seen.samples[0].requires_grad


def test_watching_a_batch_on_its_way():
    """As the Brain does: cosines [B, 1, C], the gradient comes by itself."""
    loss_fn = make_objective("ram", MARGIN)
    cosines, targets = random_batch()
    by_hand, watched = MarginDiagnostics(loss_fn), MarginDiagnostics(loss_fn)
    by_hand.add(cosines, targets)
    by_hand.add_gradient(gradient_of(loss_fn, cosines, targets), targets)
    there = cosines[:, None].clone().requires_grad_()
    watched.watch(there, targets[:, None])
    wrapped = LogSoftmaxWrapper(loss_fn)(there, targets[:, None])
    wrapped.backward()
    expected = by_hand.summary(1.0)
    assert watched.summary(1.0) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():  # a validation: nothing to hook
        watched.watch(cosines, targets)
    assert len(watched.samples) == 2 and len(watched.classes) == 1


def test_an_epoch_goes_on_from_its_state():
    loss_fn = make_objective("ram", MARGIN)
    whole, first = MarginDiagnostics(loss_fn), MarginDiagnostics(loss_fn)
    second = MarginDiagnostics(loss_fn)
    for seed, part in ((0, first), (1, first), (2, second)):
        if part is second:
            second.restore(first.state())
        cosines, targets = random_batch(seed=seed)
        gradient = gradient_of(loss_fn, cosines, targets)
        for each in (whole, part):
            each.add(cosines, targets)
            each.add_gradient(gradient, targets)
    assert second.summary(1.0) == whole.summary(1.0)
    # as do several processes' shares
    second.restore(second.state(), MarginDiagnostics(loss_fn).state())
    assert second.summary(1.0) == whole.summary(1.0)
    second.restore(MarginDiagnostics(loss_fn).state())
    assert second.summary(1.0) == {}


def test_an_epoch_goes_on_with_the_fused_loss():
    """What both paths know is summed up; the angles to all others are not."""
    loss_fn = make_objective("ram", MARGIN)
    first, whole = MarginDiagnostics(loss_fn), MarginDiagnostics(loss_fn)
    batches = [random_batch(seed=seed) for seed in (0, 1)]
    for cosines, targets in batches:
        whole.add(cosines, targets)
        whole.add_gradient(gradient_of(loss_fn, cosines, targets), targets)
    cosines, targets = batches[0]
    first.add(cosines, targets)
    first.add_gradient(gradient_of(loss_fn, cosines, targets), targets)
    second = MarginDiagnostics(loss_fn)
    second.restore(first.state())
    cosines, targets = batches[1]
    gradient = gradient_of(loss_fn, cosines, targets)
    margins = Margins(
        target_cosines(cosines, targets),
        nearest_others(cosines, targets),
        satisfied_share(
            cosines, targets, satisfied_below(loss_fn, cosines, targets)
        ),
        effective_classes(gradient, targets),
    )
    second.add_margins(margins, cosines.shape[1])
    expected = whole.summary(1.0)
    del expected["angle_between"], expected["angle_between_std"]
    assert second.summary(1.0) == pytest.approx(expected, rel=1e-5)


def test_skipped_steps_leave_no_trace():
    loss_fn = make_objective("am", MARGIN)
    seen, spoilt = MarginDiagnostics(loss_fn), MarginDiagnostics(loss_fn)
    cosines, targets = random_batch()
    for each in (seen, spoilt):
        each.add(cosines, targets)
        each.add_gradient(cosines, targets)
    spoilt.add(torch.full_like(cosines, math.nan), targets)
    spoilt.add_gradient(torch.full_like(cosines, math.nan), targets)
    assert spoilt.summary(1.0) == seen.summary(1.0)
