"""What the other ranks of torchrun do to this one."""

from __future__ import annotations

from types import TracebackType

import torch.distributed as dist


class LostPeers:
    """Turns what collectives raise when a rank is gone into a ConnectionError of one line."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, RuntimeError) and _is_lost_peer(error):
            raise ConnectionError(
                f"lost the connection to another rank in step {self.step}, or the collective "
                f"failed ({' '.join(str(error).split())[:120]}); the first cause is in the output "
                "of the rank or host that failed; --resume auto goes on from the newest checkpoint"
            ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    said = str(error)
    return any(word in said for word in ("gloo", "NCCL", "onnection closed", "onnection reset"))
