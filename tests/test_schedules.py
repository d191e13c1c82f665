"""Learning rates against their formulas."""

import math

import pytest

from speechbrain_ram.schedules import WarmupDecay


def test_step_decay_is_that_of_the_papers_toolkit():
    rate = WarmupDecay(0.01, warmup_steps=500, every=5, gamma=0.4)
    for step in range(500):  # epoch 1
        assert rate(step, 0.1) == pytest.approx(0.01 * (step + 1) / 500)
    for epoch in range(1, 52):
        expected = 0.01 * 0.4 ** ((epoch - 1) // 5)
        assert rate(10_000, epoch - 1) == pytest.approx(expected)
        assert rate(10_000, epoch - 0.001) == pytest.approx(expected)


def test_exponential_and_cosine_go_from_peak_to_final():
    for decay, middle in (
        ("exponential", math.sqrt(0.1 * 1e-5)),
        ("cosine", (0.1 + 1e-5) / 2),
    ):
        rate = WarmupDecay(0.1, decay=decay, epochs=10, final=1e-5)
        assert rate(0, 0) == pytest.approx(0.1)
        assert rate(5, 5) == pytest.approx(middle)
        assert rate(10, 10) == pytest.approx(1e-5)
        assert rate(11, 10.5) == pytest.approx(1e-5)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="decay is 'linear', allowed are"):
        WarmupDecay(0.1, decay="linear")
    with pytest.raises(ValueError, match="peak is -1, it must be above 0"):
        WarmupDecay(-1)
