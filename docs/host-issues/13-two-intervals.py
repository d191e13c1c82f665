"""`--ckpt_interval_steps` ends the program where the YAML has minutes

`ckpt_interval_minutes` and `ckpt_interval_steps` together are a `sys.exit`,
also where the one on the command line is meant to replace the one in the YAML.
One must say `--ckpt_interval_minutes 0` as well.

Expected: steps instead of minutes. The patch sets the interval to 0 that comes
from the YAML, where the command line has the other one. Both on the command
line, or both in the YAML, are refused as before.
"""

import sys

import speechbrain as sb

try:
    brain = sb.Brain(
        hparams={"ckpt_interval_minutes": 15},
        run_opts={"device": "cpu", "ckpt_interval_steps": 100},
    )
except SystemExit:
    sys.exit("still there: the program ends, expected 100 steps")
