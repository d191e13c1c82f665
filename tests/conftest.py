"""What every test needs."""

import sys

import pytest
import speechbrain  # noqa: F401  registers its lazy modules
from speechbrain.utils.importutils import LazyModule


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems():
    """Let hypothesis walk past SpeechBrain's lazy modules.

    Hypothesis asks every imported module for its ``__file__``; a lazy module
    of SpeechBrain answers by importing k2 and the like, which nobody has.
    """
    for module in list(sys.modules.values()):
        if isinstance(module, LazyModule):
            module.__file__ = None
