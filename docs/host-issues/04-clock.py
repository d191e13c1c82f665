"""The newest checkpoint is the one with the latest clock

`ckpt_recency` is `time.time()` when the checkpoint was written. On a machine
whose clock is set back, as rented ones do when NTP catches up, an older
checkpoint is recovered from, and the newer one is the first to be deleted.

Expected: the one that was saved last. The patch lets a new checkpoint's time
be at least a millisecond after that of every checkpoint in the folder.
"""

import sys
import tempfile
import time

import torch
from speechbrain.utils.checkpoints import Checkpointer

one = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(2, 2)})
one.save_checkpoint(meta={"which": 1})
time.time = lambda: 1e9
one.save_checkpoint(meta={"which": 2})
which = one.find_checkpoint().meta["which"]
if which != 2:
    sys.exit(f"still there: checkpoint {which} is taken, expected 2")
