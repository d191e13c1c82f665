"""A map of voices: embeddings in two dimensions, coloured by speaker.

The projection is t-SNE on cosine distances, from scikit-learn (the extra
``map``). Near points are similar voices; distances between far groups, and
the axes, mean nothing.
"""

from __future__ import annotations

import colorsys
import html
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from speechbrain_ram.utils import atomic_path, atomic_writer, needs_extra
from speechbrain_ram.verification.scores import unit_length

#: Markers that take turns, so that 60 speakers can be told apart.
_MARKERS = ("o", "s", "^")

#: Speakers up to which a legend is drawn into the image.
_LEGEND = 40

#: The longer side of the image, without the legend.
_INCHES = 7.0


def project(embeddings: np.ndarray) -> np.ndarray:
    """Lay embeddings [N, E] out in the plane: [N, 2], within [-1, 1]."""
    with needs_extra("A map of voices", "map"):
        from sklearn.manifold import TSNE
    if len(embeddings) < 4:
        raise ValueError(
            f"A map of {len(embeddings)} recordings shows nothing, 4 or more "
            "are needed."
        )
    points = TSNE(
        perplexity=min(30.0, (len(embeddings) - 1) / 3),
        metric="cosine",
        init="random",
        random_state=0,  # one seed, one map
    ).fit_transform(unit_length(embeddings))
    points = points - (points.max(axis=0) + points.min(axis=0)) / 2
    return points / np.abs(points).max()


def colours(count: int) -> list[str]:
    """Hexadecimal colours as far apart on the wheel as `count` allows."""
    wheel = [
        colorsys.hls_to_rgb((0.028 + i / count) % 1, 0.486, 0.605)
        for i in range(count)
    ]
    return [
        "#" + "".join(f"{round(255 * part):02x}" for part in colour)
        for colour in wheel
    ]


def without_legend(speakers: int) -> str:
    """Why an image of so many speakers does not name them, or ""."""
    if speakers <= _LEGEND:
        return ""
    return (
        f"Over {_LEGEND} speakers, so without a legend; a map in .html names "
        "each point."
    )


def draw_map(
    points: np.ndarray, speakers: Sequence[str], path: str | os.PathLike
) -> None:
    """Write points [N, 2] as an image of the format that `path` ends with."""
    with needs_extra("A map of voices", "map"):
        from matplotlib.figure import Figure
    names = sorted(set(speakers))
    owners = np.array(speakers)
    # As tall and wide as the cloud, or half as much as the other side.
    low, high = points.min(axis=0), points.max(axis=0)
    half = np.maximum(high - low, (high - low).max() / 2) / 2
    ends = np.stack([-1.05 * half, 1.05 * half]) + (high + low) / 2
    figure = Figure(figsize=_INCHES * half / half.max())
    axes = figure.add_axes((0, 0, 1, 1))
    for i, (name, colour) in enumerate(
        zip(names, colours(len(names)), strict=True)
    ):
        own = points[owners == name]
        marker = _MARKERS[i % len(_MARKERS)]
        axes.scatter(*own.T, s=22, c=colour, marker=marker, label=name, lw=0)
    axes.set(
        xticks=[],
        yticks=[],
        xlim=ends[:, 0],
        ylim=ends[:, 1],
        aspect="equal",
    )
    axes.set_title(
        f"{len(points)} recordings of {len(names)} speakers "
        "(t-SNE of cosine distances)",
        loc="left",
    )
    axes.set_xlabel(without_legend(len(names)), loc="left")
    for side in axes.spines.values():
        side.set_color("#cccccc")
    if not without_legend(len(names)):
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1, 1),
            fontsize=7,
            frameon=False,
            ncols=1 + (len(names) > 20),
        )
    with atomic_path(path) as temporary:
        figure.savefig(
            temporary,
            format=Path(path).suffix[1:] or "png",
            dpi=150,
            bbox_inches="tight",
            pad_inches=0.15,
        )


def write_html(
    points: np.ndarray,
    speakers: Sequence[str],
    names: Sequence[str],
    path: str | os.PathLike,
    title: str = "A map of voices",
) -> None:
    """Write the map as one interactive page that loads nothing else.

    Pointing at a recording names it, the wheel zooms, dragging moves, and a
    click on a speaker shows that one alone.
    """
    listed = sorted(set(speakers))
    rows = {name: row for row, name in enumerate(listed)}
    data = {
        "speakers": listed,
        "colours": colours(len(listed)),
        "points": [
            [round(float(x), 4), round(float(y), 4), rows[speaker], name]
            for (x, y), speaker, name in zip(
                points, speakers, names, strict=True
            )
        ],
    }
    page = (files("speechbrain_ram.cli") / "similarity_map.html").read_text(
        "utf-8"
    )
    # "</script>" in a file name must not end the script.
    text = json.dumps(data).replace("<", "\\u003c")
    page = page.replace("TITLE", html.escape(title)).replace("DATA", text)
    with atomic_writer(path) as file:
        file.write(page)
