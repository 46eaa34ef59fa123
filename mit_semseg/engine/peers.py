"""What the other ranks of torchrun do to this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from mit_semseg.errors import one_line

T = TypeVar("T")


def found_by_rank_0(find: Callable[[], T], rank: int, world: int) -> T:
    """What rank 0 finds, on every rank; all of them have to call this.

    Ranks that look for themselves may see different files: another one may already write some.

    Raises:
        OSError, ValueError: raised by `find`, on every rank.
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
    """Names what to look at when the ranks' results cannot be brought together.

    Args:
        rank: this one.
        done: what it has done itself.
        key: the setting of the group's time-out.
        seconds: that time-out.

    Raises:
        ConnectionError: another rank is lost.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {rank} has {done}, but lost another rank "
            f"({one_line(error, 120)}); what that one printed says why. Ranks wait "
            f"for each other for {key} {seconds:g} s"
        ) from error
