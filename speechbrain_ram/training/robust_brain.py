"""SpeechBrain's Brain for runs that are killed, starved and split up.

What :class:`RobustBrain` adds to its base class:

- a checkpoint holds everything that decides how training goes on: random
  generators, the sums of the running epoch, the log, the list of faults;
- signals and ``max_hours`` write a checkpoint and leave, see
  :mod:`speechbrain_ram.training.faults`;
- recordings that fail are skipped, see :mod:`speechbrain_ram.training.faults`;
- a step whose loss or gradients are not finite leaves no trace;
- a step of several processes is the step of one with the joint batch, and
  so is a validation; a signal to one of them is a signal to all.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Mapping

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from speechbrain_ram.training.checkpoints import CheckpointError
from speechbrain_ram.training.distributed import (
    JointBatchSampler,
    Tally,
    random_state,
    restore_random_state,
    shared_batches,
    sync_batch_norm,
    without_ddp,
)
from speechbrain_ram.training.faults import (
    Batch,
    FaultList,
    Interrupted,
    SkipUnreadable,
    StopRequest,
    ending_workers,
    explained,
    let_worker_outlive_signals,
)
from speechbrain_ram.training.state import COUNTERS, Check, read_state
from speechbrain_ram.utils import (
    all_numbers,
    atomic_writer,
    gathered,
    n_processes,
)

logger = get_logger(__name__)

_LOADER_TIMEOUT = 600  # seconds without a batch: a worker hangs


class NonFiniteError(RuntimeError):
    """Loss or gradients were NaN or infinite too often in a row."""


@functools.partial(register_checkpoint_hooks, save_on_main_only=False)
class RobustBrain(sb.Brain):
    """A Brain whose training survives.

    What it reads from the YAML:

    ==================  =====================================================
    max_hours           leave with a checkpoint after so long; 0 is never
    max_fault_share     share of unreadable utterances that stops training
    max_bad_steps       so many steps in a row without a finite loss stop it
    output_folder       where the lists of faults go
    train_logger        SpeechBrain's FileTrainLogger, whose file is kept in
                        step with the checkpoints
    ==================  =====================================================

    A subclass names in `kept_attributes` what else its epochs carry over, with
    a test of what a checkpoint may set it to.

    Arguments
    ---------
    stop : StopRequest, optional
        Made where the clock of ``max_hours`` starts.
    *args, **kwargs
        As for ``speechbrain.Brain``.
    """

    kept_attributes: Mapping[str, Check] = {}

    def __init__(self, *args, stop: StopRequest | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop = stop or StopRequest(getattr(self.hparams, "max_hours", 0))
        self.stopping = False
        self.train_sampler: JointBatchSampler | None = None
        self.tally = Tally()
        self.n_bad_steps = self.bad_in_a_row = self.n_scaled_down = 0
        self.faults: dict[sb.Stage, FaultList] = {}
        self._resumed: dict | None = None  # of the epoch that goes on
        self._random: dict | None = None  # to be set before the next step
        self._log_to_restore: str | None = None
        self._buffers_before: list[tuple] = []

    # -- the run ----------------------------------------------------------

    def fit(self, *args, **kwargs):
        """Train; raises Interrupted (status 75), or says what stopped it."""
        with self.stop.listening(), ending_workers():
            try:
                super().fit(*args, **kwargs)
            except Interrupted as leaving:
                logger.warning("%s. %s", leaving, self._how_to_go_on())
                leaving.told = True
                raise
            except (OSError, RuntimeError) as error:
                raise explained(error, self._how_to_go_on()) from error

    def _how_to_go_on(self) -> str:
        found = self.checkpointer and self.checkpointer.find_checkpoint()
        if not found:
            return "There is no checkpoint yet: the same command begins anew."
        return f"The same command goes on from checkpoint '{found.path.name}'."

    def on_fit_start(self):
        """Continue, or begin with an empty log."""
        self._log_to_restore = None
        super().on_fit_start()
        log = getattr(self.hparams.train_logger, "save_file", None)
        if log is None or not if_main_process():
            return
        if self._log_to_restore is not None:
            with atomic_writer(log) as file:
                file.write(self._log_to_restore)
        elif self.optimizer_step == 0 and os.path.exists(log):
            # Of a run that ended before its first checkpoint.
            os.replace(log, f"{log}.old")

    def _wrap_distributed(self):
        """SpeechBrain's, with a batch normalisation that CPUs have."""
        if self.distributed_launch and self.device_type == "cpu":
            for name, module in self.modules.items():
                self.modules[name] = sync_batch_norm(module)
        super()._wrap_distributed()

    # -- the data ---------------------------------------------------------

    def make_dataloader(self, dataset, stage, ckpt_prefix="dataloader-", **kw):
        """SpeechBrain's loader, around a dataset that skips what fails."""
        folder = self.hparams.output_folder
        name = {sb.Stage.TRAIN: "training"}.get(stage, "validation")
        self.faults[stage] = FaultList(
            len(dataset),
            getattr(self.hparams, "max_fault_share", 0.0),
            f"{folder}/{name}_faults.txt" if if_main_process() else None,
            name,
        )
        if stage == sb.Stage.VALID and n_processes() > 1:
            size = kw.pop("batch_size", 1)
            kw["batch_sampler"] = shared_batches(
                len(dataset), size, self.rank, n_processes()
            )
        if kw.get("num_workers", 0) > 0:
            kw["worker_init_fn"] = let_worker_outlive_signals
            kw["timeout"] = _LOADER_TIMEOUT
        return super().make_dataloader(
            SkipUnreadable(dataset), stage, ckpt_prefix, collate_fn=Batch, **kw
        )

    def _train_loader_specifics(self, dataset, loader_kwargs):
        """Share every batch among the processes."""
        rest = dict(loader_kwargs)
        rest.pop("shuffle", None)
        self.train_sampler = JointBatchSampler(
            len(dataset),
            rest.pop("batch_size", 1),
            int(os.environ.get("SB_GLOBAL_SEED", 0)),
            self.rank if n_processes() > 1 else 0,
            n_processes(),
        )
        return {**rest, "batch_sampler": self.train_sampler}

    # -- the step ---------------------------------------------------------

    def fit_batch(self, batch: Batch) -> torch.Tensor:
        """One step; its loss, or NaN (which averages leave out) if skipped."""
        self._restore_random()
        sizes = self._agree(batch, sb.Stage.TRAIN)
        if 0 in sizes:  # a process has nothing to train on
            return torch.tensor(float("nan"))
        batch = batch.data
        should_step = self.step % self.grad_accumulation_factor == 0
        self.on_fit_batch_start(batch, should_step)
        before = copy.deepcopy(self.tally)  # `+=` would change a tensor
        self._keep_buffers()
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            finite = all(
                each
                for (each,) in all_numbers(
                    (int(torch.isfinite(loss)),), self.device
                )
            )
            if finite:
                scaled = loss / self.grad_accumulation_factor
                if len(sizes) > 1:  # a mean over the joint batch
                    scaled = scaled * (len(batch) * len(sizes) / sum(sizes))
                self.scaler.scale(scaled).backward()
        overflow = False
        if finite and should_step:
            finite = self._step_if_finite()
            # From 1 on, the scale itself may be what overflows.
            overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not finite:
            self.tally = before
            self._undo_forward()
            if overflow:
                self.n_scaled_down += 1
            else:
                self._skip_step(batch, float(loss.detach()))
            return torch.tensor(float("nan"))
        if should_step:
            self.bad_in_a_row = 0
        self.tally.loss_sum += float(loss.detach()) * len(batch)
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        return loss.detach().cpu()

    def _agree(self, batch: Batch, stage: sb.Stage) -> list[int]:
        """Tell each other batch sizes, faults and wishes to leave."""
        wish = self.stop.signal
        if stage == sb.Stage.TRAIN:  # max_hours: after the validation
            wish = self.stop.reason()
        mine = (len(batch.data or ()), len(batch.faults), int(wish is not None))
        shares = all_numbers(mine, self.device)
        self.stopping = any(wish for *_, wish in shares)
        if any(n_faults for _, n_faults, _ in shares):
            faults = self.faults[stage]
            for each in gathered(batch.faults):
                faults.add(each)
            faults.check()
        return [size for size, *_ in shares]

    def _step_if_finite(self) -> bool:
        """The optimiser's step, unless the gradients are not finite."""
        grads = [
            p.grad for p in self.modules.parameters() if p.grad is not None
        ]
        scale, n_before = self.scaler.get_scale(), self.optimizer_step
        norm = float(torch.nn.utils.get_total_norm(grads)) / scale
        finite = norm < float("inf")  # not so for NaN
        if finite or self.scaler.is_enabled():
            self.optimizers_step()  # a scaler skips by itself, and scales down
        if not finite or self.scaler.get_scale() < scale:
            self.optimizer_step = n_before
            return False
        self.tally.grad_norm += norm
        self.tally.n_steps += 1
        return True

    def _keep_buffers(self):
        """Statistics of batch normalisation change in the forward pass."""
        buffers = list(self.modules.buffers())
        self._buffers_before = [(b, b.detach().clone()) for b in buffers]

    def _undo_forward(self):
        """Put back what a step changed that is not taken."""
        for buffer, kept in self._buffers_before:
            buffer.copy_(kept)
        self.zero_grad(set_to_none=True)

    def _skip_step(self, batch, loss: float):
        """Count and name a bad step; stop if that is the rule now."""
        self.n_bad_steps += 1
        self.bad_in_a_row += 1
        limit = getattr(self.hparams, "max_bad_steps", 10)
        what = (
            f"step {self.step} of epoch {self.hparams.epoch_counter.current} "
            f"has loss {loss} and gradients that are not all finite"
        )
        logger.warning("%s; it is skipped: %s", what, ", ".join(batch.id))
        if self.bad_in_a_row >= limit:
            raise NonFiniteError(
                f"{limit} steps in a row (--max_bad_steps) were skipped; "
                f"{what}. Is --lr too high, or are recordings broken? "
                f"{self._how_to_go_on()} The last batch: {', '.join(batch.id)}"
            )

    def evaluate_batch(self, batch: Batch, stage):
        """One batch of validation, without what cannot be read."""
        self._agree(batch, stage)
        if self.stopping:
            raise Interrupted(self._why_stopping())
        if batch.data is None:
            return torch.tensor(float("nan"))
        with without_ddp(self.modules):
            loss = super().evaluate_batch(batch.data, stage)
        self.tally.loss_sum += float(loss) * len(batch.data)
        return loss

    # -- checkpoints within an epoch --------------------------------------

    def leave_if_asked(self):
        """Leave where a checkpoint has everything already."""
        if self.stop.signal:
            raise Interrupted(self._why_stopping())

    def leave_together(self):
        """Leave if one of the processes was asked to; all must call this."""
        asked = all_numbers((int(self.stop.signal is not None),), self.device)
        if any(wish for (wish,) in asked):
            raise Interrupted(self._why_stopping())

    def _why_stopping(self) -> str:
        return self.stop.reason() or "another process was asked to leave"

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        """Between optimiser steps only: gradients are not saved."""
        if self.step % self.grad_accumulation_factor:
            return False
        return self.stopping or super()._should_save_intra_epoch_ckpt(
            last_ckpt_time, steps_since_ckpt
        )

    def _save_intra_epoch_ckpt(self):
        super()._save_intra_epoch_ckpt()
        if self.stopping:
            raise Interrupted(self._why_stopping())

    def on_stage_start(self, stage, epoch=None):
        """Begin the sums of the epoch, or go on with them."""
        self.tally = Tally()
        if stage == sb.Stage.TRAIN and self._resumed is not None:
            # Of all processes; the others begin at nothing.
            self.tally = Tally(**self._resumed)
            if not if_main_process():
                self.tally.n_right = self.tally.n_seen = 0
                self.tally.loss_sum = 0.0
            self._resumed = None

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Call after a training stage: validation must not lose it."""
        self._restore_random()
        if stage == sb.Stage.TRAIN and self.checkpointer is not None:
            self._save_intra_epoch_ckpt()

    def _restore_random(self):
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None

    @mark_as_saver
    def _save(self, path):
        """On every process; rank 0 writes."""
        state = {
            "step": self.step,
            "avg_train_loss": self.avg_train_loss,
            **{name: getattr(self, name) for name in COUNTERS},
            "tally": dataclasses.asdict(self.tally.joint()),
            "faults": self.faults[sb.Stage.TRAIN].messages,
            "joint_batch": self.train_sampler.joint_size,
            "threads": torch.get_num_threads(),
            "random": gathered(random_state()),
            "kept": {
                name: getattr(self, name)
                for name in self.kept_attributes
                if hasattr(self, name)
            },
            "log": self._read_log(),
        }
        if if_main_process():
            torch.save(state, path)

    @mark_as_loader
    def _recover(self, path, end_of_epoch):
        rank = self.rank if n_processes() > 1 else 0
        state = read_state(path, self.kept_attributes, rank)
        for name in ("step", "avg_train_loss", *COUNTERS):
            setattr(self, name, state.get(name, 0))
        if "tally" not in state:  # SpeechBrain's own, by a Brain
            return
        self._check_same_threads(state)
        if not end_of_epoch:
            self._check_same_epoch(state, path)
            self._resumed = state["tally"]
        for name, value in state["kept"].items():
            setattr(self, name, value)
        self.faults[sb.Stage.TRAIN].restore(state["faults"])
        self._log_to_restore = state["log"]
        self._random = state["random"]
        if end_of_epoch:
            # The next draw is the loader's; within an epoch that was earlier.
            self._restore_random()

    def _check_same_threads(self, state: dict) -> None:
        """Sums in another order: on CPU the one thing left to the machine."""
        before, now = state["threads"], torch.get_num_threads()
        if self.device_type == "cpu" and before != now:
            logger.warning(
                "The run was begun with %d threads and goes on with %d: the "
                "last bits of its numbers will not be those of a run that was "
                "never interrupted. With OMP_NUM_THREADS=%d they are.",
                before,
                now,
                before,
            )

    def _check_same_epoch(self, state: dict, path) -> None:
        """Can this run finish the epoch that another one began?"""
        joint = self.train_sampler.joint_size
        if state["joint_batch"] != joint:
            raise CheckpointError(
                f"'{path}' was written within an epoch of joint batches of "
                f"{state['joint_batch']} utterances, now they have {joint}. "
                "Keep (number of processes) x --batch_size, or delete "
                f"'{os.path.dirname(path)}' to go on from the end of the "
                "epoch before."
            )

    def _read_log(self) -> str | None:
        log = getattr(self.hparams.train_logger, "save_file", None)
        if log is None or not os.path.exists(log):
            return None
        with open(log, encoding="utf-8", errors="replace") as file:
            return file.read()
