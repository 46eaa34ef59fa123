"""Where a run happens: devices, threads, precision, ranks, and what is said of wrong ones."""

from __future__ import annotations

import ctypes
import datetime
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import pytest
import torch
import torch.distributed as dist
from processes import free_port

from mit_semseg.config import load_options
from mit_semseg.engine import cpu, rendezvous
from mit_semseg.engine.cpu import cpu_count, keep_freed_memory, set_threads
from mit_semseg.engine.devices import resolve_devices
from mit_semseg.engine.launch import read_config, without_effect
from mit_semseg.engine.rendezvous import join_process_group, leave_process_group

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
CROPS = ["DATASET.batching", "crop", "DATASET.crop_size", "(64, 64)"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`gpus(n)`: a machine on which torch sees n GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


# ------------------------------------------------------------------------------ devices
@pytest.mark.parametrize(
    ("count", "text", "expected"),
    [
        (0, None, ["cpu"]),
        (2, None, ["cuda:0", "cuda:1"]),
        (0, "cpu", ["cpu"]),
        (2, "cpu", ["cpu"]),
        (4, "0-2", ["cuda:0", "cuda:1", "cuda:2"]),
        (4, "3,0", ["cuda:3", "cuda:0"]),
        (4, "gpu1-gpu2", ["cuda:1", "cuda:2"]),
        (8, "0-1,5,1", ["cuda:0", "cuda:1", "cuda:5"]),
    ],
)
def test_devices(
    gpus: Callable[[int], None], count: int, text: str | None, expected: list[str]
) -> None:
    gpus(count)
    assert [str(device) for device in resolve_devices(text)] == expected


@pytest.mark.parametrize(
    ("count", "text", "message"),
    [
        (2, "2", "--gpus 2, but this machine has 2 GPUs; the first is 0"),
        (1, "0-3", "--gpus 0-3, but this machine has 1 GPU; the first is 0"),
        (0, "0", "--gpus 0, but this machine has no GPU that torch can use; --gpus cpu runs"),
        (2, "cpu,0", "--gpus cpu,0: name GPUs or cpu, not both"),
        (2, "", "cannot read the devices ''; write 0-3, 0,2, gpu0-gpu2 or cpu"),
        (2, "all", "cannot read the devices 'all'; write 0-3"),
        (2, "0,,1", "cannot read the devices '0,,1'; write 0-3"),
        (2, "-1", "cannot read the devices '-1'; write 0-3"),
    ],
)
def test_wrong_devices_are_answered_with_what_there_is(
    gpus: Callable[[int], None], count: int, text: str, message: str
) -> None:
    gpus(count)
    with pytest.raises(ValueError) as error:
        resolve_devices(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------ threads
@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the thread counts of this process back."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


@pytest.mark.parametrize(("count", "expected"), [(3, 3), (1, 1), (0, 1), (-2, 1)])
def test_threads(threads: None, count: int, expected: int) -> None:
    cv2.setNumThreads(4)
    set_threads(count)
    assert torch.get_num_threads() == expected
    assert cv2.getNumThreads() <= 1  # whatever this build calls "in the caller's thread"


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cpu_count() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpu_count() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_count() == 1


def test_ranks_of_a_machine_are_those_torchrun_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cpu.local_ranks() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cpu.local_ranks() == 4


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class OtherLibrary:
        def __init__(self, name: str | None) -> None:
            asked.append(name)

    monkeypatch.setattr(ctypes, "CDLL", OtherLibrary)
    keep_freed_memory()
    assert asked == [None]


# ------------------------------------------------------------------------------ ranks
def test_outside_torchrun_there_is_one_rank_with_every_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert join_process_group(devices) == (0, 1, devices)
    assert join_process_group([CPU]) == (0, 1, [CPU])
    assert not dist.is_initialized()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"rank 2 on this machine, which has 2 GPUs.*-node 2"):
        join_process_group([torch.device("cuda", 0), torch.device("cuda", 1)])
    assert not dist.is_initialized()


def test_under_torchrun_a_rank_joins_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
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


# ------------------------------------------------------------------------------ configuration
def test_a_pair_that_cannot_work_is_refused_when_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("MODEL:\n  arch_encoder: hrnetv2\n  arch_decoder: upernet\n  fc_dim: 720\n")
    with pytest.raises(ValueError, match=r"upernet reads at least \d feature maps.*hrnetv2"):
        read_config(file)
    with pytest.raises(ValueError, match=r"resnet18 emits 512 channels; MODEL.fc_dim is 2048"):
        read_config(None, ["MODEL.arch_encoder", "resnet18", "MODEL.fc_dim", "2048"])
    assert read_config(file, ["MODEL.arch_decoder", "c1"]).MODEL.arch_decoder == "c1"
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist.*mine\.yaml"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("section", ["VAL", "TEST"])
def test_windows_that_cannot_work_are_refused_when_they_are_read(section: str) -> None:
    key = f"{section}.window"
    with pytest.raises(ValueError, match=rf"{key} is \[100, 96\], .* {key} \[104, 96\]"):
        read_config(None, [key, "(100, 96)"])  # resnet50dilated: stride 8
    assert read_config(None, [key, "(104, 96)"])[section].window == [104, 96]
    whole = ["MODEL.arch_encoder", "resnet18", "MODEL.fc_dim", "512", "MODEL.arch_decoder", "c1"]
    with pytest.raises(ValueError, match=r"multiples of its stride 32.* \[128, 96\]"):
        read_config(None, [*whole, key, "(104, 96)"])


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("TRAIN.label_smoothing", "0.2", ["TRAIN.loss", "smooth+dice"]),
        ("VAL.overlap", "0.5", ["VAL.window", "(96, 96)"]),
        ("TEST.overlap", "0.5", ["TEST.window", "(96, 96)"]),
        ("DATASET.depth_scale", "500", ["DATASET.depth", "True", "MODEL.in_channels", "4"]),
        ("DATASET.depth_mean", "2", ["DATASET.depth", "True", "MODEL.in_channels", "4"]),
        ("DATASET.depth_std", "2", ["DATASET.depth", "True", "MODEL.in_channels", "4"]),
        ("DATASET.label_map", "[[7, 0]]", ["DATASET.format", "folder"]),
        ("DATASET.random_blur", "0.1", CROPS),
    ],
)
def test_settings_without_effect_are_pointed_out(
    key: str,
    value: str,
    needs: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_config(None, [key, value, *needs])
    read_config(None, needs)
    assert not caplog.text
    without = ["DATASET.format", "camvid"] if "DATASET.format" in needs else []
    read_config(None, [key, value, *without])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{key} has no effect: it is for ")
    monkeypatch.setenv("RANK", "1")
    read_config(None, [key, value, *without])
    assert len(caplog.records) == 1  # one rank says it


def test_recipes_have_no_settings_without_effect() -> None:
    for path in sorted((Path(__file__).parents[2] / "config").glob("*.yaml")):
        assert without_effect(load_options(path)) == [], path.name


# ------------------------------------------------------------------------------ ranks that die
def alive_or_not(rank: int, port: int, folder: str, timeout: float) -> None:
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


def test_the_living_leave_a_group_in_which_a_rank_has_died(tmp_path: Path) -> None:
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
def start_ranks(
    port: int, attempt: str, world: int, ranks: Sequence[int], timeout: float
) -> list[str]:
    """Ranks meet and tell each other which attempt theirs is; what each of them has read."""

    def start(rank: int) -> str:
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


def test_restarted_ranks_do_not_meet_their_earlier_processes() -> None:
    # One store for all attempts, as under torchrun.
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert start_ranks(server.port, "a", 3, [0, 1, 2], 20) == ["aaa"] * 3
    assert start_ranks(server.port, "b", 3, [0, 1, 2], 20) == ["bbb"] * 3
    for ranks in ([1, 2], [0]):
        for said in start_ranks(server.port, "c", 3, ranks, 0.6):
            assert "of 3 waited 0.6 s for the others to start" in said, "not an earlier process"
    assert start_ranks(server.port, "d", 2, [0, 1], 20) == ["dd"] * 2
    assert start_ranks(server.port, "e", 4, [0, 1, 2, 3], 20) == ["eeee"] * 4
