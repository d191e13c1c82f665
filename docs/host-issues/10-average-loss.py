"""The average loss is wrong after a loss that is not finite

`update_average` leaves such a loss out of the sum, but divides by `self.step`,
which counts it: the average that is logged is too low from then on.

Expected: the average of the losses that are finite. The patch counts those
that were left out.
"""

import sys

import speechbrain as sb
import torch

brain, average = sb.Brain(run_opts={"device": "cpu"}), 0.0
for brain.step, loss in ((1, float("nan")), (2, 2.0)):
    average = brain.update_average(torch.tensor(loss), average)
if average != 2.0:
    sys.exit(f"still there: the average is {average}, expected 2.0")
