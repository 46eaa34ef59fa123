"""Loggers of a training (`TRAIN.logger`): TensorBoard, Weights & Biases, MLflow.

They take the records of `metrics.jsonl`. A thread calls them, so that a slow disk or network does
not slow the training, and one that fails is warned of once and left out.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mit_semseg.config.options import SETTINGS, Options
from mit_semseg.errors import one_line
from mit_semseg.files import replacing

log = logging.getLogger("mit_semseg")

IDS = "loggers.json"  # in DIR: the ids with which a resumed run is continued
TENSORBOARD = "tensorboard"  # folder in DIR
PROJECT = "mit_semseg"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set
# Entries that wait for the loggers; more are dropped.
MAX_WAITING = 1000
# Seconds for which the end of a training waits for what has not been logged.
LAST_SECONDS = 30.0


@dataclass(frozen=True)
class Run:
    """What a logger is told about a run.

    Attributes:
        folder: `DIR`.
        options: all settings.
        recipe: the settings as YAML.
        step: at which the run starts or is resumed.
    """

    folder: Path
    options: Options
    recipe: str
    step: int = 0

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The settings by dotted key: numbers, strings and booleans; lists are strings."""
        values = {key: self.options[key] for key in SETTINGS}
        return {k: str(list(v)) if isinstance(v, tuple) else v for k, v in values.items()}

    def id_of(self, logger: str) -> str:
        """The id that the logger had in the run that is resumed; "" for a new run."""
        return str(self._ids().get(logger, ""))

    def keep_id(self, logger: str, value: str) -> None:
        """Write the id of a logger, for a resumed run."""
        with replacing(self.folder / IDS) as part:
            part.write_text(json.dumps({**self._ids(), logger: value}), encoding="utf-8")

    def _ids(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads((self.folder / IDS).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found


class Logger:
    """One logger; subclasses import their package when they are opened.

    Attributes:
        package: name to import.
        extra: of this package, which installs it.
    """

    package = ""
    extra = ""

    def open(self, run: Run) -> None:
        """Start or continue a run, and log its settings."""
        raise NotImplementedError(f"{type(self).__name__} must implement open")

    def log(self, step: int, values: Mapping[str, float], images: Mapping[str, np.ndarray]) -> None:
        """Log values, and images, (H, W, 3) uint8, by name."""
        raise NotImplementedError(f"{type(self).__name__} must implement log")

    def close(self) -> None:
        """Write what is left."""

    def errors(self) -> tuple[type[Exception], ...]:
        """Exceptions of the package besides those of Python."""
        return ()


class TensorBoard(Logger):
    """Event files in `DIR/tensorboard`: `tensorboard --logdir DIR`."""

    package = "tensorboard"
    extra = "tensorboard"

    def open(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then ignores what a killed run has logged after the state resumed from.
        purge = run.step + 1 if run.step else None
        self.writer = SummaryWriter(str(run.folder / TENSORBOARD), purge_step=purge, flush_secs=10)
        self.writer.add_text("recipe", f"```yaml\n{run.recipe}\n```", run.step)
        if not run.step:
            self.writer.add_hparams(run.hyperparameters, {}, run_name=".")

    def log(self, step: int, values: Mapping[str, float], images: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for name, image in images.items():
            self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB(Logger):
    """Weights & Biases; `WANDB_PROJECT`, `WANDB_MODE offline` and its other variables apply."""

    package = "wandb"
    extra = "wandb"

    def open(self, run: Run) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.api.api_key:
            raise ValueError("not logged in: run `wandb login`, or set WANDB_MODE=offline")
        known = run.id_of("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=known or None,
            resume="allow" if known else None,
            name=os.environ.get("WANDB_NAME", run.folder.name),
            dir=str(run.folder),
            config=run.hyperparameters,
            settings=wandb.Settings(console="off", silent=True),
        )
        run.keep_id("wandb", self.run.id)
        # W&B's own step cannot go back, as that of a resumed run does.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float], images: Mapping[str, np.ndarray]) -> None:
        import wandb

        shown = {name: wandb.Image(image) for name, image in images.items()}
        self.run.log({"step": step, **values, **shown})

    def close(self) -> None:
        self.run.finish()

    def errors(self) -> tuple[type[Exception], ...]:
        import wandb

        return (wandb.Error,)


class MLflow(Logger):
    """MLflow; `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` apply."""

    package = "mlflow"
    extra = "mlflow"

    def open(self, run: Run) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        self.id = run.id_of("mlflow")
        if not self.id:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self.client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self.client.create_experiment(name)
            self.id = self.client.create_run(number, run_name=run.folder.name).info.run_id
            run.keep_id("mlflow", self.id)
        self.client.update_run(self.id, status="RUNNING")
        # Parameters cannot be changed: those of a resumed run are the first ones.
        logged = self.client.get_run(self.id).data.params
        new = [Param(k, str(v)[:500]) for k, v in run.hyperparameters.items() if k not in logged]
        for begin in range(0, len(new), 100):  # the most that a server takes at once
            self.client.log_batch(self.id, params=new[begin : begin + 100])
        self.client.log_text(self.id, run.recipe, "recipe.yaml")

    def log(self, step: int, values: Mapping[str, float], images: Mapping[str, np.ndarray]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        # Names in MLflow have no brackets or commas, and may not be like "a/../b".
        metrics = [Metric(_plain(name), value, now, step) for name, value in values.items()]
        for begin in range(0, len(metrics), 1000):
            self.client.log_batch(self.id, metrics=metrics[begin : begin + 1000])
        for name, image in images.items():
            self.client.log_image(self.id, image, artifact_file=f"{name}/step_{step}.png")

    def close(self) -> None:
        self.client.set_terminated(self.id)

    def errors(self) -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException

        return (MlflowException,)


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of loggers are installed.

    Raises:
        ValueError: one is not; the message names the extra.
    """
    for name in names:
        logger = LOGGERS[name]
        if importlib.util.find_spec(logger.package) is None:
            raise ValueError(
                f"TRAIN.logger {name} needs {logger.package}: pip install "
                f"'mit_semseg[{logger.extra}]'"
            )


class Loggers:
    """Passes the records of a training to loggers, in a thread.

    Args:
        names: of the loggers, keys of `LOGGERS`.
        folder: `DIR`.
        options: all settings.
        recipe: the settings as YAML.
        classes: names of the classes.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        options: Options,
        recipe: str,
        classes: Sequence[str],
    ) -> None:
        self.loggers = {name: LOGGERS[name]() for name in names}
        self.classes = tuple(classes)
        self.run = Run(folder, options, recipe)
        self._entries: queue.Queue[tuple[Any, ...] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._dropped = False

    def open(self, step: int) -> None:
        """Start the thread, which opens the loggers.

        Args:
            step: from which the run continues.
        """
        if self.loggers:
            run = replace(self.run, step=step)
            self._thread = threading.Thread(
                target=self._work, args=(run,), name="loggers", daemon=True
            )
            self._thread.start()

    def add(self, record: Mapping[str, Any], images: Mapping[str, np.ndarray]) -> None:
        """Log a record of `metrics.jsonl` and images; does not wait."""
        if self._thread is None:
            return
        try:
            self._entries.put_nowait((record["step"], scalars(record, self.classes), images))
        except queue.Full:
            if not self._dropped and self._thread.is_alive():
                log.warning("TRAIN.logger cannot keep up: some records are not logged")
            self._dropped = True

    def close(self) -> None:
        """Log what is waiting, for at most `LAST_SECONDS`."""
        if self._thread is None:
            return
        end = time.monotonic() + LAST_SECONDS
        while self._thread.is_alive():
            try:
                self._entries.put(None, timeout=0.1)
                break
            except queue.Full:
                if time.monotonic() > end:
                    break
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            log.warning("TRAIN.logger does not end: its last records may be missing")
        self._thread = None

    def _work(self, run: Run) -> None:
        self._call("open", run)
        while (entry := self._entries.get()) is not None:
            self._call("log", *entry)
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        for name, logger in list(self.loggers.items()):
            try:
                getattr(logger, method)(*arguments)
            except _errors_of(logger) as error:
                del self.loggers[name]
                log.warning(
                    "TRAIN.logger %s is left out (%s); metrics.jsonl has all figures",
                    *(name, one_line(error, 200, named=True)),
                )


def _errors_of(logger: Logger) -> tuple[type[Exception], ...]:
    try:
        own = logger.errors()
    except ImportError:
        own = ()
    common = (
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    )
    return (*common, *own)


def scalars(record: Mapping[str, Any], classes: Sequence[str] = ()) -> dict[str, float]:
    """The finite figures of a record of `metrics.jsonl`, under the names of the loggers.

    Args:
        record: of kind `train` or `val`.
        classes: names of the classes.

    Example:
        >>> scalars({"kind": "val", "mean_iou": 0.5, "iou": [0.5, None]}, ["road", "sky"])
        {'val/mean_iou': 0.5, 'iou/road': 0.5}
    """
    groups = {
        "lr_encoder": "lr/encoder",
        "lr_decoder": "lr/decoder",
        "images_per_second": "speed/images_per_second",
        "data_wait": "speed/data_wait",
        "seconds": "speed/seconds",
    }
    found = {
        groups.get(key, f"{record['kind']}/{key}"): value
        for key, value in record.items()
        if key not in ("kind", "step", "epoch", "iou")
    }
    found |= {f"iou/{name}": value for name, value in zip(classes, record.get("iou", ()))}
    return {k: float(v) for k, v in found.items() if v is not None and math.isfinite(v)}


def _plain(name: str) -> str:
    """A name with the characters that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name).replace("..", "_")
