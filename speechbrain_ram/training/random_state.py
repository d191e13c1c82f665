"""The state of every random generator that training may draw from."""

from __future__ import annotations

import random

import numpy as np
import torch


def random_state() -> dict:
    """Take the state of Python's, numpy's and torch's generators.

    Returns
    -------
    dict
        Numbers and tensors only, so that ``torch.load(weights_only=True)``
        reads it.

    Example
    -------
    >>> state = random_state()
    >>> first = (random.random(), np.random.rand(), float(torch.rand(())))
    >>> restore_random_state(state)
    >>> first == (random.random(), np.random.rand(), float(torch.rand(())))
    True
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict) -> None:
    """Set every generator to a state that was taken.

    Arguments
    ---------
    state : dict
        From :func:`random_state`.
    """
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
