"""What the other ranks of torchrun do to this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


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
