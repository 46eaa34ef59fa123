"""Downloads against a server on this machine that can misbehave."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.server
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from mit_semseg.download import DownloadError, fetch, sha256_of

BODY = bytes(range(256)) * 2000  # 512 kB
SHA = hashlib.sha256(BODY).hexdigest()


@dataclass
class Server:
    """What it serves, how it misbehaves, and what it was asked."""

    base: str = ""
    body: bytes = BODY
    ranges: bool = True
    etag: str = '"v1"'
    cut: list[int] = field(default_factory=list)  # bytes after which each coming answer breaks off
    fail: list[int] = field(default_factory=list)  # statuses of coming answers
    content_type: str = "application/octet-stream"
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("MIT_SEMSEG_OFFLINE", raising=False)
    for proxy in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            if self.path.startswith("/missing"):
                self.send_error(404)
                return
            if state.fail:
                self.send_error(state.fail.pop(0))
                return
            start = 0
            fresh = self.headers.get("If-Range", state.etag) == state.etag
            if wanted and state.ranges and fresh:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(state.body):
                    self.send_error(416)
                    return
                self.send_response(206)
                end, total = len(state.body) - 1, len(state.body)
                self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
            else:
                self.send_response(200)
            body = state.body[start:]
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", state.content_type)
            if state.etag:
                self.send_header("ETag", state.etag)
            self.end_headers()
            self.wfile.write(body[: state.cut.pop(0)] if state.cut else body)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.base = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def only(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("before", [None, b"damaged"])
def test_whole_file_arrives_and_leaves_nothing_beside_it(server, tmp_path, before):
    dest = tmp_path / "sub" / "w.pth"
    if before is not None:
        dest.parent.mkdir()
        dest.write_bytes(before)
    assert fetch(f"{server.base}/w.pth", dest, sha256=SHA) == dest
    assert dest.read_bytes() == BODY
    assert only(dest.parent) == ["w.pth"]
    # Now that it is there, it is not fetched again; a prefix of the digest is enough.
    fetch(f"{server.base}/w.pth", dest, sha256=SHA[:8].upper())
    assert len(server.asked) == 1
    assert fetch(dest.as_uri(), tmp_path / "copy", sha256=SHA[:8]).read_bytes() == BODY


def test_a_broken_connection_is_resumed_where_it_broke(server, tmp_path):
    server.cut = [100_000, 50_000]
    dest = fetch(f"{server.base}/w.pth", tmp_path / "w.pth", sha256=SHA)
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=150000-"]
    assert dest.read_bytes() == BODY


def test_a_later_call_resumes_what_an_earlier_one_left(server, tmp_path):
    dest = tmp_path / "w.pth"
    server.cut = [300_000]
    with pytest.raises(DownloadError, match="300000 of 512000 bytes"):
        fetch(f"{server.base}/w.pth", dest, retries=0)
    assert not dest.exists()
    assert (tmp_path / "w.pth.part").stat().st_size == 300_000
    fetch(f"{server.base}/w.pth", dest, retries=0)  # no digest: the same url and version
    assert server.asked[-1] == ("/w.pth", "bytes=300000-")
    assert dest.read_bytes() == BODY
    assert only(tmp_path) == ["w.pth"]


def test_nothing_is_glued_to_an_older_version(server, tmp_path):
    dest = tmp_path / "w.pth"
    server.cut = [300_000]
    with pytest.raises(DownloadError):
        fetch(f"{server.base}/w.pth", dest, retries=0)
    server.body, server.etag = BODY[::-1], '"v2"'
    fetch(f"{server.base}/w.pth", dest)
    assert dest.read_bytes() == BODY[::-1]


def test_without_validator_or_digest_it_starts_again(server, tmp_path):
    server.etag, server.cut = "", [300_000]
    dest = fetch(f"{server.base}/w.pth", tmp_path / "w.pth")
    assert [asked for _, asked in server.asked] == [None, None]
    assert dest.read_bytes() == BODY


@pytest.mark.parametrize("ranges", [True, False])
def test_resume_false_and_servers_without_range(server, tmp_path, ranges):
    server.ranges = ranges
    (tmp_path / "w.pth.part").write_bytes(BODY[:1000])
    dest = fetch(f"{server.base}/w.pth", tmp_path / "w.pth", sha256=SHA, resume=not ranges)
    assert server.asked == [("/w.pth", None if ranges else "bytes=1000-")]
    assert dest.read_bytes() == BODY


@pytest.mark.parametrize(("part", "asked"), [(BODY + b"more", 2), (BODY, 1)])
def test_a_part_file_as_long_as_the_file_or_longer(server, tmp_path, part, asked):
    (tmp_path / "w.pth.part").write_bytes(part)
    dest = fetch(f"{server.base}/w.pth", tmp_path / "w.pth", sha256=SHA)
    assert dest.read_bytes() == BODY
    assert len(server.asked) == asked
    assert only(tmp_path) == ["w.pth"]


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [(b"", "application/octet-stream", "empty"), (BODY, "text/html; charset=utf-8", "web page")],
)
def test_an_answer_that_is_no_weight_file_is_refused(server, tmp_path, body, kind, reason):
    server.body, server.content_type = body, kind
    with pytest.raises(DownloadError, match=reason):
        fetch(f"{server.base}/w.pth", tmp_path / "w.pth")
    assert only(tmp_path) == []


def test_without_file_locks(server, tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    server.cut = [100_000]
    dest = fetch(f"{server.base}/w.pth", tmp_path / "w.pth", sha256=SHA)
    assert dest.read_bytes() == BODY
    server.cut = [100_000]
    with pytest.raises(DownloadError):
        fetch(f"{server.base}/v.pth", tmp_path / "v.pth", retries=0)
    assert only(tmp_path) == ["w.pth"]


def test_server_errors_are_tried_again_and_404_goes_to_the_next_mirror(server, tmp_path):
    server.fail = [503]
    urls = [f"{server.base}/missing", f"{server.base}/w.pth"]
    assert fetch(urls, tmp_path / "w.pth", sha256=SHA).read_bytes() == BODY
    assert [path for path, _ in server.asked] == ["/missing", "/w.pth", "/w.pth"]


@pytest.mark.parametrize("digest", ["f" * 64, "0" * 8])
def test_wrong_digest_names_both_and_keeps_nothing(server, tmp_path, digest):
    with pytest.raises(DownloadError, match=f"{digest}.*{SHA[:8]}|{SHA[:8]}.*{digest}"):
        fetch(f"{server.base}/w.pth", tmp_path / "w.pth", sha256=digest)
    assert len(server.asked) == 1
    assert only(tmp_path) == []
    abc = tmp_path / "abc"
    abc.write_bytes(b"abc")  # the standard's own test vector
    assert sha256_of(abc) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_error_names_every_url_its_reason_and_the_place(server, tmp_path):
    dest = tmp_path / "w.pth"
    dead = "http://127.0.0.1:9/w.pth"
    with pytest.raises(DownloadError) as caught:
        fetch([f"{server.base}/missing/w.pth", dead], dest, retries=0)
    text = str(caught.value)
    assert f"{server.base}/missing/w.pth: HTTP 404" in text
    assert f"{dead}: " in text
    assert f"put it at {dest}" in text
    assert "\n" not in text


def test_offline_makes_no_attempt(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    dest = tmp_path / "w.pth"
    url = f"{server.base}/w.pth"
    with pytest.raises(DownloadError) as caught:
        fetch(url, dest)
    assert url in str(caught.value)
    assert str(dest) in str(caught.value)
    assert server.asked == []
    dest.write_bytes(BODY)
    assert fetch(url, dest, sha256=SHA) == dest


def test_many_callers_of_one_file_fetch_it_once(server, tmp_path):
    dest = tmp_path / "w.pth"
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(fetch, f"{server.base}/w.pth", dest, sha256=SHA) for _ in range(6)]
        assert {call.result() for call in calls} == {dest}
    assert len(server.asked) == 1
    assert dest.read_bytes() == BODY
    assert only(tmp_path) == ["w.pth"]


@pytest.mark.parametrize(
    ("urls", "sha256", "word"),
    [([], None, "urls"), ("ftp://host/x", None, "ftp"), ("http://h/x", "xyz", "xyz")],
)
def test_arguments_are_checked(tmp_path, urls, sha256, word):
    with pytest.raises(ValueError, match=word):
        fetch(urls, tmp_path / "x", sha256=sha256)
