"""torchrun's process group: joined, left, restarted, and left by the living."""

import datetime
import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import free_port

from mit_semseg.engine import rendezvous
from mit_semseg.engine.rendezvous import join_process_group, leave_process_group

CPU = torch.device("cpu")


def test_outside_torchrun_there_is_one_rank_with_every_device(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert join_process_group(devices) == (0, 1, devices)
    assert join_process_group([CPU]) == (0, 1, [CPU])
    assert not dist.is_initialized()


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"rank 2 on this machine, which has 2 GPUs.*-node 2"):
        join_process_group([torch.device("cuda", 0), torch.device("cuda", 1)])
    assert not dist.is_initialized()


def test_under_torchrun_a_rank_joins_the_group(monkeypatch):
    port = free_port()
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        assert join_process_group([CPU]) == (0, 1, [CPU])
        assert dist.get_backend() == "gloo"
        assert join_process_group([CPU]) == (0, 1, [CPU])  # joined already
        leave_process_group()
        assert not dist.is_initialized()
        leave_process_group()  # left already
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------ ranks that die
def alive_or_not(rank, port, folder, timeout):
    """Rank 2 dies in the middle of the run; what the others see is written down."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    join_process_group([CPU], timeout)
    dist.all_reduce(torch.ones(1))
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        said = str(error)
    noticed = time.monotonic()
    leave_process_group()
    took = (noticed - began, time.monotonic() - noticed)
    Path(folder, str(rank)).write_text(json.dumps({"said": said, "took": took}))


def test_the_living_leave_a_group_in_which_a_rank_has_died(tmp_path):
    timeout = 4.0
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [
        context.Process(target=alive_or_not, args=(rank, port, str(tmp_path), timeout))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    # 0: neither hanging nor ended by the backend.
    assert [process.exitcode for process in ranks] == [0, 0, -signal.SIGKILL]
    for rank in (0, 1):
        noted = json.loads((tmp_path / str(rank)).read_text())
        assert noted["said"]
        assert noted["took"][0] < timeout + 2, "a closed connection, or the time-out"
        assert noted["took"][1] < timeout + 2, "nobody waits longer for a rank than it was told"


# ------------------------------------------------------------------------------ restarts
def start_ranks(port, attempt, world, ranks, timeout):
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
    assert start_ranks(server.port, "a", 3, [0, 1, 2], 20) == ["aaa"] * 3
    assert start_ranks(server.port, "b", 3, [0, 1, 2], 20) == ["bbb"] * 3
    for ranks in ([1, 2], [0]):
        for said in start_ranks(server.port, "c", 3, ranks, 0.6):
            assert "of 3 waited 0.6 s for the others to start" in said, "not an earlier process"
    assert start_ranks(server.port, "d", 2, [0, 1], 20) == ["dd"] * 2
    assert start_ranks(server.port, "e", 4, [0, 1, 2, 3], 20) == ["eeee"] * 4
