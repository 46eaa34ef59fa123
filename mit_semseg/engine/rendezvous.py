"""torchrun's process group: rendezvous at the start, a barrier at the end."""

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

# Where the ranks of this process's group count each other at the end; None outside a group.
_exit_store: dist.Store | None = None


def job_name() -> str:
    """What torchrun calls this job (`--rdzv-id`), the same for all its restarts; "" outside it, and
    where it gives every job the same name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def join_process_group(
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
    global _exit_store
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
    """A part of the store that no earlier start of these ranks has written to.

    torchrun restarts ranks with the store they had before, in which one may read the address of
    another one's earlier process (github.com/pytorch/pytorch/issues/135712); and every host counts
    the restarts for itself. So each process announces itself under a name of its own. Rank 0
    publishes a new prefix with the names it is for, and goes on once all of them have joined; the
    others take the prefix that is published for their present name.
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
        f"rank {rank} of {world} waited {timeout:g} s for the others to start: look at what they "
        "printed"
    )


def leave_process_group() -> None:
    """Leave torchrun's process group, all together: a backend may abort those left behind.

    The barrier is counted in the store, not by a collective, in which a dead rank would take the
    living ones with it: without it these wait for the group's time-out at most, and go.
    """
    global _exit_store
    if not dist.is_initialized():
        return
    store, _exit_store = _exit_store, None
    if store is not None:
        # The store may have gone with the machine it was on.
        with contextlib.suppress(RuntimeError):
            if store.add("ranks", 1) == dist.get_world_size():
                store.set("all", "here")
            store.wait(["all"])
    dist.destroy_process_group()
