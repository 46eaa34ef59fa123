"""Where a run happens: configuration read and checked, devices, threads, precision, ranks."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import logging
import math
import os
import time
import uuid
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from mit_semseg.config import get_defaults, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import FORMATS
from mit_semseg.dataset.split import check_channels
from mit_semseg.engine.processes import started_here
from mit_semseg.models import ENCODERS, Encoder, check_aux_weights, check_pair
from mit_semseg.utils import parse_devices

log = logging.getLogger("mit_semseg")


def read_config(path: str | Path | None, opts: list[str] | None = None) -> Config:
    """`load_config`, and values checked against each other; warns of those without effect.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a wrong key or value, or values that cannot work together, with the reason.
    """
    cfg = load_config(path, opts)
    check_pair(cfg.MODEL.arch_encoder, cfg.MODEL.arch_decoder, cfg.MODEL.fc_dim)
    check_aux_weights(cfg.MODEL.arch_decoder, cfg.TRAIN.aux_weights)
    FORMATS.get(cfg.DATASET.format)
    check_channels(cfg.MODEL.in_channels, cfg.DATASET)
    _check_windows(cfg)
    if os.environ.get("RANK", "0") == "0" and not started_here():
        for line in without_effect(cfg):
            log.warning("%s", line)
    return cfg


def _check_windows(cfg: Config) -> None:
    """Refuse sliding windows whose sides are no multiples of the encoder's strides."""
    encoder = cast(type[Encoder], ENCODERS.get(cfg.MODEL.arch_encoder.lower()))
    stride = math.lcm(*encoder.strides)
    for section in ("VAL", "TEST"):
        window = cfg[section].window
        if any(side % stride for side in window):
            fitting = [-(-int(side) // stride) * stride for side in window]
            raise ValueError(
                f"{section}.window is {window}, but {cfg.MODEL.arch_encoder} needs multiples of "
                f"its stride {stride}: set {section}.window {fitting}"
            )


def without_effect(cfg: Config) -> list[str]:
    """One line for each setting that others leave without effect."""
    defaults = get_defaults()
    needs = {
        "TRAIN.label_smoothing": ("smooth" in cfg.TRAIN.loss, "the loss smooth"),
        "TRAIN.deep_sup_scale": (not cfg.TRAIN.aux_weights, "TRAIN.aux_weights ()"),
        "VAL.stride": (cfg.VAL.window, "VAL.window"),
        "TEST.stride": (cfg.TEST.window, "TEST.window"),
        "DATASET.label_map": (
            FORMATS.get(cfg.DATASET.format)().num_class is None,
            "DATASET.format odgt and folder",
        ),
        **{
            f"DATASET.depth_{key}": (cfg.DATASET.depth, "DATASET.depth True")
            for key in ("scale", "mean", "std")
        },
    }
    lines = []
    for name, (has, what) in needs.items():
        section, key = name.split(".")
        if not has and cfg[section][key] != defaults[section][key]:
            lines.append(f"{name} has no effect: it is for {what}")
    return lines


def resolve_devices(gpus: str | None, option: str = "--gpus") -> list[torch.device]:
    """Devices named on the command line.

    Args:
        option: what the user typed them behind, for messages.
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
            reason = " ".join(str(error).split()).partition(". ")[0]
            raise ValueError(
                f"device is {name!r}, which torch cannot use here ({reason}); device 'cpu' "
                "runs everywhere"
            ) from error
    return found


def set_threads(count: int) -> None:
    """Give this process `count` compute threads, at least one; OpenCV gets none of its own."""
    import cv2

    torch.set_num_threads(max(1, count))
    # Decoding already runs beside the network; OpenCV's pool on top would fight for the cores.
    cv2.setNumThreads(0)


# Compute threads that the user has asked for; 0: as many as there are cores.
_fixed_threads = 0


def fix_threads(count: int) -> None:
    """Compute with `count` threads here and in processes that are started from here.

    Raises:
        ValueError: `count` is below 1.
    """
    global _fixed_threads
    if count < 1:
        raise ValueError(f"--threads {count}: give at least 1")
    _fixed_threads = count
    os.environ["OMP_NUM_THREADS"] = str(count)
    set_threads(count)


def fixed_threads() -> int:
    """The number that `fix_threads` was given, 0 without it."""
    return _fixed_threads


def keep_freed_memory() -> None:
    """Let the C library keep large freed blocks instead of returning them to the kernel.

    Training on the CPU allocates the same large tensors every step; with glibc's defaults each
    is mapped and zeroed page by page anew, which costs a third of the step. Elsewhere than on
    glibc nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4  # parameter numbers in malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def cpu_count() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_each(processes: int = 1) -> int:
    """Cores for each of so many processes of this rank, at least one."""
    return max(1, cpu_count() // (local_ranks() * processes))


def local_ranks() -> int:
    """Ranks of torchrun on this machine, which share its cores; 1 outside torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def job_name() -> str:
    """What torchrun calls this job (`--rdzv-id`), the same for all its restarts; "" outside it, and
    where it gives every job the same name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


# Where the ranks of this process's group say good-bye; None outside a group.
_farewell: dist.Store | None = None


def rank_devices(
    devices: list[torch.device], timeout_seconds: float = 300
) -> tuple[int, int, list[torch.device]]:
    """Join torchrun's process group when there is one, and take this rank's device.

    Args:
        devices: the devices named on the command line, those of one machine.
        timeout_seconds: a rank that waits longer than this for the others gives up: with gloo by a
            RuntimeError, with NCCL by the end of its process.

    Returns:
        (rank, world size, devices of this process); (0, 1, devices) outside torchrun.

    Raises:
        ValueError: more ranks run on this machine than GPUs are named.
        ConnectionError: the other ranks did not start in time.
    """
    global _farewell
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, devices
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_cpu = devices[0].type == "cpu"
    if not on_cpu:
        if local >= len(devices):
            raise ValueError(
                f"torchrun starts rank {local} on this machine, which has {len(devices)} GPUs "
                f"named: use --nproc-per-node {len(devices)}"
            )
        devices = [devices[local]]
        use_device(devices[0])
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_seconds)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = _room(store, rank, world, timeout_seconds)
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        _farewell = dist.PrefixStore("farewell", store)
    return dist.get_rank(), dist.get_world_size(), devices[:1]


def _room(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """A part of the store that no earlier start of these ranks has written to.

    torchrun starts ranks anew with the store they had before, in which one may read where another
    one listened in its earlier life (github.com/pytorch/pytorch/issues/135712); and every host
    counts the starts for itself. So rank 0 opens a room of its own and invites whoever asks; the
    others enter the room whose invitation names their present life.
    """
    life = uuid.uuid4().hex
    deadline = time.monotonic() + timeout
    asking = [f"asking {other}" for other in range(1, world)]
    if rank:
        store.set(f"asking {rank}", life)
    while time.monotonic() < deadline:
        if rank == 0:
            room = dist.PrefixStore(life, store)
            if all(room.check([key]) for key in asking):
                return room
            guests = [store.get(key).decode() for key in asking if store.check([key])]
            store.set("invitation", json.dumps([life, guests]))
        elif store.check(["invitation"]):
            name, guests = json.loads(store.get("invitation"))
            if life in guests:
                room = dist.PrefixStore(name, store)
                room.set(f"asking {rank}", "entered")
                return room
        time.sleep(0.05)
    raise ConnectionError(
        f"rank {rank} of {world} waited {timeout:g} s for the others to start: look at what they "
        "printed"
    )


def leave_process_group() -> None:
    """Leave torchrun's process group, all together: a backend may abort those left behind.

    The ranks count each other in the store, not by a collective, in which a dead rank would take
    the living ones with it: without it these wait for the group's time-out at most, and go.
    """
    global _farewell
    if not dist.is_initialized():
        return
    store, _farewell = _farewell, None
    if store is not None:
        # The store may have gone with the machine it was on.
        with contextlib.suppress(RuntimeError):
            if store.add("gone", 1) == dist.get_world_size():
                store.set("all", "gone")
            store.wait(["all"])
    dist.destroy_process_group()
