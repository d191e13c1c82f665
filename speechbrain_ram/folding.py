"""A trained ResNet34 for computing embeddings only, on a CPU.

At inference a batch normalisation is a fixed scale and offset a channel: it
goes into the weights of the convolution before it. Together with the memory
layout that CPUs prefer this is what makes the copy faster; it is a ResNet34
like any other, and its embeddings are those of the original to rounding.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

from speechbrain_ram.resnet import BasicBlock, ResNet34


def folded(encoder: ResNet34) -> ResNet34:
    """Copy an encoder, its batch normalisations folded into convolutions.

    Arguments
    ---------
    encoder : ResNet34
        In evaluation mode. It is left as it is.

    Returns
    -------
    ResNet34
        In evaluation mode; not for training, nor for checkpoints.

    Raises
    ------
    ValueError
        The encoder is in training mode.

    Example
    -------
    >>> encoder = ResNet34(channels=(4, 4, 4, 4)).eval()
    >>> feats = torch.rand(1, 50, 80)
    >>> network = folded(encoder)
    >>> torch.allclose(network(feats), encoder(feats), rtol=0.01, atol=0.01)
    True
    """
    if encoder.training:
        raise ValueError(
            "the encoder is in training mode: its batch normalisations still "
            "change. Call encoder.eval() first."
        )
    network = copy.deepcopy(encoder)
    identity = torch.nn.Identity()
    network.conv = fuse_conv_bn_eval(network.conv, network.norm)
    network.norm = identity
    for block in network.modules():
        if isinstance(block, BasicBlock):
            block.conv1 = fuse_conv_bn_eval(block.conv1, block.norm1)
            block.conv2 = fuse_conv_bn_eval(block.conv2, block.norm2)
            block.norm1 = block.norm2 = identity
            if isinstance(block.shortcut, torch.nn.Sequential):
                block.shortcut = fuse_conv_bn_eval(*block.shortcut)
    # Computing gradients in this layout is another matter, see brain.py.
    network.to(memory_format=torch.channels_last)
    return network.requires_grad_(False)
