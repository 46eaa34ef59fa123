"""`mit-semseg overfit`: a sanity check that a model can overfit a single image."""

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
from mit_semseg.errors import counted
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.precision import Precision
from mit_semseg.visualize.sheets import Sample, contact_sheet

# Pixel accuracy to reach, and steps between evaluations.
TARGET, EVALUATE_EVERY = 0.98, 10
# Learning rates, tried until one succeeds (narrow networks need a high one, networks without
# BatchNorm a low one), and steps of warm-up.
RATES, WARMUP = (1e-3, 5e-3, 2e-4), 10
# Least number of logits along the short side; networks with a large stride get a larger image.
MIN_LOGITS = 10
# Least momentum of BatchNorm. With MobileNetV3's 0.01 the running statistics would be dominated by
# their initial values for hundreds of steps.
MOMENTUM = 0.1


@dataclass
class Overfit:
    """Result of overfitting one image.

    Attributes:
        name: of the recipe, or encoder + decoder.
        accuracy: pixel accuracy, at the resolution of the labels.
        steps: with the best learning rate.
        rate: the best learning rate.
        loss: of the last step.
        seconds: total time.
        sample: image, ground truth and prediction.
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
            f"{self.name}: accuracy {100 * self.accuracy:.2f} %{short}, after "
            f"{counted(self.steps, 'step')} with learning rate {self.rate:g}, loss "
            f"{self.loss:.3f}, {self.seconds:.0f} s"
        )

    def figures(self) -> dict[str, Any]:
        """The attributes for JSON, without the sample."""
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
    """Train a model on its first training image until it has overfitted it.

    Without augmentation and dropout, and with a BatchNorm momentum of at least 0.1. Labels have the
    resolution of the logits, as in the published recipes.

    Args:
        cfg: a checked configuration.
        device: where to compute.
        name: in the result; default: encoder + decoder.
        steps: most steps per learning rate.
        side: short side of the image in pixels; larger for networks with fewer than 10 logits along
            it.
        progress: show a progress bar.

    Raises:
        ValueError: the data or the model cannot be used.
        FileNotFoundError: the data does not exist.
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
        size = max(side, MIN_LOGITS * stride)
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
    """A batch of the first training image, without augmentation.

    Args:
        options: the settings.
        side: short side in pixels.
        stride: image pixels per label pixel.
        depth: whether to include depth, if the recipe has it; without depth images are uint8.
    """
    plain = replace(
        options.DATASET,
        depth=depth and options.DATASET.depth,
        batching="aspect",
        crop_size=(),
        imgSizes=(side,),
        random_flip=False,
        color_jitter=0.0,
        cutmix=0.0,
        classmix=0.0,
        transform="",
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
    """The module without dropout and with a BatchNorm momentum of at least `MOMENTUM`."""
    for layer in module.modules():
        if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            layer.p = 0.0
        elif isinstance(layer, _BatchNorm) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, MOMENTUM)
    return module


@torch.no_grad()
def label_stride(module: SegmentationModule, options: Options, side: int) -> int:
    """Stride of the logits in image pixels, at least 1."""
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
    """Train with one learning rate until the target is reached."""
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
            if step % EVALUATE_EVERY == 0 or step == steps or not finite:
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
    """Predicted class ids in evaluation mode, (h, w) as the labels."""
    size = (batch["seg_label"].shape[-2], batch["seg_label"].shape[-1])
    inputs = {k: v for k, v in batch.items() if k != "seg_label"}
    return module.eval()(inputs, segSize=size)[0].argmax(0).cpu().numpy()


def table(found: list[Overfit]) -> str:
    """A Markdown table of results."""
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
    """Run `overfit` and write `overfit.md`, `overfit.json` and `overfit.png`.

    Args:
        cfg: a checked configuration.
        device: where to compute.
        out: folder of the results.
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
    print(f"{found}\nResults in {folder}")
    return found
