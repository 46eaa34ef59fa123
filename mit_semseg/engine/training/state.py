"""What a run resumes from: its parts by name, how far it is, random numbers, settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import nn

# Settings that change no weight, or its rounding only.
_HARMLESS = {
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
    """Anything with a state, such as modules, optimizers and gradient scalers of torch."""

    def state_dict(self) -> Any:
        """What it resumes from."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Become what `state_dict` returned in an earlier process."""


class RunState:
    """The state of a run: one dict, put together from the states of its parts.

    Args:
        fixed: entries that are written as they are.
    """

    def __init__(self, **fixed: str) -> None:
        self._fixed = fixed
        self._included: list[Stateful] = []
        self._parts: dict[str, tuple[Stateful | None, Callable[[], None] | None]] = {}

    def include(self, part: Stateful) -> None:
        """Add a part whose state is a dict of several entries, and which reads its own of all."""
        self._included.append(part)

    def register(
        self, name: str, part: Stateful | None, otherwise: Callable[[], None] | None = None
    ) -> None:
        """Add a part whose state is the entry `name`.

        Args:
            name: of the entry.
            part: None for what this run does not have: its entry is None, and is not read.
            otherwise: called in place of loading where a state has no such entry, or an empty one;
                without it that is an error.
        """
        self._parts[name] = part, otherwise

    def state_dict(self) -> dict[str, Any]:
        """All entries."""
        state: dict[str, Any] = dict(self._fixed)
        for name, (part, _) in self._parts.items():
            state[name] = None if part is None else part.state_dict()
        for included in self._included:
            state.update(included.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give every part its own.

        Raises:
            KeyError: an entry is missing.
            Exception: whatever a part raises that its entry does not fit.
        """
        for name, (part, otherwise) in self._parts.items():
            if part is not None and (state.get(name) or otherwise is None):
                part.load_state_dict(state[name])
            elif part is not None and otherwise is not None:
                otherwise()
        for included in self._included:
            included.load_state_dict(state)


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch_iters: steps of an epoch.
        max_iters: steps of the run; with `step` all that the schedule depends on.
        step: steps done.
        position: batches that all ranks have taken for them.
        losses, accuracies: of the steps of this epoch that were not skipped.
        skipped: skipped steps of the whole run.
        skipped_in_a_row: those since the last one that was not.
        seconds: that training has taken.
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
        """Epochs done."""
        return self.step // self.epoch_iters

    @property
    def inside(self) -> int:
        """Steps done of the epoch that is not."""
        return self.step % self.epoch_iters

    @property
    def done(self) -> bool:
        """Whether there is no step left."""
        return self.step >= self.max_iters

    def advance(self, loss: float, accuracy: float, updated: bool, batches: int) -> None:
        """Count a step, which took so many batches of all ranks."""
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
        """One entry for each attribute."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of an earlier run, whose epochs may be of another length."""
        # How far the run is counts in epochs.
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
    """The generators that the ranks of a run draw from; its state is the entry `random`.

    Args:
        seed: of the run.
        devices: those of this process; GPUs have generators of their own.
        rank, world: place among the ranks.
        progress: of the run; loaded before this is.
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
        """Draw other numbers in every epoch and rank, whatever was drawn before."""
        seed_everything(self.seed + 1009 * (self.progress.epoch + 1) + self.rank + offset)

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks, each of which has to call this."""
        everyone: list[Any] = [random_state(self.devices)]
        if self.world > 1:
            own, everyone = everyone[0], [None] * self.world
            dist.all_gather_object(everyone, own)
        return {"random": everyone}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draw what the earlier run would have drawn; of other ranks, something else."""
        states = state.get("random", [])
        if len(states) == self.world:
            restore_random_state(states[self.rank], self.devices)
        else:
            self.begin_epoch(self.progress.step)


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


# ------------------------------------------------------------------------------ a step that fails
class Snapshot:
    """A module's running statistics before a step, to be put back should the step be skipped."""

    def __init__(self, module: nn.Module) -> None:
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in module.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._pairs = [([b.clone() for b in group], group) for group in by_type.values()]

    @torch.no_grad()
    def take(self) -> None:
        """Copy them, on their device."""
        for kept, live in self._pairs:
            torch._foreach_copy_(kept, live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them what they were."""
        for kept, live in self._pairs:
            torch._foreach_copy_(live, kept)


@torch.no_grad()
def is_finite(module: nn.Module) -> bool:
    """Whether all weights are; read once from their device."""
    return bool(torch.stack([weight.isfinite().all() for weight in module.parameters()]).all())


# ------------------------------------------------------------------------------ settings
def differences(before: str, now: str) -> list[str]:
    """Settings of a state that are others now, but for those that change no weight.

    Args:
        before, now: configurations as yaml.
    """
    try:
        old = yaml.safe_load(before) or {}
    except yaml.YAMLError:
        return []
    if not isinstance(old, dict) or not old:
        return []
    lines = []
    for key, value in _leaves(yaml.safe_load(now)):
        if key.startswith(("VAL.", "TEST.")) or key in _HARMLESS:
            continue
        was = _at(old, key)
        if was not in (value, None):  # None: there was no such setting
            lines.append(f"{key} was {was}, and is {value} now")
    return lines


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
