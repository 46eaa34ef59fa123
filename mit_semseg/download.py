"""Files from the net: several mirrors, resumed, verified, and put in place atomically."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import secrets
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

logger = logging.getLogger("mit_semseg")

OFFLINE = "MIT_SEMSEG_OFFLINE"
_CHUNK = 1 << 18
_LEAST = 1 << 10  # bytes that must come within the time limit: less is a connection that stalls
_PAUSE = 0.2  # seconds before the second attempt; twice as long before each one more
_HTML = {".html", ".htm", ""}


class DownloadError(OSError):
    """No mirror delivered the file; the message names every url with its reason and the cache.

    Attributes:
        reason: the message without what to do.
    """

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason + fix)
        self.reason = reason


class _Refused(Exception):
    """One attempt failed; `again` says whether the same url is worth another try."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


def offline() -> bool:
    """Whether the environment variable MIT_SEMSEG_OFFLINE forbids using the net."""
    return os.environ.get(OFFLINE, "").lower() not in ("", "0", "false", "no")


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(
    urls: str | Sequence[str],
    dest: str | Path,
    *,
    sha256: str | None = None,
    resume: bool = True,
    progress: bool = True,
    timeout: float = 30.0,
    retries: int = 2,
) -> Path:
    """Downloads one file to `dest` unless it is there already.

    The bytes go to `<dest>.part`, which an interrupted call leaves behind and the next one
    continues (HTTP Range); only a complete and verified file is renamed to `dest`. Processes that
    want the same file at the same time wait for the first one.

    Args:
        urls: where the file is published, in order of preference (http, https or file).
        dest: path of the file; its folder is made.
        sha256: hexadecimal digest, or its first 8 or more digits (as in torchvision's file
            names). None trusts the length alone.
        resume: continue a part file of an earlier call. Without `sha256` only when it came from
            the same url and the server still has the same version.
        progress: show a bar when standard error is a terminal.
        timeout: seconds without an answer, or with less than 1 kB, before an attempt is given up.
        retries: further attempts per url after a broken connection or a server error.

    Returns:
        `dest`.

    Raises:
        ValueError: no url, a url of another kind, or `sha256` is not a digest.
        DownloadError: no url delivered the file, or MIT_SEMSEG_OFFLINE is set.
    """
    dest = Path(dest)
    urls = [urls] if isinstance(urls, str) else list(urls)
    _check_arguments(urls, sha256)
    sha256 = sha256.lower() if sha256 else None
    if _is_complete(dest, sha256):
        return dest
    if offline():
        raise DownloadError(
            f"{dest.name} is needed and {OFFLINE} is set",
            f": fetch it from {' or '.join(urls)} and put it at {dest}",
        )
    dest.parent.mkdir(parents=True, exist_ok=True)
    with _locked(dest) as (part, shared):
        if _is_complete(dest, sha256):  # another process was faster
            part.unlink(missing_ok=True)
            return dest
        with _Download(part, sha256, resume, progress, timeout, retries) as download:
            failures = download.run(urls)
        if not failures:
            os.replace(part, dest)
        elif not shared or not part.stat().st_size:
            part.unlink()
        if not part.exists():
            download.note.unlink(missing_ok=True)
    if not failures:
        return dest
    raise DownloadError(
        f"cannot download {dest.name} ({'; '.join(failures)})",
        f"; fetch it by hand and put it at {dest}",
    )


def _check_arguments(urls: list[str], sha256: str | None) -> None:
    if not urls:
        raise ValueError("urls is empty: name at least one place to download from")
    for url in urls:
        try:
            scheme = urllib.parse.urlsplit(url).scheme
        except ValueError as error:  # such as brackets that do not close
            raise ValueError(f"cannot download {url!r}: {error}") from error
        if scheme not in ("http", "https", "file"):
            raise ValueError(f"cannot download {url!r}: use an http, https or file url")
    if sha256 is not None and not (
        8 <= len(sha256) <= 64 and set(sha256.lower()) <= set("0123456789abcdef")
    ):
        raise ValueError(f"sha256 {sha256!r} is not 8 to 64 hexadecimal digits")


def _is_complete(dest: Path, sha256: str | None) -> bool:
    if not dest.is_file():
        return False
    if sha256 is None:
        return True
    found = sha256_of(dest)
    if not found.startswith(sha256):
        logger.warning("%s has sha256 %s, expected %s: fetching it anew", dest, found, sha256)
        return False
    return True


@contextlib.contextmanager
def _locked(dest: Path) -> Iterator[tuple[Path, bool]]:
    """The part file of a download that no other process works at, and whether they share it.

    Where the file system has no locks every call has a part file of its own.
    """
    part = dest.with_name(dest.name + ".part")
    lock = FileLock(f"{dest}.lock", thread_local=False, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: another process is fetching it; waiting", dest)
            lock.acquire()
    except (OSError, NotImplementedError):
        Path(lock.lock_file).unlink(missing_ok=True)
        yield part.with_name(f"{dest.name}.{secrets.token_hex(4)}.part"), False
        return
    try:
        yield part, True
    finally:
        if not part.exists():
            with contextlib.suppress(OSError):  # Windows removes no open file
                Path(lock.lock_file).unlink()
        lock.release()


@dataclass
class _Download:
    """A part file and what fills it, to be used in a `with` block; for the rest see `fetch`."""

    part: Path
    sha256: str | None
    resume: bool
    progress: bool
    timeout: float
    retries: int

    @property
    def note(self) -> Path:
        """Beside the part file: which url it came from, and which version of it."""
        return self.part.with_name(self.part.name + ".json")

    def __enter__(self) -> _Download:
        self._file = open(self.part, "ab")  # noqa: SIM115
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def run(self, urls: Sequence[str]) -> list[str]:
        """Complete the part file from one of the urls; what failed at each, [] on success."""
        failures = []
        for url in urls:
            failure = _in_one_line(self._try(url))
            if not failure:
                return []
            logger.warning("%s: %s", url, failure)
            failures.append(f"{url}: {failure}")
        return failures

    @property
    def _size(self) -> int:
        self._file.flush()
        return os.fstat(self._file.fileno()).st_size

    def _try(self, url: str) -> str:
        """All attempts at one url; why the last one failed, "" on success."""
        failure = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                kept = self._transfer(url, self.resume or attempt > 0)
            except _Refused as e:
                failure = str(e)
                if not e.again:
                    return failure
                continue
            except urllib.error.HTTPError as e:
                failure = f"HTTP {e.code} {e.reason}"
                if e.code == 416:  # nothing to add: the part file is complete, or of another file
                    if self.sha256 and sha256_of(self.part).startswith(self.sha256):
                        return ""
                    self._file.truncate(0)
                elif e.code < 500:
                    return failure
                continue
            except urllib.error.URLError as e:
                failure = str(e.reason)
                continue
            except (OSError, http.client.HTTPException) as e:
                failure = f"{type(e).__name__}: {e}"
                continue
            if self.sha256 is None or (found := sha256_of(self.part)).startswith(self.sha256):
                return ""
            # Whatever is wrong with these bytes, continuing them would keep it.
            self._file.truncate(0)
            failure = f"its sha256 is {found}, expected {self.sha256}"
            if not kept:
                return failure
        return failure

    def _transfer(self, url: str, resume: bool) -> int:
        """Add to the part file what it lacks; returns how many bytes were kept of it."""
        headers = {"User-Agent": "mit-semseg", "Accept-Encoding": "identity"}
        have, validator = self._size, self._noted_validator(url)
        if have and not (resume and (self.sha256 or validator)):
            self._file.truncate(0)
            have = 0
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator:
                headers["If-Range"] = validator

        request = urllib.request.Request(url, headers=headers)
        opener = urllib.request.build_opener(_Redirects)
        with opener.open(request, timeout=self.timeout) as response:
            if response.headers.get_content_type() == "text/html" and (
                self.part.with_suffix("").suffix.lower() not in _HTML
            ):
                raise _Refused(
                    "the server answered with a web page instead of the file", again=False
                )
            if have and getattr(response, "status", None) != 206:
                self._file.truncate(0)  # no Range here: the whole file comes again
                have = 0
            if have and (wrong := _not_the_rest(response.headers, have, validator)):
                self._file.truncate(0)
                raise _Refused(wrong, again=True)
            noted = {"url": url, "validator": _validator(response.headers)}
            self.note.write_text(json.dumps(noted))
            length = response.headers.get("Content-Length", "")
            total = have + int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
            free = shutil.disk_usage(self.part.parent).free
            if total is not None and total - have > free:
                raise _Refused(
                    f"it has {total} bytes, {self.part.parent} has {free} left", again=False
                )
            self._copy(response, have, total)
        size = self._size
        if total is not None and size != total:
            raise _Refused(f"the connection ended after {size} of {total} bytes", again=True)
        if size == 0:
            raise _Refused("the file there is empty", again=False)
        return have

    def _copy(self, response: Any, have: int, total: int | None) -> None:
        """Append the body of an answer; a connection that stalls is given up."""
        with tqdm(
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=self.part.with_suffix("").name,
            disable=None if self.progress else True,
        ) as bar:
            since, came = time.monotonic(), 0
            while chunk := response.read1(_CHUNK):
                self._file.write(chunk)
                bar.update(len(chunk))
                came += len(chunk)
                now = time.monotonic()
                if came >= _LEAST:
                    since, came = now, 0
                elif now - since > self.timeout:
                    raise _Refused(f"only {came} bytes came in {self.timeout:g} s", again=True)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _noted_validator(self, url: str) -> str:
        """What tells the version of the url that the part file is of, as noted; "" for none."""
        try:
            note = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return ""
        same = isinstance(note, dict) and note.get("url") == url
        return str(note.get("validator", "")) if same else ""


def _in_one_line(reason: str) -> str:
    """Servers may send anything, and errors quote it."""
    return " ".join("".join(c if c.isprintable() else " " for c in reason).split())[:300]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the web alone: never to the files of this machine."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise _Refused(f"it is redirected to {newurl!r}, which is refused", again=False)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _not_the_rest(headers: Any, have: int, validator: str) -> str:
    """Why an answer to "from byte `have` on" does not continue the part file; "" when it does."""
    content = headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content.strip())
    if not found or int(found[1]) != have or found[3] not in ("*", str(int(found[2]) + 1)):
        return f"asked for the bytes from {have} on, it sent {content or 'others'!r}"
    if validator and _validator(headers) not in ("", validator):
        return "it changed since the part that is here was fetched"
    return ""


def _validator(headers: Any) -> str:
    """What If-Range may carry: a strong ETag, else the date of the last change."""
    etag = headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return str(etag)
    return str(headers.get("Last-Modified", ""))
