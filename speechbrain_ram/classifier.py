"""SpeechBrain's cosine classifier with several vectors a class: sub-centres."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class SubCenterClassifier(torch.nn.Module):
    r"""Cosines to classes of K vectors each, of which the nearest counts.

    c_j = max_k cos(x, w_jk). An utterance with a wrong label may gather at a
    vector of its own, instead of pulling on that of its class: Deng, Guo, Liu,
    Gong and Zafeiriou, *Sub-center ArcFace* (ECCV 2020). The cosines are those
    of classes, so that any margin loss takes them. With K = 1 this is
    SpeechBrain's ``Classifier``: same parameter, same cosines.

    Arguments
    ---------
    input_size : int
        Embedding dimension E.
    out_neurons : int
        Number of classes C.
    sub_centers : int
        K, vectors a class. The parameter `weight` is [C, K, E], and [C, E]
        with K = 1.

    Raises
    ------
    ValueError
        A size below 1.

    Example
    -------
    >>> classifier = SubCenterClassifier(2, 2, sub_centers=2)
    >>> with torch.no_grad():
    ...     _ = classifier.weight.copy_(
    ...         torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, -1.0]] * 2])
    ...     )
    >>> classifier(torch.tensor([[[3.0, 4.0]]]))  # [N, 1, E] -> [N, 1, C]
    tensor([[[ 0.8000, -0.8000]]], grad_fn=<UnsqueezeBackward0>)
    """

    def __init__(self, input_size: int, out_neurons: int, sub_centers: int = 1):
        super().__init__()
        if min(input_size, out_neurons, sub_centers) < 1:
            raise ValueError(
                f"input_size is {input_size}, out_neurons {out_neurons} and "
                f"sub_centers {sub_centers}; allowed are 1 or more. Is the "
                "label encoder filled before the model is built?"
            )
        weight = torch.empty(out_neurons * sub_centers, input_size)
        torch.nn.init.xavier_uniform_(weight)
        if sub_centers > 1:
            weight = weight.view(out_neurons, sub_centers, input_size)
        self.weight = torch.nn.Parameter(weight)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosines [N, 1, C] of embeddings [N, 1, E] or [N, E], of any norm."""
        if embeddings.ndim == 3:
            embeddings = embeddings.squeeze(1)
        rows = F.normalize(self.weight.flatten(0, -2))
        cosines = F.linear(F.normalize(embeddings), rows)
        if self.weight.ndim == 3:
            cosines = cosines.unflatten(1, self.weight.shape[:2])
            cosines = cosines.max(dim=2).values  # one row gets the gradient
        return cosines.unsqueeze(1)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(model)``."""
        classes, *centers, dim = self.weight.shape
        return ", ".join(
            [f"input_size={dim}, out_neurons={classes}"]
            + [f"sub_centers={each}" for each in centers]
        )
