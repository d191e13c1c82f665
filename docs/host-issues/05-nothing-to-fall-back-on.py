"""By default there is no checkpoint to fall back on

`save_and_keep_only` has `num_to_keep=1` by default: the checkpoint before the
newest is deleted in the call that writes it, and so are checkpoints within an
epoch. If the newest is damaged, the training is lost.

Expected: the one before stays, as long as nothing tells a damaged one. The
patch makes the default 2, within an epoch too. Who asks for 1 gets 1.
"""

import sys
import tempfile

import torch
from speechbrain.utils.checkpoints import Checkpointer

one = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(2, 2)})
for _ in range(3):
    one.save_and_keep_only()
kept = len(one.list_checkpoints())
if kept != 2:
    sys.exit(f"still there: {kept} checkpoint is kept, expected 2")
