#!/usr/bin/env python3
"""Verify speakers: any encoder, any trial lists, scores and a report.

    python verify_speakers.py --encoder FOLDER --trials LIST [LIST ...] \
        --data_root DIR --output DIR
    torchrun --nproc_per_node=2 verify_speakers.py verify.yaml

The same as ``speechbrain-ram verify``; speechbrain_ram/cli/verify.py does it.
"""

import sys
from pathlib import Path

from speechbrain_ram.cli.verify import run

if __name__ == "__main__":
    run(sys.argv[1:], Path(__file__).name)
