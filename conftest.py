"""What tests and doctests share: each draws the same numbers in every run."""

import random

import numpy as np
import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Seed the global generators, before the fixtures of the test draw."""
    random.seed(1986)
    np.random.seed(1986)
    torch.manual_seed(1986)
