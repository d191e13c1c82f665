"""Statistics pooling over time that knows about padding.

SpeechBrain's StatisticsPooling loops over the batch and adds random noise;
this one is one masked reduction and always gives the same answer.
"""

from __future__ import annotations

import torch


def valid_frames(lengths: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Count the frames of each utterance that are not padding.

    The rule is that of SpeechBrain's ``InputNormalization``: frame i is valid
    when i < lengths * n_frames, less a millionth for rounding.

    Arguments
    ---------
    lengths : torch.Tensor
        Shape [B], relative to the longest, in (0, 1].
    n_frames : int
        Frames of the padded batch.

    Returns
    -------
    torch.Tensor
        Shape [B], int64, each in [1, n_frames].

    Example
    -------
    >>> valid_frames(torch.tensor([0.25, 0.6, 1.0]), 10)
    tensor([ 3,  6, 10])
    """
    frames = torch.ceil(lengths * n_frames - 1e-6).long()
    return frames.clamp(1, n_frames)


class StatisticsPooling(torch.nn.Module):
    """Mean and standard deviation over the valid frames of each utterance.

    The deviation is the population's, sqrt(max(mean((x - mu)^2), eps)), so
    that one frame gives a number and a constant signal a finite gradient.
    Computed in float32 under autocast.

    Arguments
    ---------
    eps : float
        The least variance.

    Example
    -------
    >>> x = torch.tensor([[[1.0, 3.0, 100.0]]])  # [B, C, T]
    >>> StatisticsPooling()(x, torch.tensor([2]))
    tensor([[2., 1.]])
    """

    def __init__(self, eps: float = 1e-7):
        super().__init__()
        self.eps = eps

    def forward(
        self, x: torch.Tensor, frames: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool over the last axis.

        Arguments
        ---------
        x : torch.Tensor
            Shape [B, C, T].
        frames : torch.Tensor
            Shape [B], the valid frames of each; None when all are.

        Returns
        -------
        torch.Tensor
            Shape [B, 2 C]: means, then standard deviations.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            if frames is None:
                mean = x.mean(dim=-1)
                variance = (x - mean.unsqueeze(-1)).square().mean(dim=-1)
            else:
                mask = (
                    torch.arange(x.shape[-1], device=x.device) < frames[:, None]
                )
                mask = mask.unsqueeze(1).to(x.dtype)  # [B, 1, T]
                count = frames.to(x.dtype).unsqueeze(1)  # [B, 1]
                mean = (x * mask).sum(dim=-1) / count
                deviation = (x - mean.unsqueeze(-1)) * mask
                variance = deviation.square().sum(dim=-1) / count
            return torch.cat([mean, variance.clamp(min=self.eps).sqrt()], 1)
