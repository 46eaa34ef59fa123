"""What the other ranks of torchrun do to this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

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
            f"({' '.join(str(error).split())[:120]}); what that one printed says why. Ranks wait "
            f"for each other for {key} {seconds:g} s"
        ) from error


@contextmanager
def lost_peers(step: int) -> Iterator[None]:
    """Turns what collectives raise when a rank is gone into a ConnectionError of one line.

    Args:
        step: of the run, named in the error.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise ConnectionError(
            f"lost the connection to another rank in step {step}, or the collective "
            f"failed ({' '.join(str(error).split())[:120]}); the first cause is in the output "
            "of the rank or host that failed; --resume auto goes on from the newest checkpoint"
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    said = str(error)
    return any(word in said for word in ("gloo", "NCCL", "onnection closed", "onnection reset"))
