"""`save_and_keep_only` changes its own default argument

With `keep_recent`, the default list `importance_keys=[]` is appended to. The
next call without the argument, of any Checkpointer of the process, gets the
longer list, and keeps the recent checkpoint also where it says
`keep_recent=False`. A list that the caller hands in grows, too.

Expected: the default stays empty. The patch makes a new list.
"""

import sys
import tempfile

import torch
from speechbrain.utils.checkpoints import Checkpointer

one = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(2, 2)})
for _ in range(3):
    one.save_and_keep_only()
length = len(Checkpointer.save_and_keep_only.__defaults__[5])
if length != 0:
    sys.exit(f"still there: the default has {length} entries, expected 0")
