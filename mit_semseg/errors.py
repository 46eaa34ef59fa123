"""Exceptions as users read them."""

from __future__ import annotations


def one_line(error: BaseException, limit: int | None = None, *, named: bool = False) -> str:
    """What an exception says, in one line; the name of its class where it says nothing.

    Args:
        error: the exception; of one that quotes a traceback, as those of loader processes do, the
            line below it.
        limit: characters at most.
        named: begin with the name of the class.
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
