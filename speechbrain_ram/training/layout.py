"""Which memory layout and which type of number training pays for."""

from __future__ import annotations

import statistics
import time

import torch

# From so many channels in the first stage on, a CPU without AVX512 is faster in
# the default layout (docs/speed.md); below 16, torch's CPU backward pass
# crashes in the other one.
_WIDE, _NARROWEST = 32, 16


def set_layout(
    encoder: torch.nn.Module, device_type: str, channels_last: bool | None
) -> None:
    """Give an encoder the memory layout that it is trained in.

    None chooses: channels_last on a GPU, and on a CPU for a first stage of 16
    to 31 channels, with AVX512 for wider ones too. A function of width and
    device alone, because the layout changes the last bits of a run.
    """
    width = getattr(encoder, "channels", [_WIDE])[0]  # or of another class
    on_cpu = device_type == "cpu"
    if channels_last is None:
        # Not an encoder of another class: it may be a narrow one, and crash.
        any_width = (
            hasattr(encoder, "channels")
            and torch.backends.cpu.get_cpu_capability() == "AVX512"
        )
        channels_last = not on_cpu or (
            width >= _NARROWEST and (any_width or width < _WIDE)
        )
    if channels_last and on_cpu and width < _NARROWEST:
        raise ValueError(
            f"channels_last with {width} channels in the first stage crashes "
            f"torch's CPU backward pass. Use {_NARROWEST} or more, or "
            "--channels_last False."
        )
    if channels_last:
        encoder.to(memory_format=torch.channels_last)


def precision_advice(device_type: str, precision: str) -> str | None:
    """Which precision a CPU is faster in, if another than the one chosen.

    One convolution is measured in both, for a fifth of a second, since flags do
    not tell: with avx512_bf16 and without AMX, bfloat16 was slower. In float32
    nothing is measured without AMX, where bfloat16 has never been faster.
    """
    kinds = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    if device_type != "cpu" or precision not in kinds:
        return None
    if precision == "fp32" and not _has_amx():
        return None
    other = "bf16" if precision == "fp32" else "fp32"
    ratio = _seconds_of(kinds[precision]) / _seconds_of(kinds[other])
    if ratio < 1:
        return None
    return (
        f"A convolution with --precision {precision} takes {ratio:.1f} times "
        f"as long as with {other} on this CPU. --precision {other} is faster "
        "here."
    )


def _has_amx() -> bool:
    """Whether a CPU multiplies matrices of bfloat16, where Linux says so."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False


def _seconds_of(dtype: torch.dtype, rounds: int = 5) -> float:
    """Median time of a convolution of ResNet34's first stage, both ways."""
    layer = torch.nn.Conv2d(32, 32, 3, padding=1, dtype=dtype)
    images = torch.ones((2, 32, 100, 80), dtype=dtype, requires_grad=True)
    seconds = []
    for _ in range(rounds + 1):  # the first one warms up
        began = time.perf_counter()
        layer(images).sum().backward()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
