"""A web page that compares two recordings; ``speechbrain-ram demo``.

One page, without anything from elsewhere, served on this machine only unless
another address is asked for. Recordings are kept for the length of a request.
Visitors may send anything: what they send is counted, timed and bounded before
it is decoded. Needs the extra ``demo``: pip install "speechbrain-ram[demo]".
"""

from __future__ import annotations

import asyncio
import copy
import ipaddress
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, astuple
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from speechbrain_ram.data.audio import audio_info
from speechbrain_ram.data.recordings import split_into_pieces
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.utils import give_back_memory, needs_extra

#: Largest request, in bytes: some minutes of uncompressed audio.
LARGEST_UPLOAD = 64 * 2**20

#: Seconds in which a request must arrive.
UPLOAD_SECONDS = 120.0

#: Requests whose recordings are received at once; the others wait.
UPLOADS = 8

#: Longest recording, in seconds: some seconds of work.
LONGEST = 300.0

#: Most samples of a recording, in all channels: `LONGEST` of 48 kHz stereo.
MOST_SAMPLES = int(LONGEST) * 48_000 * 2

#: Bars of a drawn waveform.
BARS = 240


def create_app(encoder: SpeakerEncoder, host: str = "127.0.0.1"):
    """The web application: ``/``, ``/encoder``, and ``/compare`` by POST.

    ``/compare`` takes recordings `a` and `b` as a form. Every error is
    answered with ``{"error": ...}``. `host` is what the page is served as.
    """
    with needs_extra("The web page", "demo"):
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import HTMLResponse, JSONResponse, Response
        from starlette.routing import Route
    encoder.threshold()  # says so now if there is none
    page = (files("speechbrain_ram.cli") / "demo.html").read_text("utf-8")
    uploading, computing = asyncio.Semaphore(UPLOADS), asyncio.Lock()

    async def serve_page(request: Request) -> Response:
        # Nothing is loaded from elsewhere, even if a name could inject it.
        policy = "default-src 'self' 'unsafe-inline' blob: data:"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def serve_encoder(request: Request) -> Response:
        decision = encoder.decision.to_dict()
        del decision["calibration"]
        answer = {"decision": decision, "facts": encoder.facts}
        return JSONResponse({**answer, "eer": f"{encoder.decision.eer:.2f} %"})

    async def serve_comparison(request: Request) -> Response:
        with tempfile.TemporaryDirectory() as folder:
            async with uploading:
                named = await received(request, Path(folder))
            async with computing:
                work = partial(compare, encoder, named)
                return JSONResponse(await unless_gone(request, work))

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=400)  # nobody reads it
        status = getattr(error, "status_code", 400)
        if not isinstance(error, (HTTPException, ValueError)):
            status, error = 500, "The program failed; its terminal says why."
        text = getattr(error, "detail", str(error))
        headers = getattr(error, "headers", None)
        return JSONResponse({"error": text}, status, headers)

    handled = (HTTPException, ValueError, ClientDisconnect, Exception)
    return Starlette(
        routes=[
            Route("/", serve_page),
            Route("/encoder", serve_encoder),
            Route("/compare", serve_comparison, methods=["POST"]),
        ],
        middleware=[Middleware(OwnPageOnly, names=own_names(host))],
        exception_handlers=dict.fromkeys(handled, failed),
    )


class OwnPageOnly:
    """Answers the page's own requests only.

    Another site could make a visitor's browser send recordings here, or take a
    name whose address it then changes to this machine's (DNS rebinding). No
    such name is an address, and no such request has the page's own origin.
    """

    def __init__(self, app: Callable, names: set[str]):
        self.app = app
        self.names = names

    async def __call__(self, scope, receive, send) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import JSONResponse

        if scope["type"] == "http":
            why = why_foreign(Headers(scope=scope), self.names)
            if why:
                await JSONResponse({"error": why}, 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def own_names(host: str) -> set[str]:
    """What the machine is called in the address of the page."""
    machine = socket.gethostname().lower()
    return {host.lower(), "localhost", machine, f"{machine}.local"}


def why_foreign(headers: Mapping[str, str], names: set[str]) -> str | None:
    """Why a request is not one of the page's own, None if it is."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        here = origin is None or urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        name = ""
    if name not in names and not _is_address(name):
        return (
            f"This page is not served as '{host}'. Open it by the address "
            "that the command printed."
        )
    if not here:
        return f"Requests of pages from '{origin}' are not answered."
    return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def received(request, folder: Path) -> dict[Path, str]:
    """Store the two recordings of a request: file -> the sender's name."""
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request

    length = request.headers.get("content-length")
    if length is None and "transfer-encoding" not in request.headers:
        raise HTTPException(411, "Two files, a and b, are needed.")
    if length is not None and not (length.isascii() and length.isdigit()):
        raise HTTPException(400, f"Content-Length is '{length}', no number.")
    arrived = 0

    async def counted() -> dict:
        nonlocal arrived
        message = await request.receive()
        arrived += len(message.get("body", b""))
        if arrived > LARGEST_UPLOAD:
            while message.get("more_body"):
                message = await request.receive()  # else nobody sees the answer
            limit = LARGEST_UPLOAD // 2**20
            why = f"The recordings exceed {limit} MB together."
            raise HTTPException(413, why)
        return message

    async def store() -> dict[Path, str]:
        named = {}
        form = Request(request.scope, counted).form(max_files=2, max_fields=2)
        async with form as parts:
            for side in ("a", "b"):
                upload = parts.get(side)
                if getattr(upload, "filename", None) is None:
                    raise ValueError("Two files, a and b, are needed.")
                path = folder / side
                with open(path, "wb") as file:
                    await run_in_threadpool(
                        shutil.copyfileobj, upload.file, file
                    )
                named[path] = upload.filename[:200]
        return named

    try:
        return await asyncio.wait_for(store(), UPLOAD_SECONDS)
    except asyncio.TimeoutError:
        why = f"The recordings did not arrive within {UPLOAD_SECONDS:g} s."
        raise HTTPException(408, why, {"Connection": "close"}) from None


async def unless_gone(request, work: Callable[[Callable], Any]) -> Any:
    """Work in a thread; what it is handed raises when the visitor is gone."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect

    gone = threading.Event()

    def check() -> None:
        if gone.is_set():
            raise ClientDisconnect

    # The body has been read: what comes now is the end of the connection.
    watching = asyncio.ensure_future(request.receive())
    watching.add_done_callback(lambda _: gone.set())
    try:
        return await run_in_threadpool(work, check)
    finally:
        watching.cancel()


def compare(
    encoder: SpeakerEncoder, named: Mapping[Path, str], check: Callable
) -> dict[str, Any]:
    """Compare two files; errors call them by the names that they are given."""

    def encode(*batch):
        check()
        return encoder.encode(*batch)

    watched = copy.copy(encoder)
    watched.encode = encode
    try:
        waveforms = []
        for path in named:
            check()
            waveforms.append(envelope(encoder, path))
        result = watched.compare(*named)
        told = {"told": result.told(), "waveforms": waveforms}
        return asdict(result) | told
    except ValueError as error:
        text = str(error)
        for path, name in named.items():
            text = text.replace(str(path), name)
        raise ValueError(text) from error
    finally:
        give_back_memory()


def envelope(encoder: SpeakerEncoder, path: Path) -> dict[str, Any]:
    """A recording's length in seconds, and its loudest sample in each bar."""
    frames, rate, channels = astuple(audio_info(path))
    if frames > LONGEST * rate or frames * channels > MOST_SAMPLES:
        raise ValueError(
            f"'{path}' lasts {frames / rate:,.0f} s and has "
            f"{frames * channels:,} samples; this page compares recordings of "
            f"up to {LONGEST:g} s and {MOST_SAMPLES:,} samples. Cut out a part."
        )
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


def listen(host: str, port: int) -> socket.socket:
    """A socket that visitors can connect to from now on."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, address = min(found, key=lambda each: each[0])  # IPv4 first
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        why = str(getattr(error, "strerror", None) or error)
        why = why.partition(" (while")[0]  # "attempting to bind on", at length
        raise ValueError(
            f"The page cannot be served at {host}, port {port}: {why}. Give "
            "another --port, or another --host."
        ) from error


def serve(
    encoder: SpeakerEncoder,
    host: str,
    port: int,
    tell: Callable[[str], None] = print,
) -> str:
    """Serve the page until interrupted; 127.0.0.1 is this machine only.

    Returns the address, which `tell` is given when the page is there. Port 0
    is any free one.
    """
    app = create_app(encoder, host)
    import uvicorn

    with listen(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listener.getsockname()[1]}"
        tell(address)
        config = uvicorn.Config(app, log_level="warning")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    return address
