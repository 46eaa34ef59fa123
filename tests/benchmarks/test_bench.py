"""The benchmark itself: turns are taken, memory and operations are measured, failures are told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from mit_semseg.benchmarks import command, rows
from mit_semseg.benchmarks.sides import (
    SideError,
    Timing,
    convolution_rate,
    count_flops,
    take_turns,
)


def note(path: Path, name: str) -> Callable[[], None]:
    def run() -> None:
        with path.open("a") as file:
            file.write(name)
        time.sleep(0.01 if name == "A" else 0.03)

    return run


def test_sides_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "order"
    sides = {name: partial(note, file, name) for name in "AB"}
    timings = take_turns(sides, 3)
    assert file.read_text() == "AB" * 4  # the first call of each is not counted
    assert len(timings["A"].seconds) == len(timings["B"].seconds) == 3
    assert 0.01 <= timings["A"].median < timings["B"].median


def allocate(mib: int) -> Callable[[], float]:
    def run() -> float:
        return float(torch.ones(mib, 2**18).sum())  # 2**18 float32 are a MiB

    return run


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_beyond_what_was_held_is_measured() -> None:
    timings = take_turns({"small": partial(allocate, 8), "large": partial(allocate, 200)}, 0)
    small, large = timings["small"].extra_mib, timings["large"].extra_mib
    assert small is not None and large is not None
    assert 180 < large - small < 210
    assert timings["large"].result == 200 * 2**18


def broken() -> Callable[[], None]:
    raise OSError("no such thing")


def dying() -> Callable[[], None]:
    return partial(os._exit, 3)


@pytest.mark.parametrize(
    ("prepare", "message"), [(broken, "OSError: no such thing"), (dying, "exit code 3")]
)
def test_a_failing_side_ends_the_run(prepare: Callable[[], None], message: str) -> None:
    began = time.monotonic()
    with pytest.raises(SideError, match=message):
        take_turns({"good": partial(allocate, 1), "bad": prepare}, 2)
    assert time.monotonic() - began < 60


def test_operations_of_a_convolution_are_counted() -> None:
    layer, x = torch.nn.Conv2d(3, 5, 3, bias=False), torch.zeros(2, 3, 10, 12)
    assert count_flops(lambda: layer(x)) == 2 * 2 * 8 * 10 * 5 * 3 * 9
    # Backwards twice as many, and a depthwise filter sees one channel.
    depthwise = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    image = torch.zeros(1, 6, 10, 10, requires_grad=True)
    assert count_flops(lambda: depthwise(image).sum().backward()) == 3 * 2 * 6 * 100 * 9
    assert convolution_rate(torch.float32, seconds=0.05) > 1e8


def timings(theirs: float, ours: float, mib: float = 0.0) -> dict[str, Timing]:
    return {"published": Timing([theirs]), "ours": Timing([ours], extra_mib=mib)}


def test_targets_are_judged() -> None:
    row = rows.Counting(target=10)
    assert row.judge(timings(1, 0.099)) == ("at least 10 x", True)
    assert row.judge(timings(1, 0.101)) == ("at least 10 x", False)
    assert rows.Counting().judge(timings(1, 2)) == ("", None)
    memory = rows.ClassMap(target=5, limit_mib=64)
    assert memory.judge(timings(6, 1, 63))[1] is True
    assert memory.judge(timings(6, 1, 65))[1] is False
    assert memory.judge(timings(4, 1, 63))[1] is False
    assert rows.LargeClassMap().judge({"ours": Timing([1], extra_mib=255)})[1] is True
    slower = rows.SyncBatchNorm()
    assert slower.judge(timings(1, 1.19))[1] is True
    assert slower.judge(timings(1, 1.21))[1] is False
    start = rows.Startup(name="x", limit=0.2)
    assert start.judge(timings(1, 1.1))[1] is True
    assert start.judge(timings(1, 1.3))[1] is False
    assert start.judge({"ours": Timing([0.3])})[1] is False


def test_the_rows_state_the_targets() -> None:
    wanted = {
        "class map of 683x512, 150 classes, 5 scales": 6,
        "class map of 683x512, 150 classes, one scale": 5,
        "mobilenetv2dilated + c1_deepsup, 5 scales, bf16": 5,
        "mobilenetv2dilated + c1_deepsup, 5 scales, fp32": 3,
        "resnet50dilated + ppm_deepsup, 5 scales, bf16": 3,
        "resnet50dilated + ppm_deepsup, 5 scales, fp32": 1.6,
        "mobilenetv2dilated + c1_deepsup, 2x448x608, bf16": 2,
        "resnet50dilated + ppm_deepsup, 2x448x608, bf16": 2.5,
    }
    assert wanted.items() <= {row.title: row.target for row in command.ON_CPU}.items()


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = command.bench("cpu", tmp_path, quick=True, only="colours")
    assert [one.group for one in outcomes] == ["Figures"]
    assert outcomes[0].equal_labels == 1
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["rows"][0]["ratio"] == outcomes[0].ratio
    assert written["convolutions_gflops"]["fp32"] > 0
    assert "| colours of 683x512" in (tmp_path / "bench.md").read_text()
    assert "Results in" in capsys.readouterr().out
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.width > 400


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--only unicorns: no row"):
        command.bench("cpu", tmp_path, only="unicorns")
    with pytest.raises(ValueError, match="no GPU"):
        command.bench("cuda", tmp_path)
