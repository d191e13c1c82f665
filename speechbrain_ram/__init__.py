"""Real additive margins, ResNet34 x-vectors and verification for SpeechBrain.

The modules stand on floors; each imports only from the floors below it
(``tests/test_layering.py`` holds them to that). Start with
:mod:`speechbrain_ram.losses`, which is the reason for the rest.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("speechbrain-ram")
except PackageNotFoundError:  # a clone that was put on the path, not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
