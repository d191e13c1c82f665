"""ResNet34 for speaker embeddings: 80-dim Fbank in, a 512-dim x-vector out.

The topology of the paper's section 3.2 (after Zeinali et al., arXiv
1910.12592): basic residual blocks over the time-frequency plane, statistics
pooling over time, one linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

#: Blocks in each stage by depth: 2 x 16 convolutions + first + linear = 34.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
STRIDES = (1, 2, 2, 2)
_STEP = 8  # frames of the input a frame of the output: the strides' product
_TILE = 4000  # frames, a multiple of the step
_REACH = 112  # frames of the input on each side that an output sees, at most


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride, padding=1, bias=False
        )
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(
            out_channels, out_channels, 3, padding=1, bias=False
        )
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map [B, C, F, T] to [B, C', F', T']; `mask` is [B, 1, 1, T']."""
        # Padded frames are held at 0, which is what a convolution sees past
        # the end of an utterance that is alone.
        out = self.relu(self.norm1(self.conv1(x)))
        if mask is not None:
            out = out * mask
        out = self.norm2(self.conv2(out))
        out = self.relu(out + self.shortcut(x))
        return out if mask is None else out * mask


class ResNet34(nn.Module):
    """The paper's encoder: Fbank frames to one embedding an utterance.

    With the defaults 7,946,336 parameters (2,645,296 with channels half as
    wide), as the tests check.

    Arguments
    ---------
    n_mels : int
        Mel bands of the input.
    channels : tuple of int
        Channels of the four stages.
    embedding_dim : int
        Size of the embedding.
    depth : int
        34, or 18: a ResNet18 of the same blocks.
    deviation : str
        Of the pooling, "population" or "sample", see
        :class:`StatisticsPooling`.
    norm_embedding : bool
        Whether a batch normalisation follows the linear layer. Encoders that
        were trained without one, such as WeSpeaker's, stay without.

    Raises
    ------
    ValueError
        Not four stages, a size below 1, another depth or deviation.

    Example
    -------
    >>> encoder = ResNet34(channels=(4, 4, 4, 4)).eval()
    >>> feats = torch.rand(2, 200, 80)  # [B, T, F]
    >>> encoder(feats).shape
    torch.Size([2, 1, 512])
    >>> lengths = torch.tensor([0.5, 1.0])
    >>> alone = encoder(feats[:1, :100])
    >>> torch.allclose(encoder(feats, lengths)[:1], alone, rtol=1e-4, atol=1e-4)
    True
    """

    def __init__(
        self,
        n_mels: int = 80,
        channels: Sequence[int] = (32, 64, 128, 256),
        embedding_dim: int = 512,
        depth: int = 34,
        deviation: str = "population",
        norm_embedding: bool = True,
    ):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(
                f"depth is {depth!r}, allowed are "
                f"{' and '.join(map(str, BLOCKS))}. Is it a network of other "
                "blocks?"
            )
        if len(channels) != len(STRIDES) or min(channels) < 1:
            raise ValueError(
                f"channels is {tuple(channels)}, four sizes of 1 or more are "
                "needed, one a stage."
            )
        if n_mels < 1 or embedding_dim < 1:
            raise ValueError(
                f"n_mels is {n_mels} and embedding_dim {embedding_dim}, both "
                "must be 1 or more."
            )
        # frames that are computed at once; None: all, as gradients need
        self.tile: int | None = None
        self.n_mels = n_mels
        self.channels = tuple(channels)
        self.embedding_dim = embedding_dim

        self.conv = nn.Conv2d(1, channels[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.stages = nn.ModuleList()
        before, bands = channels[0], n_mels
        for width, count, stride in zip(
            channels, BLOCKS[depth], STRIDES, strict=True
        ):
            blocks = [BasicBlock(before, width, stride)]
            blocks += [BasicBlock(width, width) for _ in range(count - 1)]
            self.stages.append(nn.ModuleList(blocks))
            before = width
            bands = (bands + stride - 1) // stride
        self.pooling = StatisticsPooling(deviation=deviation)
        self.linear = nn.Linear(2 * before * bands, embedding_dim)
        self.norm_emb: nn.Module = nn.Identity()
        if norm_embedding:
            self.norm_emb = nn.BatchNorm1d(embedding_dim)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu"
                )

    def forward(
        self, feats: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed a batch of utterances.

        Arguments
        ---------
        feats : torch.Tensor
            Shape [B, T, F].
        lengths : torch.Tensor
            Shape [B], relative to the longest utterance of the batch; None
            when none is padded, which saves the masking.

        Returns
        -------
        torch.Tensor
            Shape [B, 1, E].
        """
        if feats.ndim != 3 or feats.shape[-1] != self.n_mels:
            raise ValueError(
                f"feats has shape {tuple(feats.shape)}, [batch, time, "
                f"{self.n_mels}] is needed. Are n_mels of the features and "
                "of the encoder the same?"
            )
        frames = None
        if lengths is not None:
            frames = valid_frames(lengths, feats.shape[1])
            # On a GPU this would have to be waited for.
            if frames.device.type == "cpu" and bool(
                (frames == feats.shape[1]).all()
            ):
                frames = None
        x = feats.transpose(1, 2).unsqueeze(1)  # [B, 1, F, T]
        if self.tile and frames is None and x.shape[-1] > self.tile:
            x = self._in_tiles(x, self.tile)
        else:
            x, frames = self._maps(x, frames)
        x = self.pooling(x.flatten(1, 2), frames)  # [B, 2 C F']
        return self.norm_emb(self.linear(x)).unsqueeze(1)

    def _in_tiles(self, x: torch.Tensor, tile: int) -> torch.Tensor:
        """As :meth:`_maps` without padding, in the memory of one tile.

        Four minutes of the first stage are a gigabyte. Tiles overlap by what
        a frame at their ends sees, so that all frames are as in one piece.
        """
        n_frames, parts = x.shape[-1], []
        for first in range(0, n_frames, tile):
            start = max(0, first - _REACH)
            part, _ = self._maps(x[..., start : first + tile + _REACH], None)
            skip = (first - start) // _STEP
            keep = -(-min(tile, n_frames - first) // _STEP)
            parts.append(part[..., skip : skip + keep])
        return torch.cat(parts, -1)

    def _maps(
        self, x: torch.Tensor, frames: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is pooled, [B, C, F', T'], and its valid frames."""
        mask = _time_mask(frames, x)
        if mask is not None:
            x = x * mask
        x = self.relu(self.norm(self.conv(x)))
        if mask is not None:
            # The convolution's type: float32 would make all after it float32.
            mask = mask.to(x.dtype)
            x = x * mask
        for stage, stride in zip(self.stages, STRIDES, strict=True):
            if frames is not None and stride > 1:
                frames = (frames + stride - 1) // stride
                n_frames = (x.shape[-1] + stride - 1) // stride
                mask = _time_mask(frames, x[..., :n_frames])
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, mask)
        return x, frames


def _time_mask(
    frames: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor | None:
    """1 at the valid frames of x [B, C, F, T], as [B, 1, 1, T]."""
    if frames is None:
        return None
    steps = torch.arange(x.shape[-1], device=x.device)
    return (steps < frames[:, None])[:, None, None, :].to(x.dtype)


# -- Statistics pooling over time that knows about padding --------------------
#
# SpeechBrain's StatisticsPooling loops over the batch and adds random noise;
# this one is one masked reduction and always gives the same answer.


def valid_frames(lengths: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Count the frames of each utterance that are not padding, int64 [B].

    `lengths` are relative to the longest. The rule is that of SpeechBrain's
    ``InputNormalization``: frame i is valid when i < lengths * n_frames, less
    a millionth for rounding.
    """
    frames = torch.ceil(lengths * n_frames - 1e-6).long()
    return frames.clamp(1, n_frames)


class StatisticsPooling(torch.nn.Module):
    """Mean and standard deviation over the valid frames of each utterance.

    With S the sum of (x - mu)^2 over n frames, the `deviation` is

    - "population": sqrt(max(S / n, eps)),
    - "sample": sqrt(S / (n - 1) + eps), as WeSpeaker's encoders have it.

    Either way one frame gives a number and a constant signal a finite
    gradient. Computed in float32 under autocast.
    """

    def __init__(self, eps: float = 1e-7, deviation: str = "population"):
        super().__init__()
        if deviation not in ("population", "sample"):
            raise ValueError(
                f"deviation is {deviation!r}, 'population' or 'sample' is "
                "allowed. Is it misspelt?"
            )
        self.eps = eps
        self.deviation = deviation

    def forward(
        self, x: torch.Tensor, frames: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool [B, C, T] over T to [B, 2 C]: means, then deviations.

        `frames` [B] are the valid ones of each; None when all are.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            if frames is None:
                mean = x.mean(dim=-1)
                variance = (x - mean.unsqueeze(-1)).square().mean(dim=-1)
                # a tensor, since an exported graph has any number of frames
                count = torch.ones_like(x[:1, :1]).sum(dim=-1)
            else:
                mask = (
                    torch.arange(x.shape[-1], device=x.device) < frames[:, None]
                )
                mask = mask.unsqueeze(1).to(x.dtype)  # [B, 1, T]
                count = frames.to(x.dtype).unsqueeze(1)  # [B, 1]
                mean = (x * mask).sum(dim=-1) / count
                deviation = (x - mean.unsqueeze(-1)) * mask
                variance = deviation.square().sum(dim=-1) / count
            if self.deviation == "sample":
                variance = variance * count / (count - 1).clamp(min=1)
                variance = variance + self.eps
            else:
                variance = variance.clamp(min=self.eps)
            return torch.cat([mean, variance.sqrt()], 1)


# -- A trained ResNet34 for computing embeddings only -------------------------
#
# At inference a batch normalisation is a fixed scale and offset a channel: it
# goes into the weights of the convolution before it. Together with the memory
# layout that CPUs prefer, and tensor cores too, this is what makes the copy
# faster; it is a ResNet34 like any other, and its embeddings are those of the
# original to rounding.


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
    network.norm = identity  # type: ignore[assignment]
    for block in network.modules():
        if isinstance(block, BasicBlock):
            block.conv1 = fuse_conv_bn_eval(block.conv1, block.norm1)
            block.conv2 = fuse_conv_bn_eval(block.conv2, block.norm2)
            block.norm1 = block.norm2 = identity  # type: ignore[assignment]
            if isinstance(block.shortcut, torch.nn.Sequential):
                block.shortcut = fuse_conv_bn_eval(*block.shortcut)
    # Computing gradients in this layout is another matter, see brain.py.
    network.to(memory_format=torch.channels_last)  # type: ignore
    network.tile = _TILE
    return network.requires_grad_(False)
