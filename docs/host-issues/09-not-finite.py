"""A loss that is not finite still changes the model

`check_loss_isfinite` counts such losses, and `fit_batch` then calls `backward`
and the optimiser all the same. With `skip_nonfinite_grads` the weights are
kept, but the forward pass has already put the NaN into the statistics of batch
normalisation, for good: every later evaluation is NaN.

Expected: such a batch leaves no trace. The patch keeps a copy of the buffers
during the forward pass; where the loss is not finite in any process, it puts
them back and leaves the batch out.
"""

import sys

import speechbrain as sb
import torch
from torch.utils.data import DataLoader


class Brain(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.norm(batch)

    def compute_objectives(self, out, batch, stage):
        return out.sum()


batches = [torch.full((4, 3), float("nan")), torch.randn(4, 3)]
brain = Brain(
    {"norm": torch.nn.BatchNorm1d(3)},
    run_opts={"device": "cpu", "skip_nonfinite_grads": True},
)
brain.fit(range(1), DataLoader(batches, batch_size=None), progressbar=False)
mean = brain.modules.norm.running_mean
if not torch.isfinite(mean).all():
    sys.exit(f"still there: running_mean is {mean}, expected finite numbers")
