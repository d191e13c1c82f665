"""A checkpoint that was cut short passes for a whole one

`Checkpointer.save_checkpoint` makes the final folder, writes `CKPT.yaml` first
and the parameters afterwards. Whoever is killed in between leaves a folder
that `list_checkpoints` lists and `recover_if_possible` prefers, as the newest.

Expected: the checkpoint before it is taken. The patch writes `CKPT.yaml` last,
after all processes have written theirs: a folder without it is not listed.
"""

import contextlib
import sys
import tempfile

import torch
from speechbrain.utils.checkpoints import Checkpointer


def killed(obj, path):
    raise KeyboardInterrupt  # a SIGKILL here does the same


folder = tempfile.mkdtemp()
one = Checkpointer(folder, {"model": torch.nn.Linear(2, 2)})
one.save_checkpoint()
one.add_recoverable("other", torch.nn.Linear(2, 2), custom_save_hook=killed)
with contextlib.suppress(KeyboardInterrupt):
    one.save_checkpoint()
listed = len(Checkpointer(folder).list_checkpoints())
if listed != 1:
    sys.exit(f"still there: {listed} checkpoints are listed, expected 1")
