"""The first day on a GPU: everything that is only said of one elsewhere.

    pytest tests/test_cuda.py

TEST_DEVICE=cpu runs the same lines without a GPU, but proves nothing of one:
products are then rounded to TF32 by hand, where a GPU would round them.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RECIPE, REPOSITORY, run_recipe
from speechbrain.nnet.losses import LogSoftmaxWrapper
from test_fake_cuda import TF32, speech_like
from training.test_fused import CASES, fused_loss, gradients, objective
from training.test_fused_sub_centers import batch

from speechbrain_ram.data.audio import as_floats
from speechbrain_ram.features import make_front_end
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.losses import make_objective
from speechbrain_ram.resnet import ResNet34, folded
from speechbrain_ram.training.faults import Batch
from speechbrain_ram.training.leaving import Interrupted
from speechbrain_ram.verification.embedder import Embedder, sent_to
from speechbrain_ram.verification.embeddings import extract

DEVICE = os.environ.get("TEST_DEVICE", "cuda:0")
ON_GPU = DEVICE.startswith("cuda")

pytestmark = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(),
    reason="there is no CUDA: NOTHING was tested on a GPU",
)
gpu_only = pytest.mark.skipif(not ON_GPU, reason="TEST_DEVICE is not CUDA")


@pytest.fixture(params=[False, True], ids=["float32", "tf32"])
def tf32(request):
    """Products in float32, then as `import speechbrain` leaves them."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = request.param
    with TF32() if request.param and not ON_GPU else nullcontext():
        yield request.param
    matmul.allow_tf32, cudnn.allow_tf32 = before


def off(found, exact):
    """The largest difference, relative to the largest value."""
    exact = exact.detach().double().cpu()
    error = found.detach().double().cpu() - exact
    return float(error.abs().max() / exact.abs().max())


def distance(found, exact):
    """The largest cosine distance of two rows [B, E]."""
    found, exact = found.double().cpu(), exact.double().cpu()
    return float(1 - F.cosine_similarity(found, exact).min())


def test_tf32_is_on_after_the_import():
    """As speechbrain leaves it; the tests of front-ends rely on it."""
    assert torch.backends.cuda.matmul.allow_tf32


# -- Losses -------------------------------------------------------------------

OBJECTIVES = pytest.mark.parametrize("name, form", CASES)


@OBJECTIVES
def test_a_loss_and_its_gradient(name, form):
    wrapper = LogSoftmaxWrapper(objective(name, 0.2, 30.0, form))
    cosines = torch.rand(32, 1, 500, dtype=torch.float64) * 1.6 - 0.8
    targets = torch.randint(500, (32, 1))

    def loss_of(values, targets):
        values = values.requires_grad_()
        loss = wrapper(values, targets)
        loss.backward()
        return loss, values.grad

    exact = loss_of(cosines.clone(), targets)
    found = loss_of(cosines.float().to(DEVICE), targets.to(DEVICE))
    assert found[0].device.type == torch.device(DEVICE).type
    assert off(found[0], exact[0]) < 1e-5 and off(found[1], exact[1]) < 1e-4


@OBJECTIVES
@pytest.mark.parametrize("centers", [1, 3])
def test_the_fused_loss_and_its_gradients(name, form, tf32, centers):
    loss_fn = objective(name, 0.2, 30.0, form)
    x, weight, labels = batch(64, 3000, centers, 128, torch.float64, near=0.3)
    if centers == 1:
        weight = weight[:, 0]

    def plain(x, weight):
        rows = F.normalize(weight.reshape(-1, 128))
        cosines = F.linear(F.normalize(x), rows).reshape(64, 3000, centers)
        one_hot = F.one_hot(labels, 3000)
        return F.cross_entropy(loss_fn(cosines.amax(dim=2), one_hot), labels)

    def fused(x, weight):
        return fused_loss(x, weight, labels.to(DEVICE), loss_fn, 700)

    exact = gradients(plain, x, weight)
    found = gradients(fused, x.float().to(DEVICE), weight.float().to(DEVICE))
    limit = 2e-2 if tf32 else 1e-4
    for one, other in zip(found, exact, strict=True):
        assert off(one, other) < limit


@gpu_only
def test_memory_of_the_fused_loss():
    """Weights, their gradient, and little else: no matrix of 512 x 100,000."""
    n, n_classes, dim = 512, 100_000, 512
    weight = torch.randn(n_classes, dim, device=DEVICE, requires_grad=True)
    x = torch.randn(n, dim, device=DEVICE, requires_grad=True)
    labels = torch.randint(n_classes, (n,), device=DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    fused_loss(x, weight, labels, make_objective("ram")).backward()
    more = torch.cuda.max_memory_allocated(DEVICE) - before
    gradient = 4 * n_classes * dim
    assert more < gradient + 120e6  # one matrix of cosines is 205 MB


# -- Front-ends and encoder ---------------------------------------------------


@pytest.mark.parametrize("name, limit", [("fbank", 1e-3), ("kaldi", 2e-3)])
def test_front_ends_with_tf32_on(name, limit):
    assert torch.backends.cuda.matmul.allow_tf32
    waveforms = torch.cat([speech_like(), 0.1 * torch.randn(1, 32000)])
    exact = make_front_end(name)(waveforms)
    found = make_front_end(name).to(DEVICE)(waveforms.to(DEVICE)).cpu()
    audible = exact > exact.amax(dim=-1, keepdim=True) - 18
    assert (found - exact).abs()[audible].max() < limit
    assert (found - exact).abs().max() < 0.1


@pytest.fixture(scope="module")
def trained():
    """An encoder whose batch norms have seen something."""
    torch.manual_seed(0)
    encoder = ResNet34(channels=(16, 32, 64, 128), embedding_dim=128)
    with torch.no_grad():
        for _ in range(3):
            encoder(torch.randn(8, 80, 80))
    return encoder.eval()


def on_device(trained, channels_last=False):
    """A copy of the encoder where it is tested."""
    encoder = ResNet34(channels=(16, 32, 64, 128), embedding_dim=128)
    encoder.load_state_dict(trained.state_dict())
    encoder = encoder.eval().to(DEVICE)
    if channels_last:
        encoder.to(memory_format=torch.channels_last)
    return encoder


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_an_encoder(trained, channels_last, precision, tf32):
    feats = torch.randn(4, 160, 80)
    lengths = torch.tensor([1.0, 0.25, 0.5, 0.7])
    exact = trained(feats, lengths).squeeze(1)
    encoder = on_device(trained, channels_last)
    half = nullcontext()
    if precision == "bf16":
        half = torch.autocast(DEVICE.split(":")[0], torch.bfloat16)
    with half:
        found = encoder(feats.to(DEVICE), lengths.to(DEVICE)).squeeze(1)
        alone = torch.cat(
            [
                encoder(row[None, : round(float(part) * 160)].to(DEVICE))
                for row, part in zip(feats, lengths, strict=True)
            ]
        ).squeeze(1)
    limit = {"fp32": 2e-4 if tf32 else 1e-6, "bf16": 1e-2}[precision]
    assert distance(found, exact) < limit
    assert distance(found, alone) < limit


@torch.no_grad()
def test_a_folded_encoder(trained, tf32):
    feats, lengths = torch.randn(2, 160, 80), torch.tensor([1.0, 0.5])
    exact = trained(feats, lengths).squeeze(1)
    network = folded(on_device(trained))
    found = network(feats.to(DEVICE), lengths.to(DEVICE)).squeeze(1)
    assert distance(found, exact) < (2e-4 if tf32 else 1e-6)


def test_gradients_of_an_encoder(trained, tf32):
    feats = torch.randn(4, 80, 80)

    def gradient(encoder, feats):
        encoder.zero_grad()
        out = encoder(feats)
        (out * torch.arange(out.shape[-1], device=out.device)).sum().backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters()])

    exact = gradient(trained, feats)[None]
    found = gradient(on_device(trained, True), feats.to(DEVICE))[None]
    assert distance(found, exact) < (1e-3 if tf32 else 1e-5)


@gpu_only
@pytest.mark.parametrize("name", ["fbank", "kaldi"])
@torch.no_grad()
def test_the_forward_pass_waits_for_nothing(trained, name):
    front_end, encoder = make_front_end(name).to(DEVICE), on_device(trained)
    waveforms = torch.randn(2, 32000, device=DEVICE)
    lengths = torch.tensor([1.0, 0.5], device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder(front_end(waveforms), lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- What travels -------------------------------------------------------------


def test_16_bits_become_the_same_floats_there():
    samples = torch.arange(-(2**15), 2**15).to(torch.int16)
    data = Batch([{"id": "a", "sig": samples}]).data
    found = data.to(DEVICE).sig.data
    assert found.device.type == torch.device(DEVICE).type
    assert torch.equal(found.cpu()[0], as_floats(samples))


def test_what_is_sent_arrives():
    values = torch.randn(3, 1000)
    assert torch.equal(sent_to(DEVICE, values).cpu(), values)


# -- From training to ONNX ----------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_corpus, tmp_path_factory):
    """Two epochs in bfloat16, left once on the way and resumed."""
    folder = tmp_path_factory.mktemp("run") / "ram"
    options = ["--device", DEVICE, "--precision", "bf16"]
    settings = {"num_workers": 1, "frontend": "kaldi"}
    with pytest.raises(Interrupted):
        run_recipe(tiny_corpus, folder, *options, max_hours=1e-9, **settings)
    assert list(folder.glob("save/CKPT+*"))
    return run_recipe(tiny_corpus, folder, *options, **settings)


def test_a_run_is_resumed_and_finished(run):
    log = (run / "train_log.txt").read_text()
    losses = [
        float(part.split("train loss: ")[1].split(",")[0])
        for part in log.splitlines()
        if "train loss: " in part
    ]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert (run / "inference").is_dir() and (run / "scores.txt").is_file()


def test_extraction(run, tiny_corpus):
    root = Path(tiny_corpus.test_root)
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*.wav"))
    found, exact = (
        extract(
            SpeakerEncoder.from_folder(run / "inference", device).embedder,
            names,
            root,
            progress=False,
        )
        for device in (DEVICE, "cpu")
    )
    assert found.ids == exact.ids and len(found.ids) > 8
    one, other = torch.tensor(found.matrix), torch.tensor(exact.matrix)
    assert distance(one, other) < 2e-4


def test_a_batch_of_an_embedder_is_its_rows(run, tiny_corpus):
    root = Path(tiny_corpus.test_root)
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*.wav"))
    encoder = SpeakerEncoder.from_folder(run / "inference", DEVICE)
    one, other = (
        extract(
            Embedder(encoder.encode, device=DEVICE, pad=encoder.pad, **batches),
            names,
            root,
            progress=False,
        )
        for batches in ({}, {"batch_seconds": 0.1, "threads": 1})
    )
    assert distance(torch.tensor(one.matrix), torch.tensor(other.matrix)) < 2e-4


def test_export_and_reload(run, tmp_path):
    onnx = pytest.importorskip("speechbrain_ram.export.onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = SpeakerEncoder.from_folder(run / "inference", DEVICE)
    waveform = speech_like(1)
    before = encoder.encode(waveform, torch.ones(1))
    for export in (onnx.export_waveform, onnx.export_sherpa):
        path = export(encoder, tmp_path / "encoder.onnx")
        _, cosine = onnx.agreement(encoder, path, [waveform[0].numpy()])
        assert cosine > 1 - 2e-4
    after = encoder.encode(waveform, torch.ones(1))  # back on its device
    assert after.device.type == torch.device(DEVICE).type
    assert torch.equal(before, after)
    again = SpeakerEncoder.from_folder(run / "inference", DEVICE)
    assert again.fingerprint == encoder.fingerprint


def test_torchrun_with_a_process_a_gpu(tiny_corpus, tmp_path):
    """Two where there are two; with one, NCCL is at least set up."""
    n = min(2, torch.cuda.device_count()) if ON_GPU else 2
    settings = {
        "make_corpus": "",
        "data_root": tiny_corpus.train_root,
        "trials": tiny_corpus.trials,
        "trials_root": tiny_corpus.test_root,
        "output_folder": tmp_path / "run",
        "channels": "[16, 16, 16, 16]",
        "number_of_epochs": 1,
        "batch_size": 4,
        "crop_seconds": 0.5,
        "warmup_steps": 0,
        "distributed_backend": "nccl" if ON_GPU else "gloo",
        "device": DEVICE.split(":")[0],
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(n), "train_speaker_embeddings.py"]
    command += [str(RECIPE), "--noprogressbar"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "inference").is_dir()
