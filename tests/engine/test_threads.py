"""The number of compute threads while other programs use the cores."""

import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch

from mit_semseg.engine import cpu
from mit_semseg.engine.threads import ThreadTuner, thread_usage

RANDOM = random.Random(0)
CHANCE = [RANDOM.random() for _ in range(5000)]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """torch computes with two threads, and nobody has fixed the number."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "_fixed_threads", 0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Machine:
    """A clock that steps move on: by seconds that depend on step and threads, some of it waiting.

    Attributes:
        used: the number of threads of each step so far.
    """

    def __init__(
        self,
        seconds,
        waiting=None,  # None: the system does not report it
        cores=2,
    ):
        torch.set_num_threads(cores)
        self.seconds, self.waiting, self.cores = seconds, waiting, cores
        self.now = self.computed = self.waited = 0.0
        self.used = []
        self.tuner = ThreadTuner(clock=lambda: self.now, usage=lambda: (self.computed, self.waited))

    def run(self, steps, work=1.0):
        """Compute steps; returns the numbers of threads that were used."""
        for step in range(len(self.used), len(self.used) + steps):
            with self.tuner.step(work):
                threads = torch.get_num_threads()
                seconds = work * self.seconds(step, threads)
                self.now += seconds
                if self.waiting is not None:
                    share = self.waiting(step, threads)
                    self.waited += share * threads * seconds
                    self.computed += (1 - share) * threads * seconds
                self.used.append(threads)
            assert torch.get_num_threads() == self.cores  # as before, outside a step
        return set(self.used[-steps:])


def spikes(step, threads):
    """Beside a busy program: two threads wait for each other, in one step of three for long."""
    if threads == 1:
        return 1.5
    return 6.0 if CHANCE[step] < 1 / 3 else 1.2


@pytest.mark.parametrize("reported", [True, False])
def test_an_idle_machine_keeps_all_threads(reported):
    """With noise, first steps that are slow, and a loader that takes a little of the cores."""
    slow = {0, 1, 2, 3, 4, *range(7, 1000, 20)} if reported else set(range(7, 1000, 20))
    machine = Machine(
        lambda step, threads: 5.0 if step in slow else 1 + 0.3 * (step % 3),
        (lambda step, threads: 0.1) if reported else None,
    )
    assert machine.run(1000) == {2}


def test_large_batches_do_not_count_as_slow():
    machine = Machine(lambda step, threads: 1.0)
    assert all(machine.run(1, 5.0 if step % 3 == 0 else 1.0) == {2} for step in range(200))


def test_slow_steps_lead_to_fewer_threads_with_one_warning(caplog):
    machine = Machine(spikes)
    machine.run(50)
    assert 1 in machine.run(50)
    machine.run(3000)
    (message,) = caplog.messages
    assert "using 1 instead of 2" in message and "--threads N" in message
    # Where nothing tells of waiting, a step with all threads may look better than it is.
    assert machine.used[100:].count(2) < 0.25 * 3000


def taken(until):
    """Another program takes a core up to a step; slow from the first one on, no step is slower
    than the median."""
    return Machine(
        lambda step, threads: 2 / threads if step >= until else 3.0 if threads == 2 else 1.5,
        lambda step, threads: 0.4 if threads == 2 and step < until else 0.0,
    )


def test_threads_that_wait_for_cores_are_given_up():
    machine = taken(until=5000)
    machine.run(40)
    assert machine.run(20) == {1}
    machine.run(5000 - 60)
    assert 1 <= machine.used[60:].count(2) <= 12  # more and more rarely


def test_all_threads_compute_again_when_the_other_program_has_gone():
    machine = taken(until=100)
    machine.run(100)
    assert machine.used[-1] == 1
    machine.run(300)
    assert machine.run(100) == {2}


def test_a_comparison_that_changes_nothing_is_rarely_repeated():
    machine = Machine(
        lambda step, threads: (5.0 if CHANCE[step] < 0.3 else 1.0) * (3 if threads == 1 else 1)
    )
    machine.run(2000)
    assert 5 <= machine.used.count(1) <= 5 * 9


def test_of_many_cores_the_taken_ones_are_given_up():
    machine = Machine(
        lambda step, threads: 2.0 if threads == 8 else 8 / threads,
        lambda step, threads: 0.3 if threads == 8 else 0.0,
        cores=8,
    )
    machine.run(40)
    assert set(machine.used) == {4, 7, 8}
    assert machine.run(100) <= {7, 8}
    assert machine.used[-100:].count(8) <= 3
    # Each comparison that pays is followed by the next one, with still fewer threads.
    machine = Machine(
        lambda step, threads: 1.0 * threads, lambda step, threads: 1 - 2 / max(threads, 2), cores=32
    )
    machine.run(150)
    assert machine.tuner.threads <= 2


def test_an_error_in_a_step_leaves_all_threads():
    machine = Machine(spikes)
    while machine.tuner.threads == 2:
        machine.run(1)
    with pytest.raises(ValueError, match="bad"), machine.tuner.step(1.0):
        assert torch.get_num_threads() == 1
        raise ValueError("bad")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("how", ["fixed", "gpu", "one core"])
def test_tuning_is_disabled(how, monkeypatch):
    if how == "fixed":
        monkeypatch.setattr(os, "environ", os.environ.copy())
        cpu.fix_threads(2)
        assert os.environ["OMP_NUM_THREADS"] == "2"  # processes started from here
    machine = Machine(spikes, cores=1 if how == "one core" else 2)
    machine.tuner = ThreadTuner(enabled=how != "gpu", clock=lambda: machine.now)
    assert machine.run(200) == {machine.cores}


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="--threads 0: give at least 1"):
        cpu.fix_threads(0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_thread_usage_measures_waiting():
    """Two threads that compute on one core: each of them waits while the other computes."""
    cores = os.sched_getaffinity(0)
    x = torch.zeros(1 << 20)
    torch.set_num_threads(1)

    def compute():
        os.sched_setaffinity(0, {min(cores)})
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            x.add(1)

    before = thread_usage()
    try:
        other = threading.Thread(target=compute)
        other.start()
        compute()
        computed, waited = (b - a for a, b in zip(before, thread_usage()))
    finally:
        other.join()
        os.sched_setaffinity(0, cores)
    assert computed > 0
    assert waited > 0.1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="waiting is reported by Linux")
def test_throughput_beside_busy_programs():
    """With a busy program on every core: measured, with convolutions as in training."""
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("one core: there is no number of threads to choose")
    layers = torch.nn.Sequential(*(torch.nn.Conv2d(48, 48, 3, padding=1) for _ in range(6)))
    image = torch.randn(2, 48, 60, 80)

    def rate(tuner, seconds):
        steps, began = 0, time.monotonic()
        while time.monotonic() < began + seconds:
            with tuner.step(1.0):
                layers(image).sum().backward()
            steps += 1
        return steps / (time.monotonic() - began)

    torch.set_num_threads(1)
    alone = rate(ThreadTuner(enabled=False), 5)
    torch.set_num_threads(cores)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        tuner = ThreadTuner()
        rate(tuner, 20)  # to notice and to compare
        shared = rate(tuner, 20)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert shared > 0.4 * alone  # a fair share is cores / (cores + 1)
