"""SpeechBrain's Brain for runs that are killed, starved and split up.

What :class:`RobustBrain` adds to its base class:

- a checkpoint holds everything that decides how training goes on: random
  generators, the sums of the running epoch, the log, the list of faults;
- signals and ``max_hours`` write a checkpoint and leave, see
  :mod:`speechbrain_ram.training.leaving`;
- recordings that fail are skipped, see :mod:`speechbrain_ram.training.faults`;
- a step whose loss or gradients are not finite leaves no trace;
- a step of several processes is the step of one with the joint batch, and
  so is a validation; a signal to one of them is a signal to all.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
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

from speechbrain_ram.training.distributed import (
    JointBatchSampler,
    Tally,
    average_buffers,
    random_state,
    restore_random_state,
    shared_batches,
    without_ddp,
    wrap,
)
from speechbrain_ram.training.faults import (
    Batch,
    FaultList,
    SkipUnreadable,
    ending_workers,
    explained,
    let_worker_outlive_signals,
)
from speechbrain_ram.training.leaving import Interrupted, StopRequest
from speechbrain_ram.training.state import (
    COUNTERS,
    Check,
    check_joint_batch,
    read_state,
    warn_of_other_threads,
)
from speechbrain_ram.training.steps import (
    KeptBuffers,
    Outcome,
    SkippingBrain,
)
from speechbrain_ram.utils import (
    all_numbers,
    atomic_writer,
    gathered,
    n_processes,
)

logger = get_logger(__name__)

_LOADER_TIMEOUT = 600  # seconds without a batch: a worker hangs


@functools.partial(register_checkpoint_hooks, save_on_main_only=False)
class RobustBrain(SkippingBrain):
    """A Brain whose training survives.

    What it reads from the YAML:

    ==================  =====================================================
    max_hours           leave with a checkpoint after so long; 0 is never
    max_fault_share     share of unreadable utterances that stops training
    max_bad_steps       so many steps in a row without a finite loss stop it
    output_folder       where the lists of faults go
    sync_batch_norm     False: batch statistics are those of each process
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
        self.faults: dict[sb.Stage, FaultList] = {}
        self._resumed: dict | None = None  # of the epoch that goes on
        self._random: dict | None = None  # to be set before the next step
        self._log_to_restore: str | None = None
        self._saved_at = time.monotonic()
        self._save_is_due = False

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
        """As SpeechBrain's, see :func:`.distributed.wrap`."""
        if not self.distributed_launch:
            super()._wrap_distributed()
            return
        wrap(
            self.modules,
            self.device,
            self.joint_statistics,
            self.find_unused_parameters,
        )

    @property
    def joint_statistics(self) -> bool:
        """Whether batch normalisation is over the batch of all processes."""
        return getattr(self.hparams, "sync_batch_norm", True)

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
            kw["persistent_workers"] = True
        kw["pin_memory"] = self.device_type == "cuda"
        # Of its own: workers that live on draw once, new ones each epoch.
        kw["generator"] = torch.Generator()
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
        """One step; a loss that is known by now, NaN if it was skipped.

        That of this step, or on a GPU that of the step before.
        """
        self._restore_random()
        sizes = self._agree(batch, sb.Stage.TRAIN)
        if 0 in sizes:  # a process has nothing to train on
            return torch.tensor(float("nan"))
        batch = batch.data
        should_step = self.step % self.grad_accumulation_factor == 0
        self.on_fit_batch_start(batch, should_step)
        buffers = KeptBuffers(self.modules)
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            good = loss.detach().isfinite()
            if self.scaler.is_enabled():  # tell it from too large a scale
                shares = all_numbers((int(good),))
                good = torch.tensor(min(shares)[0] > 0, device=good.device)
            scaled = loss / self.grad_accumulation_factor
            if len(sizes) > 1:  # a mean over the joint batch
                scaled = scaled * (len(batch) * len(sizes) / sum(sizes))
            # With NaN as gradients every process sees that one has a bad loss.
            scaled = scaled * torch.where(good, 1.0, float("nan"))
            self.scaler.scale(scaled).backward()
        norm, overflow = torch.zeros_like(loss), False
        if should_step:
            good, norm, overflow = self._step_where(good)
        self.undo_unless(good, buffers)
        numbers = good, self.n_right, loss, norm
        self._outcomes.append(
            Outcome(batch.id, self.step, should_step, overflow, numbers)
        )
        self.settle(leave=int(self.defers))
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        return self._known_loss

    def _agree(self, batch: Batch, stage: sb.Stage) -> list[int]:
        """Tell each other batch sizes, faults and wishes to leave."""
        wish = self.stop.signal
        if stage == sb.Stage.TRAIN:  # max_hours: after the validation
            wish = self.stop.reason()
        minutes = (time.monotonic() - self._saved_at) / 60
        mine = (
            len(batch.data or ()),
            len(batch.faults),
            int(wish is not None),
            int(0 < self.ckpt_interval_minutes < minutes),
        )
        shares = all_numbers(mine)
        self.stopping = any(wish for _, _, wish, _ in shares)
        self._save_is_due = bool(shares[0][3])  # by the clock of rank 0
        if any(n_faults for _, n_faults, *_ in shares):
            faults = self.faults[stage]
            for each in gathered(batch.faults):
                faults.add(each)
            faults.check()
        return [size for size, *_ in shares]

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
        self.tally.n_right += int(self.n_right)
        self.tally.n_seen += len(batch.data)
        return loss

    # -- checkpoints within an epoch --------------------------------------

    def leave_if_asked(self):
        """Leave where a checkpoint has everything already."""
        if self.stop.signal:
            raise Interrupted(self._why_stopping())

    def leave_together(self):
        """Leave if one of the processes was asked to; all must call this."""
        asked = all_numbers((int(self.stop.signal is not None),))
        if any(wish for (wish,) in asked):
            raise Interrupted(self._why_stopping())

    def _why_stopping(self) -> str:
        return self.stop.reason() or "another process was asked to leave"

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        """Between optimiser steps only: gradients are not saved."""
        if self.step % self.grad_accumulation_factor or not self.checkpointer:
            return False
        by_steps = 0 < self.ckpt_interval_steps <= steps_since_ckpt
        return self.stopping or self._save_is_due or by_steps

    def _save_intra_epoch_ckpt(self):
        self.settle()
        super()._save_intra_epoch_ckpt()
        self._saved_at = time.monotonic()
        if self.stopping:
            raise Interrupted(self._why_stopping())

    def on_stage_start(self, stage, epoch=None):
        """Begin the sums of the epoch, or go on with them."""
        self.tally = Tally()
        self._saved_at = time.monotonic()
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
        if stage == sb.Stage.TRAIN and not self.joint_statistics:
            average_buffers(self.modules)
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
        if self.device_type == "cpu":
            warn_of_other_threads(state["threads"])
        if not end_of_epoch:
            check_joint_batch(state, self.train_sampler.joint_size, path)
            self._resumed = state["tally"]
        for name, value in state["kept"].items():
            setattr(self, name, value)
        self.faults[sb.Stage.TRAIN].restore(state["faults"])
        self._log_to_restore = state["log"]
        self._random = state["random"]
        if end_of_epoch:
            # The next draw is the loader's; within an epoch that was earlier.
            self._restore_random()

    def _read_log(self) -> str | None:
        log = getattr(self.hparams.train_logger, "save_file", None)
        if log is None or not os.path.exists(log):
            return None
        with open(log, encoding="utf-8", errors="replace") as file:
            return file.read()
