"""`mit-semseg bench`: run the rows, print them, and write them down."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mit_semseg import __version__
from mit_semseg.benchmarks import precision
from mit_semseg.benchmarks import rows as r
from mit_semseg.benchmarks.peers import PEERS, Peer
from mit_semseg.benchmarks.sides import SideError, Timing, convolution_rate, machine, take_turns
from mit_semseg.precision import has_fast_bf16
from mit_semseg.visualize import ratio_bars

RESNET: dict[str, Any] = {"encoder": "resnet50dilated", "decoder": "ppm_deepsup"}
HELP = ("-m", "mit_semseg.cli", "--help")
MISTAKE = ("-m", "mit_semseg.cli", "train", "--precision", "fp12")

# On the CPU. The first of each network is also what --quick runs.
ON_CPU: tuple[r.Row, ...] = (
    r.ClassMap(target=6, limit_mib=64, repeats=9),
    r.ClassMap(target=5, limit_mib=64, scales=(512,), repeats=9),
    r.LargeClassMap(repeats=1),
    r.Prediction(target=5, precision="bf16"),
    r.Prediction(target=3),
    r.Prediction(target=3, precision="bf16", **RESNET),
    r.Prediction(target=1.6, **RESNET),
    r.TrainStep(target=2, precision="bf16", images=2),
    r.TrainStep(target=2.5, precision="bf16", images=2, **RESNET),
    r.Loading(target=2),
    r.Loading(normalised=True),
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
# On an accelerator more is asked.
ON_DEVICE: tuple[r.Row, ...] = (
    r.ClassMap(target=6, limit_mib=64, repeats=9),
    r.ClassMap(target=5, limit_mib=64, scales=(512,), repeats=9),
    r.LargeClassMap(repeats=1),
    r.Prediction(target=5, precision="auto"),
    r.Prediction(target=5, precision="auto", **RESNET),
    r.TrainStep(target=3, precision="auto", batch=(8, 448, 608), images=8, repeats=20),
    r.TrainStep(target=3, precision="auto", batch=(8, 448, 608), images=8, repeats=20, **RESNET),
    r.Counting(target=10),
    r.SyncBatchNorm(),
)


@dataclass(frozen=True)
class Outcome:
    """One finished row, as it is written down.

    Seconds are medians, memory is in MiB. The floor is the time that the floating-point operations
    of our network would take at the measured rate of convolutions; `utilisation` (model FLOP
    utilisation) is how much of that rate is reached with the operations of the published network.
    """

    group: str
    title: str
    baseline: str
    published_seconds: float | None
    seconds: float
    ratio: float | None
    asked: str
    met: bool | None
    published_mib: float | None
    mib: float | None
    images_per_second: float | None
    over_floor: float | None
    utilisation: float | None
    equal_labels: float | None
    calls: int


def bench(device: str, out: str | Path, *, quick: bool = False, only: str = "") -> list[Outcome]:
    """Run the rows of a device, print them, and write bench.json, bench.md and bench.png.

    Args:
        device: cpu or cuda.
        out: folder of the results.
        quick: two calls of each side, and no other toolkits.
        only: only rows with this in their group or name, in any case.

    Raises:
        ValueError: there is no such device, or no such row.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that torch can use; use cpu")
    rows = list(ON_CPU if device == "cpu" else ON_DEVICE)
    if not quick:
        rows += PEERS
        rows += precision.rows(Path(out), device)
    rows = [dataclasses.replace(row, device=device) for row in rows]
    named = [row for row in rows if only.lower() in f"{row.group} {row.title}".lower()]
    if not named:
        raise ValueError(f"--only {only}: no row is called so; see {', '.join(_names(rows))}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rates = _rates(device)
    print(f"{machine(device)}; torch {torch.__version__}")
    for name, rate in rates.items():
        print(f"convolutions in {name}: {rate / 1e9:.0f} GFLOP/s")
    outcomes, skipped = [], []
    with tqdm(named, unit="row", dynamic_ncols=True) as bar:
        for row in bar:
            bar.set_description(f"{row.group}: {row.title}"[:60])
            if row.missing:
                skipped.append(f"{row.title}: {row.missing}")
                continue
            try:
                outcomes.append(measure(row, rates, quick))
            except SideError as error:  # the other rows are worth having all the same
                reason = str(error).strip().splitlines()[-1]
                tqdm.write(f"{row.title}: failed\n{error}")
                skipped.append(f"{row.title}: {reason}")
                continue
            tqdm.write(line(outcomes[-1]))
    text = table(outcomes, skipped)
    print(f"\n{text}")
    about = {
        "machine": machine(device),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "mit_semseg": __version__,
        "quick": quick,
        "convolutions_gflops": {name: rate / 1e9 for name, rate in rates.items()},
    }
    _write(out, about, outcomes, skipped, text)
    return outcomes


def _names(rows: Sequence[r.Row]) -> list[str]:
    return list(dict.fromkeys(row.group for row in rows))


def _rates(device: str) -> dict[str, float]:
    rates = {"fp32": convolution_rate(torch.float32, device)}
    if has_fast_bf16(torch.device(device)):
        rates["bf16"] = convolution_rate(torch.bfloat16, device)
    return rates


def measure(row: r.Row, rates: dict[str, float], quick: bool = False) -> Outcome:
    """Run one row."""
    timings = take_turns(
        row.sides(),
        min(row.repeats, 2) if quick else row.repeats,
        device=row.device,
        threads=row.threads,
        flops=row.counted,
    )
    ours = timings["ours"]
    theirs = timings.get("published", Timing())
    asked, met = row.judge(timings)
    # "auto" is bfloat16 where that is fast.
    dtype = row.precision if row.precision in rates else "bf16" if "bf16" in rates else "fp32"
    floor = ours.flops / rates[dtype] if ours.flops else None
    # Work that we save on the same network is not counted as work that we do.
    work = ours.flops if isinstance(row, Peer) else theirs.flops or ours.flops
    return Outcome(
        group=row.group,
        title=row.title,
        baseline=row.baseline,
        published_seconds=theirs.median if theirs.seconds else None,
        seconds=ours.median,
        ratio=theirs.median / ours.median if theirs.seconds else None,
        asked=asked,
        met=met,
        published_mib=theirs.extra_mib,
        mib=ours.extra_mib,
        images_per_second=row.images / ours.median if row.images else None,
        over_floor=ours.median / floor if floor else None,
        utilisation=work / ours.median / rates[dtype] if work else None,
        equal_labels=row.agreement(theirs.result, ours.result) if theirs.seconds else None,
        calls=len(ours.seconds),
    )


# ------------------------------------------------------------------------------ reports
def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def line(one: Outcome) -> str:
    """One row as it is printed while the benchmark runs."""
    against = f"{one.baseline} {_seconds(one.published_seconds)}, " if one.baseline else ""
    ratio = f", {one.ratio:.2f} x" if one.ratio else ""
    verdict = {None: "", True: " - met", False: " - MISSED"}[one.met]
    asked = f" ({one.asked}{verdict})" if one.asked else ""
    return f"{one.title}: {against}ours {_seconds(one.seconds)}{ratio}{asked}"


def table(outcomes: Sequence[Outcome], skipped: Sequence[str] = ()) -> str:
    """All rows as a Markdown table."""
    heads = (
        *("what", "against", "theirs", "ours", "ratio", "asked", "met"),
        *("memory theirs", "memory ours", "images/s", "over floor", "utilisation"),
        "labels equal",
    )
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for one in outcomes:
        cells = (
            one.title,
            one.baseline,
            _seconds(one.published_seconds),
            _seconds(one.seconds),
            _figure(one.ratio, ".2f", " x"),
            one.asked,
            {None: "", True: "yes", False: "**no**"}[one.met],
            _figure(one.published_mib, ".0f", " MiB"),
            _figure(one.mib, ".0f", " MiB"),
            _figure(one.images_per_second, ".3g"),
            _figure(one.over_floor, ".2f", " x"),
            _figure(one.utilisation, ".0%"),
            _figure(one.equal_labels, ".4%"),
        )
        lines.append(f"| {' | '.join(cells)} |")
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
        (one.group, f"{one.title} (against {one.baseline})", one.ratio)
        for one in outcomes
        if one.ratio and one.group not in ("Start", "Parallel", "Precision")
    ]
    if bars:
        ratio_bars(bars, out / "bench.png", title=f"Times faster, on {about['machine']}")
    print(f"Results in {out}")
