"""What training says about itself: margins, schedules, results.

Pure functions that return sentences. The Brain logs them when training
starts; the script prints and writes the verdict when it ends.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch

from speechbrain_ram.data.names import part_of, session_of
from speechbrain_ram.losses import (
    RealAdditiveAngularMargin,
    RealAdditiveMargin,
    equivalent_am_margin,
    paper_margin_for,
)
from speechbrain_ram.training.diagnostics import loss_floor
from speechbrain_ram.training.schedules import MarginRise, WarmupDecay
from speechbrain_ram.verification.trials import TrialList

#: A margin worth less than this to AM-Softmax is called next to none.
LEAST_MARGIN = 0.05

#: Part of the training above which a warm-up is called too long.
LONGEST_WARMUP = 1 / 3


def advice(
    loss_fn: object,
    n_classes: int,
    learning_rate: object,
    rise: MarginRise | None,
    n_steps: int,
    n_epochs: int,
) -> tuple[list[str], list[str]]:
    """What the margin is worth, and what does not fit together: warnings."""
    notes, warnings = [], []
    if hasattr(loss_fn, "scale") and n_classes:
        loss_fn = at_the_end(loss_fn, rise)
        notes.append(margin_note(loss_fn, n_classes))
        if isinstance(rise, MarginRise) and rise.end and rise.initial:
            notes.append(
                f"The margin rises to {rise.final:g} from {rise.initial:.2f}."
            )
        warnings.append(margin_warning(loss_fn, n_classes))
    warnings += schedule_warnings(learning_rate, rise, n_steps, n_epochs)
    return notes, list(filter(None, warnings))


def margin_worth(loss_fn: torch.nn.Module, n_classes: int) -> float | None:
    """What the margin of form ``paper`` is worth to AM-Softmax, else None.

    None also where a RealMargin stands around another loss, whose margin may
    mean anything. An angular margin counts as the greatest lead in cosine
    that it asks, 2 sin(m / 2), so its worth is an upper bound. See
    :func:`speechbrain_ram.losses.equivalent_am_margin`.
    """
    known = isinstance(loss_fn, RealAdditiveMargin)
    if not known or loss_fn.form != "paper":
        return None
    return equivalent_am_margin(loss_fn.largest_lead, loss_fn.scale, n_classes)


def margin_for(
    am_margin: float, loss_fn: RealAdditiveMargin, n_classes: int
) -> float:
    """The margin of form ``paper`` that is worth `am_margin` at most."""
    needed = paper_margin_for(am_margin, loss_fn.scale, n_classes)
    if isinstance(loss_fn, RealAdditiveAngularMargin):
        return 2 * math.asin(min(needed / 2, 1))  # whose greatest lead it is
    return needed


def set_start(schedule: object, loss_fn: object, n_classes: int) -> None:
    """Let the margin of form ``paper`` rise from ln(C) / s, not from 0.

    That acts like AM-Softmax's 0; under less hardly anything is learned while
    the rise has not begun. A schedule with an `initial` of its own keeps it.
    """
    if not isinstance(schedule, MarginRise) or schedule.initial is not None:
        return
    if n_classes and margin_worth(loss_fn, n_classes) is not None:
        least = margin_for(0.0, loss_fn, n_classes)
        schedule.initial = min(least, schedule.final)


def margin_note(loss_fn: torch.nn.Module, n_classes: int) -> str:
    """Number of classes, floor of the loss, worth of the margin; one line."""
    floor = loss_floor(loss_fn, n_classes)
    text = f"{n_classes:,} classes; the loss cannot go below {floor:.2f}"
    worth = margin_worth(loss_fn, n_classes)
    if worth is None:
        return text + "."
    angular = isinstance(loss_fn, RealAdditiveAngularMargin)
    return (
        f"{text} (ln C); margin {loss_fn.margin:g} of form paper is worth "
        f"{'at most ' if angular else ''}{worth:.2f} to AM-Softmax."
    )


def margin_warning(loss_fn: torch.nn.Module, n_classes: int) -> str | None:
    """What to do about a margin that is worth next to nothing, or None."""
    worth = margin_worth(loss_fn, n_classes)
    if worth is None or worth >= LEAST_MARGIN:
        return None
    angular = isinstance(loss_fn, RealAdditiveAngularMargin)
    meant = loss_fn.largest_lead
    if meant < LEAST_MARGIN:
        meant = 0.2
    needed = margin_for(meant, loss_fn, n_classes)
    text = (
        f"Margin {loss_fn.margin:g} of form paper (equation 12) is next to "
        f"none: {n_classes:,} classes at scale {loss_fn.scale:g} leave "
        f"{'at most ' if angular else ''}{worth:.2f} of it, in AM-Softmax's "
        "terms. "
    )
    if needed <= loss_fn._largest_margin:
        like = "AAM" if angular else "AM"
        text += (
            f"--margin {math.ceil(100 * needed - 1e-9) / 100:.2f} acts like "
            f"{like}-Softmax's {loss_fn.margin or meant:g}"
            f"{' (let it rise: --margin_end)' if angular else ''}; "
        )
    return text + (
        "--form released, as the authors' toolkit computes, loses nothing to "
        "the number of classes. See docs/loss-analysis.md."
    )


def at_the_end(
    loss_fn: torch.nn.Module, schedule: object | None
) -> torch.nn.Module:
    """The objective with the margin that a :class:`MarginRise` ends at."""
    known = isinstance(loss_fn, RealAdditiveMargin)
    if not known or not isinstance(schedule, MarginRise):
        return loss_fn
    loss_fn = copy.deepcopy(loss_fn)
    loss_fn.margin = float(schedule.final)
    return loss_fn


def schedule_warnings(
    rate: object,
    schedule: object | None,
    n_steps: int,
    n_epochs: int,
) -> list[str]:
    """Where warm-up, decay or the margin's rise do not fit the training."""
    found = []
    if isinstance(rate, WarmupDecay):
        found += _rate_warnings(rate, n_steps, n_epochs)
    if isinstance(schedule, MarginRise) and schedule.end > n_epochs:
        found.append(
            f"The margin rises until epoch {schedule.end:g}, but training has "
            f"{n_epochs}: it ends at {schedule(n_epochs):.2f} instead of "
            f"{schedule.final:g}. Raise --number_of_epochs, or let the rise "
            f"end earlier (--margin_start 0 --margin_end {n_epochs / 2:g})."
        )
    return found


def _rate_warnings(rate: WarmupDecay, n_steps: int, n_epochs: int):
    if rate.warmup_steps > LONGEST_WARMUP * n_steps:
        yield (
            f"The warm-up of the learning rate takes {rate.warmup_steps} "
            f"steps, but training has {n_steps} in all. Give "
            f"--warmup_steps {n_steps // 10} or raise --number_of_epochs."
        )
    if rate.warmup_epochs > LONGEST_WARMUP * n_epochs:
        yield (
            f"The warm-up of the learning rate takes {rate.warmup_epochs:g} "
            f"epochs, but training has {n_epochs} in all. Give "
            f"--warmup_epochs {n_epochs / 10:g} or raise --number_of_epochs."
        )
    if rate.decay == "step":
        if rate.every >= n_epochs:
            yield (
                f"The learning rate falls every {rate.every} epochs, but "
                f"training has {n_epochs}: it never falls. Raise "
                "--number_of_epochs or give --lr_decay cosine."
            )
    elif rate.epochs != n_epochs:
        yield (
            f"The learning rate is planned for {rate.epochs} epochs, but "
            f"training has {n_epochs}. Use the same number in the YAML."
        )


def verdict(
    before: float | None, after: float, pretrained: bool = False
) -> list[str]:
    """Say so where the EER, in percent, is not lower after training.

    `before` is None where ``verify_untrained`` is off, and that of a trained
    encoder where training began with one, `pretrained`.
    """
    if before is None or after < before:
        return []
    other = "an untrained one"
    if pretrained:
        other = "the one that training started from"
    rates = f"EER {after:.2f} % after training, {before:.2f} % before."
    if round(after, 2) == round(before, 2):
        return [
            f"On these trials this encoder is as good as {other}: {rates} More "
            "trials may tell the two apart; until they do, training has "
            "brought nothing."
        ]
    what = "Training has failed; do not use it."
    if pretrained:
        what = "Keep that one, or train it with a smaller --lr."
    return [f"This encoder is worse than {other}: {rates} {what}"]


def session_note(trials: TrialList) -> str:
    """How many target trials pair recordings of two folders (sessions)."""
    target = trials.labels == 1
    names = (*trials.enrol_ids, *trials.test_ids)
    sessions = {each: i for i, each in enumerate(set(map(session_of, names)))}
    enrol, test = (
        np.array([sessions[session_of(name)] for name in ids])
        for ids in (trials.enrol_ids, trials.test_ids)
    )
    parts = any(part_of(name)[2] is not None for name in names)
    apart = enrol[trials.enrol[target]] != test[trials.test[target]]
    text = (
        f"Of {target.sum():,} target trials, {apart.sum():,} pair recordings "
        f"of two {'folders or files' if parts else 'folders'} (sessions)."
    )
    if apart.mean() < 0.5:
        text += (
            " Recordings of one session are easier to match than those of two."
        )
    return text
