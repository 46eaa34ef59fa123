"""Texts of messages, and which process prints them."""

from __future__ import annotations

import os
import signal

# Environment variable of ranks that a command has started (see `engine.processes`).
REPORTS = "MIT_SEMSEG_REPORTS"


def warns_here() -> bool:
    """Whether this process logs warnings that all ranks have in common.

    Of several ranks this is rank 0, or the command that has started them.
    """
    return os.environ.get("RANK", "0") == "0" and REPORTS not in os.environ


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "image"), counted(2, "image"), counted(0, "class")
        ('1 image', '2 images', '0 classes')
    """
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


def exit_cause(code: int | None) -> str:
    """The exit code of a process as text: `signal SIGKILL` or `exit code 1`."""
    return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"


def one_line(error: BaseException, limit: int | None = None, *, named: bool = False) -> str:
    """The message of an exception in one line, or the name of its class if it has no message.

    Args:
        error: the exception; if it quotes a traceback, as errors of data loader processes do, the
            last line is used.
        limit: maximum number of characters.
        named: prepend the name of the class.
    """
    name, text = type(error).__name__, str(error)
    if "Traceback (most recent call last)" in text:
        last = text.strip().splitlines()[-1]
        kind, _, message = last.partition(": ")
        text = message if kind.endswith("Error") else last
    text = " ".join(text.split())
    if named:
        text = f"{name}: {text}"
    return (text or name)[:limit]
