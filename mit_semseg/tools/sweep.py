"""`mit-semseg sweep`: train and evaluate a queue of recipes, one after the other, and compare."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mit_semseg.config.node import Config
from mit_semseg.dataset import ValDataset, build_split
from mit_semseg.engine.checkpoint import make_writable
from mit_semseg.engine.cpu import fixed_threads
from mit_semseg.engine.evaluate import val_dataset
from mit_semseg.engine.launch import read_config
from mit_semseg.engine.scoring import SavedPredictions
from mit_semseg.engine.training.metrics_log import METRICS, read_metrics
from mit_semseg.tools.recipes import fingerprint, named
from mit_semseg.visualize import class_bars
from mit_semseg.visualize.sheets import image_grid

log = logging.getLogger("mit_semseg")

# Steps that the pace of a recipe is measured over, and those before them, which are slower.
PACE_STEPS, FIRST_STEPS = 12, 4
# Validation images that are shown as every model sees them.
SHOWN = 3


@dataclass
class Entry:
    """One recipe of the queue, and what came of it.

    Attributes:
        recipe: its file.
        encoder, decoder: names.
        state: "waiting", "done" or "failed".
        steps: of the training.
        train_minutes: seconds of training steps / 60, validation left out.
        mean_iou, pixel_accuracy: of the best checkpoint.
        images_per_second: of the evaluation.
        error: what a failed command said last.
        key: fingerprint of its configuration.
    """

    recipe: str
    encoder: str
    decoder: str
    state: str = "waiting"
    steps: int = 0
    train_minutes: float = 0.0
    mean_iou: float | None = None
    pixel_accuracy: float | None = None
    images_per_second: float = 0.0
    error: str = ""
    key: str = ""

    @property
    def name(self) -> str:
        """The recipe's file name without its ending."""
        return Path(self.recipe).stem


class Sweep:
    """A queue in a folder: one folder a recipe, the table `sweep.md` with two pictures, and
    `sweep.json`, from which a queue that was interrupted goes on."""

    def __init__(
        self,
        recipes: Sequence[str | Path],
        out: str | Path,
        *,
        gpus: str | None = None,
        minutes: float = 0.0,
        opts: Sequence[str] = (),
    ) -> None:
        """Read all recipes, so that a mistake in the last is found before the first is run.

        Args:
            recipes: configuration files, in the order they are run.
            out: the folder.
            gpus: as for `train` and `eval`.
            minutes: of training for each recipe, from its measured pace; 0 trains as long as the
                recipe says.
            opts: `KEY value` pairs for all of them.

        Raises:
            FileNotFoundError, ValueError: a recipe is missing or mistaken, or two have one name.
            OSError: the folder cannot be written to.
        """
        self.folder = Path(out)
        self.warned: set[str] = set()
        self.gpus, self.minutes, self.opts = gpus, minutes, list(opts)
        if minutes < 0:
            raise ValueError(f"--minutes {minutes:g}: give 0 or more")
        files = named(recipes)
        self.configs = {name: read_config(file, self.opts) for name, file in files.items()}
        make_writable(self.folder, "--out")
        earlier = self._earlier()
        self.others = [entry for name, entry in earlier.items() if name not in files]
        self.entries, self.changed = [], []
        for name, file in files.items():
            model, key = self.configs[name].MODEL, fingerprint(self.configs[name])
            entry = Entry(file, model.arch_encoder, model.arch_decoder, key=key)
            before = earlier.get(name)
            if before is None or before.key != key:
                self.changed.append(name)
            elif before.state == "done":
                entry = replace(before, recipe=file)
            self.entries.append(entry)

    def _earlier(self) -> dict[str, Entry]:
        """Name -> what earlier calls have noted."""
        file = self.folder / "sweep.json"
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text("utf-8"))
            same = found["minutes"] == self.minutes and found["overrides"] == self.opts
            entries = [Entry(**entry) for entry in found["recipes"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}): remove it, or give another --out"
            ) from error
        if not same:
            raise ValueError(
                f"{file} is of a queue with --minutes {found['minutes']:g} and the overrides "
                f"{' '.join(found['overrides']) or '(none)'}: give the same, or another --out"
            )
        return {entry.name: entry for entry in entries}

    def _set_aside(self) -> None:
        """Move what another form of a recipe has left: nothing of it may be continued."""
        for name in self.changed:
            folder = self.folder / name
            if folder.exists():
                aside = next(
                    path for n in count(1) if not (path := folder.with_name(f"{name}.{n}")).exists()
                )
                folder.rename(aside)
                print(f"{folder} is not of the recipe as it is now: moved to {aside}", flush=True)
        self.changed = []

    def run(self) -> list[Entry]:
        """All that is left of the queue; what fails is noted, and the next one is run."""
        self._set_aside()
        self._write()
        for number, entry in enumerate(self.entries, 1):
            if entry.state == "done":
                print(f"{number}/{len(self.entries)} {line(entry)} (done before)", flush=True)
                continue
            try:
                self._run(entry, f"{number}/{len(self.entries)} {entry.name}")
                entry.state, entry.error = "done", ""
            except ChildProcessError as error:
                entry.state, entry.error = "failed", str(error)
            except Exception as error:  # hours of others are not to be lost by one
                log.exception("%s", entry.name)
                entry.state, entry.error = "failed", _named(error)
            self._write()
            print(f"{number}/{len(self.entries)} {line(entry)}", flush=True)
        return self.entries

    def _run(self, entry: Entry, title: str) -> None:
        cfg, folder = self.configs[entry.name], self.folder / entry.name
        opts = [*self.opts, "DIR", str(folder)]
        if self.minutes:
            opts += self._budget(entry, cfg, title)
        self._command("train", entry, ["--resume", "auto"], opts, title, folder)
        lines = read_metrics(folder / METRICS)
        steps = [x for x in lines if x["kind"] == "train"]
        entry.steps, entry.train_minutes = steps[-1]["step"], steps[-1]["seconds"] / 60
        best = "best.pth" if (folder / "encoder_best.pth").is_file() else ""
        checkpoint = best or f"epoch_{steps[-1]['epoch']}.pth"
        result = self._evaluate(entry, [*opts, "VAL.checkpoint", checkpoint], title)
        entry.mean_iou, entry.pixel_accuracy = result["mean_iou"], result["pixel_accuracy"]
        entry.images_per_second = result["images"] / result["seconds"]

    def _evaluate(self, entry: Entry, opts: Sequence[str], title: str) -> dict[str, Any]:
        """What `eval.json` holds; class ids of some images are kept beside it."""
        results = self.folder / entry.name / "evaluation"
        figures = results / "eval.json"
        for stale in (figures, *results.glob("labels/*.npy")):
            stale.unlink(missing_ok=True)
        options = ["--out", str(results), "--keep", str(SHOWN)]
        # 1: some images failed, which the figures name; a traceback leaves none.
        self._command("eval", entry, options, opts, title, None, fine=(0, 1), result=figures)
        result: dict[str, Any] = json.loads(figures.read_text("utf-8"))
        return result

    def _draw(self) -> None:
        """Chart and pictures of what is done; without them the queue is as good."""
        done = [entry for entry in self.entries if entry.mean_iou is not None]
        if not done:
            return
        try:
            class_bars(
                [entry.name for entry in done],
                [entry.mean_iou for entry in done],
                path=self.folder / "sweep.png",
                title="Mean IoU",
                what="recipes",
            )
            self._pictures(done)
        except Exception as error:  # noqa: BLE001, pictures must not end the queue
            self._warn(f"sweep_pictures.png is not drawn: {_named(error)}")

    def _pictures(self, entries: Sequence[Entry]) -> None:
        """The same images as all recipes on the data of the first one see them, a row each, the
        best first."""
        first = self.configs[entries[0].name]
        data, split = val_dataset(first), build_split(first.DATASET, "val")
        samples = self._samples(data, self._kept(entries[0], len(data)).numbers)
        if not samples:
            return
        colors = split.classes.colors
        truth = [sample["seg_label"][0].numpy() for sample in samples.values()]
        rows = [
            ("image", [sample["img_ori"] for sample in samples.values()]),
            ("truth", truth),
        ]
        for entry in best_first(entries):
            if _data(self.configs[entry.name]) != _data(first):
                continue
            kept = self._kept(entry, len(data))
            try:
                labels = [np.load(kept.file(number)) for number in samples]
            except (OSError, ValueError, EOFError) as error:
                self._warn(f"sweep_pictures.png is without {entry.name}: {_named(error)}")
                continue
            name = f"{entry.name}, mean IoU {_percent(entry.mean_iou)}"
            rows.append((name, labels))
        tiles: list[tuple[str, np.ndarray]] = []
        for name, row in rows:  # a name may be wider than a picture: it has the row to itself
            tiles += [("" if n else name, x) for n, x in enumerate(row)]
        image_grid(
            tiles,
            self.folder / "sweep_pictures.png",
            columns=len(samples),
            names=split.classes.names,
            colors=colors,
        )

    def _kept(self, entry: Entry, images: int) -> SavedPredictions:
        return SavedPredictions.evenly(
            self.folder / entry.name / "evaluation" / "labels", SHOWN, images
        )

    def _samples(self, data: ValDataset, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Those of the samples that can be read."""
        samples = {}
        for number in numbers:
            try:
                samples[number] = data[number]
            except (OSError, ValueError) as error:
                self._warn(f"sweep_pictures.png is without an image: {_named(error)}")
        return samples

    def _warn(self, text: str) -> None:
        """Say it, once: pictures are drawn again after every recipe."""
        if text not in self.warned:
            self.warned.add(text)
            log.warning("%s", text)

    def _budget(self, entry: Entry, cfg: Config, title: str) -> list[str]:
        """Overrides with which the steps of a recipe take the given time.

        The number of epochs stays, so that it is validated as often.
        """
        note = self.folder / entry.name / "pace.json"
        if note.is_file():
            pace = json.loads(note.read_text("utf-8"))["seconds_per_step"]
        else:
            trial = self.folder / entry.name / "pace"
            settings = [
                *("DIR", str(trial), "TRAIN.num_epoch", "1", "TRAIN.eval_epochs", "0"),
                *("TRAIN.epoch_iters", str(FIRST_STEPS + PACE_STEPS), "TRAIN.disp_iter", "1"),
                *("TRAIN.checkpoint_minutes", "0"),
            ]
            self._command("train", entry, [], [*self.opts, *settings], f"{title}: pace", None)
            lines = [x for x in read_metrics(trial / METRICS) if x["kind"] == "train"]
            took = {x["step"]: x["seconds"] for x in lines}
            pace = (took[FIRST_STEPS + PACE_STEPS] - took[FIRST_STEPS]) / PACE_STEPS
            note.write_text(json.dumps({"seconds_per_step": pace}) + "\n", "utf-8")
            for file in trial.glob("*.pth"):
                file.unlink()
        iterations = max(1, round(60 * self.minutes / pace / cfg.TRAIN.num_epoch))
        return ["TRAIN.epoch_iters", str(iterations)]

    def _command(
        self,
        command: str,
        entry: Entry,
        options: Sequence[str],
        opts: Sequence[str],
        title: str,
        watched: Path | None,
        fine: Sequence[int] = (0,),
        result: Path | None = None,
    ) -> None:
        """Run a command of the command line; its output goes to a file.

        Args:
            command: its name.
            entry: the recipe.
            options, opts: what comes before and after the recipe.
            title: of the bar.
            watched: folder whose log tells how far it is.
            fine: exit statuses of success.
            result: file that success leaves.

        Raises:
            ChildProcessError: it did not succeed; with its last words.
            KeyboardInterrupt: somebody wants the queue to stop; the command has stopped.
        """
        output = self.folder / f"{entry.name}.log"
        begin = output.stat().st_size if output.is_file() else 0
        words = [sys.executable, "-m", "mit_semseg.cli", command, *options]
        words += ["--gpus", self.gpus] if self.gpus else []
        words += ["--threads", str(fixed_threads())] if fixed_threads() else []
        with output.open("a", encoding="utf-8") as file, _forwarded() as children:
            process = subprocess.Popen(
                [*words, "--cfg", entry.recipe, *opts],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Control-C comes once, from here
            )
            children.append(process)
            with tqdm(desc=f"{title}: {command}", unit="%", total=100, leave=False) as bar:
                while (code := _ended(process, 1.0)) is None:
                    if watched is not None:
                        bar.n = round(_progress(watched, self._steps(entry, opts)))
                    bar.refresh()
        if children.count(process) == 0 or code in (-signal.SIGINT, 130):
            raise KeyboardInterrupt
        if code not in fine or not (result is None or result.is_file()):
            raise ChildProcessError(f"{command} ended with {code}: {_last_words(output, begin)}")

    def _steps(self, entry: Entry, opts: Sequence[str]) -> int:
        """Steps of the whole training; 0 when they are not known before it runs."""
        train = read_config(entry.recipe, list(opts)).TRAIN
        return 0 if train.epoch_iters == "auto" else train.epoch_iters * train.num_epoch

    def _write(self) -> None:
        plain = {
            "minutes": self.minutes,
            "overrides": self.opts,
            "recipes": [asdict(entry) for entry in [*self.entries, *self.others]],
        }
        part = self.folder / ".sweep.json.part"
        part.write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
        os.replace(part, self.folder / "sweep.json")
        (self.folder / "sweep.md").write_text(table(self.entries) + "\n", "utf-8")
        self._draw()


@contextlib.contextmanager
def _forwarded() -> Iterator[list[subprocess.Popen[bytes]]]:
    """SIGINT and SIGTERM stop the children in the list, which is emptied."""
    children: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: Any) -> None:
        for child in children:
            child.send_signal(number)
        children.clear()

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _progress(folder: Path, steps: int) -> float:
    """Per cent of the steps done, as far as the log says."""
    try:
        lines = [x for x in read_metrics(folder / METRICS) if x["kind"] == "train"]
    except (FileNotFoundError, ValueError):
        return 0.0
    return 100 * lines[-1]["step"] / steps if lines and steps else 0.0


def _last_words(output: Path, begin: int) -> str:
    """The error that a log ends with, of what was written after its first `begin` bytes."""
    written = output.read_bytes()[begin:].decode("utf-8", errors="replace")
    lines = [x.strip() for x in written.replace("\r", "\n").splitlines() if x.strip()]
    errors = [x for x in lines if "error: " in x.lower()] or lines
    return f"{errors[-1] if errors else 'nothing'} ({output})"


def _named(error: Exception) -> str:
    """An error in one line, with its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _data(cfg: Config) -> tuple[Any, ...]:
    """What tells validation data apart."""
    data = cfg.DATASET
    return data.format, Path(data.root_dataset).resolve(), data.list_val, data.num_class


def line(entry: Entry) -> str:
    """One recipe in one line."""
    if entry.state == "failed":
        return f"{entry.name}: failed: {entry.error}"
    return (
        f"{entry.name}: mean IoU {_percent(entry.mean_iou)}, accuracy "
        f"{_percent(entry.pixel_accuracy)}, {entry.steps} steps in {entry.train_minutes:.1f} min"
    )


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f} %"


def best_first(entries: Sequence[Entry]) -> list[Entry]:
    """Those without a figure come last."""
    return sorted(entries, key=lambda e: -1.0 if e.mean_iou is None else e.mean_iou, reverse=True)


def table(entries: Sequence[Entry]) -> str:
    """The queue in Markdown, the best first."""
    rows = [
        "| recipe | encoder + decoder | mean IoU | accuracy | steps | minutes | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in best_first(entries):
        figures: Mapping[str, str] = {
            "done": f"{_percent(e.mean_iou)} | {_percent(e.pixel_accuracy)} | {e.steps} | "
            f"{e.train_minutes:.1f} | {e.images_per_second:.2f}",
            "failed": f"failed: {e.error.replace('|', '/')} | | | |",
            "waiting": "waiting | | | |",
        }
        rows.append(f"| {e.name} | {e.encoder} + {e.decoder} | {figures[e.state]} |")
    return "\n".join(rows)


def run(
    recipes: Sequence[str | Path],
    out: str | Path,
    *,
    gpus: str | None = None,
    minutes: float = 0.0,
    opts: Sequence[str] = (),
) -> list[Entry]:
    """The command: see `Sweep`; prints the table at the end."""
    began = time.monotonic()
    entries = Sweep(recipes, out, gpus=gpus, minutes=minutes, opts=opts).run()
    print(f"\n{table(entries)}\n\n{(time.monotonic() - began) / 60:.1f} min; {out}/sweep.png")
    return entries
