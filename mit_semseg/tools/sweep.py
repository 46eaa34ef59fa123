"""`mit-semseg sweep`: train and evaluate several configurations one after the other."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from mit_semseg.config import Options, dump_config, load_options
from mit_semseg.engine.checkpoint import make_writable
from mit_semseg.engine.cpu import fixed_threads
from mit_semseg.engine.launch import read_options
from mit_semseg.engine.training.metrics_log import METRICS, read_metrics
from mit_semseg.errors import one_line
from mit_semseg.tools.compare import Compared, compare, table
from mit_semseg.tools.recipes import named

# Steps over which the speed of a training is measured, after slower first steps.
PACE_STEPS, FIRST_STEPS = 12, 4
# Validation images whose predictions are shown.
SHOWN = 3


def run(
    recipes: Sequence[str | Path],
    out: str | Path,
    *,
    gpus: str | None = None,
    minutes: float = 0.0,
    vary: Sequence[str] = (),
    opts: Sequence[str] = (),
) -> dict[str, str]:
    """Train and evaluate every recipe with every combination of values.

    Each run has a folder, a configuration `NAME.yaml` and a log `NAME.log` in `out`. A second call
    resumes where the first was stopped, and repeats runs whose configuration has changed. After
    each run `compare` writes `sweep.md`, `sweep.json` and `sweep.png`.

    Args:
        recipes: configuration files.
        out: folder of the results.
        gpus: as for `train` and `eval`.
        minutes: training time of each run, from its measured speed; 0 for the epochs of the recipe.
        vary: "KEY=value,value,..." for each key to vary.
        opts: `KEY value` pairs for all runs.

    Returns:
        Name -> error, of the runs that failed.

    Raises:
        FileNotFoundError, ValueError: a recipe is missing or wrong, or two have the same name;
            before the first run.
        OSError: the folder cannot be written to.
    """
    if minutes < 0:
        raise ValueError(f"--minutes {minutes:g}: give 0 or more")
    folder, began = Path(out), time.monotonic()
    queue: dict[str, Options] = {}
    for (recipe, file), *values in product(named(recipes).items(), *map(_settings, vary)):
        name = ",".join([recipe, *(f"{key.rpartition('.')[2]}={x}" for key, x in values)])
        name = name.replace("/", "_")  # values may be paths
        pairs = [word for pair in values for word in pair]
        queue[name] = read_options(file, [*opts, *pairs, "DIR", str(folder / name)])
    make_writable(folder, "--out")
    flags = ["--gpus", gpus] if gpus else []
    flags += ["--threads", str(fixed_threads())] if fixed_threads() else []
    done: list[Path] = []
    failed: dict[str, str] = {}
    for number, (name, options) in enumerate(queue.items(), 1):
        print(f"{number}/{len(queue)} {name}: log in {folder / name}.log", flush=True)
        try:
            if minutes:
                iters = _epoch_iters(options, minutes, flags)
                options = replace(options, TRAIN=replace(options.TRAIN, epoch_iters=iters))
            results = _evaluated(options, flags)
            print(f"{number}/{len(queue)} {Compared.read(results)}", flush=True)
            done.append(results)
        except (OSError, ValueError) as error:  # continue with the other runs
            failed[name] = one_line(error)
            print(f"{number}/{len(queue)} {name}: failed: {failed[name]}", flush=True)
        found = compare(done, folder, name="sweep", failed=failed)
    print(f"\n{table(found, failed)}\n\n{(time.monotonic() - began) / 60:.1f} min; {out}/sweep.png")
    return failed


def _settings(vary: str) -> list[tuple[str, str]]:
    """(KEY, value) for each value; commas inside brackets do not separate values."""
    key, _, values = vary.partition("=")
    if not values:
        raise ValueError(f"--vary {vary}: give KEY=value,value,...")
    return [(key, value) for value in re.split(r",(?![^(\[]*[)\]])", values)]


def _evaluated(options: Options, flags: Sequence[str]) -> Path:
    """Train and evaluate, unless this has been done; returns the folder of the evaluation."""
    folder, same = Path(options.DIR), _is_known(options)
    results = folder / "evaluation"
    if same and (results / "eval.json").is_file():
        return results
    for stale in (results / "eval.json", *results.glob("labels/*.npy")):
        stale.unlink(missing_ok=True)
    _train(options, [*flags, *(["--resume", "auto"] if same else [])])
    best = (folder / "encoder_best.pth").is_file()
    checkpoint = "best.pth" if best else f"epoch_{options.TRAIN.num_epoch}.pth"
    words = [*flags, "--out", str(results), "--keep", str(SHOWN), "--cfg", f"{folder}.yaml"]
    code = _command("eval", [*words, "VAL.checkpoint", checkpoint], folder)
    if not (results / "eval.json").is_file():  # exit status 1 with results: some images failed
        raise ChildProcessError(f"eval ended with {code}: {_last_error(folder)}")
    return results


def _is_known(options: Options) -> bool:
    """Whether an earlier call has started a run with the same configuration."""
    file = Path(f"{options.DIR}.yaml")
    return file.is_file() and load_options(file) == options


def _train(options: Options, flags: Sequence[str]) -> None:
    file, folder = f"{options.DIR}.yaml", Path(options.DIR)
    dump_config(options, file)
    if code := _command("train", [*flags, "--cfg", file], folder):
        raise ChildProcessError(f"train ended with {code}: {_last_error(folder)}")


def _epoch_iters(options: Options, minutes: float, flags: Sequence[str]) -> int:
    """Steps per epoch for a training of `minutes`, from the speed of a short training."""
    steps = FIRST_STEPS + PACE_STEPS
    schedule = replace(
        options.TRAIN,
        num_epoch=1,
        start_epoch=0,
        epoch_iters=steps,
        eval_epochs=0,
        disp_iter=1,
        checkpoint_minutes=0.0,
    )
    trial = replace(options, DIR=f"{options.DIR}.pace", TRAIN=schedule)
    if not _is_known(trial) or len(_seconds(trial)) < steps:
        _train(trial, flags)
        for file in Path(trial.DIR).glob("*.pth"):
            file.unlink()
    took = _seconds(trial)
    pace = (took[steps] - took[FIRST_STEPS]) / PACE_STEPS
    return max(1, round(60 * minutes / pace / options.TRAIN.num_epoch))


def _seconds(options: Options) -> dict[int, float]:
    """Step -> training time in seconds."""
    file = Path(options.DIR) / METRICS
    lines = read_metrics(file) if file.is_file() else []
    return {x["step"]: x["seconds"] for x in lines if x["kind"] == "train"}


def _command(command: str, words: Sequence[str], folder: Path) -> int:
    """Run a command with its output in `FOLDER.log`; returns its exit status.

    Raises:
        KeyboardInterrupt: a signal was received; it was forwarded to the command, which has ended.
    """
    received: list[int] = []
    unsent: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: object) -> None:
        received.append(number)
        unsent.append(number)
        send()

    def send() -> None:
        while process is not None and unsent:
            process.send_signal(unsent.pop())

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _log(folder).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mit_semseg.cli", command, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # signals are only forwarded from here
            )
        send()  # what came before there was a process
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
    return code


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _last_error(folder: Path) -> str:
    """The last line of a log with an error, else its last line."""
    text = _log(folder).read_text("utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line.lower()] or lines or ["no output"]
    return f"{errors[-1]} ({_log(folder)})"
