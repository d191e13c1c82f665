"""What a training step leaves behind, and how a bad one leaves nothing.

Whether loss and gradients are finite is known on the device first. To ask for
it would make the host wait in every step. So what a bad step changed is put
back on the device, by selection, and the host learns of it a step later.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import speechbrain as sb
import torch
from speechbrain.utils.logger import get_logger

from speechbrain_ram.training.distributed import Tally

logger = get_logger(__name__)

ENCODER = "embedding_model"


class NonFiniteError(RuntimeError):
    """Loss or gradients were NaN or infinite too often in a row."""


class KeptBuffers:
    """A model's buffers before a step, whose forward pass changes them."""

    def __init__(self, module: torch.nn.Module):
        groups: dict[tuple, list[torch.Tensor]] = {}
        for buffer in module.buffers():
            groups.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        self.groups = list(groups.values())
        self.before = [_joined(group) for group in self.groups]

    def undo_unless(self, good: torch.Tensor) -> None:
        """Put them back where `good`, one truth value, is false."""
        for group, before in zip(self.groups, self.before, strict=True):
            chosen = torch.where(good, _joined(group), before)
            parts = chosen.split([each.numel() for each in group])
            torch._foreach_copy_(
                group, [a.view_as(b) for a, b in zip(parts, group, strict=True)]
            )


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in tensors])


@dataclasses.dataclass
class Outcome:
    """A step that is done on the device, for the host to count later."""

    ids: list[str]
    """Of the batch's utterances."""

    step: int
    """In its epoch."""

    stepped: bool
    """Whether the optimiser was called."""

    overflow: bool
    """Whether only the scale of fp16 was too large."""

    device_numbers: dataclasses.InitVar[Sequence[torch.Tensor]]
    """Whether it was good, right answers, mean loss, norm of the gradients."""

    def __post_init__(self, device_numbers):
        self._ready = None
        numbers = torch.stack(
            [each.detach().float() for each in device_numbers]
        )
        if numbers.is_cuda:  # to pinned memory, while the next step is begun
            numbers = numbers.to("cpu", non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        self._numbers = numbers

    def read(self) -> tuple[bool, int, float, float]:
        """Wait for the step; good, right answers, mean loss, norm."""
        if self._ready is not None:
            self._ready.synchronize()
        good, right, loss, norm = self._numbers.tolist()
        return bool(good), int(right), loss, norm


def with_own_rate(
    opt_class: Callable, part: torch.nn.Module, factor: float
) -> Callable:
    """Make an optimiser with two groups, `part` and the rest.

    The first is marked with ``lr_factor``, by which its rate is multiplied.
    """

    @functools.wraps(opt_class, updated=())
    def make(parameters, **options):
        own = list(part.parameters())
        of_part = set(map(id, own))
        rest = [each for each in parameters if id(each) not in of_part]
        groups = [{"params": own, "lr_factor": factor}, {"params": rest}]
        return opt_class(groups, **options)

    return make


def fused_on_cuda(opt_class: Callable) -> Callable:
    """Make SGD, Adam and AdamW the kind that can skip a step on the device."""

    @functools.wraps(opt_class, updated=())
    def make(parameters):
        parameters = list(parameters)
        try:
            optimizer = opt_class(parameters, fused=True)
        except (TypeError, RuntimeError):  # it has no such kind, or not here
            return opt_class(parameters)
        optimizer.register_load_state_dict_pre_hook(_as_fused)
        optimizer.register_step_pre_hook(_start_momentum)
        return optimizer

    return make


def _as_fused(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """A checkpoint of the other kind, such as one from a CPU."""
    groups = [{**group, "fused": True} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _start_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Begin SGD's momentum at 0 when a parameter first has a gradient.

    The fused kind wants buffers for all parameters of a group or for none, so
    that it fails when an encoder thaws; and those that it makes in a step that
    it then skips are memory as it was found.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for each in group["params"]:
                if each.grad is None:
                    continue
                if optimizer.state[each].get("momentum_buffer") is None:
                    optimizer.state[each]["momentum_buffer"] = torch.zeros_like(
                        each
                    )


def skips_on_the_device(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether it looks at `found_inf`, as a GradScaler leaves it, by itself."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class SkippingBrain(sb.Brain):
    """Takes a step only where loss and gradients are finite, and counts it.

    ``fit_batch`` is in :class:`.robust_brain.RobustBrain`. `compute_objectives`
    leaves the batch's right answers in `n_right`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tally = Tally()
        self.n_bad_steps = self.bad_in_a_row = self.n_scaled_down = 0
        self.n_right: int | torch.Tensor = 0
        self._outcomes: list[Outcome] = []  # of steps that are not counted yet
        self._known_loss = torch.tensor(float("nan"))

    def init_optimizers(self):
        """SpeechBrain's, of a kind that needs no answer from a GPU.

        With ``encoder_lr_factor`` in the YAML, of two groups.
        """
        factor = getattr(self.hparams, "encoder_lr_factor", 1.0)
        if factor != 1.0:
            self.opt_class = with_own_rate(
                self.opt_class, self.modules[ENCODER], factor
            )
        if self.device_type == "cuda" and self.opt_class is not None:
            self.opt_class = fused_on_cuda(self.opt_class)
        super().init_optimizers()

    def _step_where(self, good: torch.Tensor) -> tuple:
        """The optimiser's step where the gradients are finite too.

        Whether they are, their norm, and whether the scaler is to blame.
        """
        grads = [
            p.grad for p in self.modules.parameters() if p.grad is not None
        ]
        scale, n_before = self.scaler.get_scale(), self.optimizer_step
        norm = torch.nn.utils.get_total_norm(grads) / scale
        good_loss, good = good, good & norm.isfinite()
        if len(self.optimizer.param_groups) > 1:  # SpeechBrain clips the first
            torch.nn.utils.clip_grads_with_norm_(
                self.modules.parameters(), self.max_grad_norm, norm
            )
        if self.defers:
            self.optimizer.found_inf = (~good).float()
            self.optimizers_step()
            return good, norm, False
        scales = self.scaler.is_enabled() and bool(good_loss)
        if scales or bool(good):
            self.optimizers_step()  # a scaler skips by itself, and scales down
        self.zero_grad(set_to_none=True)
        if self.scaler.get_scale() < scale:
            good = torch.zeros_like(good)
        if not good:
            self.optimizer_step = n_before
        # From 1 on, the scale itself may be what overflows.
        return good, norm, scales and self.scaler.get_scale() >= 1

    @property
    def defers(self) -> bool:
        """Whether the host may learn a step later how a step went."""
        return (
            self.device_type == "cuda"
            and not self.scaler.is_enabled()
            and skips_on_the_device(self.optimizer)
        )

    def undo_unless(self, good: torch.Tensor, buffers: KeptBuffers) -> None:
        """Put back, on the device, what a bad step has changed."""
        buffers.undo_unless(good)

    def settle(self, leave: int = 0) -> None:
        """Count the steps that are done, but the last `leave`."""
        while len(self._outcomes) > leave:
            outcome = self._outcomes.pop(0)
            good, n_right, loss, norm = outcome.read()
            if good:
                self._known_loss = torch.tensor(loss)
                self.tally.n_right += n_right
                self.tally.n_seen += len(outcome.ids)
                self.tally.loss_sum += loss * len(outcome.ids)
                if outcome.stepped:
                    self.tally.grad_norm += norm
                    self.tally.n_steps += 1
                    self.bad_in_a_row = 0
                continue
            self._known_loss = torch.tensor(float("nan"))
            if outcome.stepped and self.defers:
                self.optimizer_step -= 1
            if outcome.overflow:
                self.n_scaled_down += 1
            elif outcome.stepped:
                self._skip_step(outcome, loss)
            else:  # the step that it is part of will be skipped
                logger.warning(
                    "batch %d has loss %s, so the step that accumulates it is "
                    "skipped: %s",
                    outcome.step,
                    loss,
                    ", ".join(outcome.ids),
                )

    def _skip_step(self, outcome: Outcome, loss: float):
        """Count and name a bad step; stop if that is the rule now."""
        self.n_bad_steps += 1
        self.bad_in_a_row += 1
        limit = getattr(self.hparams, "max_bad_steps", 10)
        names = ", ".join(outcome.ids)
        what = (
            f"step {outcome.step} of epoch "
            f"{self.hparams.epoch_counter.current} "
            f"has loss {loss} and gradients that are not all finite"
        )
        logger.warning("%s; it is skipped: %s", what, names)
        if self.bad_in_a_row >= limit:
            raise NonFiniteError(
                f"{limit} steps in a row (--max_bad_steps) were skipped; "
                f"{what}. Is --lr too high, or are recordings broken? "
                f"{self._how_to_go_on()} The last batch: {names}"
            )
