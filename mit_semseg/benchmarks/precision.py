"""Effect of reduced precision on the labels of trained networks and on a training loss."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mit_semseg import shipped
from mit_semseg.benchmarks.clock import Runnable
from mit_semseg.benchmarks.rows import CAMVID_WEIGHTS, Row, equal_labels
from mit_semseg.benchmarks.sides import Timing
from mit_semseg.dataset import load_image
from mit_semseg.demo import streets
from mit_semseg.engine.launch import read_options
from mit_semseg.engine.train import train
from mit_semseg.engine.training.metrics_log import METRICS, read_metrics
from mit_semseg.segmenter import Segmenter
from mit_semseg.visualize import loss_curves

MIN_EQUAL = 0.995
MAX_IMAGES = 16
SEED = 304
RECIPE = shipped.HOME / "config" / "demo.yaml"


@dataclass(frozen=True)
class Labels(Row):
    """Labels of a trained network in float32 and in reduced precision.

    Attributes:
        weights: a checkpoint folder.
        folder: folder of the images.
        name: name of the network and the images.
    """

    baseline: str = "ours in fp32"
    weights: str = ""
    folder: str = ""
    name: str = ""
    repeats: int = 1

    group = "Precision"

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"labels in {self.precision}: {self.name}"

    def _run(self, precision: str) -> Runnable:
        with contextlib.redirect_stdout(None):
            segmenter = Segmenter.from_checkpoint(
                self.weights, device=self.device, precision=precision
            )
        images = [load_image(path) for path in self._images()]
        return lambda: np.concatenate([segmenter(x).labels.reshape(-1) for x in images])

    def published(self) -> Runnable:
        return self._run("fp32")

    def ours(self) -> Runnable:
        return self._run(self.precision)

    def agreement(self, theirs: Any, ours: Any) -> float | None:
        return equal_labels(theirs, ours)

    @property
    def missing(self) -> str:
        if not (Path(self.weights) / "config.yaml").is_file():
            return f"there are no weights in {self.weights}"
        return "" if self._images() else f"there are no images in {self.folder}"

    def _images(self) -> list[Path]:
        files = sorted(Path(self.folder).glob("*.png"))
        return files[:: max(1, len(files) // MAX_IMAGES)]

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        equal = equal_labels(timings["published"].result, timings["ours"].result)
        return f"at least {MIN_EQUAL:.1%} of labels equal", equal >= MIN_EQUAL


@dataclass(frozen=True)
class Curves(Row):
    """Training loss of the demo in float32 and in reduced precision, and with another seed."""

    baseline: str = "ours in fp32"
    folder: str = "bench/demo"
    epochs: int = 4
    repeats: int = 0

    group = "Precision"

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"loss of the demo's training in {self.precision}, {self.epochs} epochs"

    @property
    def missing(self) -> str:
        return "" if RECIPE.is_file() else f"{RECIPE.name} does not exist; run it in a checkout"

    def published(self) -> Runnable:
        return self._training("fp32", SEED)

    def ours(self) -> Runnable:
        return self._training(self.precision, SEED)

    def another_seed(self) -> Runnable:
        return self._training("fp32", SEED + 1)

    def sides(self) -> dict[str, Callable[[], Runnable]]:
        return {**super().sides(), "another seed": self.another_seed}

    def trained(self, precision: str, seed: int = SEED) -> Path:
        """Checkpoint folder of one of the trainings."""
        return Path(self.folder) / f"{precision}-{seed}"

    def _training(self, precision: str, seed: int) -> Runnable:
        root, out = Path(self.folder) / "data", self.trained(precision, seed)
        if not (root / "classes.csv").is_file():
            streets.write(root)
        settings = {
            "DIR": out,
            "DATASET.root_dataset": root,
            "DATASET.list_train": root / "training.odgt",
            "DATASET.list_val": root / "validation.odgt",
            "DATASET.classes": root / "classes.csv",
            "TRAIN.num_epoch": self.epochs,
            "TRAIN.eval_epochs": self.epochs,
            "TRAIN.disp_iter": 5,
            "TRAIN.precision": precision,
            "TRAIN.seed": seed,
        }
        options = read_options(RECIPE, [str(x) for pair in settings.items() for x in pair])

        def run() -> list[float]:
            # The training moves the folder of an earlier run away.
            train(options, [torch.device(self.device)], progress=False)
            return [x["loss"] for x in read_metrics(out / METRICS) if x["kind"] == "train"]

        return run

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        fp32, other, reduced = (
            smoothed(timings[name].result) for name in ("published", "another seed", "ours")
        )
        noise, difference = np.abs(fp32 - other).mean(), np.abs(fp32 - reduced).mean()
        loss_curves(
            {
                f"{self.precision}": timings["ours"].result,
                "fp32": timings["published"].result,
                "fp32, another seed": timings["another seed"].result,
            },
            Path(self.folder).parent / "loss_curves.png",
            title=f"Training loss, {self.epochs} epochs of the demo",
        )
        target = f"difference ({difference:.3f}) at most that of two seeds ({noise:.3f})"
        return target, bool(difference <= noise)


def smoothed(losses: Any, window: int = 4) -> np.ndarray:
    """Running mean, to reduce the effect of single batches."""
    return np.convolve(np.asarray(losses), np.ones(window) / window, mode="valid")


def rows(out: Path, device: str) -> list[Row]:
    """The rows of this module.

    Args:
        out: folder for the results, where the demo is trained.
        device: cpu or cuda.
    """
    data = Path(os.environ.get("SEMSEG_DATA", "$SEMSEG_DATA"))
    # Budgets on a GPU are part of its time limit.
    trained, labelled = (60.0, 60.0) if device == "cpu" else (120.0, 10.0)
    curves = Curves(precision="bf16", folder=str(out / "demo"), budget=trained)
    held_out = out / "demo" / "data" / "images" / "validation"
    made: list[Row] = [curves]
    for precision in ("bf16",) if device == "cpu" else ("bf16", "fp16"):
        made += [
            Labels(
                precision=precision,
                budget=labelled,
                weights=str(curves.trained("bf16")),
                folder=str(held_out),
                name="the demo's network, held-out streets",
            ),
            Labels(
                precision=precision,
                budget=labelled,
                weights=str(CAMVID_WEIGHTS),
                folder=str(data / "CamVid" / "val"),
                name="the committed CamVid network, validation images",
            ),
        ]
    return made
