"""What training says about margins, schedules and results."""

import math
import re

import pytest
import torch
from conftest import REPOSITORY, run_recipe
from hyperpyyaml import load_hyperpyyaml
from speechbrain.nnet.losses import AngularMargin

from speechbrain_ram.losses import (
    FORMS,
    RealAdditiveMargin,
    RealMargin,
    make_objective,
)
from speechbrain_ram.training import advice
from speechbrain_ram.training.advice import (
    at_the_end,
    margin_note,
    margin_warning,
    margin_worth,
    schedule_warnings,
    set_start,
    verdict,
)
from speechbrain_ram.training.schedules import MarginRise, WarmupDecay

# Classes of each corpus; a speed multiplies them.
CLASSES = {
    "hparams": 24,
    "SpeechOcean762": 125,
    "VoxCeleb": 5994,
    "CNCeleb": 2800,
    "YourCorpus": 1000,
}
RECIPES = sorted(
    [
        REPOSITORY / "hparams" / "ram_resnet34.yaml",
        *(REPOSITORY / "recipes").glob("*/hparams/*.yaml"),
    ]
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: "/".join(p.parts[-3:]))
def test_no_recipe_warns_about_itself(path):
    text = path.read_text(encoding="utf-8")
    keys = "objective|margin|scale|form|speeds|number_of_epochs"
    keys += "|warmup_epochs|margin_start|margin_end|lr_decay"
    scalars = re.findall(rf"^(?:{keys}): .*$", text, re.M)
    settings = load_hyperpyyaml("\n".join(scalars))
    n_classes = CLASSES.get(path.parts[-3], CLASSES["hparams"])
    n_classes *= len(settings["speeds"])
    loss_fn = make_objective(
        *(settings[key] for key in ("objective", "margin", "scale", "form"))
    )
    worth = margin_worth(loss_fn, n_classes)
    assert (loss_fn.margin if worth is None else worth) >= 0.05
    assert margin_warning(loss_fn, n_classes) is None
    epochs = settings["number_of_epochs"]
    rise = MarginRise(0.2, settings["margin_start"], settings["margin_end"])
    rate = WarmupDecay(
        0.1,
        decay=settings["lr_decay"],
        epochs=epochs,
        warmup_epochs=settings["warmup_epochs"],
    )
    assert schedule_warnings(rate, rise, 100 * epochs, epochs) == []


@pytest.mark.parametrize("objective", ["ram", "raam"])
@pytest.mark.parametrize("n_classes", [125, 5994, 7205])
def test_the_margin_that_is_named_acts_as_meant(objective, n_classes):
    """Its pull, at the target cosine where the old one's has gone."""
    meant = make_objective(objective[1:], 0.2)
    given = make_objective(objective, 0.01)
    warning = margin_warning(make_objective(objective, 0.2), n_classes)
    if n_classes == 125:  # 0.04 is left
        assert warning is not None
    else:
        assert "-0." in warning
    margin = float(re.search(r"--margin (\S+) acts", warning).group(1))
    given.__init__(margin, 30.0)
    assert margin_warning(given, n_classes) is None
    for target in (0.4, 0.5, 0.6):
        old, new = (pull(each, n_classes, target) for each in (meant, given))
        assert new == pytest.approx(old, abs=0.15)


def pull(loss_fn, n_classes, target):
    """Derivative by the target's cosine over -s; others are N(0, 0.1)."""
    generator = torch.Generator().manual_seed(1986)
    cosines = torch.randn(64, n_classes, generator=generator) * 0.1
    cosines[:, 0] = target
    cosines.requires_grad_()
    one_hot = torch.zeros_like(cosines)
    one_hot[:, 0] = 1
    logits = loss_fn(cosines, one_hot)
    loss = torch.nn.functional.cross_entropy(
        logits, torch.zeros(64, dtype=torch.long)
    )
    (gradient,) = torch.autograd.grad(loss, cosines)
    return -float(gradient[:, 0].sum()) / loss_fn.scale


def test_what_is_said_of_a_margin():
    none = make_objective("ram", 0.2)
    note = margin_note(none, 7205)
    assert "7,205 classes" in note and "below 8.88 (ln C)" in note
    assert "is worth -0.10 to AM-Softmax" in note
    warning = margin_warning(none, 5994)
    assert "--margin 0.49 acts like AM-Softmax's 0.2" in warning
    assert "--form released" in warning
    for form in FORMS[1:]:
        other = make_objective("ram", 0.2, form=form)
        assert "below 0.00." in margin_note(other, 7205)
        assert margin_warning(other, 7205) is None
    for objective in ("softmax", "am", "aam"):
        assert margin_warning(make_objective(objective, 0.0), 7205) is None
    # A scale at which no margin would do: only the form is named.
    assert "--margin" not in margin_warning(make_objective("ram", 0.2, 1), 125)


def test_an_angular_margin_is_bounded_by_its_greatest_lead():
    loss_fn = make_objective("raam", 0.5)
    cosines = torch.linspace(-0.8, 1, 2001, dtype=torch.float64)[:, None]
    led = cosines - loss_fn(cosines, torch.ones_like(cosines)) / 30
    assert float(led.max()) == pytest.approx(loss_fn.largest_lead, abs=1e-6)
    assert margin_worth(loss_fn, 125) == pytest.approx(
        2 * math.sin(0.25) - math.log(125) / 30
    )


def test_a_rising_margin_counts_as_what_it_becomes():
    now = RealAdditiveMargin(0.1, 30)
    later = at_the_end(now, MarginRise(0.5, 1, 2))
    assert (now.margin, later.margin) == (0.1, 0.5)
    assert at_the_end(now, None) is now


@pytest.mark.parametrize(
    "objective, form, expected",
    [
        ("ram", "paper", math.log(5994) / 30),
        ("raam", "paper", 2 * math.asin(math.log(5994) / 60)),
        ("ram", "released", 0.0),
        ("ram", "hinge", 0.0),
        ("am", "paper", 0.0),
        ("aam", "paper", 0.0),
        ("softmax", "paper", 0.0),
    ],
)
def test_a_margin_rises_from_what_is_worth_nothing(objective, form, expected):
    """Not from less: equation 12 at 0 hardly pulls."""
    loss_fn = make_objective(objective, 0.5, 30, form)
    rise = MarginRise(0.5, 1, 2)
    set_start(rise, loss_fn, 5994)
    assert [rise(0), rise(1), rise(2)] == pytest.approx([expected] * 2 + [0.5])
    if expected:
        assert margin_worth(
            make_objective(objective, rise(0), 30, form), 5994
        ) == pytest.approx(0)
        notes, _ = advice.advice(loss_fn, 5994, None, rise, 100, 10)
        assert notes[1] == f"The margin rises to 0.5 from {expected:.2f}."


def test_the_start_of_a_rise_that_is_given_or_beyond_its_end():
    loss_fn = make_objective("ram", 0.1)
    given, high = MarginRise(0.5, 1, 2, initial=0.0), MarginRise(0.1, 1, 2)
    set_start(given, loss_fn, 5994)
    set_start(high, loss_fn, 5994)
    assert (given(0), high(0)) == (0.0, 0.1)
    set_start(None, loss_fn, 5994)  # no schedule, and one of another class
    set_start(lambda epochs_done: 0.1, loss_fn, 5994)


def test_of_a_margin_around_any_loss_only_the_floor_is_known():
    loss_fn = RealMargin(AngularMargin(0.2, 30))
    assert at_the_end(loss_fn, MarginRise(0.5, 1, 2)) is loss_fn
    assert margin_note(loss_fn, 7205).endswith("cannot go below 8.88.")
    assert margin_warning(loss_fn, 7205) is None


@pytest.mark.parametrize(
    "rate, rise, match",
    [
        (
            WarmupDecay(0.1, warmup_steps=100, decay="cosine", epochs=4),
            None,
            "takes 100 steps, .* has 40 in all. Give --warmup_steps 4 or",
        ),
        (
            WarmupDecay(0.1, warmup_epochs=3, decay="cosine", epochs=4),
            None,
            "takes 3 epochs, .* has 4 in all. Give --warmup_epochs 0.4",
        ),
        (WarmupDecay(0.1, every=5), None, "every 5 epochs, .* has 4: it never"),
        (
            WarmupDecay(0.1, decay="cosine", epochs=9),
            None,
            "planned for 9 epochs, but training has 4",
        ),
        (
            None,
            MarginRise(0.5, 6, 13),
            r"epoch 13, .* has 4: it ends at 0.00 instead of 0.5.*"
            "--margin_start 0 --margin_end 2",
        ),
    ],
)
def test_schedules_that_do_not_fit(rate, rise, match):
    (warning,) = schedule_warnings(rate, rise, n_steps=40, n_epochs=4)
    assert re.search(match, warning)


def test_schedules_that_fit():
    rate = WarmupDecay(0.1, warmup_steps=13, decay="cosine", epochs=4)
    assert schedule_warnings(rate, MarginRise(0.5, 0, 4), 40, 4) == []
    assert schedule_warnings(lambda *_: 0.1, lambda _: 0.2, 40, 4) == []


def test_training_says_so_at_the_start_and_at_the_end(
    tiny_corpus, tmp_path, monkeypatch, capsys
):
    """A margin of nothing, a warm-up without end, nothing learned."""
    from speechbrain_ram.training import brain

    monkeypatch.setattr(brain, "eer", lambda *_: 0.0)  # of the untrained
    run = run_recipe(
        tiny_corpus,
        tmp_path / "run",
        margin=0.1,
        warmup_steps=100,
        number_of_epochs=1,
    )
    log = (run / "log.txt").read_text()
    assert "6 classes; the loss cannot go below 1.79 (ln C)" in log
    assert "Margin 0.1 of form paper (equation 12) is next to none" in log
    assert "takes 100 steps, but training has 4 in all" in log
    note = "This encoder is worse than an untrained one: EER "
    told = capsys.readouterr().out
    assert note in told and "EER before training: 0.00 % (untrained)" in told
    for file in ("report/results.md", "inference/README.md"):
        assert f"**{note}" in (run / file).read_text()
    assert note in (run / "inference" / "encoder.json").read_text()


def test_verdict():
    assert verdict(None, 40.0) == [] and verdict(23.3, 23.2) == []
    (note,) = verdict(23.3, 36.7)
    assert "worse than an untrained one: EER 36.70 % after" in note
    assert "23.30 % before. Training has failed; do not use it." in note


def test_a_tie_is_no_failure():
    (note,) = verdict(45.0, 45.0)
    assert "as good as an untrained one: EER 45.00 % after" in note
    assert "failed" not in note and "worse" not in note


def test_the_verdict_on_an_encoder_that_had_been_trained(
    tiny_corpus, tiny_run, tmp_path, monkeypatch, capsys
):
    for after in (45.0, 46.0):
        (note,) = verdict(45.0, after, pretrained=True)
        assert "untrained" not in note and "failed" not in note
    from speechbrain_ram.training import brain

    monkeypatch.setattr(brain, "eer", lambda *_: 0.0)  # as it came
    run_recipe(
        tiny_corpus,
        tmp_path / "run",
        pretrained=str(tiny_run / "inference"),
        number_of_epochs=1,
    )
    told = capsys.readouterr().out
    assert "0.00 % (the encoder of --pretrained)" in told
    assert "(untrained)" not in told
    note = "This encoder is worse than the one that training started from: "
    assert note in told
    assert f"**{note}" in (tmp_path / "run/inference/README.md").read_text()


def test_a_warning_says_which_page():
    text = margin_warning(make_objective("ram", 0.0), 125)
    assert "acts like AM-Softmax's 0.2" in text
    (page,) = re.findall(r"See (\S+)\.$", text)
    assert (REPOSITORY / page).is_file()
    assert advice.LEAST_MARGIN == 0.05
