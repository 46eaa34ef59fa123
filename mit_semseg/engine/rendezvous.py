"""Joining and leaving torchrun's process group."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
import uuid

import torch
import torch.distributed as dist

from mit_semseg.engine.devices import use_device
from mit_semseg.errors import counted

# Store for the barrier at the end; None outside a process group.
_exit_store: dist.Store | None = None


def job_name() -> str:
    """Name of the torchrun job (`--rdzv-id`); "" without torchrun or without a name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def join_process_group(
    devices: list[torch.device], timeout_seconds: float = 300
) -> tuple[int, int, list[torch.device]]:
    """Join torchrun's process group, if there is one, and select this rank's device.

    Args:
        devices: of the command line, on this machine.
        timeout_seconds: time limit of the start and of collectives, which then raise a RuntimeError
            with gloo and end the process with NCCL.

    Returns:
        (rank, world size, devices of this process); (0, 1, devices) without torchrun.

    Raises:
        ValueError: there are more ranks on this machine than devices, or the device is mps.
        ConnectionError: the other ranks did not start in time.
    """
    global _exit_store
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, devices
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_cpu = devices[0].type == "cpu"
    if devices[0].type == "mps":
        raise ValueError("--gpus mps is a single device: start the command without torchrun")
    if not on_cpu:
        if local >= len(devices):
            raise ValueError(
                f"torchrun starts local rank {local}, but --gpus has only "
                f"{counted(len(devices), 'GPU')}: use --nproc-per-node {len(devices)}"
            )
        devices = [devices[local]]
        use_device(devices[0])
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_seconds)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = _unused_prefix(store, rank, world, timeout_seconds)
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        _exit_store = dist.PrefixStore("exit", store)
    return dist.get_rank(), dist.get_world_size(), devices[:1]


def _unused_prefix(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """A new prefix of the store, agreed on by all ranks.

    torchrun restarts ranks with the old store, in which a rank may read the address of another
    rank's earlier process (github.com/pytorch/pytorch/issues/135712), and each host has its own
    count of restarts. Each process therefore announces a unique name. Rank 0 publishes a new prefix
    together with the announced names, and continues when all ranks have joined it; the other ranks
    join the prefix that was published with their current name.
    """
    name = uuid.uuid4().hex
    deadline = time.monotonic() + timeout
    announced = [f"announced/{other}" for other in range(1, world)]
    if rank:
        store.set(f"announced/{rank}", name)
    while time.monotonic() < deadline:
        if rank == 0:
            prefixed = dist.PrefixStore(name, store)
            if all(prefixed.check([key]) for key in announced):
                return prefixed
            names = [store.get(key).decode() for key in announced if store.check([key])]
            store.set("published", json.dumps([name, names]))
        elif store.check(["published"]):
            prefix, names = json.loads(store.get("published"))
            if name in names:
                prefixed = dist.PrefixStore(prefix, store)
                prefixed.set(f"announced/{rank}", "joined")
                return prefixed
        time.sleep(0.05)
    raise ConnectionError(
        f"rank {rank} of {world} waited {timeout:g} s for the others to start: see their output"
    )


def leave_process_group() -> None:
    """Leave torchrun's process group after a barrier, since a backend may abort remaining ranks.

    The barrier uses the store and not a collective, so that after the death of a rank the others
    wait no longer than the time-out and end normally.
    """
    global _exit_store
    if not dist.is_initialized():
        return
    store, _exit_store = _exit_store, None
    if store is not None:
        # The host of the store may have ended.
        with contextlib.suppress(RuntimeError):
            if store.add("ranks", 1) == dist.get_world_size():
                store.set("all", "done")
            store.wait(["all"])
    dist.destroy_process_group()
