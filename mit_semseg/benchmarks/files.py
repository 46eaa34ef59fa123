"""Rows that read files: data loading, prediction of a folder, evaluation of a list."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mit_semseg.benchmarks import published
from mit_semseg.benchmarks.clock import Runnable, clock_of
from mit_semseg.benchmarks.rows import CAMVID_WEIGHTS, HEIGHT, SCALES, WIDTH, Row
from mit_semseg.benchmarks.sides import Timing
from mit_semseg.config import Options
from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.transforms import Normalize
from mit_semseg.demo import streets
from mit_semseg.engine.cpu import cpu_count
from mit_semseg.engine.evaluate import evaluate
from mit_semseg.engine.launch import read_options
from mit_semseg.engine.predict import predict


def write_scenes(
    folder: Path, count: int, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> list[tuple[str, str]]:
    """Renders street scenes as JPEGs with masks, by default of the size of ADE20K's images."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    pairs = []
    for k in range(count):
        image, label = streets.render((seed, k), size)
        # Noise, because smooth rendered images are decoded faster than photographs.
        noise = rng.normal(0, 6, (*size, 1))
        noisy = np.clip(image + noise, 0, 255).astype(np.uint8)
        paths = str(folder / f"{k}.jpg"), str(folder / f"{k}.png")
        Image.fromarray(noisy).save(paths[0], quality=90)
        Image.fromarray(label.astype(np.uint8)).save(paths[1])
        pairs.append(paths)
    return pairs


@dataclass(frozen=True)
class Loading(Row):
    """Files to training batches of two, on one core."""

    threads: int = 1
    repeats: int = 7
    images: int = 16  # on disk, and in one pass
    normalised: bool = False  # by the loading process, not on the device

    group = "Data"

    @property
    def title(self) -> str:  # type: ignore[override]
        where = "on the same core too" if self.normalised else "left to the device"
        return f"{WIDTH}x{HEIGHT} JPEGs to batches, one worker core, normalisation {where}"

    def _dataset(self, folder: str) -> TrainDataset:
        records = [
            {"fpath_img": image, "fpath_segm": mask, "width": WIDTH, "height": HEIGHT}
            for image, mask in write_scenes(Path(folder), self.images, 1)
        ]
        return TrainDataset("", records, {}, batch_per_gpu=2, normalized=False)

    def published(self) -> Runnable:
        folder = tempfile.TemporaryDirectory(prefix="bench-")
        data = self._dataset(folder.name)
        files = {record["fpath_img"]: record["fpath_segm"] for record in data.list_sample}
        # The same images in the same batches, with other random sizes and flips.
        batches = [[(x, files[x]) for x in data.files(i)] for i in range(data.batches_per_pass)]
        rng = np.random.default_rng(0)

        def one_pass() -> None:
            assert folder  # not removed before the end
            for pairs in batches:
                flips = (rng.random(len(pairs)) < 0.5).tolist()
                published.training_batch(pairs, int(rng.choice(SCALES)), 1000, flips)

        return one_pass

    def ours(self) -> Runnable:
        folder = tempfile.TemporaryDirectory(prefix="bench-")
        data = self._dataset(folder.name)
        normalize = Normalize.of({})
        start = 0

        def one_pass() -> None:
            assert folder  # not removed before the end
            nonlocal start
            for i in range(data.batches_per_pass):
                batch = data[start + i]
                if self.normalised:
                    normalize(batch["img_data"], batch["img_size"])
            start += data.batches_per_pass

        return one_pass


@dataclass(frozen=True)
class Throughput(Row):
    """Images per second of a command, from the difference of a short and a long run, which excludes
    the time for loading the model.

    Attributes:
        size: height and width of the images.
        few: number of images of the short run.
        most: maximum number of images of the long run.
        scale: short side of the network's input; 0: as configured.
        rate: target in images per second, on a machine with at least `cores` cores.
    """

    baseline: str = ""
    precision: str = "auto"
    repeats: int = 0
    images: int = 1
    size: tuple[int, int] = (360, 480)
    few: int = 16
    most: int = 480
    scale: int = 0
    rate: float | None = None
    cores: int = 16
    weights: str = str(CAMVID_WEIGHTS)

    group = "Files"

    @property
    def missing(self) -> str:
        if not (Path(self.weights) / "config.yaml").is_file():
            return f"there are no weights in {self.weights}"
        return ""

    @property
    def torch_device(self) -> torch.device:
        """`device` as commands use it."""
        return torch.device("cpu") if self.device == "cpu" else torch.device(self.device, 0)

    @abstractmethod
    def process(self, folder: Path, files: list[tuple[str, str]]) -> None:
        """Process images, given with their masks, and write the results to a folder."""

    def options(self, settings: Mapping[str, Any]) -> Options:
        """The options of the checkpoint, with other settings."""
        settings = {"DIR": self.weights, **settings}
        if self.scale:
            settings |= {"TEST.imgSizes": [self.scale], "VAL.imgSizes": [self.scale]}
        file = Path(self.weights) / "config.yaml"
        return read_options(file, [str(x) for pair in settings.items() for x in pair])

    def ours(self) -> Runnable:
        folder = tempfile.TemporaryDirectory(prefix="bench-")
        root = Path(folder.name)
        scenes = write_scenes(root, min(16, self.most), 2, self.size)
        n = len(scenes)
        files = [_copied(scenes[k % n], root / f"copy{k // n}") for k in range(self.most)]
        clock = clock_of(self.device)

        def work(count: int) -> None:
            silent = contextlib.redirect_stdout(io.StringIO())
            with silent, tempfile.TemporaryDirectory(dir=root) as out:
                self.process(Path(out), files[:count])

        def run() -> dict[str, Any]:
            assert folder  # not removed before the end
            work(self.few)
            base, _ = clock.timed(partial(work, self.few))
            fitting = int(0.5 * self.budget * self.few / base)
            count = max(2 * self.few, min(self.most, fitting))
            total, _ = clock.timed(partial(work, count))
            more = count - self.few
            kernels = clock.kernel_seconds(partial(work, self.few))
            return {
                # The difference can be negative if the start takes most of the time.
                "seconds": (total - base) / more if total > base else total / count,
                "kernels": None if kernels is None else kernels / self.few,
            }

        return run

    def measured(self, timings: dict[str, Timing]) -> dict[str, Timing]:
        one = timings["ours"]
        kernels = one.result["kernels"]
        kernels = None if kernels is None else float(kernels)
        return {
            "ours": replace(one, seconds=[float(one.result["seconds"])], kernel_seconds=kernels)
        }

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        if self.rate is None:
            return "", None
        target = f"at least {self.rate:g} images/s with {self.cores} cores"
        if cpu_count() < self.cores:
            return f"{target}, this machine has {cpu_count()}", None
        return target, 1 / timings["ours"].median >= self.rate


@dataclass(frozen=True)
class FolderPrediction(Throughput):
    """`mit-semseg predict` of a folder, with three output files per image."""

    @property
    def title(self) -> str:  # type: ignore[override]
        height, width = self.size
        return f"test.py, {width}x{height} images, color + overlay + legend"

    def process(self, folder: Path, files: list[tuple[str, str]]) -> None:
        save = ["color", "overlay", "legend"]
        options = self.options({"TEST.save": save, "TEST.precision": self.precision})
        images = [image for image, _ in files]
        results = predict(options, images, self.torch_device, result=folder, progress=False)
        failed = [one["error"] for one in results if "error" in one]
        if failed:
            raise RuntimeError(failed[0])


@dataclass(frozen=True)
class Evaluating(Throughput):
    """`mit-semseg eval` of a list."""

    @property
    def title(self) -> str:  # type: ignore[override]
        height, width = self.size
        return f"eval_multipro.py, {width}x{height} images, scale of the checkpoint"

    def process(self, folder: Path, files: list[tuple[str, str]]) -> None:
        height, width = self.size
        records = [
            {"fpath_img": image, "fpath_segm": mask, "width": width, "height": height}
            for image, mask in files
        ]
        listed = folder / "list.odgt"
        listed.write_text("".join(json.dumps(record) + "\n" for record in records))
        options = self.options(
            {
                "DATASET.format": "odgt",
                "DATASET.root_dataset": folder,
                "DATASET.list_train": listed,
                "DATASET.list_val": listed,
                "DATASET.classes": Path(self.weights) / "classes.csv",
                "VAL.precision": self.precision,
            }
        )
        evaluate(options, [self.torch_device], progress=False, out_dir=folder)


def _copied(pair: tuple[str, str], folder: Path) -> tuple[str, str]:
    """The same image and mask under another name."""
    folder.mkdir(exist_ok=True)
    made = []
    for file in map(Path, pair):
        made.append(str(folder / file.name))
        shutil.copyfile(file, made[-1])
    return made[0], made[1]
