"""Masked statistics against a loop over the utterances."""

import pytest
import torch

from speechbrain_ram.resnet import StatisticsPooling, valid_frames


def test_equals_a_loop_over_the_utterances():
    x = torch.randn(5, 7, 40, dtype=torch.float64)
    frames = torch.tensor([1, 2, 13, 39, 40])
    pooled = StatisticsPooling(eps=1e-12)(x, frames)
    for row, n, out in zip(x, frames, pooled, strict=True):
        alone = row[:, :n]
        expected = torch.cat([alone.mean(1), alone.std(1, correction=0)])
        assert torch.allclose(out, expected, atol=1e-6)


def test_the_deviation_of_a_sample():
    """As torch.var counts, with the constant under the root."""
    x = torch.randn(4, 7, 40, dtype=torch.float64)
    frames = torch.tensor([2, 13, 39, 40])
    pooled = StatisticsPooling(1e-2, "sample")(x, frames)
    for row, n, out in zip(x, frames, pooled, strict=True):
        alone = row[:, :n]
        deviation = (alone.var(1) + 1e-2).sqrt()
        expected = torch.cat([alone.mean(1), deviation])
        assert torch.allclose(out, expected, rtol=1e-12)
        whole = StatisticsPooling(1e-2, "sample")(alone[None])[0]
        assert torch.allclose(whole, expected, rtol=1e-12)


def test_another_deviation():
    with pytest.raises(ValueError, match="deviation is 'biased', 'popul"):
        StatisticsPooling(deviation="biased")


DEVIATIONS = pytest.mark.parametrize("deviation", ["population", "sample"])


@DEVIATIONS
def test_no_frames_given_means_all(deviation):
    x = torch.randn(3, 4, 11)
    pooling = StatisticsPooling(deviation=deviation)
    assert torch.allclose(pooling(x), pooling(x, torch.full((3,), 11)))


@DEVIATIONS
@pytest.mark.parametrize("size", [6, 1])
@pytest.mark.parametrize("frames", [None, torch.tensor([6, 1])])
def test_constant_input_has_finite_gradients(frames, size, deviation):
    x = torch.ones(2, 3, size, requires_grad=True)
    frames = frames if frames is None else frames.clamp(max=size)
    StatisticsPooling(deviation=deviation)(x, frames).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_same_answer_twice_and_float32_under_autocast():
    x = torch.randn(2, 3, 50).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = (StatisticsPooling()(x) for _ in range(2))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    assert torch.allclose(first[:, :3], x.float().mean(-1))


def test_valid_frames_follow_speechbrains_mask():
    from speechbrain.processing.features import make_padding_mask

    lengths = torch.rand(200, generator=torch.Generator().manual_seed(0))
    lengths = lengths.clamp(0.01, 1.0)
    for n_frames in (1, 7, 101, 2001):
        x = torch.zeros(200, n_frames, 1)
        mask = make_padding_mask(x, lengths).squeeze(-1)
        expected = mask.sum(1).clamp(min=1)
        assert torch.equal(valid_frames(lengths, n_frames), expected)
