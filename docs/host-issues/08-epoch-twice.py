"""The training log has an epoch twice after a kill

Recipes log an epoch and save its checkpoint afterwards. `FileTrainLogger`
appends, so a run that dies in between logs the epoch again when it goes on.
(`TensorboardLogger` counts its steps in memory and starts at 1 again.)

Expected: the epoch that was repeated takes the place of the first. The patch
drops a line of training with the same epoch (the same `stats_meta`) before it
adds the new one; lines of tests stay. TensorBoard's files are left as they are.
"""

import sys
import tempfile
from pathlib import Path

from speechbrain.utils.train_logger import FileTrainLogger

file = Path(tempfile.mkdtemp()) / "train_log.txt"
for _ in range(2):  # the first is killed before it saves a checkpoint
    FileTrainLogger(str(file)).log_stats({"epoch": 1}, {"loss": 2.0})
lines = len(file.read_text(encoding="utf-8").splitlines())
if lines != 1:
    sys.exit(f"still there: {lines} lines for epoch 1, expected 1")
