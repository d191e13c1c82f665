"""A missing file of a recoverable given to the constructor: KeyError

`_call_load_hooks` looks the name up in `optional_recoverables`, which
`add_recoverable` fills and `add_recoverables`, the constructor's way, does not.

Expected: the RuntimeError that names the missing path. The patch takes a
recoverable that is not in `optional_recoverables` as not optional.
"""

import sys
import tempfile

import torch
from speechbrain.utils.checkpoints import Checkpointer

folder = tempfile.mkdtemp()
Checkpointer(folder, {"a": torch.nn.Linear(2, 2)}).save_checkpoint()
two = {"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)}
try:
    Checkpointer(folder, two).recover_if_possible()
except RuntimeError:
    pass
except KeyError as error:
    sys.exit(f"still there: KeyError: {error}, expected a RuntimeError")
