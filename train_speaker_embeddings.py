#!/usr/bin/env python3
"""Train a speaker encoder, verify it, and export it for inference.

    python train_speaker_embeddings.py hparams/ram_resnet34.yaml --margin 0.2
    torchrun --nproc_per_node=2 train_speaker_embeddings.py YAML

The same as ``speechbrain-ram train``; speechbrain_ram/cli/train.py does it.
"""

import sys
from pathlib import Path

from speechbrain_ram.training.leaving import leave_while_loading

if __name__ == "__main__":
    leave_while_loading()
    from speechbrain_ram.cli.train import run

    run(sys.argv[1:], Path(__file__).name)
