"""SpeechBrain's Brain for speaker encoders, with what a long run must log."""

from __future__ import annotations

import time
from collections.abc import Sequence

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process, main_process_only
from speechbrain.utils.logger import get_logger

from speechbrain_ram.data.synthetic import feature_masks
from speechbrain_ram.losses import set_margin
from speechbrain_ram.training.advice import advice, set_start
from speechbrain_ram.training.checkpoints import CheckpointError
from speechbrain_ram.training.diagnostics import MarginDiagnostics, is_diagnosed
from speechbrain_ram.training.distributed import unwrapped
from speechbrain_ram.training.fused import FusedMarginClassifier
from speechbrain_ram.training.layout import precision_advice, set_layout
from speechbrain_ram.training.robust_brain import RobustBrain
from speechbrain_ram.training.state import are_numbers, is_number_or_none
from speechbrain_ram.training.steps import ENCODER
from speechbrain_ram.utils import gathered
from speechbrain_ram.verification.embedder import Embedder, Padding
from speechbrain_ram.verification.embeddings import extract
from speechbrain_ram.verification.metrics import eer, min_dcf
from speechbrain_ram.verification.scores import score_trials
from speechbrain_ram.verification.store import EmbeddingSet
from speechbrain_ram.verification.trials import TrialList

logger = get_logger(__name__)


class SpeakerBrain(RobustBrain):
    """Trains front-end, encoder and classifier with any margin objective.

    What it reads from the YAML, beside SpeechBrain's own run options and what
    :class:`RobustBrain` reads:

    ===================  ====================================================
    modules              compute_features, mean_var_norm, embedding_model and
                         classifier, which returns cosines, or is a
                         :class:`.fused.FusedMarginClassifier` with the
                         loss_fn of compute_cost
    compute_cost         (cosines [B, 1, C], targets [B, 1]) -> loss, such as
                         SpeechBrain's LogSoftmaxWrapper
    learning_rate        (optimiser steps, epochs done) -> rate, such as
                         :class:`speechbrain_ram.training.schedules.WarmupDecay`
    epoch_counter        SpeechBrain's
    train_logger         SpeechBrain's; TensorBoard is added by ``tensorboard``
    verify_every         epochs between verifications of the dev trials
    margin_schedule      optional: epochs done -> margin, such as
                         :class:`.schedules.MarginRise`; the loss_fn of
                         compute_cost is given it by its `margin`, unless
                         ``objective`` is 'softmax'
    frozen_epochs        optional: of the start, in which the encoder stays
    encoder_lr_factor    optional: the encoder's rate is this times the rate
    average_checkpoints  optional: the encoder of the end is the mean over so
                         many last epochs, not the best one's
    synthetic            optional: with 'masks', :func:`.feature_masks`
    margin_diagnostics   False leaves them out of the log, see
                         :mod:`speechbrain_ram.training.diagnostics`
    ===================  ====================================================

    Arguments
    ---------
    dev_trials : TrialList
        Trials whose EER picks the best checkpoint; without them the
        classification error on the validation set does.
    dev_root : str
        The folder that the trial list's paths are relative to.
    read_options : dict
        ``sample_rate``, ``resample`` and ``mixdown`` for the recordings.
    *args, **kwargs
        As for :class:`RobustBrain`.
    """

    kept_attributes = {
        "rate": is_number_or_none,
        "untrained": are_numbers,
        "diagnosed": is_diagnosed,
    }

    def __init__(
        self,
        *args,
        dev_trials: TrialList | None = None,
        dev_root: str | None = None,
        read_options: dict | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.dev_trials = dev_trials
        self.dev_root = dev_root
        self.read_options = read_options or {}
        self.best_key = "error" if dev_trials is None else "EER"
        self.dev_embeddings: EmbeddingSet | None = None
        self.embedded_at: int | None = None  # epoch
        self.untrained: dict[str, float] = {}  # what the trials gave first
        self.rate: float | None = None  # of the last step
        self.frozen = False  # in this step, the encoder
        self.steps_per_epoch = None
        self.train_set = None
        self.train_stats: dict[str, float] = {}
        self.started = 0.0  # the epoch, here
        self.seen_before = 0
        self.n_diagnosed: tuple = ()
        synthetic = getattr(self.hparams, "synthetic", ())
        self.masks = feature_masks() if "masks" in synthetic else None
        self.diagnostics = None
        loss_fn = getattr(self.hparams.compute_cost, "loss_fn", None)
        wanted = getattr(self.hparams, "margin_diagnostics", True)
        if wanted and hasattr(loss_fn, "scale"):
            self.diagnostics = MarginDiagnostics(loss_fn)
        classifier = dict(self.modules).get("classifier")  # not to embed only
        self.fused = isinstance(classifier, FusedMarginClassifier)
        self.n_classes = len(getattr(classifier, "weight", ()))
        if self.fused and classifier.loss_fn is not loss_fn:
            raise ValueError(
                "the fused classifier has another loss_fn than compute_cost, "
                "whose margin the schedule changes. Give both the same "
                "!ref <loss_fn> in the YAML, or use --fused_loss False."
            )
        wanted = getattr(self.hparams, "channels_last", False)
        set_layout(self.modules[ENCODER], self.device_type, wanted)
        self.loggers = [self.hparams.train_logger]
        if getattr(self.hparams, "tensorboard", False) and if_main_process():
            self.loggers.append(
                sb.utils.train_logger.TensorboardLogger(
                    f"{self.hparams.output_folder}/tensorboard"
                )
            )

    def _compile(self):
        """With --compile or --jit, the encoder alone, unless keys are named.

        The rest takes 1 % of a step, and would be compiled for each length.
        """
        everything = self.modules
        if self.compile_module_keys is None and self.jit_module_keys is None:
            self.modules = torch.nn.ModuleDict({ENCODER: everything[ENCODER]})
        super()._compile()
        everything.update(self.modules)
        self.modules = everything

    # -- the step ---------------------------------------------------------

    def compute_forward(self, batch, stage):
        """Waveforms to cosines [B, 1, C]; all crops have one length.

        With the fused classifier, to the loss and the samples' margins.
        """
        batch = batch.to(self.device, non_blocking=True)
        waveforms, lengths = batch.sig
        feats = self.modules.compute_features(waveforms)
        feats = self.modules.mean_var_norm(feats, lengths)
        if self.masks is not None and stage == sb.Stage.TRAIN:
            feats = self.masks(feats)
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and not self.frozen
        ):
            embeddings = self.modules.embedding_model(feats).float()
        # A bfloat16 cosine near 0.5 is good to 0.004, 0.1 after the scale.
        with torch.autocast(self.device_type, enabled=False):
            if self.fused:
                targets = batch.spk_id_encoded.data
                return self.modules.classifier(embeddings, targets, True)
            return self.modules.classifier(embeddings)

    def compute_objectives(self, outputs, batch, stage):
        """Loss of the batch; counts its right answers on the way."""
        targets = batch.spk_id_encoded.data.to(self.device)
        watched = stage == sb.Stage.TRAIN and self.diagnostics is not None
        if self.fused:
            loss, margins = outputs
            right = margins.cosine > margins.nearest
            if watched:
                self.diagnostics.add_margins(margins, self.n_classes)
        else:
            best = outputs.detach().squeeze(1).argmax(dim=1)
            right = best == targets.squeeze(1)
            if watched:
                self.diagnostics.watch(outputs, targets)
            with torch.autocast(self.device_type, enabled=False):
                loss = self.hparams.compute_cost(outputs, targets)
        self.n_right = right.sum()  # on the device: no waiting
        return loss

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate of this step."""
        epochs_done = self._epochs_done(self.step)
        if self.diagnostics is not None:
            self.n_diagnosed = self.diagnostics.counts()
        self.rate = self.hparams.learning_rate(self.optimizer_step, epochs_done)
        self._schedule_margin(epochs_done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get("lr_factor", 1.0)
        frozen = epochs_done < getattr(self.hparams, "frozen_epochs", 0)
        if frozen or self.frozen:  # its batch statistics too
            self.modules[ENCODER].train(not frozen)
        self.frozen = frozen

    def undo_unless(self, good, buffers):
        """Put back what a bad step has changed, and do not diagnose it."""
        super().undo_unless(good, buffers)
        if self.diagnostics is not None:
            self.diagnostics.forget_unless(good, *self.n_diagnosed)

    def _epochs_done(self, step):
        """Before a step of this epoch, counted from 1."""
        before = self.hparams.epoch_counter.current - 1
        return before + (step - 1) / self.steps_per_epoch

    def _schedule_margin(self, epochs_done):
        """Give the objective the margin of this moment."""
        schedule = getattr(self.hparams, "margin_schedule", None)
        # One that never rises leaves the margin that the loss was made with.
        if schedule is not None and getattr(schedule, "end", None) != 0:
            self._set_margin(schedule(epochs_done))

    def _set_margin(self, margin):
        """Give the objective another margin, where it has one."""
        loss_fn = self.hparams.compute_cost.loss_fn
        softmax = getattr(self.hparams, "objective", None) == "softmax"
        if not softmax and margin != getattr(loss_fn, "margin", None):
            set_margin(loss_fn, margin)

    def make_dataloader(self, dataset, stage, *args, **kwargs):
        """RobustBrain's loader; notes the length of an epoch."""
        loader = super().make_dataloader(dataset, stage, *args, **kwargs)
        if stage == sb.Stage.TRAIN:
            self.steps_per_epoch = len(loader)
            self.train_set = dataset
        return loader

    # -- the epoch --------------------------------------------------------

    def on_fit_start(self):
        """Resume, if there is a checkpoint that fits; say what will not do."""
        hparams = self.hparams
        n_epochs = hparams.epoch_counter.limit
        n_steps = self.steps_per_epoch * n_epochs
        loss_fn = getattr(hparams.compute_cost, "loss_fn", None)
        schedule = getattr(hparams, "margin_schedule", None)
        set_start(schedule, loss_fn, self.n_classes)
        notes, warnings = advice(
            loss_fn,
            self.n_classes,
            hparams.learning_rate,
            schedule,
            n_steps // self.grad_accumulation_factor,
            n_epochs,
        )
        slow = precision_advice(self.device_type, self.precision)
        if slow is not None:
            (notes if self.precision == "fp32" else warnings).append(slow)
        for note in notes:
            logger.info(note)
        for warning in warnings:
            logger.warning(warning)
        try:
            super().on_fit_start()
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            raise ValueError(
                "the checkpoints in "
                f"'{self.checkpointer.checkpoints_dir}' are of another "
                "architecture or another number of speakers. Use another "
                f"--output_folder, or remove them. ({error})"
            ) from error
        wanted = getattr(hparams, "verify_untrained", False)
        if wanted and self.optimizer_step == 0:
            self.untrained = self.verify()
            self._log({"epoch": 0}, valid_stats=self.untrained)

    def on_stage_start(self, stage, epoch=None):
        """Choose the crops of the epoch, start the clock."""
        goes_on = self._resumed is not None
        super().on_stage_start(stage, epoch)
        if stage == sb.Stage.TRAIN:
            if self.diagnostics is not None and not goes_on:
                self.diagnostics.reset()
            self.train_set.set_epoch(epoch)
            self.started = time.perf_counter()
            self.seen_before = self.tally.n_seen  # by an interrupted run
        elif stage == sb.Stage.VALID:  # which may come first after a resume
            self._schedule_margin(self._epochs_done(self.steps_per_epoch))

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log; after a validation also verify, and save a checkpoint."""
        if stage == sb.Stage.TRAIN:
            self.settle()
            self.train_stats = self._training_stats()
            super().on_stage_end(stage, stage_loss, epoch)
            return
        total = self.tally.joint()
        stats = {"loss": total.loss, "error": 100 - total.accuracy}
        if stage == sb.Stage.VALID:
            last = epoch == self.hparams.epoch_counter.limit
            if last or epoch % self.hparams.verify_every == 0:
                stats.update(self.verify())
                self.embedded_at = epoch
            self._log(
                {"epoch": epoch, "lr": self.rate}, self.train_stats, stats
            )
            self.checkpointer.save_and_keep_only(
                meta={"epoch": epoch, **stats},
                min_keys=[self.best_key],
                num_to_keep=max(self.n_averaged, 1),
            )

    def _training_stats(self) -> dict[str, float]:
        total = self.tally.joint()
        seconds = time.perf_counter() - self.started
        stats = {
            "loss": total.loss,
            "accuracy": total.accuracy,
            "grad_norm": total.grad_norm / max(total.n_steps, 1),
            "utterances/s": (total.n_seen - self.seen_before) / seconds,
        }
        if self.diagnostics is not None:
            stats.update(self._joint_diagnostics().summary(stats["loss"]))
        if self.n_bad_steps:
            stats["skipped steps"] = self.n_bad_steps
        if self.n_scaled_down:
            stats["scaled down"] = self.n_scaled_down
        if self.faults[sb.Stage.TRAIN].messages:
            stats["unreadable"] = len(self.faults[sb.Stage.TRAIN].messages)
        return stats

    @main_process_only  # SpeechBrain's loggers talk to the other processes
    def _log(self, meta, train_stats=None, valid_stats=None):
        for one in self.loggers:
            one.log_stats(
                meta, train_stats=train_stats, valid_stats=valid_stats
            )

    def _joint_diagnostics(self) -> MarginDiagnostics:
        joint = MarginDiagnostics(self.diagnostics.loss_fn)
        joint.restore(*gathered(self.diagnostics.state()))
        return joint

    @property
    def diagnosed(self) -> dict | None:
        """The epoch's margin diagnostics so far, of all processes."""
        if self.diagnostics is None:
            return None
        return self._joint_diagnostics().state()

    @diagnosed.setter
    def diagnosed(self, state: dict | None):
        if self.diagnostics is not None and state is not None:
            self.diagnostics.reset()
            if if_main_process():  # as with the tally, it stands for all
                self.diagnostics.restore(state)

    # -- verification -----------------------------------------------------

    @property
    def pad(self) -> Padding | None:
        """How the front-end batches waveforms; None is the host's way."""
        return getattr(self.modules["compute_features"], "pad", None)

    @torch.no_grad()
    def encode(
        self, waveforms: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Embed a batch [B, samples] of relative lengths [B] as [B, E]."""
        waveforms = waveforms.to(self.device)
        lengths = lengths.to(self.device)
        with self.evaluation_ctx:
            # Without wrappers: DDP would wait for ranks with fewer batches, a
            # compiled graph would be compiled again for each length.
            features, normalise, encoder = (
                unwrapped(self.modules[name])
                for name in ("compute_features", "mean_var_norm", ENCODER)
            )
            feats = normalise(features(waveforms), lengths)
            return encoder(feats, lengths).squeeze(1).float()

    @property
    def n_averaged(self) -> int:
        """Over how many epochs the encoder of the end is averaged."""
        return getattr(self.hparams, "average_checkpoints", None) or 0

    def load_best(self) -> None:
        """Load the weights that training ends with: best, or averaged."""
        self.modules.eval()  # a run that had been finished trains nothing
        embedded, self.dev_embeddings = self.dev_embeddings, None
        if self.n_averaged > 1:
            self.checkpointer.load_mean(
                ["embedding_model", "classifier"], self.n_averaged
            )
            return
        best = self.checkpointer.choose_checkpoints(
            min_key=self.best_key, max_num_checkpoints=1
        )
        if not best:
            raise CheckpointError(
                f"no checkpoint in '{self.checkpointer.checkpoints_dir}' says "
                f"its {self.best_key}: there is no best one."
            )
        best = best[0]
        self.checkpointer.load_modules(best)
        if best.meta.get("epoch") == self.embedded_at:
            self.dev_embeddings = embedded  # by these weights

    def embed(self, utterances: Sequence[str], root: str) -> EmbeddingSet:
        """Embed recordings, by paths relative to `root`, with all processes."""
        self.modules.eval()
        with self.stop.listening():
            embeddings = extract(
                Embedder(
                    self.encode,
                    device=self.device,
                    pad=self.pad,
                    **self.read_options,
                ),
                utterances,
                root,
                progress=not self.noprogressbar,
                check=self.leave_if_asked,
            )
            self.leave_together()
        return embeddings

    def embed_dev(self) -> EmbeddingSet:
        """Embed the dev trials' recordings, but not twice by the best epoch."""
        if self.dev_embeddings is None:
            self.dev_embeddings = self.embed(
                self.dev_trials.utterances, self.dev_root
            )
        return self.dev_embeddings

    def verify(self) -> dict[str, float]:
        """Error rates on the dev trials, {} where there are none."""
        if self.dev_trials is None:
            return {}
        self.dev_embeddings = None  # those of an earlier epoch
        embeddings = self.embed_dev()
        scores = score_trials(
            self.dev_trials, embeddings.ids, embeddings.matrix
        )
        labels = self.dev_trials.labels
        return {
            "EER": eer(scores, labels),
            "minDCF(0.01)": min_dcf(scores, labels, p_target=0.01),
        }
