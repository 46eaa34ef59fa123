"""`mit-semseg profile`: what a recipe costs in parameters, operations, memory and time."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mit_semseg.config import Options
from mit_semseg.config.node import Config
from mit_semseg.engine.predictor import Predictor
from mit_semseg.errors import one_line
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.visualize import ratio_bars

# Seconds that a measurement of speed takes at least, after a first call that does not count.
LEAST_SECONDS, LEAST_CALLS = 2.0, 3


@dataclass(frozen=True)
class Profile:
    """What a model costs; counts are those of one image.

    Attributes:
        name: of the recipe.
        encoder, decoder: names.
        parameters: trained numbers of encoder and decoder, with auxiliary heads, which work in
            training alone; in millions.
        weights_mib: the size of all parameters and buffers in float32, with auxiliary heads.
        gflops: floating-point operations of the forward pass in evaluation, in 1e9; a
            multiplication and an addition are two.
        activations_mib: what a training step holds for its backward pass, in float32 and without
            TRAIN.activation_checkpointing.
        images_per_second: forward passes of one image at a time, as in prediction.
    """

    name: str
    encoder: str
    decoder: str
    parameters: float
    weights_mib: float
    gflops: float
    activations_mib: float
    images_per_second: float


def profile(
    cfg: Options | Config,
    device: torch.device,
    size: tuple[int, int] = (512, 512),
    *,
    name: str = "",
) -> Profile:
    """Measure a configured model, with random weights.

    Args:
        cfg: a checked configuration; its data is not needed.
        device: where to compute.
        size: height and width of the image.
        name: in the result.

    Raises:
        ValueError: the model cannot be built, or works with no image of this size.
    """
    _check_size(size)
    options = Options.read(cfg).without_weights()
    model = options.MODEL
    module = ModelBuilder.from_config(options, inference=False).to(device)
    image = torch.zeros(1, model.in_channels, *size, device=device)
    parts = [*module.encoder.parameters(), *module.decoder.parameters()]
    held = [*parts, *module.buffers()]
    name = name or model.name
    with _reach(name, size):
        gflops = operations(module, image) / 1e9
        activations_mib = activations(module, image, options) / 2**20
    return Profile(
        name,
        model.arch or model.arch_encoder,
        "" if model.arch else model.arch_decoder,
        sum(p.numel() for p in parts) / 1e6,
        sum(4 * x.numel() for x in held) / 2**20,
        gflops,
        activations_mib,
        speed(module, image, options),
    )


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise ValueError(f"--size {size[0]} {size[1]}: give a height and a width of 1 or more")


@contextmanager
def _reach(name: str, size: tuple[int, int]) -> Iterator[None]:
    """Of what a network says of an image that is too small for it, one line that names both."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = one_line(error, 200)
        raise ValueError(
            f"--size {size[0]} {size[1]}: {name} works with no such image ({reason}); give a "
            "larger one, of sides that are multiples of 32"
        ) from error


@torch.no_grad()
def operations(module: SegmentationModule, image: Tensor) -> int:
    """Floating-point operations of convolutions, matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        module.eval().logits(image)
    return counter.get_total_flops()


def activations(module: SegmentationModule, image: Tensor, options: Options) -> int:
    """Bytes that a training step keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # alive, so that it stays unique
        return x

    H, W = image.shape[-2:]
    rate = options.DATASET.segm_downsampling_rate
    label = torch.zeros(1, -(-H // rate), -(-W // rate), dtype=torch.long, device=image.device)
    # A second image, of which half is counted: some layers cannot learn from one value.
    batch = {"img_data": image.repeat(2, 1, 1, 1), "seg_label": label.repeat(2, 1, 1)}
    module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = module(batch)
    total = sum(size for size, _ in kept.values()) // 2
    del loss
    return total


def speed(module: SegmentationModule, image: Tensor, options: Options) -> float:
    """Images a second, one at a time, as `predict` computes them (`VAL.precision`)."""
    predictor = Predictor(module, options.DATASET, image.device, precision=options.VAL.precision)
    predictor.logits([image])
    seconds: list[float] = []
    end = time.monotonic() + LEAST_SECONDS
    while len(seconds) < LEAST_CALLS or time.monotonic() < end:
        began = _now(image.device)
        predictor.logits([image])
        seconds.append(_now(image.device) - began)
    return 1 / statistics.median(seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


COLUMNS: Mapping[str, str] = {
    "parameters": "parameters, 1e6",
    "weights_mib": "weights, MiB",
    "gflops": "GFLOP",
    "activations_mib": "activations, MiB",
    "images_per_second": "images/s",
}


def run(
    recipes: Mapping[str, Options | Config],
    device: torch.device,
    size: tuple[int, int],
    out: str | Path = "",
) -> list[Profile]:
    """The command: a table of recipes.

    One that cannot be measured is named and does not stop the others, unless it is the only one.

    Args:
        recipes: name -> configuration.
        device: where to compute.
        size: height and width of the image.
        out: folder for `profile.md`, `profile.json` and `profile.png`; "" writes nothing.

    Raises:
        ValueError: `size` is none, or the only recipe cannot be measured.
    """
    _check_size(size)
    found = []
    for name, cfg in tqdm(recipes.items(), disable=len(recipes) == 1, leave=False):
        try:
            found.append(profile(cfg, device, size, name=name))
        except (ValueError, RuntimeError) as error:  # one of those is torch.OutOfMemoryError
            if len(recipes) == 1:
                raise
            reason = one_line(error, 200)
            tqdm.write(f"error: {name} is left out: {reason}", file=sys.stderr)
            continue
        if out:
            _write(found, size, Path(out))
    if found:
        print(table(found, size))
    return found


def table(found: Sequence[Profile], size: tuple[int, int]) -> str:
    """Rows in Markdown, padded so that they read as they are."""
    head = ["recipe", *COLUMNS.values()]
    rows = [[one.name, *(f"{getattr(one, key):.4g}" for key in COLUMNS)] for one in found]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [f"One image of {size[1]}x{size[0]}:", ""]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _write(found: Sequence[Profile], size: tuple[int, int], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.md").write_text(table(found, size) + "\n", "utf-8")
    plain = {"size": size, "recipes": [asdict(one) for one in found]}
    (folder / "profile.json").write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    slowest = min(one.images_per_second for one in found)
    ratio_bars(
        [
            ("images a second", one.name, one.images_per_second / slowest)
            for one in sorted(found, key=lambda one: -one.images_per_second)
        ],
        folder / "profile.png",
        title="Speed beside the slowest",
    )
