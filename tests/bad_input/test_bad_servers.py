"""Downloads from servers that cut, stall, lie and redirect, and by several processes at once."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from download_server import BODY, SHA, V1, complete, cut, head, refused, rest, whole

from mit_semseg.download import DownloadError, fetch


def redirect(to):
    return lambda start, send: send(head("302 Found", f"Location: {to}", "Content-Length: 0"))


# ------------------------------------------------------------------------------ cut, stalled
@pytest.mark.parametrize("after", [0, 1, 1000, len(BODY) - 1])
def test_cut_answers_are_continued(server, dest, after):
    server.answers = [cut(after, V1)]
    fetch(server.url, dest, sha256=SHA, progress=False)
    assert complete(dest) and server.starts == [None, after or None]


def test_stalled_servers_are_given_up_in_time(server, dest):
    def stalls(start, send):
        cut(5000, V1)(start, send)
        time.sleep(10)

    def trickles(start, send):
        """A byte now and then resets every time limit of a socket."""
        cut(0)(start, send)
        for k in range(100):
            send(BODY[k : k + 1])
            time.sleep(0.05)

    began = time.monotonic()
    server.answers = [lambda start, send: time.sleep(10)]
    assert "timed out" in refused(dest, server.url, timeout=0.3)
    server.answers = [trickles]
    assert re.search(r"only \d+ bytes in 0\.3 s", refused(dest, server.url, timeout=0.3))
    shutil.rmtree(dest.parent)
    server.answers, server.starts = [stalls], []
    fetch(server.url, dest, sha256=SHA, progress=False, timeout=0.3)
    assert complete(dest) and server.starts == [None, 5000]
    assert time.monotonic() - began < 8


# ------------------------------------------------------------------------------ lies
def test_wrong_content_lengths(server, dest):
    server.answers = [whole(length=len(BODY) + 1000)] * 3
    text = refused(dest, server.url, retries=2)
    assert f"{len(BODY)} of {len(BODY) + 1000} bytes" in text
    shutil.rmtree(dest.parent)
    # Less promised than sent: without a digest nobody can know; with one it is seen.
    server.answers = [whole(length=1000)] * 3
    text = refused(dest, server.url, sha256=SHA, retries=2)
    assert "its sha256 is" in text and not any(dest.parent.iterdir())
    server.answers = [whole(length=10**17)]  # more than the disk holds
    assert re.search(r"it has 1000+ bytes, but .* only \d+ free", refused(dest, server.url))


@pytest.mark.parametrize("length", ["-5", "many", "1e6", "", "0x10", "9" * 40])
def test_invalid_content_lengths(server, dest, length):
    server.answers = [whole(length=length)]
    try:
        fetch(server.url, dest, sha256=SHA, progress=False, retries=0)
    except DownloadError as error:
        assert "\n" not in str(error) and not dest.exists()
    else:
        assert complete(dest)


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [b"", b"\r\n\r\n", b"SSH-2.0-OpenSSH_9\r\n", b"\x16\x03\x01" * 50, b"HTTP/1.1 abc\r\n\r\n",
     OK + b"X: y\r\n" * 500 + b"\r\n", OK + b"X: " + b"y" * 70000,
     OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nno chunk\r\n"],
)  # fmt: skip
def test_answers_other_than_http(server, dest, answer):
    server.answers = [lambda start, send: send(answer)]
    assert refused(dest, server.url, sha256=SHA).isprintable()


# ------------------------------------------------------------------------------ ranges
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (rest(content_range="none"), "request from byte 5000 has range 'none'"),
        (rest(content_range="bytes 0-199999/200800"), "has range 'bytes 0-"),
        (rest(content_range="bytes 5001-200799/200800"), "has range 'bytes 5001-"),
        (rest(content_range="bytes 5000-9000/200800"), "has range 'bytes 5000-9000"),
        (rest(content_range="nonsense"), "has range 'nonsense'"),
        (rest(etag='"v2"'), "the file has changed"),
    ],
)
@pytest.mark.parametrize("sha256", [SHA, None])
def test_a_wrong_continuation_starts_again(server, dest, answer, reason, sha256):
    server.answers = [cut(5000, V1), answer]
    fetch(server.url, dest, sha256=sha256, progress=False, retries=2)
    assert complete(dest) and server.starts == [None, 5000, None]
    dest.unlink()
    server.answers = [cut(5000, V1), answer]
    assert reason in refused(dest, server.url, sha256=sha256, retries=1)
    assert os.listdir(dest.parent) == []


def test_a_continuation_with_other_bytes_starts_again(server, dest):
    """Right by its headers, wrong by its digest: one more attempt, from the beginning."""
    server.answers = [cut(5000, V1), rest(BODY[::-1])]
    fetch(server.url, dest, sha256=SHA, progress=False)
    assert complete(dest) and server.starts == [None, 5000, None]
    dest.unlink()
    server.answers = [cut(5000, V1), rest(BODY[::-1], etag='"other"')]
    mirrors = [server.url, f"{server.base}/mirror"]
    fetch(mirrors, dest, sha256=SHA, progress=False, retries=1)
    assert complete(dest)
    # No digest: what arrives is one version or the other, never some of each.
    dest.unlink()
    server.answers = [cut(5000, V1)]
    server.honest = whole(BODY[::-1], 'ETag: "v2"')  # the answer to an If-Range that fails
    fetch(server.url, dest, progress=False)
    assert complete(dest, BODY[::-1])


# ------------------------------------------------------------------------------ redirects
def test_redirects_are_followed_and_loops_end(server, dest):
    server.answers = [redirect("/elsewhere"), redirect(f"{server.base}/there")]
    fetch(server.url, dest, sha256=SHA, progress=False)
    assert complete(dest) and len(server.starts) == 3
    dest.unlink()
    server.honest = redirect("/w.pth")
    assert "HTTP 302 The HTTP server returned a redirect error" in refused(dest, server.url)
    assert len(server.starts) < 30


@pytest.mark.parametrize(
    "to", ["file:///etc/hostname", "FILE:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "jar:x"]
)
def test_redirects_to_this_machines_files_are_refused(server, dest, to):
    server.answers = [redirect(to)] * 3
    text = refused(dest, server.url, retries=2)
    assert re.search("redirect to .* not allowed|Redirection to .* not allowed", text)
    assert len(server.starts) == 1 and not any(dest.parent.iterdir())


@pytest.mark.parametrize("url", ["http://[::1", "http://host:port/x", "http://a b/x", "http:///x"])
def test_invalid_urls(dest, url):
    with pytest.raises((ValueError, DownloadError)) as caught:
        fetch(url, dest, retries=0, timeout=2)
    assert url in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ several at once
def _fetch(url, dest, sha256):
    return str(fetch(url, dest, sha256=sha256, progress=False))


@pytest.mark.parametrize("sha256", [SHA, None])
def test_processes_get_one_good_copy(server, dest, sha256):
    def slowly(start, send):
        send(head("200 OK", f"Content-Length: {len(BODY)}", V1) + BODY[:100_000])
        time.sleep(0.2)
        send(BODY[100_000:])

    server.answers = [slowly]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        got = pool.starmap(_fetch, [(server.url, dest, sha256)] * 3)
    assert got == [str(dest)] * 3 and complete(dest)
    assert len(server.starts) == 1


def test_a_waiting_process_takes_over_from_a_killed_one(server, dest):
    started = threading.Event()

    def stalls(start, send):
        cut(5000, V1)(start, send)
        started.set()
        time.sleep(1.5)

    server.answers = [stalls]
    code = "import sys; from mit_semseg.download import fetch; fetch(*sys.argv[1:3])"
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(dest)])
    assert started.wait(20)
    while not dest.with_name("w.pth.part").stat().st_size:
        time.sleep(0.01)
    timer = threading.Timer(0.3, process.send_signal, [signal.SIGKILL])
    timer.start()
    fetch(server.url, dest, sha256=SHA, progress=False)
    assert process.wait() == -signal.SIGKILL
    assert complete(dest) and server.starts[0] is None and len(server.starts) == 2
