"""The Triton kernels: run by Triton's interpreter, compiled for GPUs."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

# TRITON_INTERPRET is read when triton is imported: hence the subprocess.
EQUAL_TO_TORCH = """
import torch
from speechbrain_ram.fused import fused_margin_loss
from speechbrain_ram.losses import FORMS, OBJECTIVES, make_objective

cases = [(name, "paper") for name in OBJECTIVES[:3]]
cases += [(name, form) for name in OBJECTIVES[3:] for form in FORMS]
# N, C, E, chunk: no multiples of a tile; one tile; N = 1, C = 2.
shapes = [(130, 300, 40, 200), (3, 40, 33, None), (1, 2, 8, None)]
draw = torch.Generator().manual_seed(0)
for name, form in cases:
    for n, n_classes, dim, chunk in shapes:
        weight = torch.randn(n_classes, dim, generator=draw)
        labels = torch.randint(n_classes, (n,), generator=draw)
        x = torch.randn(n, dim, generator=draw)
        x[::2] += 2 * weight[labels[::2]]
        x[0] = -weight[labels[0]]  # e^z would leave float32 at s = 64
        results = []
        for impl in ("torch", "triton"):
            inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
            loss_fn = make_objective(name, 0.2, 64.0, form)
            loss = fused_margin_loss(*inputs, labels, loss_fn, chunk, impl)
            grads = torch.autograd.grad(loss, inputs)
            results.append((loss.detach(), *grads))
        for a, b in zip(*results):
            excess = (a - b).abs().max() - 1e-5 * a.abs().max().clamp(min=1)
            assert excess <= 0, (name, form, n, n_classes, float(excess))
try:
    double = torch.ones(2, 2, dtype=torch.float64)
    fused_margin_loss(double, double, labels.new_zeros(2), loss_fn, 2, "triton")
except TypeError as error:
    print("compared", error)
"""


def test_interpreted_kernels_equal_plain_pytorch():
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", EQUAL_TO_TORCH],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compared impl='triton' computes in float32" in done.stdout


@pytest.mark.parametrize(
    "form, precision", [("trivial", "ieee"), ("hinge", "tf32")]
)
def test_compiles_to_machine_code(form, precision, tmp_path, monkeypatch):
    """As far as one gets without a GPU: a cubin for A100 and H100."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from speechbrain_ram import fused_triton

    constants = {"E": 512, "FORM": form, "PRECISION": precision}
    constants |= {
        "TN": fused_triton._TILE_N,
        "TB": fused_triton._TILE_B,
        "TE": fused_triton._TILE_E,
    }
    types = {"own_ptr": "*i64", "violated_ptr": "*i8", "scale": "fp32"}
    for kernel in (
        fused_triton._log_sum_exp_kernel,
        fused_triton._gradient_kernel,
    ):
        signature = {
            name: "constexpr"
            if name in constants
            else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        for capability in (80, 90):
            compiled = triton.compile(
                source,
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": fused_triton._WARPS},
            )
            assert len(compiled.asm["cubin"]) > 1000
            # An A100's multiprocessor lends a block at most this much.
            assert compiled.metadata.shared <= 163 * 1024
