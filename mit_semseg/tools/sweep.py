"""`mit-semseg sweep`: train and evaluate a queue of configurations, one after the other."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from mit_semseg.config import dump_config, load_config
from mit_semseg.config.node import Config
from mit_semseg.engine.checkpoint import make_writable
from mit_semseg.engine.cpu import fixed_threads
from mit_semseg.engine.launch import read_config
from mit_semseg.engine.training.metrics_log import METRICS, read_metrics
from mit_semseg.errors import one_line
from mit_semseg.tools.compare import Compared, compare, table
from mit_semseg.tools.recipes import named

# Steps over which the pace of a training is measured, and those before them, which are slower.
PACE_STEPS, FIRST_STEPS = 12, 4
# Validation images that are shown as every model sees them.
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

    Each has a folder and a configuration `NAME.yaml` below `out`; what is said goes to `NAME.log`.
    Called again, it resumes where it was stopped, and trains anew what is configured otherwise.
    After each, `compare` writes `sweep.md`, `sweep.json` and `sweep.png` of all that is done.

    Args:
        recipes: configuration files, in the order they are run.
        out: the folder.
        gpus: as for `train` and `eval`.
        minutes: of training for each, from its measured pace; 0 trains as long as the recipe says.
        vary: "KEY=value,value,..." for each key that is varied.
        opts: `KEY value` pairs for all of them.

    Returns:
        name -> reason, of those that failed.

    Raises:
        FileNotFoundError, ValueError: a recipe is missing or mistaken, or two have one name; it is
            found before the first one is run.
        OSError: the folder cannot be written to.
    """
    if minutes < 0:
        raise ValueError(f"--minutes {minutes:g}: give 0 or more")
    folder, began = Path(out), time.monotonic()
    queue: dict[str, Config] = {}
    for (recipe, file), *values in product(named(recipes).items(), *map(_settings, vary)):
        name = ",".join([recipe, *(f"{key.rpartition('.')[2]}={x}" for key, x in values)])
        name = name.replace("/", "_")  # of paths among the values
        pairs = [word for pair in values for word in pair]
        queue[name] = read_config(file, [*opts, *pairs, "DIR", str(folder / name)])
    make_writable(folder, "--out")
    options = ["--gpus", gpus] if gpus else []
    options += ["--threads", str(fixed_threads())] if fixed_threads() else []
    done: list[Path] = []
    failed: dict[str, str] = {}
    for number, (name, cfg) in enumerate(queue.items(), 1):
        print(f"{number}/{len(queue)} {name}: its output goes to {folder / name}.log", flush=True)
        try:
            if minutes:
                cfg.TRAIN.epoch_iters = _epoch_iters(cfg, minutes, options)
            results = _evaluated(cfg, options)
            print(f"{number}/{len(queue)} {Compared.read(results)}", flush=True)
            done.append(results)
        except (OSError, ValueError) as error:  # hours of the others are not to be lost by one
            failed[name] = one_line(error)
            print(f"{number}/{len(queue)} {name}: failed: {failed[name]}", flush=True)
        found = compare(done, folder, name="sweep", failed=failed)
    print(f"\n{table(found, failed)}\n\n{(time.monotonic() - began) / 60:.1f} min; {out}/sweep.png")
    return failed


def _settings(vary: str) -> list[tuple[str, str]]:
    """(KEY, value) of each value; commas inside brackets part none."""
    key, _, values = vary.partition("=")
    if not values:
        raise ValueError(f"--vary {vary}: give KEY=value,value,...")
    return [(key, value) for value in re.split(r",(?![^(\[]*[)\]])", values)]


def _evaluated(cfg: Config, options: Sequence[str]) -> Path:
    """Train and evaluate, unless the same configuration was before; the folder of the figures."""
    folder, same = Path(cfg.DIR), _is_known(cfg)
    results = folder / "evaluation"
    if same and (results / "eval.json").is_file():
        return results
    for stale in (results / "eval.json", *results.glob("labels/*.npy")):
        stale.unlink(missing_ok=True)
    _train(cfg, [*options, *(["--resume", "auto"] if same else [])])
    best = (folder / "encoder_best.pth").is_file()
    checkpoint = "best.pth" if best else f"epoch_{cfg.TRAIN.num_epoch}.pth"
    words = [*options, "--out", str(results), "--keep", str(SHOWN), "--cfg", f"{folder}.yaml"]
    code = _command("eval", [*words, "VAL.checkpoint", checkpoint], folder)
    if not (results / "eval.json").is_file():  # 1 with figures: some images failed
        raise ChildProcessError(f"eval ended with {code}: {_last_error(folder)}")
    return results


def _is_known(cfg: Config) -> bool:
    """Whether an earlier call has begun with the same configuration."""
    file = Path(f"{cfg.DIR}.yaml")
    return file.is_file() and load_config(file) == cfg


def _train(cfg: Config, options: Sequence[str]) -> None:
    dump_config(cfg, f"{cfg.DIR}.yaml")
    if code := _command("train", [*options, "--cfg", f"{cfg.DIR}.yaml"], Path(cfg.DIR)):
        raise ChildProcessError(f"train ended with {code}: {_last_error(Path(cfg.DIR))}")


def _epoch_iters(cfg: Config, minutes: float, options: Sequence[str]) -> int:
    """Steps of an epoch with which the training takes so long, from the pace of a short one."""
    trial = cfg.clone()
    trial.DIR, trial.TRAIN.num_epoch, trial.TRAIN.eval_epochs = f"{cfg.DIR}.pace", 1, 0
    trial.TRAIN.epoch_iters, trial.TRAIN.disp_iter = FIRST_STEPS + PACE_STEPS, 1
    trial.TRAIN.checkpoint_minutes = 0.0
    if not _is_known(trial) or len(_seconds(trial)) < FIRST_STEPS + PACE_STEPS:
        _train(trial, options)
        for file in Path(trial.DIR).glob("*.pth"):
            file.unlink()
    took = _seconds(trial)
    pace = (took[FIRST_STEPS + PACE_STEPS] - took[FIRST_STEPS]) / PACE_STEPS
    return max(1, round(60 * minutes / pace / cfg.TRAIN.num_epoch))


def _seconds(cfg: Config) -> dict[int, float]:
    """Step -> seconds of a training up to it."""
    file = Path(cfg.DIR) / METRICS
    lines = read_metrics(file) if file.is_file() else []
    return {x["step"]: x["seconds"] for x in lines if x["kind"] == "train"}


def _command(command: str, words: Sequence[str], folder: Path) -> int:
    """Run a command, with `FOLDER.log` for its output; its exit status.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop; the command, which was told, has ended.
    """
    with _log(folder).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mit_semseg.cli", command, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Control-C comes once, from here
        )
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        process.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt
    return code


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _last_error(folder: Path) -> str:
    """The last line with an error that a command has said, else its last line."""
    text = _log(folder).read_text("utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line.lower()] or lines or ["nothing"]
    return f"{errors[-1]} ({_log(folder)})"
