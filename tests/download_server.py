"""A server on this machine for tests of downloads, which gives the answers it is told to."""

import contextlib
import hashlib
import os
import re
import socketserver

import pytest

from mit_semseg.download import DownloadError, fetch

BODY = bytes(range(251)) * 800  # 200 kB
SHA = hashlib.sha256(BODY).hexdigest()
V1 = 'ETag: "v1"'


class Server(socketserver.ThreadingTCPServer):
    """Gives the answers it was told to, then honest ones; remembers where each was to begin."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = []
        self.honest = honest
        self.starts = []
        self.base = f"http://127.0.0.1:{self.server_address[1]}"
        self.url = f"{self.base}/w.pth"


class Handler(socketserver.StreamRequestHandler):
    """One request a connection."""

    def handle(self):
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return
            request += line
        found = re.search(rb"Range: bytes=(\d+)-", request)
        start = int(found[1]) if found else None
        self.server.starts.append(start)
        answer = self.server.answers.pop(0) if self.server.answers else self.server.honest
        with contextlib.suppress(OSError):  # who asked has gone
            answer(start, self.request.sendall)


def head(status, *lines):
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "Connection: close", "", ""]).encode()


def whole(body=BODY, *lines, length=None):
    """All of a body, with a Content-Length that may be a lie."""
    claimed = len(body) if length is None else length

    def answer(start, send):
        send(head("200 OK", f"Content-Length: {claimed}", *lines) + body)

    return answer


def rest(body=BODY, content_range="", etag='"v1"'):
    """What a Range asks for, or something else under its name."""

    def answer(start, send):
        begin = start or 0
        claimed = content_range or f"bytes {begin}-{len(body) - 1}/{len(body)}"
        lines = [f"Content-Length: {len(body) - begin}", f"ETag: {etag}"]
        lines += [f"Content-Range: {claimed}"] if claimed != "none" else []
        send(head("206 Partial Content", *lines) + body[begin:])

    return answer


def honest(start, send):
    (rest() if start is not None else whole(BODY, V1))(start, send)


def cut(after, *lines):
    def answer(start, send):
        send(head("200 OK", f"Content-Length: {len(BODY)}", *lines) + BODY[:after])

    return answer


def complete(dest, body=BODY):
    """The right file, and nothing beside it."""
    return dest.read_bytes() == body and os.listdir(dest.parent) == [dest.name]


def refused(dest, *urls, **options):
    """The one line about a download that failed; no file under its name."""
    with pytest.raises(DownloadError) as caught:
        fetch(list(urls), dest, progress=False, **{"retries": 0, "timeout": 2.0, **options})
    assert not dest.exists() and "\n" not in str(caught.value)
    assert f"put it at {dest}" in str(caught.value)
    return str(caught.value)
