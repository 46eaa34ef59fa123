"""Downloads from a server on this machine: whole, resumed, verified, from several mirrors."""

import errno
import fcntl
from concurrent.futures import ThreadPoolExecutor

import pytest
from download_server import BODY, SHA, V1, complete, cut, head, refused, whole

from mit_semseg.download import fetch, sha256_of


@pytest.mark.parametrize("before", [None, b"damaged"])
def test_whole_file_arrives_and_leaves_nothing_beside_it(server, dest, tmp_path, before):
    if before is not None:
        dest.parent.mkdir()
        dest.write_bytes(before)
    assert fetch(server.url, dest, sha256=SHA) == dest and complete(dest)
    # Now that it is there, it is not fetched again; a prefix of the digest is enough.
    fetch(server.url, dest, sha256=SHA[:8].upper())
    assert len(server.starts) == 1
    assert fetch(dest.as_uri(), tmp_path / "copy", sha256=SHA[:8]).read_bytes() == BODY


def test_a_later_call_resumes_what_an_earlier_one_left(server, dest):
    server.answers = [cut(100_000, V1)]
    assert f"100000 of {len(BODY)} bytes" in refused(dest, server.url)
    assert dest.with_name("w.pth.part").stat().st_size == 100_000
    fetch(server.url, dest, retries=0)  # no digest: the same url and version
    assert complete(dest) and server.starts == [None, 100_000]


def test_without_validator_or_digest_it_starts_again(server, dest):
    server.answers = [cut(100_000)]
    fetch(server.url, dest)
    assert complete(dest) and server.starts == [None, None]


@pytest.mark.parametrize(
    ("part", "answers", "resume", "starts"),
    [
        (BODY[:1000], [], False, [None]),
        (BODY[:1000], [whole()], True, [1000]),  # a server that knows no ranges
        (BODY, [], True, [None]),
        (BODY + b"more", [lambda _, send: send(head("416 No"))], True, [len(BODY) + 4, None]),
    ],
)
def test_a_part_that_is_there(server, dest, part, answers, resume, starts):
    dest.parent.mkdir()
    dest.with_name("w.pth.part").write_bytes(part)
    server.answers = answers
    fetch(server.url, dest, sha256=SHA, resume=resume)
    assert complete(dest)
    assert server.starts == starts or part == BODY


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(whole(b""), "empty"), (whole(BODY, "Content-Type: text/html; charset=utf-8"), "web page")],
)
def test_an_answer_that_is_no_weight_file_is_refused(server, dest, answer, reason):
    server.answers = [answer]
    assert reason in refused(dest, server.url)
    assert not any(dest.parent.iterdir())


def test_without_file_locks(server, dest, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    server.answers = [cut(100_000, V1)]
    fetch(server.url, dest, sha256=SHA)
    assert complete(dest)
    server.answers = [cut(100_000, V1)]
    refused(dest.with_name("v.pth"), server.url)
    assert complete(dest)


def test_server_errors_are_tried_again_and_404_goes_to_the_next_mirror(server, dest):
    server.answers = [lambda _, send: send(head("404 No")), lambda _, send: send(head("503 No"))]
    fetch([f"{server.base}/missing", server.url], dest, sha256=SHA)
    assert complete(dest) and len(server.starts) == 3


@pytest.mark.parametrize("digest", ["f" * 64, "0" * 8])
def test_a_wrong_digest_names_both_and_keeps_nothing(server, dest, digest, tmp_path):
    text = refused(dest, server.url, sha256=digest, retries=2)
    assert digest in text and SHA[: len(digest)] in text
    assert len(server.starts) == 1 and not any(dest.parent.iterdir())
    abc = tmp_path / "abc"
    abc.write_bytes(b"abc")  # the standard's own test vector
    assert sha256_of(abc) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_error_names_every_url_its_reason_and_the_place(server, dest):
    server.answers = [lambda _, send: send(head("404 No"))]
    text = refused(dest, server.url, "http://127.0.0.1:9/w.pth")
    assert f"{server.url}: HTTP 404" in text and "http://127.0.0.1:9/w.pth: " in text


def test_offline_makes_no_attempt(server, dest, monkeypatch):
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    assert server.url in refused(dest, server.url) and server.starts == []
    dest.parent.mkdir(exist_ok=True)
    dest.write_bytes(BODY)
    assert fetch(server.url, dest, sha256=SHA) == dest


def test_threads_fetch_one_file_once(server, dest):
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(fetch, server.url, dest, sha256=SHA) for _ in range(6)]
        assert {call.result() for call in calls} == {dest}
    assert complete(dest) and len(server.starts) == 1


@pytest.mark.parametrize(
    ("urls", "sha256", "word"),
    [([], None, "urls"), ("ftp://host/x", None, "ftp"), ("http://h/x", "xyz", "xyz")],
)
def test_arguments_are_checked(dest, urls, sha256, word):
    with pytest.raises(ValueError, match=word):
        fetch(urls, dest, sha256=sha256)
