"""Classifier and margin loss in one, for very many speakers.

The plain way to train on C speakers makes the cosines [N, C], their one-hot
targets, logits, log-probabilities and the gradients of each: at N = 512 and
C = 10^6 every one of these takes 2 GB. Here the classes pass by in chunks,
forward and again backward, and what is kept is O(N E + C).

In the notation of :mod:`speechbrain_ram.losses`, every objective is

    loss_i = log(1 + e^{L_i}),   L_i = log sum_{j != y} e^{g(z_ij)}

with z_ij = s c_ij - a_i and a_i the target's logit after its margin:

============  =========================================  ==================
objective     g(z)                                       d loss / d z_j
============  =========================================  ==================
trivial       z                                          e^{z - loss}
``paper``     max(0, z)                                  e^{z - loss}, z > 0
``released``  z where z > 0, else -a                     e^{z - loss}, z > 0
``hinge``     log(e^{max(0, z)} - 1)                     e^{z - loss}, z > 0
============  =========================================  ==================

so L is a running log-sum-exp, and one number per sample is all that the
backward pass needs to know of the other chunks. The real margins add that a
class which no sample of the batch violates has exactly no gradient; the
forward pass marks the others, the backward pass visits only those.

A class of K sub-centres has K rows, and c_ij is the cosine to the nearest. A
chunk is of whole classes, so that it knows the nearest row of each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import AdditiveAngularMargin, AngularMargin
from torch.autograd.function import once_differentiable

from speechbrain_ram.classifier import SubCenterClassifier
from speechbrain_ram.losses import (
    RealAdditiveAngularMargin,
    RealAdditiveMargin,
    RealMargin,
    WideAngularMargin,
)
from speechbrain_ram.training.chunks import (
    class_ids,
    excess,
    fill_own,
    gradient,
    lengths,
    log_sum_exp,
    nearest,
    own_column,
    rivals,
    slices,
    sub_centers_of,
    target_logit,
    target_rows,
    target_units,
)
from speechbrain_ram.training.diagnostics import Margins

#: Classes from which training takes the fused loss by default. It is faster
#: from 1,000 on (``benchmarks/bench_loss.py``), but below 10,000 that is less
#: than a hundredth of a step, and the log loses the angles to other speakers.
FUSED_FROM = 10_000

#: Chunk times N or E, the larger: 8 MB a float32 matrix, a few at a time.
_CHUNK_ELEMENTS = 2**21

# Above this share of violated classes, plain slices are faster than gathering.
_DENSE = 0.5

# On a GPU, to gather is to wait for the number of classes to visit.
_WORTH_A_WAIT = 100_000

# Losses whose other logits are s c_j and whose a depends on c_y alone. A class
# derived from one may compute something else, which nothing here would notice.
_TRIVIAL = (AngularMargin, AdditiveAngularMargin, WideAngularMargin)
_REAL = (RealMargin, RealAdditiveMargin, RealAdditiveAngularMargin)


def make_classifier(
    input_size: int,
    out_neurons: int,
    loss_fn: torch.nn.Module,
    fused: bool | None = None,
    sub_centers: int = 1,
) -> torch.nn.Module:
    """SpeechBrain's cosine classifier, or the one that is fused with the loss.

    Their parameters are the same: a checkpoint of one fits the other.

    Arguments
    ---------
    input_size, out_neurons : int
        Embedding dimension E and number of classes C.
    loss_fn : torch.nn.Module
        As for :class:`FusedMarginClassifier`; SpeechBrain's classifier does
        not know it.
    fused : bool, optional
        None is fused from :data:`FUSED_FROM` classes on.
    sub_centers : int
        Vectors a class, of which the nearest counts.

    Returns
    -------
    torch.nn.Module
        ``speechbrain.lobes.models.ECAPA_TDNN.Classifier``, with several
        sub-centres :class:`.SubCenterClassifier`, or
        :class:`FusedMarginClassifier`.

    Raises
    ------
    ValueError
        Fused is wanted with a loss_fn that it does not know.

    Example
    -------
    >>> loss_fn = RealAdditiveMargin(margin=0.2, scale=30)
    >>> type(make_classifier(8, 1000, loss_fn)).__name__
    'Classifier'
    >>> type(make_classifier(8, 1000, loss_fn, fused=True)).__name__
    'FusedMarginClassifier'
    """
    if fused is None:
        fused = out_neurons >= FUSED_FROM and _is_known(loss_fn)
    if fused:
        try:
            _check_loss_fn(loss_fn)
        except TypeError as error:  # in a YAML it is a wrong value
            raise ValueError(str(error)) from None
        return FusedMarginClassifier(
            input_size, out_neurons, loss_fn, sub_centers=sub_centers
        )
    if sub_centers == 1:
        return Classifier(input_size, out_neurons=out_neurons)
    return SubCenterClassifier(input_size, out_neurons, sub_centers)


class FusedMarginClassifier(SubCenterClassifier):
    """A cosine classifier that can return the margin loss itself.

    ``classifier(embeddings, targets)`` equals
    ``LogSoftmaxWrapper(loss_fn)(classifier(embeddings), targets)`` and its
    gradients, to rounding, without a matrix [N, C]. Without targets it
    returns the cosines, as SpeechBrain's class does; the parameters have the
    same name and shape, so that their checkpoints fit each other.

    Arguments
    ---------
    input_size : int
        Embedding dimension E.
    out_neurons : int
        Number of classes C, 2 or more.
    loss_fn : torch.nn.Module
        What ``LogSoftmaxWrapper`` would take: SpeechBrain's
        ``AngularMargin``, ``AdditiveAngularMargin``, or this package's
        ``RealAdditiveMargin``, ``RealAdditiveAngularMargin``, and
        ``RealMargin`` around the first two; no class derived from these.
    chunk_size : int
        Classes at a time; by default, as many as make 8 MB of cosines.
    sub_centers : int
        As for :class:`.SubCenterClassifier`.

    Raises
    ------
    TypeError
        A loss_fn that is none of these.
    ValueError
        An impossible size; in ``forward``, wrong shapes or labels.

    Example
    -------
    >>> loss_fn = RealAdditiveMargin(margin=0.2, scale=30)
    >>> classifier = FusedMarginClassifier(8, 1000, loss_fn)
    >>> embeddings = torch.randn(4, 1, 8)  # [N, 1, E]
    >>> classifier(embeddings, torch.tensor([[1], [0], [999], [1]])).shape
    torch.Size([])
    >>> classifier(embeddings).shape  # cosines
    torch.Size([4, 1, 1000])
    """

    def __init__(
        self,
        input_size: int,
        out_neurons: int,
        loss_fn: torch.nn.Module,
        chunk_size: int | None = None,
        sub_centers: int = 1,
    ):
        _check_loss_fn(loss_fn)
        if input_size < 1 or out_neurons < 2:
            raise ValueError(
                f"input_size is {input_size} and out_neurons {out_neurons}; "
                "allowed are 1 or more, and 2 or more classes. Is the label "
                "encoder filled before the model is built?"
            )
        super().__init__(input_size, out_neurons, sub_centers)
        self.loss_fn = loss_fn
        self.chunk_size = chunk_size

    def forward(
        self,
        embeddings: torch.Tensor,
        targets: torch.Tensor | None = None,
        with_margins: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Margins]:
        """The mean loss, or without targets the cosines [N, 1, C].

        Embeddings are [N, 1, E] or [N, E], of any length; targets are class
        indices, [N, 1] or [N]. `with_margins` also returns what
        :class:`.diagnostics.Margins` names. All is float32 under autocast;
        float64 stays float64. A GPU finds labels out of range without being
        waited for: as an assertion of the device, later.
        """
        if targets is None:
            return super().forward(embeddings)
        x = embeddings.squeeze(1) if embeddings.ndim == 3 else embeddings
        weight, labels = self.weight, targets.reshape(-1)
        _check_loss_fn(self.loss_fn)
        _check_shapes(x, weight, labels)
        _check_labels(labels, len(weight))
        chunk_size = self.chunk_size
        if chunk_size is None:
            of_a_class = max(x.shape) * sub_centers_of(weight)
            chunk_size = max(1, _CHUNK_ELEMENTS // of_a_class)
        elif chunk_size < 1:
            raise ValueError(
                f"chunk_size is {chunk_size}, allowed is 1 or more."
            )
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype != torch.float64:
                x = x.float()
            losses, *margins = _MarginLosses.apply(
                F.normalize(x),
                weight,
                labels.long(),
                self.loss_fn,
                min(chunk_size, len(weight)),
                with_margins,
            )
        loss = losses.mean()
        return (loss, Margins(*margins)) if with_margins else loss


class _MarginLosses(torch.autograd.Function):
    """Length-normalised embeddings x [N, E], weights -> losses [N].

    Weights are [C, E] or [C, K, E]; `flat` ones are [C K, E]. With margins,
    also the fields of ``Margins``, which have no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, labels, loss_fn, chunk, with_margins):
        form, scale = _form(loss_fn), float(loss_fn.scale)
        centers = sub_centers_of(weight)
        target = target_rows(x, weight, labels)
        unit, _ = target_units(weight.flatten(0, -2), target, x.dtype)
        cosine = (x * unit).sum(dim=1)
        logit, slope = target_logit(loss_fn, cosine)

        norm = x.new_empty(weight.shape[:-1])
        violated = labels.new_empty(len(weight), dtype=torch.bool)
        blocks = slices(len(weight), chunk)
        # Made here: what is kept of a chunk would lie where the chunk's
        # matrices were freed, and the next ones find no room there.
        log_sums = x.new_empty(len(blocks), len(x))
        seen = x.new_empty(4, *log_sums.shape) if with_margins else None
        for k, rows in enumerate(blocks):
            w = weight[rows].to(x.dtype)
            norm[rows] = lengths(w)
            own = own_column(class_ids(rows, labels), labels)
            z = excess(x, w.flatten(0, -2), norm[rows].flatten(), logit, scale)
            z, _ = nearest(z, centers)
            fill_own(z, own, -torch.inf)
            if with_margins:
                rivals(z, form, seen[:, k])
            log_sums[k], violated[rows] = log_sum_exp(z, own, logit, form)
        log_sum = log_sums.logsumexp(dim=0)
        loss = torch.logaddexp(log_sum, torch.zeros_like(log_sum))

        ctx.save_for_backward(
            *(x, weight, labels, target, norm),
            *(violated, cosine, logit, slope, loss),
        )
        ctx.settings = form, scale, chunk
        if not with_margins:
            return loss, None
        best, above, once, twice = seen
        n_others = len(weight) - 1
        shared = torch.exp(2 * once.logsumexp(dim=0) - twice.logsumexp(dim=0))
        margins = (
            cosine,
            (best.amax(dim=0) + logit) / scale,
            1 - above.sum(dim=0) / n_others,
            torch.where(shared.isnan(), 0, shared),  # nobody has a gradient
        )
        ctx.mark_non_differentiable(*margins)
        return loss, *margins

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        with torch.autocast(grad_loss.device.type, enabled=False):
            grads = _MarginLosses._gradients(ctx, grad_loss)
        return (*grads, None, None, None, None)

    @staticmethod
    def _gradients(ctx, grad_loss):
        form, scale, chunk = ctx.settings
        x, weight, labels, target, norm, *of_samples = ctx.saved_tensors
        violated, cosine, logit, slope, loss = of_samples
        centers = sub_centers_of(weight)
        blocks = slices(len(weight), chunk)
        grad_weight = torch.empty_like(
            weight, memory_format=torch.contiguous_format
        )
        few = weight.device.type != "cpu" and len(weight) < _WORTH_A_WAIT
        if form != "trivial" and not few:
            rows = violated.nonzero().squeeze(1)
            if len(rows) < _DENSE * len(weight):
                blocks = rows.split(chunk) if len(rows) else ()
                grad_weight.zero_()

        grad_x = torch.zeros_like(x)
        pull = torch.zeros_like(loss)  # - d loss / d logit, times grad_loss
        for rows in blocks:
            w = weight[rows].to(x.dtype).flatten(0, -2)
            norm_here = norm[rows].flatten()
            own = own_column(class_ids(rows, labels), labels)
            grad_dot, pull_here, radial = gradient(
                *(x, w, norm_here, own, logit, loss, grad_loss),
                *(scale, form, centers),
            )
            pull += pull_here
            grad_x.addmm_(grad_dot, w)
            # What a row's length would change is normalised away.
            grad_w = torch.addcmul(
                grad_dot.t() @ x,
                w,
                (radial / norm_here).unsqueeze(1),
                value=-1,
            )
            grad_w = grad_w.view(-1, *weight.shape[1:])
            grad_weight[rows] = grad_w.to(weight.dtype)

        if form in ("trivial", "released"):  # every other class pulls
            pull = -torch.expm1(-loss) * grad_loss
        flat = weight.flatten(0, -2)
        unit, target_norm = target_units(flat, target, x.dtype)
        grad_cosine = (-pull * slope).unsqueeze(1)
        grad_x.addcmul_(grad_cosine, unit)
        grad_target = grad_cosine * (x - cosine.unsqueeze(1) * unit)
        grad_target = (grad_target / target_norm).to(weight.dtype)
        grad_weight.flatten(0, -2).index_add_(0, target, grad_target)
        return grad_x, grad_weight


def _form(loss_fn):
    return loss_fn.form if isinstance(loss_fn, RealMargin) else "trivial"


def _is_known(loss_fn):
    if type(loss_fn) in _REAL:
        loss_fn = loss_fn.loss_fn
    return type(loss_fn) in _TRIVIAL


def _check_loss_fn(loss_fn):
    if not _is_known(loss_fn):
        around = ""
        if type(loss_fn) is RealMargin:
            around = f" around {type(loss_fn.loss_fn).__name__}"
        raise TypeError(
            f"loss_fn is {type(loss_fn).__name__}{around}, allowed are "
            "SpeechBrain's AngularMargin and AdditiveAngularMargin, RealMargin "
            "around one of them, RealAdditiveMargin and "
            "RealAdditiveAngularMargin. Is it already wrapped in "
            "LogSoftmaxWrapper? A loss_fn of your own trains with "
            "--fused_loss False."
        )


def _check_shapes(embeddings, weight, labels):
    n, dim = embeddings.shape if embeddings.ndim == 2 else (-1, -1)
    if n < 1 or labels.shape != (n,) or weight.shape[-1] != dim:
        raise ValueError(
            "embeddings [N, E], weight [C, E] or [C, K, E] and labels [N] are "
            f"needed, N at least 1; got {tuple(embeddings.shape)}, "
            f"{tuple(weight.shape)} and {tuple(labels.shape)}. Is a singleton "
            "time axis left to squeeze?"
        )


def _check_labels(labels, n_classes):
    if labels.device.type in ("cuda", "meta"):
        torch._assert_async(
            ((labels >= 0) & (labels < n_classes)).all(),
            f"labels are not all in 0 to {n_classes - 1}",
        )
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"labels run from {low} to {high}, allowed are 0 to "
            f"{n_classes - 1}. Was the label encoder filled from another "
            "manifest than the classifier's size?"
        )
