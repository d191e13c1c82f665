"""Real additive margins, ResNet34 x-vectors and verification for SpeechBrain.

The wings, each of which imports only from those before it: utils, margins,
losses, classifier, resnet, features, data, verification, corpora, training,
export, inference, cli. Start with :mod:`speechbrain_ram.losses`, which is the
reason for the rest.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechbrain_ram.inference import SpeakerEncoder as SpeakerEncoder
    from speechbrain_ram.losses import (
        RealAdditiveAngularMargin as RealAdditiveAngularMargin,
    )
    from speechbrain_ram.losses import RealAdditiveMargin as RealAdditiveMargin
    from speechbrain_ram.losses import RealMargin as RealMargin
    from speechbrain_ram.resnet import ResNet34 as ResNet34
    from speechbrain_ram.training.brain import SpeakerBrain as SpeakerBrain

try:
    __version__ = version("speechbrain-ram")
except PackageNotFoundError:  # a clone that was put on the path, not installed
    __version__ = "0+unknown"

_HOMES = {
    "RealAdditiveMargin": "losses",
    "RealAdditiveAngularMargin": "losses",
    "RealMargin": "losses",
    "ResNet34": "resnet",
    "SpeakerBrain": "training.brain",
    "SpeakerEncoder": "inference",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
