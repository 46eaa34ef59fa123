"""`mit-semseg bench`: runs the rows, and prints and writes the results."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mit_semseg import __version__
from mit_semseg.benchmarks import precision
from mit_semseg.benchmarks import rows as r
from mit_semseg.benchmarks.clock import OtherPrograms
from mit_semseg.benchmarks.files import Loading
from mit_semseg.benchmarks.gpu import RESNET, gpu_peers, gpu_rows
from mit_semseg.benchmarks.peers import Peer, peers
from mit_semseg.benchmarks.sides import (
    Processes,
    SideError,
    Timing,
    convolution_rate,
    time_sides,
)
from mit_semseg.benchmarks.training import TrainStep
from mit_semseg.engine.devices import machine
from mit_semseg.precision import has_fast_bf16
from mit_semseg.visualize import ratio_bars

# Groups that are left out of the chart, as their ratios are not speed-ups.
NOT_IN_CHART = ("Start", "Parallel", "Precision", "New shapes")
# Time limit of a benchmark on a GPU, in seconds.
GPU_SECONDS = 230.0
# Cores used by other programs above which there is a warning, as ratios change.
OTHER_CORES = 0.2

HELP = ("-m", "mit_semseg.cli", "--help")
MISTAKE = ("-m", "mit_semseg.cli", "train", "--precision", "fp12")

# On the CPU. The first of each network is also what --quick runs.
ON_CPU: tuple[r.Row, ...] = (
    r.ClassMap(target=6, limit_mib=64, repeats=9),
    r.ClassMap(target=5, limit_mib=64, scales=(512,), repeats=9),
    r.LargeClassMap(repeats=1),
    r.Prediction(target=5, precision="bf16"),
    r.Prediction(target=3),
    r.Prediction(target=4, precision="bf16", **RESNET),
    r.Prediction(target=1.6, **RESNET),
    TrainStep(target=2, precision="bf16", images=2),
    TrainStep(target=2.5, precision="bf16", images=2, **RESNET),
    Loading(target=2),
    Loading(normalised=True),
    r.Counting(target=10),
    r.Colours(target=4),
    r.SyncBatchNorm(),
    r.Startup(
        name="import mit_semseg",
        command=("-c", "import torch, mit_semseg"),
        against=("-c", "import torch"),
        baseline="import torch",
        limit=0.2,
    ),
    r.Startup(name="mit-semseg --help", command=HELP, baseline=""),
    r.Startup(name="mit-semseg with a wrong argument", command=MISTAKE, baseline=""),
)


@dataclass(frozen=True)
class Outcome:
    """Results of one row.

    Seconds are medians, memory is in MiB. The floor is the time of the floating-point operations of
    our network at the measured rate of convolutions; `utilisation` (model FLOP utilisation) is the
    fraction of that rate reached with the operations of the published network. `busy` is the
    fraction of time in which GPU kernels run, `row_seconds` the time of the whole row, and
    `other_cores` the number of cores used by other programs in that time.
    """

    group: str
    title: str
    baseline: str
    published_seconds: float | None
    seconds: float
    ratio: float | None
    target: str
    met: bool | None
    published_mib: float | None
    mib: float | None
    images_per_second: float | None
    over_floor: float | None
    utilisation: float | None
    equal_labels: float | None
    calls: int
    published_busy: float | None = None
    busy: float | None = None
    row_seconds: float = 0.0
    other_cores: float | None = None


def bench(device: str, out: str | Path, *, quick: bool = False, only: str = "") -> list[Outcome]:
    """Runs the rows of a device, prints them, and writes bench.json, bench.md and bench.png.

    Args:
        device: cpu or cuda; on cuda rows that do not fit into four minutes are skipped.
        out: folder for the results.
        quick: two calls of each side, and no other toolkits.
        only: run only rows whose group or name contains this, ignoring case.

    Raises:
        ValueError: the device does not exist, or no row matches.
    """
    on_cpu = device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU on this machine; use --device cpu")
    rows = list(ON_CPU) if on_cpu else gpu_rows()
    if not quick:
        rows += peers(("fp32", "bf16")) if on_cpu else gpu_peers()
        rows += precision.rows(Path(out), device)
    rows = [replace(row, device=device) for row in rows]
    named = [row for row in rows if only.lower() in f"{row.group} {row.title}".lower()]
    if not named:
        raise ValueError(f"--only {only}: no row matches; groups are {', '.join(_names(rows))}")
    return run(named, out, device=device, quick=quick, limit=None if on_cpu else GPU_SECONDS)


def run(
    rows: Sequence[r.Row],
    out: str | Path,
    *,
    device: str,
    quick: bool = False,
    limit: float | None = None,
) -> list[Outcome]:
    """Runs rows, see `bench`.

    Args:
        rows: rows for `device`.
        out: folder for the results.
        device: cpu or cuda.
        quick: two calls of each side.
        limit: time limit in seconds: rows whose budget exceeds the remaining time are skipped. If
            set, both sides keep their processes from row to row, to save time, and hanging
            processes are killed.
    """
    began = time.monotonic()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{machine(device)}; torch {torch.__version__}")
    others = _others()
    rates = _rates(device)
    for name, rate in rates.items():
        print(f"convolutions in {name}: {rate / 1e12:.3g} TFLOP/s")
    outcomes, skipped = [], []
    processes = None if limit is None else Processes()
    try:
        with tqdm(rows, unit="row", dynamic_ncols=True) as bar:
            for row in bar:
                bar.set_description(f"{row.group}: {row.title}"[:60])
                if row.missing:
                    skipped.append(f"{row.title}: {row.missing}")
                    continue
                left = math.inf if limit is None else limit - (time.monotonic() - began)
                if row.budget > left:
                    skipped.append(f"{row.title}: no time was left; select it with --only")
                    continue
                try:
                    outcomes.append(measure(row, rates, quick, processes))
                except SideError as error:  # continue with the other rows
                    reason = str(error).strip().splitlines()[-1]
                    tqdm.write(f"{row.title}: failed\n{error}")
                    skipped.append(f"{row.title}: failed: {reason}")
                    continue
                tqdm.write(line(outcomes[-1]))
    finally:
        if processes is not None:
            processes.stop()
    text = table(outcomes, skipped)
    print(f"\n{text}")
    about = {
        "machine": machine(device),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "mit_semseg": __version__,
        "quick": quick,
        "other_cores": others,
        "convolutions_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "seconds": time.monotonic() - began,
    }
    _write(out, about, outcomes, skipped, text)
    print(f"Measured in {about['seconds']:.0f} s")
    return outcomes


def _others(seconds: float = 1.0) -> float | None:
    """Cores that other programs use now, with a warning if they are too many."""
    others = OtherPrograms()
    time.sleep(seconds)
    cores = others.cores()
    if cores is not None and cores > OTHER_CORES:
        print(
            f"warning: other programs use {cores:.1f} of the cores; seconds and speed-ups differ "
            "from those of an idle machine"
        )
    return cores


def _names(rows: Sequence[r.Row]) -> list[str]:
    return list(dict.fromkeys(row.group for row in rows))


def _rates(device: str) -> dict[str, float]:
    """FLOP/s of convolutions in the precisions of the rows."""
    fast = has_fast_bf16(torch.device(device))
    if device == "cpu":
        return {name: convolution_rate(name) for name in ("fp32", *(["bf16"] if fast else []))}
    names = [*(["bf16", "tf32"] if fast else []), "fp16", "fp32"]
    return {name: convolution_rate(name, device, seconds=0.3) for name in names}


def _rate(precision: str, rates: Mapping[str, float]) -> float:
    """The rate of a precision; "auto" is bfloat16 if that is fast."""
    return next(rates[name] for name in (precision, "bf16", "tf32", "fp32") if name in rates)


def measure(
    row: r.Row,
    rates: Mapping[str, float],
    quick: bool = False,
    processes: Processes | None = None,
) -> Outcome:
    """Runs one row."""
    began = time.monotonic()
    others = OtherPrograms(processes.computed) if processes else OtherPrograms()
    timed = time_sides(
        row.sides(),
        min(row.repeats, 2) if quick else row.repeats,
        device=row.device,
        threads=row.threads,
        flops=row.counted,
        limit=row.budget,
        burst=row.burst,
        timeout=None if processes is None else max(60.0, 3 * row.budget),
        processes=processes,
    )
    timings = row.measured(timed)
    ours = timings["ours"]
    theirs = timings.get("published", Timing())
    compared = bool(theirs.seconds)
    target, met = row.judge(timings)
    rate = _rate(row.precision, rates)
    floor = ours.flops / rate if ours.flops else None
    # Operations that are avoided on the same network do not count as done.
    work = ours.flops if isinstance(row, Peer) else theirs.flops or ours.flops
    return Outcome(
        group=row.group,
        title=row.title,
        baseline=row.baseline,
        published_seconds=theirs.median if compared else None,
        seconds=ours.median,
        ratio=theirs.median / ours.median if compared else None,
        target=target,
        met=met,
        published_mib=theirs.extra_mib,
        mib=ours.extra_mib,
        images_per_second=row.images / ours.median if row.images else None,
        over_floor=ours.median / floor if floor else None,
        utilisation=work / ours.median / rate if work else None,
        equal_labels=row.agreement(theirs.result, ours.result) if compared else None,
        calls=len(ours.seconds) * ours.calls,
        published_busy=theirs.busy if compared else None,
        busy=ours.busy,
        row_seconds=time.monotonic() - began,
        other_cores=others.cores(),
    )


# ------------------------------------------------------------------------------ reports
def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def line(one: Outcome) -> str:
    """One row as text, printed while the benchmark runs."""
    against = f"{one.baseline} {_seconds(one.published_seconds)}, " if one.baseline else ""
    ratio = f", {one.ratio:.2f} x" if one.ratio else ""
    verdict = {None: "", True: ", met", False: ", MISSED"}[one.met]
    target = f" (target: {one.target}{verdict})" if one.target else ""
    return f"{one.title}: {against}ours {_seconds(one.seconds)}{ratio}{target}"


COLUMNS: dict[str, Callable[[Outcome], str]] = {
    "what": lambda one: one.title,
    "against": lambda one: one.baseline,
    "theirs": lambda one: _seconds(one.published_seconds),
    "ours": lambda one: _seconds(one.seconds),
    "speed-up": lambda one: _figure(one.ratio, ".2f", " x"),
    "target": lambda one: one.target,
    "met": lambda one: {None: "", True: "yes", False: "**no**"}[one.met],
    "memory theirs": lambda one: _figure(one.published_mib, ".0f", " MiB"),
    "memory ours": lambda one: _figure(one.mib, ".0f", " MiB"),
    "images/s": lambda one: _figure(one.images_per_second, ".3g"),
    "time / floor": lambda one: _figure(one.over_floor, ".2f", " x"),
    "utilisation": lambda one: _figure(one.utilisation, ".0%"),
    "labels equal": lambda one: _figure(one.equal_labels, ".4%"),
}
LOAD_COLUMN: dict[str, Callable[[Outcome], str]] = {
    "cores of other programs": lambda one: _figure(one.other_cores, ".1f"),
}
GPU_COLUMNS: dict[str, Callable[[Outcome], str]] = {
    "GPU busy theirs": lambda one: _figure(one.published_busy, ".0%"),
    "GPU busy ours": lambda one: _figure(one.busy, ".0%"),
}


def table(outcomes: Sequence[Outcome], skipped: Sequence[str] = ()) -> str:
    """All rows as a Markdown table."""
    on_gpu = any(one.busy is not None for one in outcomes)
    disturbed = any((one.other_cores or 0) > OTHER_CORES for one in outcomes)
    columns = {**COLUMNS, **(GPU_COLUMNS if on_gpu else {}), **(LOAD_COLUMN if disturbed else {})}
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for one in outcomes:
        lines.append(f"| {' | '.join(cell(one) for cell in columns.values())} |")
    return "\n".join([*lines, *(f"\nNot run: {reason}" for reason in skipped)])


def _write(
    out: Path,
    about: dict[str, Any],
    outcomes: Sequence[Outcome],
    skipped: Sequence[str],
    text: str,
) -> None:
    content = {**about, "rows": [asdict(one) for one in outcomes], "not_run": list(skipped)}
    (out / "bench.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(text + "\n", encoding="utf-8")
    bars = [
        (f"{one.group}, against {one.baseline}", one.title, one.ratio)
        for one in outcomes
        if one.ratio and one.group not in NOT_IN_CHART
    ]
    if bars:
        ratio_bars(bars, out / "bench.png", title=f"Speed-up, on {about['machine']}")
    print(f"Results in {out}")
