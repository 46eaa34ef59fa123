"""`mit-semseg overfit`: a model that cannot overfit one image will not learn many."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from mit_semseg.config.node import Config
from mit_semseg.dataset import TrainDataset, build_split
from mit_semseg.demo import streets
from mit_semseg.engine.training.optim import build_optimizer, poly_factor, set_learning_rates
from mit_semseg.engine.training.state import seed_everything
from mit_semseg.models import (
    DECODERS,
    ENCODERS,
    ModelBuilder,
    SegmentationModule,
    check_pair,
)
from mit_semseg.models.papers import PAPER_MODELS
from mit_semseg.precision import Precision
from mit_semseg.tools.recipes import fingerprint
from mit_semseg.visualize.sheets import Sample, contact_sheet, image_grid

# Steps between two looks at the result, and those in which the rate rises from 0.
LOOK, WARMUP = 10, 10
# Scores along the short side, at least: coarse networks get a larger image.
LEAST_SCORES = 10
# The accuracy that a model has to reach.
TARGET = 0.98
# Of the running statistics of BatchNorm, at least.
MOMENTUM = 0.1
# One after the other, until one of them succeeds: narrow networks want a high rate, those without
# BatchNorm a low one.
RATES = (1e-3, 5e-3, 2e-4)


@dataclass
class Overfit:
    """How a model learned one image.

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
    sample: Sample


def overfit(
    cfg: Config,
    device: torch.device,
    *,
    name: str = "",
    steps: int = 400,
    target: float = TARGET,
    side: int = 96,
    progress: bool = True,
) -> Overfit:
    """Train a configured model on its first training image, until it knows it.

    The image is taken as training would take it, but for chance: no flips, no crops, no jitter, no
    dropout. The statistics of BatchNorm follow with a momentum of 0.1 or more.
    Labels have the resolution of the network's scores, as the published recipes have them.

    Args:
        cfg: a checked configuration; its data set must be there.
        device: where to compute.
        name: in the result.
        steps: at most, for each learning rate that is tried.
        target: accuracy to stop at.
        side: short side of the image in pixels; more for networks that would give less than 10
            scores along it.
        progress: show a bar.

    Raises:
        ValueError: the data or the model cannot be used.
        FileNotFoundError: there is no such data.
    """
    began = time.monotonic()
    best: Overfit | None = None
    for rate in RATES:
        seed_everything(cfg.TRAIN.seed)
        module = prepared(ModelBuilder.from_config(cfg, inference=False)).to(device)
        stride = label_stride(module, cfg, side)
        batch = one_image(cfg, max(side, LEAST_SCORES * stride), stride)
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        taken, loss = _train(module, tensors, cfg, rate, steps, target, name, progress)
        prediction = classes(module, tensors)
        truth = batch["seg_label"][0].numpy()
        found = Overfit(
            name or f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}",
            _accuracy(prediction, truth),
            taken,
            rate,
            loss,
            time.monotonic() - began,
            _sample(name, picture(cfg, batch), truth, prediction),
        )
        if best is None or found.accuracy > best.accuracy:
            best = found
        if best.accuracy >= target:
            break
    assert best is not None
    best.seconds = time.monotonic() - began
    return best


def one_image(cfg: Config, side: int, stride: int) -> dict[str, Any]:
    """The batch of the first training image, without chance.

    Args:
        cfg: the configuration.
        side: short side in pixels.
        stride: image pixels per label pixel.
    """
    plain = cfg.clone()
    plain.DATASET.batching, plain.DATASET.crop_size = "aspect", []
    plain.DATASET.imgSizes = [side]
    plain.DATASET.random_flip, plain.DATASET.color_jitter = False, 0.0
    plain.DATASET.padding_constant = math.lcm(plain.DATASET.padding_constant, stride)
    plain.DATASET.segm_downsampling_rate = stride
    split = build_split(plain.DATASET, "train")
    data = TrainDataset(
        plain.DATASET.root_dataset,
        split.records[:1],
        plain.DATASET,
        seed=cfg.TRAIN.seed,
        label_map=split.label_map,
        normalized=False,
    )
    return data[0]


def prepared(module: SegmentationModule) -> SegmentationModule:
    """The module, changed in place for a few hundred steps of one image.

    Dropout lets everything pass. The running statistics of BatchNorm follow as fast as torch's do
    by default: with MobileNetV3's momentum of 0.01 they would still be partly those they began
    with, a variance of 1 where that of the image may be a thousandth.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            layer.p = 0.0
        elif isinstance(layer, _BatchNorm) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, MOMENTUM)
    return module


@torch.no_grad()
def label_stride(module: SegmentationModule, cfg: Config, side: int) -> int:
    """Image pixels per pixel of the network's scores, 1 for those that give more."""
    side = -(-side // 32) * 32
    image = next(module.parameters()).new_zeros(1, cfg.MODEL.in_channels, side, side)
    training = module.training
    stride = side // module.eval().logits(image).shape[-1]
    module.train(training)
    return max(stride, 1)


def _train(
    module: SegmentationModule,
    batch: dict[str, Tensor],
    cfg: Config,
    rate: float,
    steps: int,
    target: float,
    name: str,
    progress: bool,
) -> tuple[int, float]:
    """Steps taken, and the loss of the last."""
    optimizer = build_optimizer("AdamW", (module, rate), weight_decay=0.0)
    truth = batch["seg_label"][0].cpu().numpy()
    precision = Precision.of(cfg.TRAIN.precision, next(module.parameters()).device)
    with tqdm(range(1, steps + 1), desc=name, disable=not progress, leave=False) as bar:
        for step in bar:
            set_learning_rates(optimizer, rate * poly_factor(step, 2 * steps, 0.9, WARMUP))
            module.train()
            with precision.products(), precision.autocast():
                loss, _ = module(dict(batch))
            if not torch.isfinite(loss):
                return step, loss.item()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
            optimizer.step()
            if step % LOOK == 0:
                accuracy = _accuracy(classes(module, batch), truth)
                bar.set_postfix_str(f"loss {loss.item():.3f}, accuracy {100 * accuracy:.1f} %")
                if accuracy >= target:
                    break
    return step, loss.item()


@torch.no_grad()
def classes(module: SegmentationModule, batch: dict[str, Tensor]) -> np.ndarray:
    """What the model predicts of the image, (h, w) as the labels, in evaluation mode."""
    size = (batch["seg_label"].shape[-2], batch["seg_label"].shape[-1])
    inputs = {k: v for k, v in batch.items() if k != "seg_label"}
    return module.eval()(inputs, segSize=size)[0].argmax(0).cpu().numpy()


def _accuracy(prediction: np.ndarray, truth: np.ndarray) -> float:
    return float((prediction == truth)[truth >= 0].mean())


def picture(cfg: Config, batch: dict[str, Any]) -> np.ndarray:
    """The image of a batch of one, (H, W, 3) uint8 RGB, as it was before it was normalised."""
    image: Tensor = batch["img_data"][0, :3]
    if image.is_floating_point():  # with depth
        data = cfg.DATASET
        mean, std = (torch.tensor(x)[:, None, None] for x in (data.mean, data.std))
        image = (image * std + mean) * (255 / data.value_range)
        image = image.flip(0) if data.color_order == "BGR" else image
        image = image.round().clamp(0, 255)
    return image.permute(1, 2, 0).numpy().astype(np.uint8)


def _sample(name: str, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> Sample:
    """Image, labels and prediction at the resolution of the image."""
    stride = image.shape[0] // truth.shape[0]
    large = [x.repeat(stride, 0).repeat(stride, 1) for x in (truth, prediction)]
    return Sample(name, image, *large)


# ------------------------------------------------------------------------------ all models
def every_model() -> list[tuple[str, str]]:
    """The models of the papers, and pairs with all other registered encoders and decoders."""
    encoders, decoders = ENCODERS.first_names(), DECODERS.first_names()
    pairs = {(model.encoder, model.decoder) for model in PAPER_MODELS}
    seen = {*(ENCODERS.get(e) for e, _ in pairs), *(DECODERS.get(d) for _, d in pairs)}
    light = ("resnet18dilated", "resnet18", "mobilenetv2dilated")
    for name in encoders:
        if ENCODERS.get(name) not in seen:
            pairs.add(_first_fit((name, d) for d in ("c1", *decoders)))
    for name in decoders:
        if DECODERS.get(name) not in seen:
            pairs.add(_first_fit((e, name) for e in (*light, *encoders)))
    return sorted(pairs)


def _first_fit(pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
    for pair in pairs:
        try:
            check_pair(*pair)
            encoder = ENCODERS.get(pair[0])
            with torch.device("meta"):
                ModelBuilder.build_decoder(
                    pair[1], channels=encoder.channels, strides=encoder.strides, num_class=2
                )
        except ValueError:
            continue
        return pair
    raise ValueError("a registered model fits no other")


def scene_config(cfg: Config, encoder: str, decoder: str, data: Path) -> Config:
    """A model on rendered scenes, with random weights."""
    cfg = cfg.clone()
    cfg.merge_from_list(
        [
            *("MODEL.arch_encoder", encoder, "MODEL.arch_decoder", decoder),
            *("MODEL.fc_dim", str(ENCODERS.get(encoder).channels[-1])),
            *("MODEL.weights_encoder", "none", "MODEL.weights_decoder", "none"),
            *("DATASET.root_dataset", str(data), "DATASET.num_class", str(len(streets.CLASSES))),
            *("DATASET.list_train", str(data / "training.odgt")),
            *("DATASET.classes", str(data / "classes.csv"), "DATASET.format", "odgt"),
            # As `streets.write` stores its labels, whatever data the recipe is for.
            *("DATASET.label_offset", "1", "DATASET.label_map", "()", "DATASET.ignore_label", "()"),
            *("DATASET.depth", "False", "MODEL.in_channels", "3"),
            *("DATASET.batching", "aspect", "DATASET.crop_size", "()"),
            *("TRAIN.aux_weights", "()"),
        ]
    )
    return cfg


def run(
    cfg: Config,
    device: torch.device,
    out: str | Path,
    *,
    every: bool = False,
    only: str = "",
    name: str = "",
    steps: int = 400,
    side: int = 96,
) -> list[Overfit]:
    """The command: one recipe, or every registered model on a rendered scene.

    Writes `overfit.md`, `overfit.json` and `overfit.png` (image, truth, prediction and errors of
    one model, or the predictions of all) to a folder. With `every` also what each model predicts,
    in `models/`: called again, it goes on from there.

    Args:
        cfg: the recipe; with `every`, what the models have in common.
        device: where to compute.
        out: the folder.
        every: all registered models.
        only: of them, those with this text in "encoder + decoder".
        name: of the recipe.
        steps, side: see `overfit`.

    Raises:
        ValueError: no model has such a name, or `only` has nothing to choose from.
    """
    if only and not every:
        raise ValueError(f"--only {only} chooses among all models: give --every, too")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Overfit] = []
    if not every:
        table = build_split(cfg.DATASET, "train").classes
        found.append(overfit(cfg, device, name=name, steps=steps, side=side))
        _write(found, table.names, table.colors, folder)
        print(line(found[0]))
        print(f"Table and picture in {folder}")
        return found
    pairs = [pair for pair in every_model() if only in " + ".join(pair)]
    if not pairs:
        raise ValueError(f"--only {only}: no encoder + decoder has this in its name")
    with tempfile.TemporaryDirectory() as scenes:
        data = streets.write(scenes, 1, 1, size=(240, 320))
        names = [name for name, _ in streets.CLASSES]
        colors = np.array([color for _, color in streets.CLASSES])
        for encoder, decoder in pairs:
            title = f"{encoder} + {decoder}"
            kept = folder / "models" / f"{encoder}+{decoder}.npz"
            pair = scene_config(cfg, encoder, decoder, data)
            asked = [steps, side, fingerprint(pair, TEMPORARY)]
            one = _load(kept, asked)
            if one is None:
                one = overfit(pair, device, name=title, steps=steps, side=side)
                _save(kept, one, asked)
            found.append(one)
            _write(found, names, colors, folder)
            print(line(one), flush=True)
    return found


# Keys that name the folder of the rendered scene, which is another one every time.
TEMPORARY = ("root_dataset", "list_train", "classes")
FIGURES = ("name", "accuracy", "steps", "rate", "loss", "seconds")


def _figures(one: Overfit) -> dict[str, Any]:
    return {key: getattr(one, key) for key in FIGURES}


def _save(file: Path, one: Overfit, asked: list[Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    text = json.dumps({"asked": asked, "figures": _figures(one)})
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        np.savez_compressed(
            stream,
            text=np.array(text),
            image=one.sample.image,
            truth=one.sample.truth,
            prediction=one.sample.prediction,
        )
    part.replace(file)


def _load(file: Path, asked: list[Any]) -> Overfit | None:
    """What an earlier call found, if it was asked for the same and the model has learned."""
    if not file.is_file():
        return None
    with np.load(file) as stored:
        note = json.loads(str(stored["text"]))
        figures = note["figures"]
        if note["asked"] != asked or figures["accuracy"] < TARGET:
            return None
        arrays = [stored[key] for key in ("image", "truth", "prediction")]
    return Overfit(**figures, sample=Sample(figures["name"], *arrays))


def line(one: Overfit) -> str:
    """One model in one line."""
    short = "" if one.accuracy >= TARGET else f", below {100 * TARGET:.0f} %"
    return (
        f"{one.name}: {100 * one.accuracy:.2f} % after {one.steps} steps of rate {one.rate:g}"
        f"{short}, loss {one.loss:.3f}, {one.seconds:.0f} s"
    )


def _write(
    found: Sequence[Overfit], names: Sequence[str], colors: np.ndarray, folder: Path
) -> None:
    rows = ["| model | accuracy | steps | learning rate | seconds |", "|---|---|---|---|---|"]
    for one in found:
        rows.append(
            f"| {one.name} | {100 * one.accuracy:.2f} % | {one.steps} | {one.rate:g} | "
            f"{one.seconds:.0f} |"
        )
    title = "Overfitting one image"
    page = [f"# {title}", "", *rows, "", "![Predictions](overfit.png)"]
    (folder / "overfit.md").write_text("\n".join(page) + "\n", "utf-8")
    plain = [_figures(one) for one in found]
    (folder / "overfit.json").write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    picture = folder / "overfit.png"
    if len(found) == 1:
        contact_sheet([found[0].sample], names, colors, picture, title=found[0].name)
        return
    first = found[0].sample
    tiles = [("image\n", first.image), ("truth\n", first.truth)]
    for one in found:
        label = one.name.replace(" + ", "\n+ ") + f", {100 * one.accuracy:.1f} %"
        tiles.append((label, one.sample.prediction))
    image_grid(tiles, picture, title=title, columns=5, names=names, colors=colors)
