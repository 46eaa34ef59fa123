"""`mit-semseg overfit`: a model that cannot overfit one image will not learn many."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from mit_semseg.config import Options, TrainOptions
from mit_semseg.config.node import Config
from mit_semseg.dataset import TrainDataset, build_split
from mit_semseg.engine.training.optim import build_optimizer, set_learning_rates
from mit_semseg.engine.training.schedule import learning_rate_factor
from mit_semseg.engine.training.state import seed_everything
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.precision import Precision
from mit_semseg.visualize.sheets import Sample, contact_sheet

# Accuracy that a model has to reach, and steps between two looks at it.
TARGET, LOOK = 0.98, 10
# Learning rates, tried until one succeeds: narrow networks want a high one, those without
# BatchNorm a low one. The first steps rise to it.
RATES, WARMUP = (1e-3, 5e-3, 2e-4), 10
# Scores along the short side, at least: coarse networks get a larger image.
LEAST_SCORES = 10
# Least momentum of BatchNorm, torch's default: with MobileNetV3's 0.01 the running statistics would
# still be partly those they began with, a variance of 1 where that of the image is a thousandth.
MOMENTUM = 0.1


@dataclass
class Overfit:
    """How well a model has learned one image.

    Attributes:
        name: of the recipe, or encoder + decoder.
        accuracy: share of the labelled pixels that are right, at the resolution of the labels.
        steps: that it took, those of rates that failed left out.
        rate: the learning rate.
        loss: of the last step.
        seconds: of everything.
        sample: image, truth and prediction.
    """

    name: str
    accuracy: float
    steps: int
    rate: float
    loss: float
    seconds: float
    sample: Sample = field(repr=False)

    def __str__(self) -> str:
        short = "" if self.accuracy >= TARGET else f", below {100 * TARGET:.0f} %"
        return (
            f"{self.name}: {100 * self.accuracy:.2f} % after {self.steps} steps of rate "
            f"{self.rate:g}{short}, loss {self.loss:.3f}, {self.seconds:.0f} s"
        )

    def figures(self) -> dict[str, Any]:
        """All but the sample, as JSON takes it."""
        return {key: value for key, value in vars(self).items() if key != "sample"}


def overfit(
    cfg: Options | Config,
    device: torch.device,
    *,
    name: str = "",
    steps: int = 400,
    side: int = 96,
    progress: bool = True,
) -> Overfit:
    """Train a configured model on its first training image, until it knows it.

    The image is taken as training would take it, but for chance: no flips, no crops, no jitter, no
    dropout. The statistics of BatchNorm follow with a momentum of 0.1 or more. Labels have the
    resolution of the network's scores, as the published recipes have them.

    Args:
        cfg: a checked configuration; its data set must be there.
        device: where to compute.
        name: in the result; default: encoder + decoder.
        steps: at most, for each learning rate that is tried.
        side: short side of the image in pixels; more for networks that would give less than 10
            scores along it.
        progress: show a bar.

    Raises:
        ValueError: the data or the model cannot be used.
        FileNotFoundError: there is no such data.
    """
    options = Options.read(cfg)
    if steps < 1:
        raise ValueError(f"--steps {steps}: give at least 1")
    name = name or options.MODEL.name
    began, tries = time.monotonic(), []
    for rate in RATES:
        seed_everything(options.TRAIN.seed)
        module = prepared(ModelBuilder.from_config(options, inference=False)).to(device)
        stride = label_stride(module, options, side)
        size = max(side, LEAST_SCORES * stride)
        batch = one_image(options, size, stride)
        image = one_image(options, size, stride, depth=False)["img_data"][0].permute(1, 2, 0)
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        tries.append(_train(module, tensors, options, rate, steps, name, image.numpy(), progress))
        if tries[-1].accuracy >= TARGET:
            break
    best = max(tries, key=lambda one: one.accuracy)
    best.seconds = time.monotonic() - began
    return best


def one_image(options: Options, side: int, stride: int, depth: bool = True) -> dict[str, Any]:
    """The batch of the first training image, without chance.

    Args:
        options: the settings.
        side: short side in pixels.
        stride: image pixels per label pixel.
        depth: False leaves depth out where the recipe has it: bytes instead of floats.
    """
    plain = replace(
        options.DATASET,
        depth=depth and options.DATASET.depth,
        batching="aspect",
        crop_size=(),
        imgSizes=(side,),
        random_flip=False,
        color_jitter=0.0,
        padding_constant=math.lcm(options.DATASET.padding_constant, stride),
        segm_downsampling_rate=stride,
    )
    split = build_split(plain, "train")
    data = TrainDataset(
        plain.root_dataset,
        split.records[:1],
        plain,
        seed=options.TRAIN.seed,
        label_map=split.label_map,
        normalized=False,
    )
    return data[0]


def prepared(module: SegmentationModule) -> SegmentationModule:
    """The module without dropout, and with statistics that follow within some hundred steps."""
    for layer in module.modules():
        if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            layer.p = 0.0
        elif isinstance(layer, _BatchNorm) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, MOMENTUM)
    return module


@torch.no_grad()
def label_stride(module: SegmentationModule, options: Options, side: int) -> int:
    """Image pixels per pixel of the network's scores, 1 for those that give more."""
    side = -(-side // 32) * 32
    image = next(module.parameters()).new_zeros(1, options.MODEL.in_channels, side, side)
    return max(side // module.eval().logits(image).shape[-1], 1)


def _train(
    module: SegmentationModule,
    batch: dict[str, Tensor],
    options: Options,
    rate: float,
    steps: int,
    name: str,
    image: np.ndarray,
    progress: bool,
) -> Overfit:
    """Steps of one learning rate, until the model knows the image."""
    optimizer = build_optimizer("AdamW", (module, rate), weight_decay=0.0)
    precision = Precision.of(options.TRAIN.precision, next(module.parameters()).device)
    schedule = TrainOptions(lr_pow=0.9, warmup_iters=WARMUP)
    truth, began = batch["seg_label"][0].cpu().numpy(), time.monotonic()
    with tqdm(range(1, steps + 1), desc=name, disable=not progress, leave=False) as bar:
        for step in bar:
            set_learning_rates(optimizer, rate * learning_rate_factor(schedule, step, 2 * steps))
            module.train()
            with precision.products(), precision.autocast():
                loss, _ = module(dict(batch))
            finite = bool(torch.isfinite(loss))
            if finite:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
                optimizer.step()
            if step % LOOK == 0 or step == steps or not finite:
                prediction = predicted(module, batch)
                accuracy = float((prediction == truth)[truth >= 0].mean())
                bar.set_postfix_str(f"loss {loss.item():.3f}, accuracy {100 * accuracy:.1f} %")
                if accuracy >= TARGET or not finite:
                    break
    stride = image.shape[0] // truth.shape[0]
    sample = Sample(
        name, image, *(x.repeat(stride, 0).repeat(stride, 1) for x in (truth, prediction))
    )
    return Overfit(name, accuracy, step, rate, loss.item(), time.monotonic() - began, sample)


@torch.no_grad()
def predicted(module: SegmentationModule, batch: dict[str, Tensor]) -> np.ndarray:
    """The classes of the image, (h, w) as the labels, in evaluation mode."""
    size = (batch["seg_label"].shape[-2], batch["seg_label"].shape[-1])
    inputs = {k: v for k, v in batch.items() if k != "seg_label"}
    return module.eval()(inputs, segSize=size)[0].argmax(0).cpu().numpy()


def table(found: list[Overfit]) -> str:
    """Models in Markdown."""
    rows = ["| model | accuracy | steps | learning rate | seconds |", "|---|---|---|---|---|"]
    rows += [
        f"| {x.name} | {100 * x.accuracy:.2f} % | {x.steps} | {x.rate:g} | {x.seconds:.0f} |"
        for x in found
    ]
    return "\n".join(["# Overfitting one image", "", *rows, "", "![Predictions](overfit.png)", ""])


def run(
    cfg: Options | Config,
    device: torch.device,
    out: str | Path,
    *,
    name: str = "",
    steps: int = 400,
    side: int = 96,
) -> Overfit:
    """The command: `overfit`, and `overfit.md`, `overfit.json` and `overfit.png` (image, truth,
    prediction and errors) in a folder.

    Args:
        cfg: the recipe.
        device: where to compute.
        out: the folder.
        name, steps, side: see `overfit`.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    options = Options.read(cfg)
    classes = build_split(options.DATASET, "train").classes
    found = overfit(options, device, name=name, steps=steps, side=side)
    (folder / "overfit.md").write_text(table([found]), "utf-8")
    (folder / "overfit.json").write_text(json.dumps([found.figures()], indent=2) + "\n", "utf-8")
    sheet = folder / "overfit.png"
    contact_sheet([found.sample], classes.names, classes.colors, sheet, title=found.name)
    print(f"{found}\nTable and picture in {folder}")
    return found
