"""What a margin does during training, seen from the cosines.

Pure functions on cosines [N, C] and targets [N], one number a sample, and a
collector that a training loop feeds step by step. Only
:meth:`MarginDiagnostics.summary`, called once an epoch, waits for the device.

Notation as in :mod:`speechbrain_ram.losses`: a class j is *satisfied* when
the target, margin taken off, beats it: s c_j <= a.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


class Margins(NamedTuple):
    """What the fused loss knows of each sample, [N] each, without cosines."""

    cosine: torch.Tensor
    """c_y."""

    nearest: torch.Tensor
    """max c_j over the others."""

    satisfied: torch.Tensor
    """Share of the others that are satisfied."""

    gradient_classes: torch.Tensor
    """Effective number of the others with gradient."""


LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def target_cosines(
    cosines: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """c_y of each sample, [N], from cosines [N, C] and targets [N]."""
    return cosines.gather(1, targets[:, None]).squeeze(1)


def satisfied_below(
    loss_fn: LossFunction, cosines: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The cosine up to which another class is satisfied, a / s, [N].

    c_y - m for additive margins, cos(theta_y + m) for angular ones, c_y for
    softmax; from cosines [N, C] and targets [N].
    """
    # With the target as the only class, the logits are the target's alone.
    alone = target_cosines(cosines, targets)[:, None]
    return loss_fn(alone, torch.ones_like(alone)).squeeze(1) / loss_fn.scale


def satisfied_share(
    cosines: torch.Tensor, targets: torch.Tensor, below: torch.Tensor
) -> torch.Tensor:
    """Share of the non-targets that are satisfied, [N] in [0, 1].

    `below` is of :func:`satisfied_below`; a tie is satisfied, as in the losses.
    """
    satisfied = (cosines <= below[:, None]).sum(dim=1)
    own = target_cosines(cosines, targets) <= below
    return (satisfied - own.long()) / (cosines.shape[1] - 1)


def nearest_others(
    cosines: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Largest cosine among the non-targets, max c_j, [N]."""
    return cosines.scatter(1, targets[:, None], -math.inf).amax(dim=1)


def cosine_margins(
    cosines: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The margin that was reached, c_y - max c_j, [N] in [-2, 2]."""
    return target_cosines(cosines, targets) - nearest_others(cosines, targets)


def effective_classes(
    gradient: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """How many non-targets share the gradient, [N]: (sum g)^2 / sum g^2.

    The participation ratio of the sizes g of the gradient [N, C] by the
    cosines: k where k classes get the same and the others nothing, 0 where no
    class gets any.
    """
    size = gradient.abs().scatter(1, targets[:, None], 0.0)
    # By the largest: squares of tiny gradients would vanish in float32.
    largest = size.amax(dim=1, keepdim=True)
    size = size / torch.where(largest > 0, largest, 1.0)
    squares = size.square().sum(dim=1)
    return size.sum(dim=1).square() / torch.where(squares > 0, squares, 1.0)


def loss_floor(loss_fn: LossFunction, n_classes: int) -> float:
    """Least loss of a sample: c_y = 1 and every other cosine -1.

    ln C for form ``paper``, 0 for ``hinge``, next to 0 for the others at the
    usual scales. No real batch reaches it: C vectors cannot all be opposite.
    """
    cosines = torch.full((1, n_classes), -1.0, dtype=torch.float64)
    cosines[0, 0] = 1.0
    one_hot = torch.zeros_like(cosines)
    one_hot[0, 0] = 1.0
    logits = loss_fn(cosines, one_hot)
    return float(logits.logsumexp(dim=1) - logits[:, 0])


class MarginDiagnostics:
    """Collects the quantities of an epoch; docs/training-log.md names them.

    Keeps up to seven numbers a sample, on the device, so that quantiles are
    exact. The fused loss gives no angles to all others: :meth:`add_margins`.
    """

    def __init__(self, loss_fn: LossFunction):
        self.loss_fn = loss_fn
        self.samples: list[torch.Tensor] = []
        self.classes: list[torch.Tensor] = []
        self.n_classes = 0

    def reset(self) -> None:
        """Forget, for the next epoch."""
        self.samples, self.classes, self.n_classes = [], [], 0

    def state(self) -> dict:
        """For a checkpoint in the middle of an epoch, or another process."""
        return {
            "samples": _joined(self.samples).cpu() if self.samples else None,
            "classes": _joined(self.classes).cpu() if self.classes else None,
            "n_classes": self.n_classes,
        }

    def restore(self, *states: dict) -> None:
        """Go on from one ``state``, or from those of several processes."""
        self.reset()
        for state in states:
            for name in ("samples", "classes"):
                if state[name] is not None:
                    getattr(self, name).append(state[name])
            self.n_classes = max(self.n_classes, state["n_classes"])

    def counts(self) -> tuple[int, int]:
        """How many batches were taken, for :meth:`forget_unless`."""
        return len(self.samples), len(self.classes)

    def forget_unless(
        self, good: torch.Tensor, n_samples: int, n_classes: int
    ) -> None:
        """Make what was taken since :meth:`counts` NaN where `good` is false.

        :meth:`summary` leaves NaN out. `good` is not waited for.
        """
        for parts, n_before in (
            (self.samples, n_samples),
            (self.classes, n_classes),
        ):
            parts[n_before:] = [
                torch.where(good, part, math.nan) for part in parts[n_before:]
            ]

    def watch(self, cosines: torch.Tensor, targets: torch.Tensor) -> None:
        """Take cosines [N, C] or [N, 1, C], later also their gradient."""
        n_classes = cosines.shape[-1]
        targets = targets.reshape(-1)
        self.add(cosines.reshape(-1, n_classes), targets)
        if cosines.requires_grad:
            cosines.register_hook(
                lambda grad: self.add_gradient(
                    grad.reshape(-1, n_classes), targets
                )
            )

    @torch.no_grad()
    def add(self, cosines: torch.Tensor, targets: torch.Tensor) -> None:
        """Take a batch: cosines [N, C], targets [N]."""
        cosines = cosines.detach().float()
        self.n_classes = cosines.shape[1]
        below = satisfied_below(self.loss_fn, cosines, targets)
        angles = cosines.clamp(-1, 1).acos().rad2deg()
        within = target_cosines(angles, targets)
        others = angles.scatter(1, targets[:, None], 0.0)
        n_others = self.n_classes - 1
        self.samples.append(
            torch.stack(
                [
                    satisfied_share(cosines, targets, below),
                    cosine_margins(cosines, targets),
                    within,
                    angles.scatter(1, targets[:, None], 180.0).amin(dim=1),
                    others.sum(dim=1) / n_others,
                    others.square().sum(dim=1) / n_others,
                ]
            )
        )

    @torch.no_grad()
    def add_margins(self, margins: Margins, n_classes: int) -> None:
        """Take a batch of the fused loss with `n_classes`, gradients too."""
        self.n_classes = n_classes
        angles = torch.stack([margins.cosine, margins.nearest])
        within, nearest = angles.clamp(-1, 1).acos().rad2deg()
        lead = margins.cosine - margins.nearest
        self.samples.append(
            torch.stack([margins.satisfied, lead, within, nearest]).float()
        )
        self.classes.append(margins.gradient_classes.float())

    @torch.no_grad()
    def add_gradient(
        self, gradient: torch.Tensor, targets: torch.Tensor
    ) -> None:
        """Take the gradient [N, C] of a batch, by the cosines."""
        self.classes.append(effective_classes(gradient.float(), targets))

    def summary(self, mean_loss: float) -> dict[str, float]:
        """The epoch's numbers from its mean loss in nats; waits for the device.

        Empty where no batch was added, without ``gradient_classes`` where no
        gradient was, without ``angle_between`` where a batch was of the fused
        loss.
        """
        if not self.samples:
            return {}
        samples = _joined(self.samples).double().cpu()
        # Steps that are not finite are skipped by training; here too.
        samples = samples[:, samples.isfinite().all(dim=0)]
        if not samples.numel():
            return {}
        satisfied, margins, within, nearest, *others = samples
        # Not torch.quantile, which refuses more than 2^24 numbers.
        low, middle, high = np.quantile(margins.numpy(), [0.05, 0.5, 0.95])
        summary = {
            "satisfied": satisfied.mean(),
            "margin_p05": low,
            "margin_p50": middle,
            "margin_p95": high,
            "above_floor": mean_loss - loss_floor(self.loss_fn, self.n_classes),
            "angle_within": within.mean(),
            "angle_within_std": within.std(correction=0),
            "angle_nearest": nearest.mean(),
        }
        if others:
            between, squares = (each.mean() for each in others)
            summary["angle_between"] = between
            variance = (squares - between.square()).clamp(min=0)
            summary["angle_between_std"] = variance.sqrt()
        if self.classes:
            classes = _joined(self.classes)
            summary["gradient_classes"] = classes[classes.isfinite()].mean()
        return {name: float(value) for name, value in summary.items()}


def is_diagnosed(state: Any) -> bool:
    """Whether it is None or a state of :class:`MarginDiagnostics`."""
    if state is None:
        return True
    if not isinstance(state, dict):
        return False
    samples, classes = state.get("samples"), state.get("classes")
    return isinstance(state.get("n_classes"), int) and all(
        each is None
        or isinstance(each, torch.Tensor)
        and each.dtype == torch.float32
        and each.dim() == (2 if each is samples else 1)
        and (each is classes or len(each) in (4, 6))
        for each in (samples, classes)
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor, where the newest part lies: the restored one is elsewhere.

    Of the quantities that all parts have.
    """
    device = parts[-1].device
    if parts[0].ndim == 2:
        n_rows = min(map(len, parts))
        parts = [part[:n_rows] for part in parts]
    return torch.cat([part.to(device) for part in parts], dim=-1)
