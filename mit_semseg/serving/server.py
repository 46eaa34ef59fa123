"""A model behind HTTP: `mit-semseg serve`."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import PurePath
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from mit_semseg import __version__
from mit_semseg.dataset import ClassTable
from mit_semseg.result import Result
from mit_semseg.segmenter import Segmenter
from mit_semseg.serving.answers import OUTPUTS, wanted
from mit_semseg.serving.batches import Batches, Job
from mit_semseg.serving.limits import Limits, Refused, decode, open_upload
from mit_semseg.serving.metrics import CONTENT_TYPE, Metrics

Output = Literal["labels", "overlay", "areas", "polygons"]
# Open connections beside those of the queue, which are answered with 503.
_CONNECTIONS = 1000
# Without it, the rest of a body that is refused would be read.
_CLOSE = {"Connection": "close"}
_ABOUT = """Send an image as the body of a request to `/predict`, or as the file of a form:

    curl --data-binary @photo.jpg "http://HOST:PORT/predict?output=overlay" -o overlay.png
    curl --form image=@photo.jpg  "http://HOST:PORT/predict?output=areas"
"""
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_FORM = {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": _FORM},
        "image/jpeg": _IMAGE,
        "image/png": _IMAGE,
    },
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "labels: a palette PNG of class ids; overlay: a PNG; areas: JSON; "
        "polygons: GeoJSON",
        "content": {"image/png": {}, "application/json": {}, "application/geo+json": {}},
    },
    400: {"description": "the image is damaged, or the form has no file"},
    408: {"description": "the body came too slowly"},
    413: {"description": "too many bytes or pixels"},
    415: {"description": "not an image of a supported format"},
    503: {"description": "the queue is full, or the server stops; see the header Retry-After"},
    504: {"description": "not computed in time"},
}


class Service:
    """Admission, reading and answering of requests.

    Args:
        segmenter: the model, of RGB images.
        limits: what is accepted.
    """

    def __init__(self, segmenter: Segmenter, limits: Limits) -> None:
        self.limits, self.admitted = limits, 0
        self.metrics = Metrics(lambda: self.admitted, lambda: len(self.batches))

        def segment(images: list[Any]) -> list[Result]:
            return segmenter(images, batch_size=limits.batch)

        self.batches = Batches(segment, limits, self.metrics.images.observe)

    async def predict(self, request: Request, output: str) -> Response:
        """The answer to an image; HTTPException for all others."""
        began, status = asyncio.get_running_loop().time(), 500
        try:
            answer = await self._admit(request, output)
            status = 200
            self.metrics.seconds.observe(asyncio.get_running_loop().time() - began)
            return Response(answer, media_type=OUTPUTS[output][0])
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self.metrics.requests.labels(status).inc()

    async def _admit(self, request: Request, output: str) -> bytes:
        if self.admitted >= self.limits.queue or not self.batches.alive:
            await self._discard(request)
            seconds = math.ceil(self.admitted * self.batches.seconds)
            raise HTTPException(
                503,
                f"{self.admitted} requests are waiting; try again later",
                {"Retry-After": str(min(max(seconds, 1), 60)), **_CLOSE},
            )
        self.admitted += 1
        status = 408
        deadline = asyncio.get_running_loop().time() + self.limits.timeout
        try:
            data = await asyncio.wait_for(self._upload(request), self.limits.timeout)
            status = 504
            left = deadline - asyncio.get_running_loop().time()
            return await asyncio.wait_for(self._compute(data, output), max(left, 0))
        except (asyncio.TimeoutError, TimeoutError):  # one class from Python 3.11 on
            text = f"took over {self.limits.timeout:g} seconds"
            raise HTTPException(status, text, _CLOSE if status == 408 else None) from None
        except ClientDisconnect as error:
            raise HTTPException(400, "the client has gone") from error
        finally:
            self.admitted -= 1

    async def _compute(self, data: bytes, output: str) -> bytes:
        try:
            image = open_upload(data, self.limits)
            job = Job(image.size, lambda: decode(image), OUTPUTS[output][1])
            return await asyncio.wrap_future(self.batches.submit(job))
        except Refused as error:
            raise HTTPException(error.status, str(error)) from error
        except (RuntimeError, MemoryError) as error:
            raise HTTPException(500, str(error)) from error

    async def _upload(self, request: Request) -> bytes:
        """The bytes of the image, from a form or the whole body."""
        chunks = self._chunks(request)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return b"".join([chunk async for chunk in chunks])
        parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=10)
        parser.spool_max_size = self.limits.bytes  # in memory, since it may be all there is
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError, ValueError) as error:
            raise HTTPException(400, "not a form of one file") from error
        try:
            files = [part for part in form.values() if not isinstance(part, str)]
            if not files:
                raise HTTPException(400, "the form has no file")
            return await files[0].read()
        finally:
            await form.close()

    async def _chunks(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The body in pieces; 413 as soon as it is known to be too large."""
        size, limit = 0, self.limits.bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise HTTPException(413, f"{declared} bytes; the limit is {limit}", _CLOSE)
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise HTTPException(413, f"more than {limit} bytes", _CLOSE)
            yield chunk

    async def _discard(self, request: Request) -> None:
        """Read the body, since some clients read no answer before they have sent it."""

        async def read() -> None:
            async for _ in self._chunks(request):
                pass

        with suppress(asyncio.TimeoutError, TimeoutError, HTTPException, ClientDisconnect):
            await asyncio.wait_for(read(), self.limits.timeout)


def create_app(segmenter: Segmenter, limits: Limits, name: str = "model") -> FastAPI:
    """The ASGI application of a model.

    Args:
        segmenter: the model.
        limits: what is accepted.
        name: of the model, for `/health`.
    """
    service = Service(segmenter, limits)
    classes = _class_list(segmenter.classes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batches.close)

    app = FastAPIOffline(
        title="mit-semseg", version=__version__, description=_ABOUT, lifespan=lifespan
    )

    @app.post(
        "/predict",
        response_class=Response,
        responses=_ANSWERS,
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(request: Request, output: Output | None = None) -> Response:
        """Segment an image; without `output` the header `Accept` decides, else it is labels."""
        return await service.predict(request, output or wanted(request.headers.get("accept", "")))

    @app.get("/health")
    async def health(response: Response) -> dict[str, Any]:
        """Whether images are computed; status 503 if not."""
        alive = service.batches.alive
        response.status_code = 200 if alive else 503
        return {
            "status": "ok" if alive else "stopping",
            "model": name,
            "device": str(segmenter.predictor.device),
            "waiting": len(service.batches),
        }

    @app.get("/classes")
    async def class_table() -> list[dict[str, Any]]:
        """Id, name and colour of the classes."""
        return classes

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return app


def _class_list(classes: ClassTable) -> list[dict[str, Any]]:
    return [
        {"id": number, "name": name, "color": color}
        for number, (name, color) in enumerate(zip(classes.names, classes.colors.tolist()))
    ]


def http_server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """The server of an application, for its `run(sockets=[socket])`."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.queue + _CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(limits.timeout),
    )
    return uvicorn.Server(config)


def serve(segmenter: Segmenter, source: str, host: str, port: int, limits: Limits) -> None:
    """Serve a model until SIGTERM or SIGINT; requests that are admitted are answered first.

    Args:
        segmenter: the model.
        source: its name or path, of which the last part is shown.
        host: address to listen on.
        port: 0 for any that is free.
        limits: what is accepted.

    Raises:
        OSError: the address cannot be used.
    """
    app = create_app(segmenter, limits, PurePath(source).name)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: {error.strerror or error}") from error
        where = f"[{host}]" if ":" in host else host
        address = f"http://{where}:{listening.getsockname()[1]}"
        print(f"Serving {source} on {address} (documentation: {address}/docs)", flush=True)
        # uvicorn raises the signal that has stopped it again; then it is to do nothing.
        before = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            http_server(app, limits).run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print("Stopped", flush=True)
