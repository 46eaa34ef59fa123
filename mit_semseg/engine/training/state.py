"""The state of a run for resuming: its parts by name, progress, random states, settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import nn

from mit_semseg.config.options import SETTINGS
from mit_semseg.engine.training.fsdp import is_sharded, local

# Settings that do not affect the weights, except by rounding.
_NO_EFFECT = {
    *("DIR", "TRAIN.workers", "TRAIN.start_epoch", "TRAIN.keep", "TRAIN.checkpoint_minutes"),
    *(
        "TRAIN.stall_seconds",
        "TRAIN.disp_iter",
        "TRAIN.eval_epochs",
        "TRAIN.parallel",
        "TRAIN.channels_last",
    ),
}


class Stateful(Protocol):
    """Anything with a state dict, such as torch's modules, optimizers and gradient scalers."""

    def state_dict(self) -> Any:
        """The state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restore the state."""


class RunState:
    """The state of a run: one dict, assembled from the states of its parts.

    Args:
        fixed: constant entries.
    """

    def __init__(self, **fixed: str) -> None:
        self._fixed = fixed
        self._included: list[Stateful] = []
        self._parts: dict[str, tuple[Stateful | None, Callable[[], None] | None]] = {}

    def include(self, part: Stateful) -> None:
        """Add a part whose state dict is merged into the state of the run."""
        self._included.append(part)

    def register(
        self, name: str, part: Stateful | None, fallback: Callable[[], None] | None = None
    ) -> None:
        """Add a part whose state is the entry `name`.

        Args:
            name: of the entry.
            part: None if this run does not have it: the entry is written as None and not read.
            fallback: called if a state has no such entry or an empty one; without a fallback this
                is an error.
        """
        self._parts[name] = part, fallback

    def state_dict(self) -> dict[str, Any]:
        """The entries of all parts."""
        state: dict[str, Any] = dict(self._fixed)
        for name, (part, _) in self._parts.items():
            state[name] = None if part is None else part.state_dict()
        for included in self._included:
            state.update(included.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all parts.

        Raises:
            KeyError: an entry is missing.
            Exception: raised by a part that its entry does not fit.
        """
        for name, (part, fallback) in self._parts.items():
            if part is not None and (state.get(name) or fallback is None):
                part.load_state_dict(state[name])
            elif part is not None and fallback is not None:
                fallback()
        for included in self._included:
            included.load_state_dict(state)


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        epoch_iters: steps per epoch.
        max_iters: steps of the run.
        step: completed steps.
        position: batches that all ranks have consumed.
        losses, accuracies: of the steps of the current epoch, without skipped steps.
        skipped: skipped steps of the run.
        skipped_in_a_row: skipped steps since the last update.
        seconds: training time.
    """

    epoch_iters: int
    max_iters: int
    step: int = 0
    position: int = 0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.step // self.epoch_iters

    @property
    def inside(self) -> int:
        """Completed steps of the current epoch."""
        return self.step % self.epoch_iters

    @property
    def done(self) -> bool:
        """Whether all steps are completed."""
        return self.step >= self.max_iters

    def advance(self, loss: float, accuracy: float, updated: bool, batches: int) -> None:
        """Count a step that consumed `batches` batches of all ranks."""
        if updated:
            self.losses.append(loss)
            self.accuracies.append(accuracy)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.step += 1
        self.position += batches

    def state_dict(self) -> dict[str, Any]:
        """The attributes."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an earlier run; with another `epoch_iters`, at the same fraction of an epoch."""
        self.step = state["step"] * self.epoch_iters // state["epoch_iters"]
        self.position = state["position"]
        self.losses = [float(value) for value in state.get("losses", ())]
        self.accuracies = [float(value) for value in state.get("accuracies", ())]
        self.skipped = int(state.get("skipped", 0))
        self.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
        self.seconds = float(state.get("seconds", 0.0))


# ------------------------------------------------------------------------------ random numbers
def seed_everything(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class RandomNumbers:
    """The random number generators of all ranks; its state is the entry `random`.

    Args:
        seed: of the run.
        devices: of this process; each GPU has its own generator.
        rank: of this process.
        world: number of ranks.
        progress: of the run; has to be loaded first.
    """

    def __init__(
        self,
        seed: int,
        devices: Sequence[torch.device],
        rank: int,
        world: int,
        progress: Progress,
    ) -> None:
        self.seed, self.devices, self.rank, self.world = seed, list(devices), rank, world
        self.progress = progress

    def begin_epoch(self, offset: int = 0) -> None:
        """Seed the generators for the current epoch and rank."""
        seed_everything(self.seed + 1009 * (self.progress.epoch + 1) + self.rank + offset)

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks (a collective: every rank has to call this)."""
        everyone: list[Any] = [random_state(self.devices)]
        if self.world > 1:
            own, everyone = everyone[0], [None] * self.world
            dist.all_gather_object(everyone, own)
        return {"random": everyone}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the generators; with another number of ranks they are seeded anew."""
        states = state.get("random", [])
        if len(states) == self.world:
            restore_random_state(states[self.rank], self.devices)
        else:
            self.begin_epoch(self.progress.step)


def random_state(devices: Sequence[torch.device]) -> dict[str, Any]:
    """The states of all generators of a process, in types that `weights_only` loading accepts.

    Args:
        devices: of the process; each GPU has its own generator.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any], devices: Sequence[torch.device]) -> None:
    """Restore the states returned by `random_state`."""
    torch.set_rng_state(state["torch"])
    for device, one in zip((d for d in devices if d.type == "cuda"), state["cuda"]):
        torch.cuda.set_rng_state(one, device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


# ------------------------------------------------------------------------------ skipped steps
class Snapshot:
    """A copy of the buffers of a module (BatchNorm statistics), restored if a step is skipped."""

    def __init__(self, module: nn.Module) -> None:
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in module.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._pairs = [([b.clone() for b in group], group) for group in by_type.values()]

    @torch.no_grad()
    def save(self) -> None:
        """Copy the buffers, on their device."""
        for kept, live in self._pairs:
            torch._foreach_copy_(kept, live)

    @torch.no_grad()
    def restore(self) -> None:
        """Reset the buffers to the copy."""
        for kept, live in self._pairs:
            torch._foreach_copy_(live, kept)


@torch.no_grad()
def is_finite(module: nn.Module) -> bool:
    """Whether all parameters are finite, with one read from their device.

    If they are sharded, every rank has to call this.
    """
    weights = list(module.parameters())
    finite = torch.stack([local(weight).isfinite().all() for weight in weights]).all().float()
    if is_sharded(weights[0]):
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


# ------------------------------------------------------------------------------ settings
def differences(before: str, now: str) -> list[str]:
    """One line for each setting that differs and affects the weights.

    Args:
        before, now: configurations as YAML.
    """
    try:
        old = yaml.safe_load(before) or {}
    except yaml.YAMLError:
        return []
    if not isinstance(old, dict) or not old:
        return []
    lines, new = [], yaml.safe_load(now)
    for key in SETTINGS:
        if key.startswith(("VAL.", "TEST.")) or key in _NO_EFFECT:
            continue
        was, value = _value_at(old, key), _value_at(new, key)
        if was not in (value, None):  # None: the key did not exist
            lines.append(f"{key} was {was} and is now {value}")
    return lines


def _value_at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
