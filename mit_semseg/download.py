"""Downloads from several mirrors: resumed, verified and moved into place atomically."""

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
_MIN_BYTES = 1 << 10  # bytes within the time limit, below which a connection is stalled
_PAUSE = 0.2  # seconds before the second attempt; doubled for each further attempt
_HTML = {".html", ".htm", ""}


class DownloadError(OSError):
    """All mirrors failed; the message has each url with its error, and where to put the file.

    Attributes:
        reason: the message without the advice.
    """

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason + fix)
        self.reason = reason


class _Refused(Exception):
    """An attempt failed; `again` says whether to retry the same url."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


def offline() -> bool:
    """Whether the environment variable MIT_SEMSEG_OFFLINE disables downloads."""
    return os.environ.get(OFFLINE, "").lower() not in ("", "0", "false", "no")


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file as 64 lower-case hexadecimal digits."""
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
    """Download a file to `dest` unless it exists.

    Data is written to `<dest>.part`. An interrupted download leaves this file, and the next call
    continues it (HTTP Range). The complete and verified file is renamed to `dest`. Processes that
    download the same file wait for the first one.

    Args:
        urls: http, https or file urls, in order of preference.
        dest: path of the file; its folder is created.
        sha256: hexadecimal digest, or at least its first 8 digits (as in torchvision's file names).
            None checks only the length.
        resume: continue a part file of an earlier call. Without `sha256` only if it is from the
            same url and the server has the same version.
        progress: show a progress bar if standard error is a terminal.
        timeout: seconds without an answer, or with less than 1 kB, before an attempt fails.
        retries: further attempts per url after a broken connection or a server error.

    Returns:
        `dest`.

    Raises:
        ValueError: no url, a url of another scheme, or an invalid `sha256`.
        DownloadError: all urls failed, or MIT_SEMSEG_OFFLINE is set.
    """
    dest = Path(dest)
    urls = [urls] if isinstance(urls, str) else list(urls)
    _check_arguments(urls, sha256)
    sha256 = sha256.lower() if sha256 else None
    if _is_complete(dest, sha256):
        return dest
    if offline():
        raise DownloadError(
            f"{dest.name} is needed, but {OFFLINE} is set",
            f": download it from {' or '.join(urls)} and put it at {dest}",
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
        f"; download it by hand and put it at {dest}",
    )


def _check_arguments(urls: list[str], sha256: str | None) -> None:
    if not urls:
        raise ValueError("urls is empty: give at least one url")
    for url in urls:
        try:
            scheme = urllib.parse.urlsplit(url).scheme
        except ValueError as error:  # for example unbalanced brackets
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
        logger.warning("%s has sha256 %s, expected %s: downloading it again", dest, found, sha256)
        return False
    return True


@contextlib.contextmanager
def _locked(dest: Path) -> Iterator[tuple[Path, bool]]:
    """Lock a download; yields its part file and whether other processes use the same one.

    On file systems without locks each call has its own part file.
    """
    part = dest.with_name(dest.name + ".part")
    lock = FileLock(f"{dest}.lock", thread_local=False, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: waiting for the download by another process", dest)
            lock.acquire()
    except (OSError, NotImplementedError):
        Path(lock.lock_file).unlink(missing_ok=True)
        yield part.with_name(f"{dest.name}.{secrets.token_hex(4)}.part"), False
        return
    try:
        yield part, True
    finally:
        if not part.exists():
            with contextlib.suppress(OSError):  # Windows cannot remove an open file
                Path(lock.lock_file).unlink()
        lock.release()


@dataclass
class _Download:
    """A context that fills a part file; for the arguments see `fetch`."""

    part: Path
    sha256: str | None
    resume: bool
    progress: bool
    timeout: float
    retries: int

    @property
    def note(self) -> Path:
        """File beside the part file with its url and version."""
        return self.part.with_name(self.part.name + ".json")

    def __enter__(self) -> _Download:
        self._file = open(self.part, "ab")  # noqa: SIM115
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def run(self, urls: Sequence[str]) -> list[str]:
        """Try the urls in order; returns their errors, [] on success."""
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
        """Try a url repeatedly; returns the last error, "" on success."""
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
                if e.code == 416:  # Range not satisfiable: the part file is complete or wrong
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
            # Restart: continuing would keep the wrong bytes.
            self._file.truncate(0)
            failure = f"its sha256 is {found}, expected {self.sha256}"
            if not kept:
                return failure
        return failure

    def _transfer(self, url: str, resume: bool) -> int:
        """Complete the part file; returns how many of its bytes were reused."""
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
                self._file.truncate(0)  # the server ignores Range and sends the whole file
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
                    f"it has {total} bytes, but {self.part.parent} only {free} free", again=False
                )
            self._copy(response, have, total)
        size = self._size
        if total is not None and size != total:
            raise _Refused(f"the connection ended after {size} of {total} bytes", again=True)
        if size == 0:
            raise _Refused("the server sent an empty file", again=False)
        return have

    def _copy(self, response: Any, have: int, total: int | None) -> None:
        """Append the body of a response; raises if the connection stalls."""
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
                if came >= _MIN_BYTES:
                    since, came = now, 0
                elif now - since > self.timeout:
                    raise _Refused(f"only {came} bytes in {self.timeout:g} s", again=True)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _noted_validator(self, url: str) -> str:
        """The stored validator (ETag or date) of the part file; "" for none."""
        try:
            note = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return ""
        same = isinstance(note, dict) and note.get("url") == url
        return str(note.get("validator", "")) if same else ""


def _in_one_line(reason: str) -> str:
    """Text without control characters, which servers may send and errors quote."""
    return " ".join("".join(c if c.isprintable() else " " for c in reason).split())[:300]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, not to local files."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise _Refused(f"redirect to {newurl!r} is not allowed", again=False)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _not_the_rest(headers: Any, have: int, validator: str) -> str:
    """Why a response to a Range request does not continue the part file; "" if it does."""
    content = headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content.strip())
    if not found or int(found[1]) != have or found[3] not in ("*", str(int(found[2]) + 1)):
        return f"the response to a request from byte {have} has range {content or 'none'!r}"
    if validator and _validator(headers) not in ("", validator):
        return "the file has changed since the first part was downloaded"
    return ""


def _validator(headers: Any) -> str:
    """Value for If-Range: a strong ETag, else the date of the last change."""
    etag = headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return str(etag)
    return str(headers.get("Last-Modified", ""))
