"""The process group is left to Python's end

`ddp_init_group` makes a process group and nothing destroys it. If Python ends
before gloo's threads do, now and then the process aborts ("terminate called
without an active exception"), with all its work done: about once in fifteen
runs on a busy machine. To destroy it is not enough: `torch.distributed.nn`,
which the first DistributedDataParallel imports, takes the group that exists by
then as a default argument and holds it.

Expected: no thread of gloo is left when Python ends. The patch imports
`torch.distributed.nn` before there is a group, and destroys the group at exit.
Models that are still in scope there hold it as well.
"""

import atexit
import gc
import os
import socket
import sys
from pathlib import Path

import speechbrain as sb
import torch


def look():
    """The last of the functions that are called at exit."""
    gc.collect()  # as Python's end does
    names = Path("/proc/self/task").glob("*/comm")
    threads = sum("gloo" in name.read_text() for name in names)
    if threads:
        print(f"still there: {threads} threads, expected 0", file=sys.stderr)
        os._exit(1)


atexit.register(look)
with socket.create_server(("127.0.0.1", 0)) as line:
    port = line.getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
sb.utils.distributed.ddp_init_group({"distributed_backend": "gloo"})
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
