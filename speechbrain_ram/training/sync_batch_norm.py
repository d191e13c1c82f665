"""Batch normalisation over all processes, on CPUs too.

``torch.nn.SyncBatchNorm`` refuses CPU tensors, and SpeechBrain converts every
model to it as soon as there are several processes. This one computes mean and
variance over the joint batch with two differentiable sums, which gloo has.
"""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


class CPUSyncBatchNorm(_NormBase):
    """Batch normalisation whose statistics are those of the joint batch.

    Input [B, C, ...] of any number of dimensions. Parameters, buffers and
    their names are those of the layer that it replaces. It is no subclass of
    torch's, which SpeechBrain would convert.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise a batch [B, C, ...] of this process."""
        if not self.training:
            return functional.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                eps=self.eps,
            )
        dims = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        half = input.dtype in (torch.bfloat16, torch.float16)
        values = input.float() if half else input
        ones = values.new_full((1,), values.numel() / values.size(1))
        sums = torch.cat([values.sum(dims), ones])
        sums = differentiable.all_reduce(sums)
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        # Of the deviations, not of the squares: no cancellation.
        deviations = values - mean.view(shape)
        variance = differentiable.all_reduce((deviations**2).sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        out = deviations * scale.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


def sync_batch_norm(module: torch.nn.Module) -> torch.nn.Module:
    """Replace every batch normalisation of a module by the one above.

    Arguments
    ---------
    module : torch.nn.Module
        Changed in place, unless it is itself a batch normalisation.

    Returns
    -------
    torch.nn.Module

    Example
    -------
    >>> layers = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    >>> type(sync_batch_norm(layers)[0]).__name__
    'CPUSyncBatchNorm'
    """
    if isinstance(module, _BatchNorm):
        new = CPUSyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine
        )
        new.load_state_dict(module.state_dict())
        return new.to(module.running_mean)  # its device and number type
    for name, child in module.named_children():
        setattr(module, name, sync_batch_norm(child))
    return module
