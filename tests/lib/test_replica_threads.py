"""The threads of replicas: they last, nothing piles up in them, and they end with the process."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import (
    DataParallelWithCallback,
    SynchronizedBatchNorm1d,
    UserScatteredDataParallel,
)

ROOT = Path(__file__).resolve().parents[2]


class Net(nn.Module):
    """Notes the threads it is called in."""

    def __init__(self):
        super().__init__()
        self.norm = SynchronizedBatchNorm1d(2)
        self.seen = []

    def forward(self, x):
        self.seen.append(threading.get_ident())
        return self.norm(x)


def batches(n=2):
    return [torch.randn(i + 2, 2) for i in range(n)]


def replicas_of(model):
    """Living threads in which a model's replicas have run."""
    seen = set(model.module.seen)
    return [thread for thread in threading.enumerate() if thread.ident in seen]


def wait_for_end(threads):
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_the_same_threads_serve_every_pass():
    model = UserScatteredDataParallel(Net(), ["cpu"] * 2)
    model(batches())
    before, threads = threading.active_count(), set(model.module.seen)
    assert len(threads) == 2 and threading.get_ident() not in threads
    for _ in range(200):
        model(batches())
    assert set(model.module.seen) == threads
    assert threading.active_count() == before
    net = Net()
    model = DataParallelWithCallback(net)
    model.device_ids = ["cpu", "cpu"]
    for _ in range(3):
        replicas = model.replicate(net, model.device_ids)
        model.parallel_apply(replicas, [(x,) for x in batches()], [{}, {}])
    assert len(set(net.seen)) == 2


def test_a_replica_keeps_its_thread():
    """cuDNN's plans are kept by thread: those of replica 0 are of no use to replica 1."""
    model = UserScatteredDataParallel(Net(), ["cpu"] * 3)
    places = []

    class Placed(Net):
        def forward(self, x):
            places[-1][len(x)] = threading.get_ident()
            return super().forward(x)

    model.module.__class__ = Placed
    for n in (2, 3, 2, 3):
        places.append({})
        model(batches(n))
    assert places[1] == places[3]
    assert all(places[1][rows] == ident for rows, ident in places[2].items())


def test_threads_hold_nothing_after_a_pass():
    class Freed(Net):
        def forward(self, x):
            self.norm(x)
            return x.sum() * 0

    model = UserScatteredDataParallel(Freed(), ["cpu"] * 2)

    def tensors():
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    tensors()  # what earlier tests left may go in any collection
    before = tensors()
    model(batches())
    assert tensors() <= before


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_threads_of_its_own(how):
    model = UserScatteredDataParallel(Net(), ["cpu"] * 2)
    model(batches())
    model.module.seen.clear()
    other = how(model)
    other(batches())
    model(batches())
    assert len(set(model.module.seen + other.module.seen)) == 4
    threads = replicas_of(other)
    del other
    gc.collect()
    wait_for_end(threads)
    assert model(batches()).shape == (5, 2)


def test_passes_at_the_same_time_do_not_wait_for_each_other():
    meeting = threading.Barrier(4, timeout=20)  # two replicas of each of two passes

    class Meeting(Net):
        def forward(self, x):
            if not meeting.broken:
                meeting.wait()
            return self.norm(x)

    model = UserScatteredDataParallel(Meeting(), ["cpu"] * 2)
    results = []
    callers = [threading.Thread(target=lambda: results.append(model(batches()))) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert len(results) == 2
    meeting.abort()
    deadline = time.monotonic() + 10
    while sum(t.name.startswith("replica-") for t in threading.enumerate()) > 2:
        gc.collect()  # of other tests
        assert time.monotonic() < deadline, "those of the second pass are not needed any more"
        time.sleep(0.01)


def test_a_forked_process_starts_its_own():
    model = UserScatteredDataParallel(Net(), ["cpu"] * 2)
    model(batches())
    child = os.fork()
    if not child:
        os._exit(7 if model(batches()).shape == (5, 2) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# What is left when the interpreter exits, in a child for each case that has imported torch already;
# many tensors take a while to be freed.
LEAVING = """
import os, sys, torch
from mit_semseg.lib.nn import SynchronizedBatchNorm1d, UserScatteredDataParallel

folder, *cases = sys.argv[1:]
for words in cases:
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{folder}/{words}.txt", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv[1:] = words.split()
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = SynchronizedBatchNorm1d(2)

    def forward(self, x):
        held = [torch.zeros(1) for _ in range(2000)]
        if len(x) == 3 and "fails" in sys.argv:
            raise OSError("no such pixel")
        return self.norm(x)

model = UserScatteredDataParallel(Net(), ["cpu"] * 4)
inputs = [torch.randn(n, 2, requires_grad=True) for n in (2, 3, 4, 3)]
if "caught" in sys.argv:
    try:
        model(inputs)
    except OSError as caught:
        error = caught
else:
    out = model(inputs)
if "deleted" in sys.argv:
    del model
if "circular" in sys.argv:
    model.itself = [model]
    del model
"""


def test_a_process_with_replicas_exits_normally(tmp_path):
    """A thread that lives when the interpreter shuts down may abort the process."""
    codes = {"": 0, "deleted": 0, "circular": 0, "fails": 1, "fails caught": 0}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LEAVING, tmp_path, *codes]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert process.returncode == 0, process.stderr
    output = {words: (tmp_path / f"{words}.txt").read_text() for words in codes}
    assert process.stdout.split() == [str(code) for code in codes.values()], output
    for words, code in codes.items():
        assert "terminate called" not in output[words]
        assert ("OSError: no such pixel" in output[words]) == bool(code)
