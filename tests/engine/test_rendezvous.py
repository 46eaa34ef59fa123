"""torchrun's process group: joined, left, restarted, and left by the living."""

import datetime
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import exit_codes, free_port

from mit_semseg.engine import rendezvous
from mit_semseg.engine.rendezvous import join_process_group, leave_process_group

CPU, GPUS = torch.device("cpu"), [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_outside_torchrun_there_is_one_rank_with_every_device(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for devices in (GPUS, [CPU]):
        assert join_process_group(devices) == (0, 1, devices)
    assert not dist.is_initialized()


def test_under_torchrun_a_rank_joins_the_group(monkeypatch):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **where}.items():
        monkeypatch.setenv(name, value)
    try:
        for _ in range(2):  # the second time it has joined already
            assert join_process_group([CPU]) == (0, 1, [CPU])
            assert dist.get_backend() == "gloo"
        for _ in range(2):
            leave_process_group()
            assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"local rank 2, but --gpus has only 2 GPUs.*-node 2"):
        join_process_group(GPUS)
    assert not dist.is_initialized()


# ------------------------------------------------------------------------------ ranks that die
TIMEOUT = 3.0


def alive_or_not(rank, port, folder):
    """Rank 2 dies in the middle of the run; what the others see is written down."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    join_process_group([CPU], TIMEOUT)
    dist.all_reduce(torch.ones(1))
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        output = str(error)
    noticed = time.monotonic()
    leave_process_group()
    took = (noticed - began, time.monotonic() - noticed)
    Path(folder, str(rank)).write_text(json.dumps({"error": output, "took": took}))


def test_living_ranks_leave_a_group_with_a_dead_one(tmp_path):
    codes = exit_codes(alive_or_not, 3, free_port(), str(tmp_path))
    assert codes == [0, 0, -signal.SIGKILL], "neither hanging nor ended by the backend"
    for rank in (0, 1):
        noted = json.loads((tmp_path / str(rank)).read_text())
        assert noted["error"]
        assert noted["took"][0] < TIMEOUT + 2, "a closed connection, or the time-out"
        assert noted["took"][1] < TIMEOUT + 2, "nobody waits longer for a rank than it was told"


# ------------------------------------------------------------------------------ restarts
def meet(port, attempt, world, ranks, timeout=20.0):
    """Ranks meet and tell each other which attempt theirs is; what each of them has read."""

    def start(rank):
        time.sleep(0.05 * ((rank + 1) % world))  # rank 0 is not the first to come
        client = dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
        client.set_timeout(datetime.timedelta(seconds=20))
        try:
            store = rendezvous._unused_prefix(client, rank, world, timeout)
        except ConnectionError as error:
            return str(error)
        store.set(f"attempt of {rank}", attempt)
        return "".join(store.get(f"attempt of {other}").decode() for other in range(world))

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(start, ranks))


def test_restarted_ranks_do_not_meet_their_earlier_processes():
    # One store for all attempts, as under torchrun.
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in "ab":
        assert meet(server.port, attempt, 3, [0, 1, 2]) == [attempt * 3] * 3
    for ranks in ([1, 2], [0]):
        for output in meet(server.port, "c", 3, ranks, 0.6):
            assert "of 3 waited 0.6 s for the others to start" in output, "not an earlier process"
    assert meet(server.port, "d", 2, [0, 1]) == ["dd"] * 2
    assert meet(server.port, "e", 4, [0, 1, 2, 3]) == ["eeee"] * 4
