"""What margins may be, and what they are worth."""

from __future__ import annotations

import math


def equivalent_am_margin(margin: float, scale: float, n_classes: int) -> float:
    """What a margin of form ``paper`` is worth to AM-Softmax: m - ln(C) / s.

    With V the classes that violate the margin, equation 12 is
    ln(C - |V| + sum_V e^{z_j}) = ln(C - |V|) + ln(1 + sum_V e^{z_j'}), where
    z_j' is z_j at the margin m - ln(C - |V|) / s. So its gradient is that of
    AM-Softmax there, without the satisfied classes. Two steps more are an
    approximation: C for C - |V|, and the satisfied classes put back. It holds
    while a small part of the classes violates; when training begins nearly
    all do, and the margin is still m. ``docs/loss-analysis.md`` has the
    bounds and the numbers.

    Arguments
    ---------
    margin : float
        m of :class:`.RealAdditiveMargin`, in cosine.
    scale : float
        s.
    n_classes : int
        C.

    Returns
    -------
    float
        A margin for AM-Softmax; below 0 it is less than no margin.

    Example
    -------
    >>> round(equivalent_am_margin(0.3, scale=30, n_classes=5994), 2)
    0.01
    """
    return margin - math.log(n_classes) / scale


def paper_margin_for(am_margin: float, scale: float, n_classes: int) -> float:
    """The margin of form ``paper`` that acts like AM-Softmax's: m + ln(C) / s.

    The inverse of :func:`equivalent_am_margin`, and as approximate.

    Arguments
    ---------
    am_margin : float
        m of AM-Softmax, in cosine.
    scale : float
        s.
    n_classes : int
        C.

    Returns
    -------
    float
        m for :class:`.RealAdditiveMargin`.

    Example
    -------
    >>> round(paper_margin_for(0.2, scale=30, n_classes=5994), 2)
    0.49
    """
    return am_margin + math.log(n_classes) / scale


def check_margin(margin: float, scale: float, largest_margin: float) -> None:
    """Raise a ValueError unless margin and scale are numbers in range."""
    for name, value in (("margin", margin), ("scale", scale)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(
                f"{name} is {value!r}, a number is needed. Is it quoted in "
                "the YAML?"
            )
    if not 0 <= margin <= largest_margin:
        raise ValueError(
            f"margin is {margin}, allowed is 0 to {largest_margin:.4g}. Is it "
            "already multiplied by the scale, or in degrees?"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, allowed is above 0 and finite.")
