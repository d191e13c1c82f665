r"""Real margins: the max(0, .) that AM-Softmax leaves out.

Notation: cosines c_j, label y, scale s, margin m. The target's logit after
the margin is a = s (c_y - m), or a = s cos(theta_y + m) for the angular
margin, and z_j = s c_j - a, for j != y, is how far class j breaks into the
margin, in logits. A class with z_j <= 0 is *satisfied*: the target beats it
by the whole margin.

=================  ======================================================
trivial margin     log(1 + sum_j e^{z_j}): AM- and AAM-Softmax, which
                   SpeechBrain calls AngularMargin, AdditiveAngularMargin
``form="paper"``   log(1 + sum_j e^{max(0, z_j)}): RAM-Softmax, equation 12
                   of Li, Nai and Wang, *Real Additive Margin Softmax for
                   Speaker Verification*. Equals cross-entropy on
                   max(logits, a); a satisfied class still adds e^0 = 1, so
                   the loss never goes below log C.
``"released"``     cross-entropy where each logit below a is set to 0, as
                   the authors' public toolkit computes it: satisfied
                   classes weigh e^{-a} and go on pulling on the target.
``"hinge"``        log(1 + sum_j (e^{max(0, z_j)} - 1)): exactly 0 once
                   every class is satisfied, as the paper's text says.
=================  ======================================================

In every form the gradient on a satisfied class's cosine is zero. Each class
here maps cosines and one-hot targets to logits, which is what SpeechBrain's
:class:`~speechbrain.nnet.losses.LogSoftmaxWrapper` asks of its ``loss_fn``.
"""

from __future__ import annotations

import math
import pydoc
from collections.abc import Callable
from typing import Any

import torch

from speechbrain_ram.margins import check_margin
from speechbrain_ram.margins import equivalent_am_margin as equivalent_am_margin
from speechbrain_ram.margins import paper_margin_for as paper_margin_for

#: The three ways to write a real margin, the paper's first.
FORMS = ("paper", "released", "hinge")

#: What ``make_objective`` builds.
OBJECTIVES = ("softmax", "am", "aam", "ram", "raam")

# A logit this far below the target's has probability exactly 0, in float32
# and float64 alike, and is finite: -inf would become NaN in the wrapper's
# KL divergence, which multiplies it by a target of 0.
_DROPPED = 1e4


def real_margin_logits(
    logits: torch.Tensor, one_hot: torch.Tensor, form: str = "paper"
) -> torch.Tensor:
    """Turn logits with a trivial margin into logits with a real one, [N, C].

    The softmax cross-entropy of the result is the loss of the named form. The
    target's logit has the margin taken off already; a tie with it counts as
    satisfied. All results are finite.
    """
    target = (logits * one_hot).sum(dim=1, keepdim=True)  # a, [N, 1]
    if form == "paper":
        return torch.where(logits > target, logits, target)
    if form == "released":
        return torch.where(logits < target, torch.zeros_like(logits), logits)
    # hinge: a violating class must weigh e^z - 1, so its logit is
    # a + log(e^z - 1) = a + z + log(1 - e^-z), stable for large z. Below
    # eps, e^z - 1 vanishes beside the 1 in the logarithm and log() does not.
    z = logits - target
    violates = z > torch.finfo(z.dtype).eps
    z = torch.where(violates, z, torch.ones_like(z))  # log() never sees z <= 0
    weight = z + torch.log(-torch.expm1(-z))
    weight = torch.where(violates, weight, -_DROPPED)
    return torch.where(one_hot > 0, logits, target + weight)


class RealMargin(torch.nn.Module):
    """The real margin of any margin loss: its max(0, .).

    Takes the logits of `loss_fn` as s c_j and a, and returns logits whose
    softmax cross-entropy is the loss of the named form. The paper's conclusion
    proposes this for AAM-Softmax and others. Computed in float32 under
    autocast (bfloat16 logits near 30 are 0.125 apart); float64 reaches
    `loss_fn` as it is.

    Arguments
    ---------
    loss_fn : callable
        Maps cosines [N, C] and one-hot targets [N, C] to logits [N, C], as
        SpeechBrain's ``AngularMargin`` and ``AdditiveAngularMargin`` do. Its
        `margin` and `scale`, where it has them, are attributes of this too.
    form : str
        'paper' (equation 12), 'released' (the authors' toolkit) or 'hinge'
        (exactly 0 when separated).

    Raises
    ------
    TypeError
        A loss_fn that cannot be called, that returns a loss (a
        ``LogSoftmaxWrapper``), or that has a real margin already.
    ValueError
        An unknown form, or, in ``forward``, tensors of unequal or wrong shape.

    Example
    -------
    >>> from speechbrain.nnet.losses import AdditiveAngularMargin
    >>> loss_fn = RealMargin(AdditiveAngularMargin(margin=0.2, scale=30))
    >>> cosines = torch.tensor([[0.5, 0.1]])
    >>> loss_fn(cosines, torch.tensor([[1.0, 0.0]]))
    tensor([[9.5394, 9.5394]])
    >>> loss_fn.scale
    30
    """

    def __init__(
        self,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        form: str = "paper",
    ):
        super().__init__()
        check_form(form)
        # Here, as SpeechBrain takes a second or more to import.
        from speechbrain.nnet.losses import LogSoftmaxWrapper

        wrapped = isinstance(loss_fn, (LogSoftmaxWrapper, RealMargin))
        if wrapped or not callable(loss_fn):
            raise TypeError(
                f"loss_fn is {type(loss_fn).__name__}, allowed is what maps "
                "cosines and one_hot [N, C] to logits [N, C] without a real "
                "margin. Does RealMargin stand around LogSoftmaxWrapper, "
                "instead of inside it?"
            )
        self.loss_fn: Any = loss_fn  # may have a margin, or not
        self.form = form

    @property
    def margin(self) -> float:
        """That of `loss_fn`."""
        return self.loss_fn.margin

    @margin.setter
    def margin(self, value: float):
        set_margin(self.loss_fn, value)

    @property
    def scale(self) -> float:
        """That of `loss_fn`."""
        return self.loss_fn.scale

    @scale.setter
    def scale(self, value: float):
        self.loss_fn.scale = value

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"form={self.form!r}"

    def forward(
        self, cosines: torch.Tensor, one_hot: torch.Tensor
    ) -> torch.Tensor:
        """Logits [N, C], whose cross-entropy is the real-margin loss.

        From cosines in [-1, 1] (not checked: that would wait for the device in
        every step) and one_hot, both [N, C]; float32 or wider.
        """
        if cosines.ndim != 2 or cosines.shape != one_hot.shape:
            raise ValueError(
                "cosines and one_hot must both have shape [N, C], got "
                f"{tuple(cosines.shape)} and {tuple(one_hot.shape)}. Is a "
                "singleton time axis left to squeeze?"
            )
        with torch.autocast(cosines.device.type, enabled=False):
            if cosines.dtype != torch.float64:
                cosines = cosines.float()
            logits = self.loss_fn(cosines, one_hot.to(cosines.dtype))
            if logits.shape != cosines.shape:
                raise ValueError(
                    f"loss_fn returned shape {tuple(logits.shape)}, logits of "
                    f"shape {tuple(cosines.shape)}, [N, C], are needed. Does "
                    "it return a loss?"
                )
            return self.beyond_margin(logits, one_hot.to(logits.dtype))

    def beyond_margin(
        self, logits: torch.Tensor, one_hot: torch.Tensor
    ) -> torch.Tensor:
        """What `form` makes of logits with a trivial margin, all [N, C]."""
        return real_margin_logits(logits, one_hot, self.form)


class RealAdditiveMargin(RealMargin):
    """RAM-Softmax: the additive cosine margin, with its max(0, .).

    With a = s (c_y - m) and z_j = s c_j - a, the loss of one sample is
    log(1 + sum_j e^{max(0, z_j)}) in the default form, equation 12 of the
    paper. Computed in float32 under autocast (bfloat16 logits near 30 are
    0.125 apart); float64 stays float64.

    Arguments
    ---------
    margin : float
        m, the least lead of the target in cosine, in [0, 2]. The paper's
        best: 0.30 for VoxCeleb (5,994 classes), 0.20 for CN-Celeb (2,800),
        which fit 'released'; 'paper' needs more: :func:`paper_margin_for`.
    scale : float
        s, which turns cosines into logits; above 0. The paper's: 30.
    form : str
        'paper' (equation 12), 'released' (the authors' toolkit) or 'hinge'
        (exactly 0 when separated).

    Raises
    ------
    ValueError
        A margin, scale or form outside these ranges, or, in ``forward``,
        tensors of unequal or wrong shape.

    Example
    -------
    >>> from speechbrain.nnet.losses import LogSoftmaxWrapper
    >>> cosines = torch.tensor([[[0.9, 0.1, -0.2]]])  # [N, 1, C]
    >>> targets = torch.tensor([[0]])  # [N, 1]
    >>> loss = LogSoftmaxWrapper(RealAdditiveMargin(margin=0.3, scale=30))
    >>> loss(cosines, targets)  # all separated: log C
    tensor(1.0986)
    >>> hinge = RealAdditiveMargin(margin=0.3, scale=30, form="hinge")
    >>> float(LogSoftmaxWrapper(hinge)(cosines, targets))
    0.0
    """

    _largest_margin = 2.0  # cosines lie in [-1, 1]

    @property
    def largest_lead(self) -> float:
        """The greatest lead in cosine, c_y - a / s, that the margin asks."""
        return self.margin

    def __init__(self, margin: float, scale: float, form: str = "paper"):
        check_margin(margin, scale, self._largest_margin)
        super().__init__(self._trivial(float(margin), float(scale)), form)

    @staticmethod
    def _trivial(margin: float, scale: float) -> torch.nn.Module:
        from speechbrain.nnet.losses import AngularMargin

        return AngularMargin(margin, scale)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"margin={self.margin}, scale={self.scale}, form={self.form!r}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class WideAngularMargin(torch.nn.Module):
    """SpeechBrain's AdditiveAngularMargin; float64 stays float64."""

    def __init__(self, margin: float, scale: float):
        super().__init__()
        self.margin, self.scale = margin, scale

    def forward(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The trivial margin: s c_j, and s cos(theta_y + m) at the target."""
        # The clamp keeps the square root's derivative finite at |c| = 1.
        cosines = outputs.clamp(-1 + 1e-7, 1 - 1e-7)
        sines = (1.0 - cosines.pow(2)).sqrt()
        turned = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        beyond = cosines - math.sin(math.pi - self.margin) * self.margin
        target = torch.where(
            cosines > math.cos(math.pi - self.margin), turned, beyond
        )
        return self.scale * (targets * target + (1.0 - targets) * cosines)


class RealAdditiveAngularMargin(RealAdditiveMargin):
    """The additive angular margin (AAM, ArcFace) with its max(0, .).

    As :class:`RealAdditiveMargin` with a = s cos(theta_y + m): what the
    paper's conclusion proposes for AAM-Softmax. Where theta_y + m would pass
    pi, `a` goes on falling linearly, as in SpeechBrain's
    ``AdditiveAngularMargin``, with which this agrees bit for bit in float32
    when every class violates the margin.

    Arguments
    ---------
    margin : float
        m in radians, in [0, pi / 2].
    scale : float
        s, above 0.
    form : str
        'paper', 'released' or 'hinge'.

    Raises
    ------
    ValueError
        As :class:`RealAdditiveMargin`.

    Example
    -------
    >>> loss_fn = RealAdditiveAngularMargin(margin=0.2, scale=30)
    >>> cosines = torch.tensor([[0.5, 0.1]])
    >>> loss_fn(cosines, torch.tensor([[1.0, 0.0]]))
    tensor([[9.5394, 9.5394]])
    """

    _largest_margin = math.pi / 2
    _trivial = WideAngularMargin

    @property
    def largest_lead(self) -> float:
        """2 sin(m / 2), near a right angle: cos(theta) - cos(theta + m)."""
        return 2 * math.sin(self.margin / 2)


def set_margin(loss_fn: Any, margin: float) -> None:
    """Give a loss_fn another margin; it stays the same object.

    Raises a ValueError where it has no `margin`, or where its logits stay
    although the margin is another: some compute from it when they are made.
    """
    from speechbrain.nnet.losses import AdditiveAngularMargin

    if not hasattr(loss_fn, "margin"):
        raise ValueError(
            f"{type(loss_fn).__name__} has no attribute `margin` that could "
            f"become {margin:g}. Train without a rise: --margin_end 0."
        )
    if isinstance(loss_fn, RealMargin):
        set_margin(loss_fn.loss_fn, margin)
        return
    if type(loss_fn) is AdditiveAngularMargin:  # computes from it when made
        fresh = type(loss_fn)(margin, loss_fn.scale, loss_fn.easy_margin)
        loss_fn.__dict__.update(fresh.__dict__)
        return
    alone = torch.full((1, 1), 0.3), torch.ones(1, 1)
    change, before = abs(margin - loss_fn.margin), loss_fn(*alone)
    loss_fn.margin = margin
    if change > 0.01 and torch.equal(loss_fn(*alone), before):
        raise ValueError(
            f"{type(loss_fn).__name__} gives the same logits whatever its "
            "margin is set to. Does it compute from it in __init__ instead of "
            "in forward? Or train without a rise: --margin_end 0."
        )


def make_objective(
    objective: str,
    margin: float = 0.3,
    scale: float = 30.0,
    form: str = "paper",
) -> torch.nn.Module:
    """Build a ``loss_fn`` from four scalars that a command line can set.

    Arguments
    ---------
    objective : str
        'softmax' (cosine softmax: scale, no margin), 'am' and 'aam' (trivial
        margins, SpeechBrain's own classes), 'ram' and 'raam' (real margins).
        Of a loss of your own 'MODULE.CLASS', called with margin and scale, or
        'real-MODULE.CLASS', with a :class:`RealMargin` around it.
    margin, scale : float
        m and s. 'softmax' takes no margin.
    form : str
        Of the real margins; the others take none.

    Returns
    -------
    torch.nn.Module
        Maps cosines [N, C] and one-hot targets [N, C] to logits [N, C].

    Raises
    ------
    ValueError
        An unknown objective or form, or a margin or scale out of range.
    TypeError
        A class of your own that does not give a trivial margin.

    Example
    -------
    >>> make_objective("ram", margin=0.2)
    RealAdditiveMargin(margin=0.2, scale=30.0, form='paper')
    """
    check_form(form)  # a typo in a setting that is not used is a typo still
    real, _, inner = str(objective).rpartition("real-")
    no_margin = ("softmax", "ram", "raam")  # that could become a real one
    if inner != str(objective) and not real and inner not in no_margin:
        return RealMargin(make_objective(inner, margin, scale), form)
    if objective == "ram":
        return RealAdditiveMargin(margin, scale, form)
    if objective == "raam":
        return RealAdditiveAngularMargin(margin, scale, form)
    from speechbrain.nnet.losses import AdditiveAngularMargin, AngularMargin

    if objective == "softmax":
        check_margin(0.0, scale, 0.0)
        return AngularMargin(margin=0.0, scale=float(scale))
    if objective == "am":
        check_margin(margin, scale, RealAdditiveMargin._largest_margin)
        return AngularMargin(margin=float(margin), scale=float(scale))
    if objective == "aam":
        check_margin(margin, scale, RealAdditiveAngularMargin._largest_margin)
        return AdditiveAngularMargin(margin=float(margin), scale=float(scale))
    if isinstance(objective, str) and "." in objective:
        check_margin(margin, scale, math.pi)
        return _own_objective(objective, margin, scale)
    raise ValueError(
        f"objective is {objective!r}, allowed are {', '.join(OBJECTIVES)}, and "
        "MODULE.CLASS for one of your own."
    )


def _own_objective(name: str, margin: float, scale: float) -> torch.nn.Module:
    """What the class of a dotted name makes."""
    try:
        found: Any = pydoc.locate(name)
        if found is None:
            raise ValueError("there is none in the folders of PYTHONPATH")
        loss_fn = found(margin=margin, scale=scale)
        logits = loss_fn(torch.zeros(2, 3), torch.eye(3)[:2])
        if getattr(logits, "shape", None) != (2, 3):
            raise ValueError("of cosines [2, 3] it does not make logits [2, 3]")
        if isinstance(loss_fn, torch.nn.Module) and loss_fn.state_dict():
            # The optimiser and checkpoints would not know of them.
            raise ValueError("it has parameters or buffers, which stay as made")
        return loss_fn
    except Exception as error:  # of code that is not ours
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"objective is {name!r}, a class of this name that takes margin "
            "and scale, and makes logits of cosines and one-hot targets, is "
            f"needed: {why}."
        ) from error


def check_form(form: str) -> None:
    """Raise a ValueError unless `form` is one of :data:`FORMS`."""
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, allowed are {', '.join(FORMS)}.")
