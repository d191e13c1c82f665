"""Learning rates against their formulas."""

import math

import pytest

from speechbrain_ram.training.schedules import MarginRise, WarmupDecay


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


def test_warm_up_by_epochs():
    rate = WarmupDecay(
        0.1, decay="exponential", epochs=150, final=5e-5, warmup_epochs=6
    )
    assert rate(0, 0) == 0
    for done in (0.5, 3, 5.9, 6, 100):
        whole = 0.1 * (5e-5 / 0.1) ** (done / 150)
        expected = whole * min(done / 6, 1)
        assert rate(12345, done) == pytest.approx(expected)


def test_margin_rises_as_wespeaker_raises_it():
    """Epochs 20 to 40 there, counted from 1, are 19 to 39 done."""
    margin = MarginRise(final=0.2, start=19, end=39)
    per_epoch = 1000
    for step in (0, 18_999, 19_000, 19_001, 25_000, 38_999, 39_000, 99_999):
        now = step - 19 * per_epoch
        if now < 0:
            expected = 0.0
        elif step >= 39 * per_epoch:
            expected = 0.2
        else:
            share = now / (20 * per_epoch)
            expected = 0.2 * (1 - math.exp(share * math.log(1e-3)))
        assert margin(step / per_epoch) == pytest.approx(expected, abs=1e-9)


def test_margin_without_a_rise():
    assert MarginRise(0.3)(0.0) == 0.3
    falling = MarginRise(final=0.1, start=1, end=2, initial=0.5)
    assert falling(0.5) == 0.5
    assert 0.1 < falling(1.5) < 0.5
    with pytest.raises(ValueError, match="from epoch 5 to 2; expected 0 <="):
        MarginRise(0.3, start=5, end=2)
