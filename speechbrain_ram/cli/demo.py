"""A web page that compares two recordings; ``speechbrain-ram demo``.

One page, without anything from elsewhere, served on this machine only unless
another address is asked for. Recordings are kept for the length of a request.
Needs the extra ``demo``: ``pip install "speechbrain-ram[demo]"``.
"""

from __future__ import annotations

import tempfile
import threading
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from speechbrain_ram.data.recordings import split_into_pieces
from speechbrain_ram.inference import SpeakerEncoder

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
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, JSONResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError(
            f"'{error.name}' is missing, which the web page needs: "
            'pip install "speechbrain-ram[demo]"'
        ) from error
    encoder.threshold()  # says so now if there is none
    page = (files("speechbrain_ram") / "demo.html").read_text("utf-8")
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
        facts = encoder.encoder.folder.facts
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
        path, 0, encoder.sample_rate, encoder.window_seconds, True, True
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
