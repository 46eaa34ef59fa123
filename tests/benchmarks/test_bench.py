"""The benchmark itself: turns are taken, memory and operations are measured, failures are told."""

import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from mit_semseg.benchmarks import clock, command, gpu, published, rows
from mit_semseg.benchmarks.clock import GpuClock, OtherPrograms, covered, kernel_spans
from mit_semseg.benchmarks.files import FolderPrediction
from mit_semseg.benchmarks.sides import (
    Processes,
    SideError,
    Timing,
    convolution_rate,
    count_flops,
    time_sides,
)
from mit_semseg.benchmarks.training import NewShapes, Replicas, Training


def note(path, name):
    def run():
        with path.open("a") as file:
            file.write(name)
        time.sleep(0.01 if name == "A" else 0.03)

    return run


@pytest.mark.usefixtures("forked")
def test_bursts_are_timed_in_turn_and_their_processes_kept(tmp_path):
    file = tmp_path / "order"
    sides = {name: partial(note, file, name) for name in "AB"}
    processes = Processes()
    try:
        timings = time_sides(sides, 2, burst=0.2, processes=processes)
        before = {name: side.process.pid for name, side in processes.sides.items()}
        took = time_sides({"A": partial(allocate, 1)}, 0, processes=processes)
        assert processes.sides["A"].process.pid == before["A"]
        # A side that fails gets a new process, and the other stays.
        with pytest.raises(SideError, match="exit code 3"):
            time_sides({"A": dying}, 1, processes=processes)
        time_sides(sides, 1, processes=processes)
        after = {name: side.process.pid for name, side in processes.sides.items()}
    finally:
        processes.stop()
    a, b = timings["A"], timings["B"]
    warm = "AB" + "A" * 3 + "B" * 3  # the first call, two more, and one to see how long it takes
    assert file.read_text().startswith(warm + 2 * ("A" * a.calls + "B" * b.calls))
    assert 1 < a.calls <= 20 and 1 < b.calls <= 7
    assert len(a.seconds) == len(b.seconds) == 2
    assert 0.03 <= b.median < 0.03 * b.calls  # of a call, not of a burst
    assert took["A"].result == 2**18
    assert before["A"] != after["A"] and before["B"] == after["B"]


def allocate(mib):
    def run():
        return float(torch.ones(mib, 2**18).sum())  # 2**18 float32 are a MiB

    return run


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_increase_of_memory_is_measured():
    timings = time_sides({"small": partial(allocate, 8), "large": partial(allocate, 200)}, 0)
    small, large = timings["small"].extra_mib, timings["large"].extra_mib
    assert small is not None and large is not None
    assert 180 < large - small < 210
    assert timings["large"].result == 200 * 2**18


def broken():
    raise OSError("no such thing")


def dying():
    return partial(os._exit, 3)


def stuck():
    return partial(time.sleep, 600)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("prepare", "message"),
    [(broken, "OSError: no such thing"), (dying, "exit code 3"), (stuck, "no answer for 3 s")],
)
def test_a_failing_side_ends_the_run(prepare, message):
    good, processes = partial(allocate, 1), Processes()
    try:
        time_sides({"good": good, "bad": good}, 0, processes=processes)
        began = time.monotonic()
        with pytest.raises(SideError, match=message):
            time_sides({"good": good, "bad": prepare}, 2, timeout=3, processes=processes)
        assert time.monotonic() - began < 60
        assert not processes.sides["bad"].process.is_alive()
    finally:
        processes.stop()


def test_operations_of_a_convolution_are_counted():
    layer, x = torch.nn.Conv2d(3, 5, 3, bias=False), torch.zeros(2, 3, 10, 12)
    assert count_flops(lambda: layer(x)) == 2 * 2 * 8 * 10 * 5 * 3 * 9
    # Backwards twice as many, and a depthwise filter sees one channel.
    depthwise = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    image = torch.zeros(1, 6, 10, 10, requires_grad=True)
    assert count_flops(lambda: depthwise(image).sum().backward()) == 3 * 2 * 6 * 100 * 9
    assert convolution_rate("fp32", seconds=0.05) > 1e8


def timings(theirs, ours, mib=0.0):
    return {"published": Timing([theirs]), "ours": Timing([ours], extra_mib=mib)}


MET = rows.ClassMap(target=5, limit_mib=64)


@pytest.mark.parametrize(
    ("row", "found", "met"),
    [
        (rows.Counting(target=10), timings(1, 0.099), True),
        (rows.Counting(target=10), timings(1, 0.101), False),
        (rows.Counting(), timings(1, 2), None),
        (MET, timings(6, 1, 63), True),
        (MET, timings(6, 1, 65), False),
        (MET, timings(4, 1, 63), False),
        (rows.LargeClassMap(), {"ours": Timing([1], extra_mib=255)}, True),
        (rows.SyncBatchNorm(), timings(1, 1.19), True),
        (rows.SyncBatchNorm(), timings(1, 1.21), False),
        (Replicas(), timings(1, 1.19), True),
        (Replicas(), timings(1, 1.21), False),
        (rows.Startup(name="x", limit=0.2), timings(1, 1.1), True),
        (rows.Startup(name="x", limit=0.2), timings(1, 1.3), False),
        (rows.Startup(name="x", limit=0.2), {"ours": Timing([0.3])}, False),
    ],
)
def test_targets_are_judged(row, found, met):
    asked, judged = row.judge(found)
    assert judged is met and bool(asked) == (met is not None)


def shapes_timings(row, new, known):
    result = {"new": new, "known": known, "kernels": known / 2, "shapes": 50}
    return row.measured({"ours": Timing([99.0], extra_mib=7, result=result)})


def test_new_shapes_are_judged_against_known_ones():
    row = NewShapes(count=8, rate=260)
    assert row.judge(shapes_timings(row, 0.0449, 0.03))[1] is True
    assert row.judge(shapes_timings(row, 0.0451, 0.03))[1] is False
    assert row.judge(shapes_timings(row, 0.04, 0.0308))[1] is False  # 259.7 images/s
    measured = shapes_timings(row, 0.06, 0.03)
    target = "50 shapes: at most 1.5 x a known one (2.00 x); known, 260 images/s (267)"
    assert row.judge(measured) == (target, False)
    assert measured["published"].median == 0.03 and measured["ours"].median == 0.06
    assert measured["published"].busy == 0.5 and measured["ours"].extra_mib == 7
    # All are different, of sizes that networks of stride 8 take, and no longer than 1000.
    drawn = row.random_shapes()
    assert len(set(drawn)) == 60
    assert all(side % 8 == 0 and side <= 1000 for shape in drawn for side in shape)


def test_folder_prediction_is_judged_with_enough_cores(monkeypatch):
    row = FolderPrediction(rate=90, cores=1)
    result = {"seconds": 1 / 91, "kernels": None}
    assert row.judge(row.measured({"ours": Timing([9.0], result=result)}))[1] is True
    result["seconds"] = 1 / 89
    slow = row.measured({"ours": Timing([9.0], result=result)})
    assert row.judge(slow)[1] is False
    target, met = FolderPrediction(rate=90, cores=10**6).judge(slow)
    assert met is None and "with 1000000 cores, this machine has" in target


def test_the_rows_of_a_gpu_differ_and_fit_into_four_minutes():
    all_rows = [*gpu.gpu_rows(), *gpu.gpu_peers()]
    assert sum(row.budget for row in all_rows) < command.GPU_SECONDS
    assert len({row.title for row in all_rows}) == len(all_rows)
    for row in all_rows:
        assert row.baseline in (gpu.PUBLISHED, "") or not row.baseline.startswith("published")


# ------------------------------------------------------------------------------ clocks
class Event:
    """One of torch.cuda's, on a clock that each recording moves on by 30 ms."""

    now = 0.0
    log: list[str] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 30
        self.at = Event.now
        Event.log.append("record")

    def synchronize(self):
        Event.log.append("wait")

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_gpu_times_bursts_with_its_events(monkeypatch):
    Event.log.clear()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: Event.log.append("wait"))
    calls = iter(range(100))

    def call():
        Event.log.append("call")
        return next(calls)

    assert GpuClock().timed(call, 3) == (0.01, 2)  # 30 ms for three
    assert Event.log == ["wait", "record", "call", "call", "call", "record", "wait"]


def test_kernels_side_by_side_are_counted_once():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.8)]) == 4
    assert covered([]) == 0


def test_kernels_are_told_from_the_rest_of_a_profile():
    on_cpu = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=on_cpu) as profiled,
        torch.profiler.record_function("mine"),
    ):
        torch.ones(3).add(1)
    events = list(profiled.events() or ())
    assert len(events) >= 2 and kernel_spans(events) == []  # none of them is a GPU's
    for event in events:
        event.device_type = torch.autograd.DeviceType.CUDA
    spans = kernel_spans(events)
    assert 0 < len(spans) < len(events)  # what was marked is no kernel
    assert all(0 <= start <= end for start, end in spans)
    events[-1].name = "Memcpy HtoD (Pinned -> Device)"
    assert len(kernel_spans(events)) == len(spans) - 1


@pytest.mark.gpu
def test_a_gpu_is_measured():
    a, clock = torch.randn(4096, 4096, device="cuda"), GpuClock()
    clock.timed(lambda: a @ a, 3)
    clock.mark_memory()
    seconds, product = clock.timed(lambda: a @ a, 50)
    # One kernel after the other, and 2 x 4096 ** 3 operations in each.
    assert product.shape == a.shape and 1e12 < 2 * 4096**3 / seconds < 3e15
    kernels = clock.kernel_seconds(lambda: a @ a, 20)
    assert kernels is not None and 0.7 < kernels / seconds < 1.2
    peak = clock.peak_mib()
    assert peak is not None and 64 <= peak < 64 * 4


def test_the_published_procedure_runs_with_torchs_defaults():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32, matmul.allow_tf32 = False, True
        with published.torch_defaults():
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, False)
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, True)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


# ------------------------------------------------------------------------------ a GPU's rows
TINY = gpu.Sizes(
    image=(64, 96),
    large=(120, 160),
    scales=(32, 64),
    batch=(2, 64, 64),
    shapes=3,
    folder=(64, 96),
    files=(2, 6),
    scale=64,
    peer=(64, 64),
    burst=0.01,
    shorten=10.0,
)


def light(row):
    """The same on a CPU that other programs keep busy."""
    row = replace(row, threads=1, repeats=min(1, row.repeats), precision="fp32")
    return replace(row, **gpu.MOBILENET) if hasattr(row, "encoder") else row


@pytest.mark.timeout(900)  # dozens of short calls, each of which other programs may hold up
@pytest.mark.slow
def test_gpu_rows_run_on_the_cpu_at_a_small_size(tmp_path):
    # One of each kind; synchronised BatchNorm is a row of the CPU's too, and has one size only.
    rows_of_gpu = [row for row in gpu.gpu_rows(TINY) if not isinstance(row, rows.SyncBatchNorm)]
    small = list({type(row): light(row) for row in rows_of_gpu}.values())
    broken_peer = replace(gpu.gpu_peers(TINY)[-1], build_peer=broken, package="torch")
    absent = replace(gpu.gpu_peers(TINY)[0], package="no_such_package")
    chosen = [*small[:1], broken_peer, absent, *small[1:]]
    outcomes = command.run(chosen, tmp_path, device="cpu", limit=600.0)
    assert [one.title for one in outcomes] == [row.title for row in small]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert len(written["not_run"]) == 2
    assert "failed: OSError: no such thing" in written["not_run"][0]
    assert "no_such_package is not installed" in written["not_run"][1]
    assert written["seconds"] >= sum(one.row_seconds for one in outcomes) > 0
    by_type = {type(row): one for row, one in zip(small, outcomes, strict=True)}
    for one in outcomes:
        assert one.seconds > 0 and one.busy is None
    assert by_type[rows.Prediction].utilisation
    assert "shapes: at most 1.5 x a known one" in by_type[NewShapes].target
    assert by_type[NewShapes].ratio and by_type[NewShapes].images_per_second
    assert by_type[FolderPrediction].images_per_second
    assert by_type[Replicas].published_seconds


def test_replicas_of_equal_batches_have_the_loss_of_one():
    batch = Replicas(batch=(2, 64, 64))._batch()
    single = Training("mobilenetv2dilated", "c1_deepsup", "cpu", "fp32")
    double = Training("mobilenetv2dilated", "c1_deepsup", "cpu", "fp32", replicas=2)
    first = single(batch)
    assert double(batch, batch) == pytest.approx(first, rel=1e-4)
    assert single(batch) != first  # the step was taken


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="Linux tells in /proc")
def test_cores_used_by_other_programs(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    core = min(os.sched_getaffinity(0))
    absent = max(os.sched_getaffinity(0)) + 1
    # Ticks of user, nice, system, idle, iowait, irq, softirq, steal, guest.
    stat.write_text(f"cpu{core} 100 20 30 999 999 4 5 6 999\ncpu{absent} {'9 ' * 9}\nintr 7\n")
    assert clock.busy_seconds(stat) == pytest.approx(165 / os.sysconf("SC_CLK_TCK"))
    assert clock.busy_seconds(tmp_path / "none") is None

    busy, own, now = iter((100.0, 103.0)), iter((1.0, 1.5)), iter((0.0, 2.0))
    monkeypatch.setattr(clock, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(os, "times", lambda: (0.25, 0.0, 0.0, 0.0, 9.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert OtherPrograms(lambda: next(own)).cores() == 1.25  # of 3 s in 2, 0.5 are ours


@pytest.mark.usefixtures("forked")
def test_results_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(OtherPrograms, "cores", lambda self: 1.25)
    outcomes = command.bench("cpu", tmp_path, quick=True, only="colours")
    assert [one.group for one in outcomes] == ["Metrics"]
    assert outcomes[0].equal_labels == 1
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["rows"][0]["ratio"] == outcomes[0].ratio
    assert written["convolutions_gflops"]["fp32"] > 0
    assert written["other_cores"] == written["rows"][0]["other_cores"] == 1.25
    table = (tmp_path / "bench.md").read_text()
    assert "| colours of 683x512" in table
    assert "| cores of other programs |" in table and "| 1.2 |" in table
    printed = capsys.readouterr().out
    assert "Results in" in printed
    assert "warning: other programs use 1.2 of the cores" in printed
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.width > 400


def test_rows_beyond_the_time_limit_are_not_run(tmp_path, capsys, monkeypatch):
    """In processes as users have them, on a machine that nobody else uses."""
    monkeypatch.setattr(OtherPrograms, "cores", lambda self: 0.1)
    monkeypatch.setattr(command, "convolution_rate", lambda precision: 1e9)
    long = replace(rows.Colours(), budget=500.0)
    outcomes = command.run([rows.Colours(budget=1.0), long], tmp_path, device="cpu", limit=300.0)
    assert len(outcomes) == 1
    written = json.loads((tmp_path / "bench.json").read_text())
    assert "no time was left" in written["not_run"][0]
    assert written["other_cores"] == written["rows"][0]["other_cores"] == 0.1
    assert "cores of other programs" not in (tmp_path / "bench.md").read_text()
    assert "warning" not in capsys.readouterr().out


def test_impossible_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--only unicorns: no row"):
        command.bench("cpu", tmp_path, only="unicorns")
    with pytest.raises(ValueError, match="no GPU"):
        command.bench("cuda", tmp_path)
