"""`mit-semseg selftest`: run the drills, print what they found, and write it down."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from mit_semseg.engine.cpu import cpu_count
from mit_semseg.selftest import drills, memory
from mit_semseg.selftest.drills import Drill, Outcome
from mit_semseg.selftest.job import Ground, Running
from mit_semseg.selftest.soak import soak

DRILLS: dict[str, Drill] = {
    "killed": drills.killed,
    "signalled": drills.signalled,
    "damaged": drills.damaged,
    "full": drills.full,
    "lost_loader": drills.lost_loader,
    "lost_evaluator": drills.lost_evaluator,
    "lost_rank": drills.lost_rank,
    "stalled": drills.stalled,
    "not_finite": drills.not_finite,
    "training_memory": memory.training,
    "evaluation_memory": memory.evaluation,
}


def selftest(
    out: str | Path, *, quick: bool = False, only: str = "", soak_hours: float = 0.0
) -> list[Outcome]:
    """Run the drills, and write `selftest.json` and `selftest.md`.

    Args:
        out: folder of the results and of everything the drills write.
        quick: fewer kills, shorter runs.
        only: drills whose name holds this text.
        soak_hours: after them, how long to soak; 0: not at all.

    Raises:
        ValueError: no drill has such a name.
    """
    chosen = {name: drill for name, drill in DRILLS.items() if only in name}
    if only == "soak" and not soak_hours:
        raise ValueError("the soak needs its time: --soak HOURS")
    if not chosen and only != "soak":
        raise ValueError(f"no drill is called {only!r}; there are {', '.join(DRILLS)}")
    folder = Path(out)
    ground = Ground(folder.resolve() / "work", "c1_deepsup" if quick else "ppm_deepsup")
    ground.folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for drill in chosen.values():
        outcomes.append(_timed(partial(drill, ground, quick)))
        _write(outcomes, folder)
    if soak_hours:
        outcomes.append(_timed(partial(soak, ground, soak_hours)))
        _write(outcomes, folder)
    return outcomes


def _timed(run: Callable[[], Outcome]) -> Outcome:
    """Run a drill to its end, and end what it leaves behind."""
    began = time.monotonic()
    try:
        outcome = run()
    except (ChildProcessError, TimeoutError) as error:
        outcome = Outcome("a drill that could not be done", "", False, {}, str(error))
    finally:
        for running in list(Running.started):
            running.destroy()
    outcome.figures["seconds"] = round(time.monotonic() - began, 1)
    print(line(outcome), flush=True)
    return outcome


def line(outcome: Outcome) -> str:
    """One drill in one line."""
    figures = ", ".join(f"{key} {value}" for key, value in outcome.figures.items())
    verdict = "held" if outcome.held else f"BROKEN ({' '.join(outcome.complaint.split())})"
    return f"{outcome.name}: {outcome.promise}: {verdict}; {figures}"


def _write(outcomes: Sequence[Outcome], folder: Path) -> None:
    machine = f"{platform.machine()}, {cpu_count()} cores, torch {torch.__version__}"
    found = {"machine": machine, "drills": [outcome.plain() for outcome in outcomes]}
    (folder / "selftest.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    rows = [
        f"Machine: {machine}.",
        "",
        "| broken | promised | held | measured |",
        "|---|---|---|---|",
    ]
    for one in outcomes:
        figures = "; ".join(f"{key}: {value}" for key, value in one.figures.items())
        held = "yes" if one.held else "**no**"
        rows.append(f"| {one.name} | {one.promise} | {held} | {figures} |")
    (folder / "selftest.md").write_text("\n".join(rows) + "\n", "utf-8")
