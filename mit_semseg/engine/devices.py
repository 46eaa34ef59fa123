"""Devices that the user names, checked against those of this machine."""

from __future__ import annotations

import torch

from mit_semseg.errors import one_line
from mit_semseg.utils import parse_devices


def resolve_devices(gpus: str | None, option: str = "--gpus") -> list[torch.device]:
    """Devices named on the command line.

    Args:
        option: the option they were given with, for messages.
        gpus: `0-3`, `0,2`, `gpu0-gpu2`, `cpu`, or None for all GPUs there are, else the CPU.

    Raises:
        ValueError: a GPU is named that this machine does not have.
    """
    names = [] if gpus is None else parse_devices(gpus)
    if names == ["cpu"]:  # without a look at GPUs, which starts their driver
        return [torch.device("cpu")]
    if "cpu" in names:
        raise ValueError(f"{option} {gpus}: name GPUs or cpu, not both")
    count = _gpu_count()
    if gpus is None:
        return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    indices = [int(name.removeprefix("gpu")) for name in names]
    if max(indices) >= count:
        fix = "the first is 0" if count else f"{option} cpu runs without one"
        raise ValueError(f"{option} {gpus}, but this machine has {_gpus(count)}; {fix}")
    return [torch.device("cuda", i) for i in indices]


def use_device(device: torch.device) -> None:
    """Make a GPU the current one, before anything opens a context on GPU 0; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpus(count: int) -> str:
    """How many GPUs there are, in words."""
    return f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU that torch can use"


def usable_device(device: torch.device | str | int | None) -> torch.device:
    """A device that torch can compute on.

    Args:
        device: as `torch.device` takes it; a number is that of a GPU. None: the first GPU, else
            the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        device = "cuda" if _gpu_count() else "cpu"
    name = f"cuda:{device}" if isinstance(device, int) else str(device)
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; give 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type == "cuda" and (found.index or 0) >= (count := _gpu_count()):
        fix = "the first is 'cuda:0'" if count else "device 'cpu' runs without one"
        raise ValueError(f"device is {name!r}, but this machine has {_gpus(count)}; {fix}")
    if found.type not in ("cpu", "cuda"):
        try:
            torch.ones(1, device=found).item()
        except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
            reason = one_line(error).partition(". ")[0]
            raise ValueError(
                f"device is {name!r}, which torch cannot use here ({reason}); device 'cpu' "
                "runs everywhere"
            ) from error
    return found
