"""Several processes do not see each utterance once

PyTorch's `DistributedSampler` repeats utterances up to a multiple of the number
of processes, or drops the rest; `DistributedSamplerWrapper` does the same to
whole batches. The gradients of a last, uneven batch are averaged as if all
shares were of one size.

Expected: each batch in one process. No small patch does it: with uneven shares
one process has a step more, in which DistributedDataParallel and the broadcast
of `_should_save_intra_epoch_ckpt` wait for the others for ever. One way is a
sampler that gives every process a part of each batch, and gradients weighted by
the sizes of these parts.
"""

import sys

from speechbrain.dataio.sampler import DistributedSamplerWrapper
from torch.utils.data import BatchSampler

batches = BatchSampler(range(5), batch_size=1, drop_last=False)
shares = [
    DistributedSamplerWrapper(batches, num_replicas=2, rank=rank)
    for rank in range(2)
]
seen = sum(len(list(share)) for share in shares)
if seen != 5:
    sys.exit(f"still there: 5 batches are seen {seen} times, expected 5")
