"""Models of this toolkit on the Hugging Face Hub: names `hub:USER/NAME`, download, errors.

`HF_TOKEN` or `hf auth login` give access to private models; `HF_HOME` (cache), `HF_ENDPOINT` and
`HF_HUB_OFFLINE` apply.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mit_semseg.engine.checkpoint import CLASSES, CONFIG
from mit_semseg.errors import one_line
from mit_semseg.models.external import FILE

PREFIX = "hub:"
# What is downloaded of a model; nothing of it is executed.
FILES = (CONFIG, CLASSES, FILE, "encoder_*.safetensors", "decoder_*.safetensors")
# Seconds before each further attempt after a temporary error.
PAUSES = (1.0, 4.0)
_TEMPORARY = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")


class HubName(NamedTuple):
    """A model on the hub.

    Attributes:
        repo: `USER/NAME`.
        revision: a branch, tag or commit; None: the newest version.
    """

    repo: str
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> HubName:
        """From `USER/NAME` or `USER/NAME@REVISION`, with or without `hub:`.

        Raises:
            ValueError: another form.
        """
        repo, _, revision = text.removeprefix(PREFIX).partition("@")
        part = r"[A-Za-z0-9][\w.-]*"
        if not re.fullmatch(f"{part}/{part}", repo) or len(repo) > 96:
            raise ValueError(f"{text!r} is not the name of a model on the hub; give USER/NAME")
        return cls(repo, revision or None)


def fetch(source: str) -> Path:
    """The folder of a model in the hub's cache, downloaded if the cache lacks it.

    Without a connection, the version in the cache is used.

    Args:
        source: `hub:USER/NAME`, or `hub:USER/NAME@REVISION` for a branch, tag or commit.

    Raises:
        ValueError: a wrong name, or huggingface_hub is not installed.
        OSError: there is no such model, or it cannot be downloaded.
    """
    name = HubName.of(source)
    hub = library(source)
    folder: str = talking(
        lambda: hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=[*FILES]),
        f"{source} cannot be downloaded",
        name,
    )
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"{source} has no {CONFIG}: it is not a model of this toolkit; for one of transformers "
            f"give hf:{name.repo}"
        )
    return path


def library(what: str) -> Any:
    """huggingface_hub.

    Args:
        what: the source or option that needs it, for the error.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{what} needs huggingface_hub: pip install 'mit_semseg[hub]'") from error
    return huggingface_hub


def talking(call: Callable[[], T], failure: str, name: HubName) -> T:
    """Call a function of huggingface_hub, again after temporary errors.

    Args:
        call: the function.
        failure: beginning of error messages.
        name: the model.

    Raises:
        OSError: with one line for each error of the library.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # Its base is the error of the library for HTTP, which differs between versions.
    transport: Any = HfHubHTTPError.__mro__[1]
    with _quiet():
        for pause in (*PAUSES, None):
            try:
                return call()
            # RuntimeError: of an upload, with the error of the server as its cause.
            except (transport, OSError, ValueError, RuntimeError) as error:
                if pause is None or not _is_temporary(error, transport):
                    raise OSError(f"{failure}: {_reason(error, name)}") from error
                time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _is_temporary(error: BaseException, transport: type[BaseException]) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error.__cause__ if isinstance(error, (LocalEntryNotFoundError, RuntimeError)) else None
    error = cause or error
    if (status := _status(error)) is not None:
        return status in _TEMPORARY
    return isinstance(error, transport) or "Consistency check" in str(error)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error; None if there was no answer."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _reason(error: BaseException, name: HubName) -> str:
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    private = "for a private model set HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"{name.repo} is gated: accept its conditions on {where}/{name.repo}, and {private}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{where} has no {name.repo}, or does not show it to you: check the name; {private}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.repo} has no branch, tag or commit {name.revision}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__
        if cause is None or type(cause).__name__ == "OfflineModeIsEnabled":
            return "it is not in the cache, and HF_HUB_OFFLINE is set"
        return f"it is not in the cache, and {where} does not answer ({_brief(cause)})"
    if _status(error) in (401, 403):
        return (
            f"{where} does not allow it ({_brief(error)}): set HF_TOKEN to a token that may write"
        )
    return _brief(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)


def _brief(error: BaseException) -> str:
    status = _status(error)
    return f"HTTP status {status}" if status is not None else one_line(error, 160)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's log of its attempts: an error follows, or it has worked."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
