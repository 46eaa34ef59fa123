"""Parsing and checking of device names."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from mit_semseg.engine.cpu import cpu_count
from mit_semseg.errors import counted, one_line
from mit_semseg.utils import parse_devices


def resolve_devices(gpus: str | None, option: str = "--gpus") -> list[torch.device]:
    """Devices of a command line option.

    Args:
        gpus: `0-3`, `0,2`, `gpu0-gpu2`, `cpu`, `mps`, or None for all GPUs but `mps`,
            else the CPU.
        option: its name, for messages.

    Raises:
        ValueError: this machine does not have one of the GPUs.
    """
    names = [] if gpus is None else parse_devices(gpus)
    if names == ["cpu"]:  # without counting GPUs, which initialises their driver
        return [torch.device("cpu")]
    if names == ["mps"]:
        _check_mps(f"{option} mps", f"{option} cpu")
        return [torch.device("mps")]
    if other := {"cpu", "mps"} & {*names}:
        raise ValueError(f"{option} {gpus}: name GPUs or {min(other)}, not both")
    count = _gpu_count()
    if gpus is None:
        return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    indices = [int(name.removeprefix("gpu")) for name in names]
    if max(indices) >= count:
        fix = "the first is 0" if count else f"{option} cpu runs without one"
        raise ValueError(f"{option} {gpus}, but this machine has {_gpus(count)}; {fix}")
    return [torch.device("cuda", i) for i in indices]


def use_device(device: torch.device) -> None:
    """Make a GPU the current device, so that no context is created on GPU 0; no-op for the CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def machine(device: torch.device | str) -> str:
    """Name and number of cores of the CPU, after that of the GPU if `device` is one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    text = f"{name}, {counted(cpu_count(), 'core')}"
    on_gpu = torch.device(device).type == "cuda"
    return f"{torch.cuda.get_device_name(device)}; {text}" if on_gpu else text


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpus(count: int) -> str:
    return counted(count, "GPU") if count else "no GPU that torch can use"


def _check_mps(given: str, instead: str) -> None:
    if not torch.backends.mps.is_available():
        raise ValueError(
            f"{given}, but this machine has no Apple GPU that torch can use; {instead} runs "
            "without one"
        )


def usable_device(device: torch.device | str | int | None) -> torch.device:
    """A device, checked to be usable.

    Args:
        device: as for `torch.device`, or the number of a GPU, or None for the first GPU, else the
            CPU.

    Raises:
        ValueError: this machine does not have the device.
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
    if found.type == "mps":
        _check_mps(f"device is {name!r}", "device 'cpu'")
    elif found.type not in ("cpu", "cuda"):
        try:
            torch.ones(1, device=found).item()
        except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
            reason = one_line(error).partition(". ")[0]
            raise ValueError(
                f"device is {name!r}, which torch cannot use here ({reason}); 'cpu' always works"
            ) from error
    return found
