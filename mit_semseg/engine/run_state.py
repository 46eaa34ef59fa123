"""What a run is beside its weights: random numbers, running statistics, settings."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from mit_semseg.config.node import Config, keys

# Settings that change no weight.
_HARMLESS = {
    *("DIR", "TRAIN.workers", "TRAIN.start_epoch", "TRAIN.keep", "TRAIN.checkpoint_minutes"),
    *("TRAIN.stall_seconds", "TRAIN.disp_iter", "TRAIN.eval_epochs", "TRAIN.parallel"),
}


def seed_everything(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rank_seed(rank: int, epoch: int) -> int:
    """A different seed offset for every rank and epoch."""
    return 1009 * epoch + rank


def random_state(devices: Sequence[torch.device]) -> dict[str, Any]:
    """The state of every generator a process draws from, in types that load without pickled code.

    Args:
        devices: those of the process; GPUs have generators of their own.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any], devices: Sequence[torch.device]) -> None:
    """Put back what `random_state` returned in an earlier process."""
    torch.set_rng_state(state["torch"])
    for device, one in zip((d for d in devices if d.type == "cuda"), state["cuda"]):
        torch.cuda.set_rng_state(one, device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


class Snapshot:
    """A module's running statistics before a step, to be put back should it come to nothing."""

    def __init__(self, module: nn.Module) -> None:
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in module.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._pairs = [([b.clone() for b in group], group) for group in by_type.values()]

    @torch.no_grad()
    def take(self) -> None:
        """Copy them."""
        for kept, live in self._pairs:
            torch._foreach_copy_(kept, live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them what they were."""
        for kept, live in self._pairs:
            torch._foreach_copy_(live, kept)


def differences(before: str, cfg: Config) -> list[str]:
    """Settings of a state that are others now, but for those that change no weight."""
    if not before:
        return []
    try:
        old = yaml.safe_load(before)
    except yaml.YAMLError:
        return []
    new = yaml.safe_load(cfg.dump())
    lines = []
    for key in keys(cfg):
        if key.startswith(("VAL.", "TEST.")) or key in _HARMLESS:
            continue
        was, now = _at(old, key), _at(new, key)
        if was != now:
            lines.append(f"{key} was {was}, and is {now} now")
    return lines


def _at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
