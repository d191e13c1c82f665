"""The memory layout that is chosen, and a type of number that does not pay."""

import pytest
import torch

from speechbrain_ram.resnet import ResNet34
from speechbrain_ram.training import layout
from speechbrain_ram.training.layout import precision_advice, set_layout


def is_channels_last(layer):
    return layer.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "width, device_type, capability, wanted, chosen",
    [
        (8, "cpu", "AVX2", None, False),
        (8, "cpu", "AVX512", None, False),
        (16, "cpu", "AVX2", None, True),
        (16, "cpu", "AVX512", None, True),
        (32, "cpu", "AVX2", None, False),
        (32, "cpu", "AVX512", None, True),
        (32, "cpu", "AVX2", True, True),
        (16, "cpu", "AVX2", False, False),
        (32, "cpu", "AVX512", False, False),
        (8, "cuda", "AVX2", None, True),
        (32, "cuda", "AVX2", None, True),
        (32, "cuda", "AVX2", False, False),
    ],
)
def test_layouts(width, device_type, capability, wanted, chosen, monkeypatch):
    monkeypatch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: capability
    )
    encoder = ResNet34(channels=(width, 16, 16, 16))
    set_layout(encoder, device_type, wanted)
    assert is_channels_last(encoder.stages[0][0].conv1) == chosen


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_an_encoder_of_another_class(capability, monkeypatch):
    monkeypatch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: capability
    )
    encoder = torch.nn.Conv2d(3, 3, 3)
    set_layout(encoder, "cpu", None)
    assert not is_channels_last(encoder)
    set_layout(encoder, "cpu", True)
    assert is_channels_last(encoder)


def test_the_layout_that_crashes_torch():
    with pytest.raises(ValueError, match="8 channels.*--channels_last False"):
        set_layout(ResNet34(channels=(8, 16, 16, 16)), "cpu", True)


@pytest.mark.parametrize("amx", [True, False])
def test_slow_precision_is_said(monkeypatch, amx):
    seconds = {torch.float32: 1.0, torch.bfloat16: 1.7, torch.float16: 0.5}
    monkeypatch.setattr(layout, "_seconds_of", lambda kind: seconds[kind])
    monkeypatch.setattr(layout, "_has_amx", lambda: amx)
    warning = precision_advice("cpu", "bf16")
    assert "--precision bf16 takes 1.7 times as long as with fp32" in warning
    assert precision_advice("cpu", "fp16") is None  # it pays
    assert precision_advice("cpu", "fp32") is None
    assert precision_advice("cuda", "bf16") is None
    seconds[torch.bfloat16] = 0.5
    assert precision_advice("cpu", "bf16") is None
    advice = precision_advice("cpu", "fp32")
    assert (advice is not None) == amx
    if amx:
        assert "--precision fp32 takes 2.0 times as long as with bf16" in advice
        assert "--precision bf16 is faster" in advice


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_can_be_measured(kind):
    assert layout._seconds_of(kind, rounds=1) > 0
