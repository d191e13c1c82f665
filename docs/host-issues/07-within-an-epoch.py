"""A training that goes on within an epoch is not the one that was killed

A checkpoint within an epoch has step, average loss and optimiser step. It has
no random generators, so that dropout, crops and noise are others than without
the kill. With `grad_accumulation_factor` above 1 it may also fall between two
optimiser steps, and the gradients that were being accumulated are lost.

Expected: the same draws, and no checkpoint while gradients are accumulated.
The patch saves PyTorch's generators and sets them before the first batch after
the recovery: making the loader's iterator draws from them. Python's and NumPy's
need the same where a recipe draws from them, and each process its own.
"""

import contextlib
import sys
import tempfile

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import Checkpointer

folder = tempfile.mkdtemp()


class Brain(sb.Brain):
    def __init__(self, killed_at, gradients=1):
        self.killed_at, self.drawn, self.saved_at = killed_at, {}, []
        super().__init__(
            {"model": torch.nn.Linear(1, 1)},
            hparams={},
            run_opts={
                "device": "cpu",
                "ckpt_interval_minutes": 0,
                "ckpt_interval_steps": 1,
                "grad_accumulation_factor": gradients,
            },
            checkpointer=Checkpointer(folder),
        )

    def compute_forward(self, batch, stage):
        self.drawn[self.step] = float(torch.rand(()))
        if self.step == self.killed_at:
            raise KeyboardInterrupt
        return self.modules.model(batch)

    def compute_objectives(self, out, batch, stage):
        return out.sum()

    def _save_intra_epoch_ckpt(self):
        self.saved_at.append(self.step)
        super()._save_intra_epoch_ckpt()

    def run(self):
        loader = {"batch_size": 1}
        data = list(torch.randn(4, 1))
        self.fit(range(1), data, train_loader_kwargs=loader, progressbar=False)


first = Brain(killed_at=3)
with contextlib.suppress(KeyboardInterrupt):
    first.run()
second = Brain(killed_at=None)
second.run()
drawn = [brain.drawn[3] for brain in (first, second)]
folder = tempfile.mkdtemp()
third = Brain(killed_at=None, gradients=2)
third.run()
if drawn[0] != drawn[1] or third.saved_at != [2, 4]:
    sys.exit(
        f"still there: step 3 drew {drawn[0]:.3f}, again {drawn[1]:.3f}, "
        f"expected the same; two steps' gradients were accumulated, and "
        f"checkpoints fell after steps {third.saved_at}, expected [2, 4]"
    )
