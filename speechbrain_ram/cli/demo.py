"""A web page that compares two recordings; ``speechbrain-ram demo``.

One page, without anything from elsewhere, served on this machine only unless
another address is asked for. Recordings are kept for the length of a request.
Needs the extra ``demo``: ``pip install "speechbrain-ram[demo]"``.
"""

from __future__ import annotations

import colorsys
import html
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from speechbrain_ram.data.recordings import split_into_pieces
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.utils import atomic_path, atomic_writer, needs_extra
from speechbrain_ram.verification.scores import unit_length

#: Largest request, in bytes: some minutes of uncompressed audio.
LARGEST_UPLOAD = 64 * 2**20

#: Bars of a drawn waveform.
BARS = 240


def create_app(encoder: SpeakerEncoder):
    """Build the web application.

    Arguments
    ---------
    encoder : SpeakerEncoder
        With saved thresholds.

    Returns
    -------
    starlette.applications.Starlette
        Serves the page at ``/``, what it shows of the encoder at
        ``/encoder``, and takes recordings ``a`` and ``b`` as a form at
        ``/compare``. Anything wrong with them is answered with status 400
        and ``{"error": ...}``.

    Raises
    ------
    ImportError
        The extra is not installed.
    ValueError
        The encoder has no thresholds to decide by.
    """
    with needs_extra("The web page", "demo"):
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, JSONResponse, Response
        from starlette.routing import Route
    encoder.threshold()  # says so now if there is none
    page = (files("speechbrain_ram.cli") / "demo.html").read_text("utf-8")
    one_at_a_time = threading.Lock()

    def compare(a: bytes, b: bytes, names: tuple[str, str]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, one_at_a_time:
            paths = [Path(folder) / side for side in ("first", "second")]
            paths[0].write_bytes(a)
            paths[1].write_bytes(b)
            try:
                result = asdict(encoder.compare(*paths))
            except ValueError as error:
                text = str(error)
                for path, name in zip(paths, names, strict=True):
                    text = text.replace(str(path), name)
                raise ValueError(text) from error
            result["waveforms"] = [envelope(encoder, p) for p in paths]
        return result

    async def serve_page(request: Request) -> Response:
        # Nothing is loaded from elsewhere, even if a name could inject it.
        policy = "default-src 'self' 'unsafe-inline' blob: data:"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def serve_encoder(request: Request) -> Response:
        decision = encoder.decision.to_dict()
        del decision["calibration"]
        facts = encoder.facts
        return JSONResponse({"decision": decision, "facts": facts})

    async def serve_comparison(request: Request) -> Response:
        try:
            length = int(request.headers.get("content-length", LARGEST_UPLOAD))
            if length >= LARGEST_UPLOAD:
                async for _ in request.stream():
                    pass  # a sender who is cut off never sees the answer
                limit = LARGEST_UPLOAD // 2**20
                raise ValueError(f"The recordings exceed {limit} MB together.")
            async with request.form(max_files=2) as form:
                uploads = [form.get(side) for side in ("a", "b")]
                if any(getattr(u, "filename", None) is None for u in uploads):
                    raise ValueError("Two files, a and b, are needed.")
                contents = [await upload.read() for upload in uploads]
                names = tuple(upload.filename for upload in uploads)
            return JSONResponse(
                await run_in_threadpool(compare, *contents, names)
            )
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    return Starlette(
        routes=[
            Route("/", serve_page),
            Route("/encoder", serve_encoder),
            Route("/compare", serve_comparison, methods=["POST"]),
        ]
    )


def envelope(encoder: SpeakerEncoder, path: Path) -> dict[str, Any]:
    """A recording's length in seconds, and its loudest sample in each bar.

    Arguments
    ---------
    encoder : SpeakerEncoder
        Says how recordings are read.
    path : pathlib.Path
        The recording.

    Returns
    -------
    dict
        ``seconds``, and ``peaks``, `BARS` numbers in [0, 1].
    """
    pieces = split_into_pieces(
        path, 0, encoder.sample_rate, True, True, longest=60.0
    )
    peaks = []
    for piece in pieces:
        bars = np.array_split(
            piece.load().abs().numpy(), max(1, BARS // len(pieces))
        )
        peaks += [float(bar.max(initial=0)) for bar in bars]
    seconds = sum(piece.samples for piece in pieces) / encoder.sample_rate
    return {"seconds": seconds, "peaks": peaks}


def serve(encoder: SpeakerEncoder, host: str, port: int) -> None:
    """Serve the page until interrupted.

    Arguments
    ---------
    encoder : SpeakerEncoder
        With saved thresholds.
    host : str
        127.0.0.1 for this machine only.
    port : int
        Of the server.
    """
    app = create_app(encoder)
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning")


# -- A map of voices: embeddings in two dimensions, coloured by speaker -------
#
# The projection is t-SNE on cosine distances, from scikit-learn (the extra
# ``map``). Near points are similar voices; distances between far groups, and
# the axes, mean nothing.

#: Markers that take turns, so that 60 speakers can be told apart.
_MARKERS = ("o", "s", "^")

#: Speakers up to which a legend is drawn into the image.
_LEGEND = 40


def project(embeddings: np.ndarray) -> np.ndarray:
    """Lay embeddings out in the plane.

    Arguments
    ---------
    embeddings : np.ndarray
        Shape [N, E]; their lengths do not matter.

    Returns
    -------
    np.ndarray
        Shape [N, 2], within [-1, 1].

    Raises
    ------
    ValueError
        Fewer than 4 embeddings, or one that is zero, NaN or infinite.
    ImportError
        The extra is not installed.
    """
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
    """Hexadecimal colours as far apart on the wheel as `count` allows.

    Example
    -------
    >>> colours(2)
    ['#c74a31', '#31aec7']
    """
    wheel = [
        colorsys.hls_to_rgb((0.028 + i / count) % 1, 0.486, 0.605)
        for i in range(count)
    ]
    return [
        "#" + "".join(f"{round(255 * part):02x}" for part in colour)
        for colour in wheel
    ]


def draw_map(
    points: np.ndarray, speakers: Sequence[str], path: str | os.PathLike
) -> None:
    """Write the map as an image.

    Arguments
    ---------
    points : np.ndarray
        Shape [N, 2], from :func:`project`.
    speakers : sequence of str
        Whose recording each point is.
    path : path
        Its ending chooses the format: .png, .svg, .pdf.

    Raises
    ------
    ImportError
        The extra is not installed.
    """
    with needs_extra("A map of voices", "map"):
        from matplotlib.figure import Figure
    names = sorted(set(speakers))
    owners = np.array(speakers)
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, colour) in enumerate(
        zip(names, colours(len(names)), strict=True)
    ):
        own = points[owners == name]
        marker = _MARKERS[i % len(_MARKERS)]
        axes.scatter(*own.T, s=22, c=colour, marker=marker, label=name, lw=0)
    axes.set(
        xticks=[],
        yticks=[],
        aspect="equal",
        title=f"{len(points)} recordings of {len(names)} speakers "
        "(t-SNE of cosine distances)",
    )
    for side in axes.spines.values():
        side.set_color("#cccccc")
    if len(names) <= _LEGEND:
        figure.legend(
            loc="outside right upper",
            fontsize=7,
            frameon=False,
            ncols=1 + (len(names) > 30),
        )
    with atomic_path(path) as temporary:
        figure.savefig(
            temporary, format=Path(path).suffix[1:] or "png", dpi=150
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

    Arguments
    ---------
    points : np.ndarray
        Shape [N, 2], from :func:`project`.
    speakers, names : sequence of str
        Whose recording each point is, and what it is called.
    path : path
        The file to write.
    title : str
        Its heading.
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
