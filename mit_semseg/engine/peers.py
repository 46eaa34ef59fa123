"""Exchange of results between torchrun's ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from mit_semseg.errors import one_line

T = TypeVar("T")


def found_by_rank_0(find: Callable[[], T], rank: int, world: int) -> T:
    """The result of `find` on rank 0, broadcast to all ranks, which all have to call this.

    Other ranks could find other files, since rank 0 may already be writing some.

    Raises:
        OSError, ValueError: raised by `find`; on every rank.
    """
    if world == 1:
        return find()
    found: list[T | Exception | None] = [None]
    if rank == 0:
        try:
            found = [find()]
        except (OSError, ValueError) as error:
            found = [error]
    dist.broadcast_object_list(found)
    (result,) = found
    if isinstance(result, Exception):
        raise result
    return result  # type: ignore[return-value]


@contextmanager
def results_of_ranks(rank: int, done: str, key: str, seconds: float) -> Iterator[None]:
    """Convert errors of collectives to a ConnectionError that says what to check.

    Args:
        rank: of this process.
        done: what it has completed, for the message.
        key: the setting of the process group's time-out.
        seconds: that time-out.

    Raises:
        ConnectionError: another rank was lost.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {rank} has {done}, but lost another rank "
            f"({one_line(error, 120)}): see the output of that rank. Ranks wait for each other for "
            f"{key} {seconds:g} s"
        ) from error
