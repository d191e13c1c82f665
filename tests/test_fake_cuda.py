"""What a GPU would do otherwise than a CPU, as far as it shows without one.

Fake CUDA tensors have a device, a shape and a type, but no content: operations
on them can be counted. The rounding of TF32 products is done by hand.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.lobes.features import Fbank
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from speechbrain_ram.features import KaldiFbank, make_front_end
from speechbrain_ram.resnet import BasicBlock, ResNet34
from speechbrain_ram.verification.embedder import Embedder, sent_to
from speechbrain_ram.verification.embeddings import extract

# The last three stand for the others in inference mode.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
PRODUCTS += ("matmul", "linear", "conv2d")


class Operations(TorchDispatchMode):
    """Notes the operations of a block: name, types and devices of inputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        ins = [each for each in args if isinstance(each, torch.Tensor)]
        self.seen.append((func.overloadpacket.__name__, ins, out))
        return out

    def between_devices(self):
        """Operations that take from one device and give to another."""
        return [
            name
            for name, ins, out in self.seen
            if isinstance(out, torch.Tensor)
            and {each.device for each in ins if each.ndim} - {out.device}
        ]

    def float32_products(self):
        """Matrix products that a GPU may round to TF32."""
        return [
            name
            for name, ins, _ in self.seen
            if name in PRODUCTS and ins[0].dtype == torch.float32
        ]


def tf32(values):
    """Round the 23 bits of float32's fraction to TF32's 10."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


class TF32(TorchDispatchMode):
    """Products of float32 whose inputs are rounded as on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            args = [
                tf32(each)
                if isinstance(each, torch.Tensor)
                and each.dtype == torch.float32
                and each.ndim > 1  # the bias is added in float32
                else each
                for each in args
            ]
        return func(*args, **(kwargs or {}))


def on_fake_cuda(module, *shape):
    """What a module does to float32 values of a shape, noted."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = module.to("cuda")
        values = torch.empty(shape, device="cuda")
        with Operations() as operations:
            operations.result = module(values)
    return operations


def speech_like(seconds=2):
    """A voiced sound, with the 80 dB between its bands that speech has."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(int(seconds * 16000)) / 16000
    sound = 1e-4 * torch.randn(len(time), generator=generator)
    for k in range(1, 30):
        sound += torch.sin(2 * math.pi * 120 * k * time) / k**3
    return 0.3 * sound[None] / sound.abs().max()


# -- Front-ends ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["fbank", "kaldi"])
def test_a_front_end_copies_nothing_to_the_device(name):
    operations = on_fake_cuda(make_front_end(name), 2, 16000)
    assert operations.result.device.type == "cuda"
    assert operations.result.dtype == torch.float32
    assert operations.between_devices() == []
    assert operations.float32_products() == []


def test_the_host_front_end_copies_twice_a_call():
    """Why ours is not the host's; when this fails, it can be again."""
    operations = on_fake_cuda(Fbank(n_mels=80, n_fft=512), 2, 16000)
    assert operations.between_devices() == ["_to_copy", "_to_copy"]
    assert operations.float32_products() == ["mm"]


def test_our_host_front_end_is_the_host_one_on_a_cpu():
    theirs = Fbank(n_mels=80, n_fft=512)
    ours = make_front_end("fbank")
    waveforms = torch.randn(3, 20000)
    assert torch.equal(ours(waveforms), theirs(waveforms))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def _off(front_end, waveforms, exact):
    """The largest difference from the exact features where they are audible."""
    audible = exact > exact.amax(dim=-1, keepdim=True) - 18  # nats, 78 dB
    return float((front_end(waveforms) - exact).abs()[audible].max())


def test_tf32_leaves_the_kaldi_front_end_of_a_gpu_alone(monkeypatch):
    waveforms = speech_like()
    front_end = KaldiFbank()
    exact = front_end(waveforms)
    with TF32():
        assert _off(front_end, waveforms, exact) > 0.1  # the product's form
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with TF32():
        assert _off(front_end, waveforms, exact) < 1e-3


def test_tf32_leaves_the_host_front_end_of_a_gpu_alone(monkeypatch):
    waveforms = speech_like()
    front_end = make_front_end("fbank")
    exact = front_end(waveforms)  # decibels
    with TF32():
        assert _off(front_end, waveforms, exact) > 1e-3
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with TF32():
        assert _off(front_end, waveforms, exact) < 1e-4


@pytest.mark.parametrize("options", [{}, {"snip_edges": True, "n_mels": 40}])
def test_both_forms_of_the_kaldi_front_end_are_one(monkeypatch, options):
    waveforms = speech_like()
    front_end = KaldiFbank(**options)
    on_cpu = front_end(waveforms)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(front_end(waveforms), on_cpu, atol=1e-3, rtol=0)


# -- The encoder --------------------------------------------------------------


def test_masks_keep_bfloat16():
    """On a CPU: autocast asks for a real GPU where it is one's."""
    encoder = ResNet34(n_mels=16, channels=(4, 4, 4, 4)).eval()
    types = set()
    for module in encoder.modules():
        if isinstance(module, (BasicBlock, torch.nn.BatchNorm2d)):
            module.register_forward_hook(
                lambda _, ins, out: types.update({ins[0].dtype, out.dtype})
            )
    feats, lengths = torch.randn(2, 60, 16), torch.tensor([0.5, 1.0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoder(feats, lengths)
    assert types == {torch.bfloat16}


def test_a_masked_network_waits_for_nothing():
    with FakeTensorMode():
        with torch.device("cuda"):
            encoder = ResNet34(n_mels=16, channels=(4, 4, 4, 4)).eval()
        feats = torch.zeros(2, 60, 16, device="cuda")
        lengths = torch.ones(2, device="cuda")
        with torch.no_grad(), Operations() as operations:
            encoder(feats, lengths)
    assert operations.between_devices() == []
    names = {name for name, _, _ in operations.seen}
    assert not names & {"_local_scalar_dense", "nonzero", "is_nonzero"}


# -- Extraction ---------------------------------------------------------------


def test_batches_reach_a_gpu_without_waiting(monkeypatch):
    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self
    )
    values = torch.zeros(2, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        sent = sent_to("cuda:0", values)
    assert sent.device == torch.device("cuda:0") and pinned[0] is values
    assert sent_to("cpu", values) is values and len(pinned) == 1


def test_extraction_away_from_the_cpu(tmp_path):
    """With two batches of up to 120 s at once, and readers for all cores."""
    names = [f"{i}.wav" for i in range(5)]
    for i, name in enumerate(names):
        wave = 0.1 * np.random.randn(16000 * (1 + i))
        soundfile.write(tmp_path / name, wave, 16000)
    seen = []

    def encode(waveforms, lengths):
        seen.append((waveforms.device.type, len(waveforms)))
        return torch.zeros(len(waveforms), 3)

    embedder = Embedder(encode, device="meta")
    found = extract(embedder, names, tmp_path, progress=False)
    assert found.matrix.shape == (5, 3) and seen == [("meta", 5)]
    samples = dict.fromkeys(range(32), 16000 * 8)
    assert list(map(len, embedder.batches(samples))) == [15, 15, 2]


def test_the_suite_for_gpus_runs_its_lines():
    """On the CPU, so that it has not grown stale when a GPU is there."""
    suite = Path(__file__).with_name("test_cuda.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(suite)],
        env={**os.environ, "TEST_DEVICE": "cpu"},
        cwd=suite.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
