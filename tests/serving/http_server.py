"""A server in a thread, with a model that takes no time, and a client for it."""

import contextlib
import http.client
import io
import json
import socket
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from PIL import Image

from mit_semseg.dataset import ClassTable
from mit_semseg.result import Result

CLASSES = ClassTable.of(["dark", "bright"])


def png(width=6, height=4, value=0):
    """The bytes of a grey image."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def result(image):
    """Class 1 where an image is bright."""
    return Result(image, (image[:, :, 0] > 127).astype(np.int64), CLASSES)


class Brightness:
    """A model of two classes, dark and bright.

    Attributes:
        batches: the number of images of each call.
        go: calls wait for it.
        entered: set when a call waits.
    """

    def __init__(self):
        self.classes = CLASSES
        options = SimpleNamespace(bands=(), depth=False)
        self.predictor = SimpleNamespace(options=options, device="cpu")
        self.batches = []
        self.go, self.entered = threading.Event(), threading.Event()
        self.go.set()

    def __call__(self, images, batch_size=8):
        self.entered.set()
        assert self.go.wait(30)
        if not isinstance(images, list):
            return result(images)
        self.batches.append(len(images))
        return [result(image) for image in images]


@dataclass
class Answer:
    """An answer of a server."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def image(self):
        return Image.open(io.BytesIO(self.body))


def ask(port, path="/health", body=None, headers=None, method=None, timeout=60):
    """One request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request(
            method or ("GET" if body is None else "POST"), path, body=body, headers=headers or {}
        )
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())


def form(data, filename="a.png", name="image"):
    """A form with one file: its bytes and headers."""
    head = (
        f'--xyz\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=xyz"}
    return head.encode() + data + b"\r\n--xyz--\r\n", headers


def wait_until(condition, seconds=30):
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(model, **limits):
    """The port of a server in this process."""
    from mit_semseg.serving.limits import Limits
    from mit_semseg.serving.server import create_app, http_server

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        limits = Limits(**limits)
        server = http_server(create_app(model, limits, "a_model"), limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
