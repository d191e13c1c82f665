"""The page docs/loss-analysis.md: its formulas, its tables, its figures."""

import math
import re
import sys

import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "research" / "analysis"))
import loss_analysis
import loss_numbers as numbers

from speechbrain_ram.losses import FORMS, make_objective

PAGE = (REPOSITORY / "docs" / "loss-analysis.md").read_text(encoding="utf-8")
M, S = 0.35, 30.0


def by_hand(name, row, margin=M, scale=S):
    """Loss and gradient of one sample by the page's formulas, in floats."""
    a = scale * (row[0] - margin)
    z = [scale * c - a for c in row[1:]]
    if name == "AM":
        weights, extra, slopes = [math.exp(v) for v in z], 0.0, None
    else:
        violating = [v > 0 for v in z]
        n_kept = sum(not v for v in violating)
        weights = [math.exp(v) if v > 0 else 0.0 for v in z]
        extra = {
            "paper": n_kept,
            "released": n_kept * math.exp(-a),
            "hinge": -sum(violating),
        }[name]
    total = 1 + extra + sum(weights)
    slopes = [w / total for w in weights]
    pull = sum(slopes)
    if name == "released":
        pull += extra / total  # satisfied classes go on pulling
    return math.log(total), [-pull, *slopes]


@pytest.mark.parametrize("name", ["AM", "paper", "released", "hinge"])
@pytest.mark.parametrize("mean_target", [-0.2, 0.0, 0.4, 0.8])
def test_the_formulas_of_the_page(name, mean_target):
    cosines = numbers.batch(9, mean_target, n=6, spread=0.2)
    loss, gradient = numbers.loss_and_gradient(name, cosines, M)
    for i, row in enumerate(cosines.tolist()):
        expected_loss, expected = by_hand(name, row)
        assert float(loss[i]) == pytest.approx(expected_loss, abs=1e-10)
        assert gradient[i].tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("n_classes", [2, 10, 1000])
@pytest.mark.parametrize("mean_target", [0.0, 0.2, 0.5])
def test_equation_12_is_am_over_the_violating_classes(n_classes, mean_target):
    cosines = numbers.batch(n_classes, mean_target)
    paper = numbers.loss_and_gradient("paper", cosines, M)[1]
    exact = numbers.truncated_am_gradient(cosines, M)
    torch.testing.assert_close(exact, paper, rtol=1e-9, atol=1e-12)
    # and the shift is what does it
    assert paper.norm() > 0
    unshifted = numbers.truncated_am_gradient(cosines, M + 0.01)
    assert numbers.difference(unshifted, paper) > 1e-8


@pytest.mark.parametrize("n_classes", [10, 1000])
@pytest.mark.parametrize("mean_target", [0.3, 0.5, 0.7])
def test_bounds_of_the_approximation(n_classes, mean_target):
    """AM at m - ln(C - V)/s gives violators half to all of paper's."""
    for row in numbers.batch(n_classes, mean_target, n=16)[:, None]:
        z = numbers.excess(row, M)[0]
        kept = 1 + int((z <= 0).sum())
        am = numbers.loss_and_gradient("AM", row, M - math.log(kept) / S)[1]
        paper = numbers.loss_and_gradient("paper", row, M)[1]
        ratio = (am / paper)[0, 1:][z > 0]
        assert torch.all((ratio > 0.5) & (ratio <= 1 + 1e-9))
        assert am[0, 1:][z <= 0].sum() < 0.5


@pytest.mark.parametrize("n_classes", [125, 1000])
def test_search_finds_the_shifted_margin(n_classes):
    cosines = numbers.batch(n_classes, 0.5)
    paper = numbers.loss_and_gradient("paper", cosines, M)[1]
    found = numbers.nearest_am_margin(cosines, paper)
    assert found == pytest.approx(M - math.log(n_classes) / S, abs=0.01)


def test_released_moves_satisfied_classes_to_cosine_0():
    cosines = numbers.batch(50, 0.5)
    satisfied = numbers.excess(cosines, M) <= 0
    moved = cosines.clone()
    moved[:, 1:][satisfied] = 0
    released = numbers.loss_and_gradient("released", cosines, M)[0]
    am = numbers.loss_and_gradient("AM", moved, M)[0]
    torch.testing.assert_close(released, am, rtol=1e-12, atol=0)


def test_am_is_equation_1_up_to_ln_c():
    for mean_target in (0.0, 0.4, 0.9):
        cosines = numbers.batch(200, mean_target)
        loss = numbers.loss_and_gradient("AM", cosines, M)[0]
        hard = numbers.excess(cosines, M).amax(dim=1).clamp(min=0)
        assert torch.all(hard <= loss)
        assert torch.all(loss <= hard + math.log(200))


def test_hinge_is_equation_1_for_one_violator():
    cosines = numbers.one_violator(1000)
    loss, gradient = numbers.loss_and_gradient("hinge", cosines)
    assert float(loss) == pytest.approx(5)
    assert gradient[0, :2].tolist() == pytest.approx([-1, 1])
    # v classes just inside the margin pull v times as hard
    many = numbers.sample(0.5, torch.full((7,), 0.3 + 1e-6))
    pull = numbers.loss_and_gradient("hinge", many)[1][0, 0]
    assert float(pull) == pytest.approx(-7, rel=1e-3)


def test_nothing_is_easy_at_scale_1():
    """The paper's footnote 2: x >= (C - 1) e^(m - 2) at s = 1."""
    best = numbers.sample(1.0, torch.full((9,), -1.0))
    x = float(numbers.excess(best, 0.0, 1.0).exp().sum())
    assert x == pytest.approx(9 * math.exp(-2)) and x > 1


@pytest.mark.parametrize("margin", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_at_one_angle_the_angular_margin_is_its_formula(form, margin):
    """z = 2 s sin(m/2) sin(theta + m/2), in all classes."""
    angles = torch.tensor([1e-3, 0.5, 1.0, 1.57, 2.0], dtype=torch.float64)
    cosines = angles.cos()[:, None].expand(-1, 125)
    one_hot = torch.zeros_like(cosines)
    one_hot[:, 0] = 1
    logits = make_objective("raam", margin, 30.0, form)(cosines, one_hot)
    loss = -logits.log_softmax(dim=1)[:, 0]
    z = 60 * math.sin(margin / 2) * torch.sin(angles + margin / 2)
    ones = 0 if form != "hinge" else 1
    expected = torch.log(1 + 124 * (z.exp() - ones))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("title", numbers.TABLES)
def test_the_page_holds_what_the_script_prints(title):
    assert numbers.TABLES[title]() in PAGE, f"run the script: {title}"


def test_figures_are_there_and_small():
    named = set(re.findall(r"\]\((figures/[\w-]+\.png)\)", PAGE))
    assert len(named) == len(loss_analysis.FIGURES)
    for name in named:
        size = (REPOSITORY / "docs" / name).stat().st_size
        assert 10_000 < size < 150_000, name


def test_a_figure_is_drawn(tmp_path):
    plt = loss_analysis.import_pyplot()
    loss_analysis.approximations(plt, tmp_path)
    plt.close("all")
    (file,) = tmp_path.iterdir()
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_script_runs(tmp_path, capsys):
    loss_analysis.main(tmp_path)
    printed = capsys.readouterr().out
    assert all(table() in printed for table in numbers.TABLES.values())
    assert len(list((tmp_path / "figures").iterdir())) == 6
