"""Learning rates and margins as pure functions of where training stands.

SpeechBrain's schedulers keep a step count of their own; these keep nothing,
so a run that was interrupted goes on with exactly the rate it had.
"""

from __future__ import annotations

import math

DECAYS = ("step", "exponential", "cosine")


class WarmupDecay:
    """Linear warm-up by optimiser steps, then a decay by epochs.

    ============  =======================================================
    step          peak * gamma ^ floor(epochs done / every): with Adam,
                  500 steps of warm-up, every=5 and gamma=0.4 what the
                  paper's public toolkit runs on VoxCeleb
    exponential   peak * (final / peak) ^ (share of training done)
    cosine        from peak to final along half a cosine
    ============  =======================================================

    Arguments
    ---------
    peak : float
        The highest learning rate, above 0.
    warmup_steps : int
        Optimiser steps over which the rate climbs from peak / warmup_steps.
    warmup_epochs : float
        Epochs over which it climbs from 0, beside or instead of these.
    decay : str
        'step', 'exponential' or 'cosine'.
    epochs : int
        Length of the whole training (exponential and cosine).
    final : float
        Rate at its end (exponential and cosine).
    every, gamma : int, float
        Of the step decay.

    Raises
    ------
    ValueError
        An unknown decay or a number out of range.

    Example
    -------
    >>> rate = WarmupDecay(0.01, warmup_steps=500, every=5, gamma=0.4)
    >>> rate(step=0, epochs_done=0.0)
    2e-05
    >>> rate(step=5000, epochs_done=4.9), rate(step=6000, epochs_done=5.0)
    (0.01, 0.004)
    """

    def __init__(
        self,
        peak: float,
        warmup_steps: int = 0,
        decay: str = "step",
        epochs: int = 1,
        final: float = 1e-5,
        every: int = 5,
        gamma: float = 0.4,
        warmup_epochs: float = 0.0,
    ):
        if decay not in DECAYS:
            raise ValueError(
                f"decay is {decay!r}, allowed are {', '.join(DECAYS)}."
            )
        for name, value in (
            ("peak", peak),
            ("final", final),
            ("every", every),
            ("gamma", gamma),
            ("epochs", epochs),
        ):
            if not value > 0:
                raise ValueError(f"{name} is {value}, it must be above 0.")
        self.peak = float(peak)
        self.warmup_steps = warmup_steps
        self.warmup_epochs = warmup_epochs
        self.decay = decay
        self.epochs = epochs
        self.final = float(final)
        self.every = every
        self.gamma = gamma

    def __call__(self, step: int, epochs_done: float) -> float:
        """The rate after so many optimiser steps and (fractions of) epochs."""
        done = min(epochs_done / self.epochs, 1.0)
        if self.decay == "step":
            rate = self.peak * self.gamma ** (int(epochs_done) // self.every)
        elif self.decay == "exponential":
            rate = self.peak * (self.final / self.peak) ** done
        else:
            half_cosine = 0.5 * (1 + math.cos(math.pi * done))
            rate = self.final + (self.peak - self.final) * half_cosine
        if step < self.warmup_steps:
            rate *= (step + 1) / self.warmup_steps
        if epochs_done < self.warmup_epochs:
            rate *= epochs_done / self.warmup_epochs
        return rate


class MarginRise:
    """A margin that rises between two epochs, fast at first.

    With x the share of the way from `start` to `end`, the margin is
    initial + (final - initial) (1 - 0.001^x), as WeSpeaker raises it; before
    and after it stays where it is. A network that cannot tell anybody apart
    yet learns badly under a large margin.

    Arguments
    ---------
    final : float
        The margin from `end` on.
    start, end : float
        Epochs done when the rise begins and ends; equal for none.
    initial : float, optional
        The margin until `start`; None is 0, or what the Brain puts here for
        equation 12 (:func:`.advice.set_start`).

    Raises
    ------
    ValueError
        The rise ends before it begins.

    Example
    -------
    >>> margin = MarginRise(final=0.2, start=19, end=39)
    >>> margin(10), round(margin(24), 3), margin(39)
    (0.0, 0.164, 0.2)
    """

    def __init__(
        self,
        final: float,
        start: float = 0.0,
        end: float = 0.0,
        initial: float | None = None,
    ):
        if not 0 <= start <= end:
            raise ValueError(
                f"the margin rises from epoch {start} to {end}; expected "
                "0 <= start <= end."
            )
        self.final = final
        self.start = start
        self.end = end
        self.initial = initial

    def __call__(self, epochs_done: float) -> float:
        """The margin after so many (fractions of) epochs."""
        if epochs_done >= self.end:
            return self.final
        initial = self.initial or 0.0
        if epochs_done <= self.start:
            return initial
        done = (epochs_done - self.start) / (self.end - self.start)
        return initial + (self.final - initial) * (1 - 0.001**done)
