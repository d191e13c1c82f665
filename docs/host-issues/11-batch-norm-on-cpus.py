"""No training of batch normalisation by several processes on CPUs

`_wrap_distributed` converts every model to `SyncBatchNorm`, whatever the
device; on CPUs DistributedDataParallel then raises "ValueError: SyncBatchNorm
layers only work with GPU modules". So `torchrun` with gloo cannot train any of
the recipes with batch normalisation.

Expected: it trains. The patch leaves the model as it is where its parameters
are on a CPU: each process then normalises by its own share of the batch.
"""

import os
import sys
import tempfile

import speechbrain as sb
import torch

place = f"file://{tempfile.mkdtemp()}/meet"
torch.distributed.init_process_group("gloo", place, rank=0, world_size=1)
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
options = {"device": "cpu", "distributed_backend": "gloo"}
brain = sb.Brain({"norm": torch.nn.BatchNorm1d(3)}, run_opts=options)
error = None
try:
    brain._wrap_distributed()
    brain.modules.norm(torch.randn(4, 3))
except ValueError as problem:
    error = problem
torch.distributed.destroy_process_group()
if error is not None:
    sys.exit(f"still there: {error}, expected no error")
