"""Copies from and to a device, and times on it, that nobody waits for."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mit_semseg.engine.transfer import HostCopy, Stopwatch, Threads, pinned


def test_thread_counts_per_process(monkeypatch):
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    monkeypatch.setattr("mit_semseg.engine.cpu.cpu_count", lambda: 16)
    assert (Threads.of(gpu, 1).readers, Threads.of(gpu, 1).writers) == (8, 16)
    assert (Threads.of(gpu, 4).readers, Threads.of(gpu, 4).writers) == (2, 4)
    assert (Threads.of(gpu, 99).readers, Threads.of(gpu, 99).writers) == (2, 2)
    assert (Threads.of(cpu, 1).readers, Threads.of(cpu, 1).writers) == (2, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Threads.of(gpu, 1).writers == 2


def test_on_the_cpu_nothing_is_copied_or_pinned():
    device = torch.device("cpu")
    labels = torch.arange(6).view(2, 3)
    assert pinned(labels, device) is labels
    np.testing.assert_array_equal(HostCopy(labels).array(), labels.numpy())
    watch = Stopwatch(device)
    time.sleep(0.02)
    assert 0.02 <= watch.stop().seconds() < 5


@pytest.mark.gpu
def test_host_copies_from_a_gpu_are_asynchronous():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.rand(4096, 4096, device=device)
    torch.mm(x, x)
    torch.cuda.synchronize()
    watch = Stopwatch(device)
    y = x
    for _ in range(50):
        y = torch.mm(x, y) / 2048
    copy, event = HostCopy(y), torch.cuda.Event()
    event.record()
    watch.stop()
    assert not event.query(), "the copy is on its way while this thread goes on"
    with ThreadPoolExecutor(1) as other:
        array = other.submit(copy.array).result()
    np.testing.assert_array_equal(array, y.cpu().numpy())
    assert copy.wait().is_pinned() and watch.seconds() > 0.01
    assert pinned(torch.ones(3), device).is_pinned()
