"""`mit-semseg profile`: parameters, operations, memory and speed of recipes."""

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

from mit_semseg.config import Options, load_options
from mit_semseg.config.node import Config
from mit_semseg.engine.devices import machine
from mit_semseg.engine.predictor import Predictor
from mit_semseg.errors import one_line
from mit_semseg.models import ENCODERS, ModelBuilder, SegmentationModule
from mit_semseg.models.papers import LIBRARY_MODELS, PAPER_MODELS
from mit_semseg.visualize import ratio_bars

# Least time and number of calls of a speed measurement, after a warm-up call.
MIN_SECONDS, MIN_CALLS = 2.0, 3


@dataclass(frozen=True)
class Profile:
    """Cost of a model for one image.

    Attributes:
        name: of the recipe.
        encoder, decoder: names.
        parameters: of encoder and decoder, including auxiliary heads, in 1e6.
        weights_mib: size of parameters and buffers in float32, including auxiliary heads, in MiB.
        gflops: floating-point operations of the forward pass in evaluation mode, in 1e9;
            multiplication and addition count as two.
        activations_mib: activations stored for the backward pass, in float32 and without
            `TRAIN.activation_checkpointing`, in MiB.
        images_per_second: speed of prediction with batch size 1.
        images_per_cpu_second: the same per second of CPU time, summed over all threads, which other
            programs disturb less than elapsed time: that of the fastest of several calls.
    """

    name: str
    encoder: str
    decoder: str
    parameters: float
    weights_mib: float
    gflops: float
    activations_mib: float
    images_per_second: float
    images_per_cpu_second: float


def profile(
    cfg: Options | Config,
    device: torch.device,
    size: tuple[int, int] = (512, 512),
    *,
    name: str = "",
) -> Profile:
    """Measure a configured model, with random weights.

    Only its speed is measured on the device; everything else is counted on torch's meta device,
    which neither computes nor needs memory.

    Args:
        cfg: a checked configuration; its data is not needed.
        device: where to compute.
        size: height and width of the image in pixels.
        name: in the result; default: encoder + decoder.

    Raises:
        ValueError: the model cannot be built, or the image is too small for it.
    """
    _check_size(size)
    options = Options.read(cfg).without_weights()
    model = options.MODEL
    name = name or model.name
    plan, image = on_meta(options, size)
    parts = parameters(plan)
    held = [*parts, *plan.buffers()]
    with _reach(name, size):
        gflops = operations(plan, image) / 1e9
        activations_mib = activations(plan, image, options) / 2**20
    module = ModelBuilder.from_config(options, inference=False).to(device)
    return Profile(
        name,
        model.arch or model.arch_encoder,
        "" if model.arch else model.arch_decoder,
        sum(p.numel() for p in parts) / 1e6,
        sum(4 * x.numel() for x in held) / 2**20,
        gflops,
        activations_mib,
        *speed(module, torch.zeros_like(image, device=device), options),
    )


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise ValueError(f"--size {size[0]} {size[1]}: give a height and a width of 1 or more")


@contextmanager
def _reach(name: str, size: tuple[int, int]) -> Iterator[None]:
    """Convert errors of a network for an image that is too small to a ValueError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # torch.OutOfMemoryError since torch 2.5
        raise
    except (RuntimeError, ValueError) as error:
        reason = one_line(error, 200)
        raise ValueError(
            f"--size {size[0]} {size[1]} does not work with {name} ({reason}); give a larger size, "
            "in multiples of 32"
        ) from error


def on_meta(options: Options, size: tuple[int, int]) -> tuple[SegmentationModule, Tensor]:
    """A model and an image of height and width `size` on torch's meta device.

    Raises:
        ValueError: the model cannot be built.
    """
    with torch.device("meta"):
        plan = ModelBuilder.from_config(options.without_weights(), inference=False).to("meta")
    return plan, torch.zeros(1, options.MODEL.in_channels, *size, device="meta")


def parameters(module: SegmentationModule) -> list[Tensor]:
    """Parameters of encoder and decoder, including auxiliary heads."""
    return [*module.encoder.parameters(), *module.decoder.parameters()]


@torch.no_grad()
def operations(module: SegmentationModule, image: Tensor) -> int:
    """Floating-point operations of convolutions, matrix products and attention in evaluation."""
    with FlopCounterMode(display=False) as counter:
        module.eval().logits(image)
    return counter.get_total_flops()


def activations(module: SegmentationModule, image: Tensor, options: Options) -> int:
    """Bytes stored for the backward pass of a training step, without weights."""
    weights = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), x)  # kept alive: a unique address
        return x

    H, W = image.shape[-2:]
    rate = options.DATASET.segm_downsampling_rate
    label = torch.zeros(1, -(-H // rate), -(-W // rate), dtype=torch.long, device=image.device)
    # Two images, counted half: BatchNorm needs more than one value per channel.
    batch = {"img_data": image.repeat(2, 1, 1, 1), "seg_label": label.repeat(2, 1, 1)}
    module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = module(batch)
    total = sum(size for size, _ in kept.values()) // 2
    del loss
    return total


def speed(module: SegmentationModule, image: Tensor, options: Options) -> tuple[float, float]:
    """Images per second, and per second of CPU time, of prediction in `VAL.precision`."""
    predictor = Predictor(module, options.DATASET, image.device, precision=options.VAL.precision)
    predictor.logits([image])
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    end = time.monotonic() + MIN_SECONDS
    while len(seconds) < MIN_CALLS or time.monotonic() < end:
        began, cpu_began = _now(image.device)
        predictor.logits([image])
        ended, cpu_ended = _now(image.device)
        seconds.append(ended - began)
        cpu_seconds.append(cpu_ended - cpu_began)
    return 1 / statistics.median(seconds), 1 / min(cpu_seconds)


def _now(device: torch.device) -> tuple[float, float]:
    """Elapsed time, and CPU time of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


COLUMNS: Mapping[str, str] = {
    "parameters": "parameters, 1e6",
    "weights_mib": "weights, MiB",
    "gflops": "GFLOP",
    "activations_mib": "activations, MiB",
    "images_per_second": "images/s",
    "images_per_cpu_second": "images/s of CPU time",
}


def of_papers(opts: Sequence[str] = ()) -> dict[str, Options]:
    """Name -> configuration of the models of papers, for 21 classes.

    Args:
        opts: overrides of the configuration.
    """
    found = {}
    for model in (*PAPER_MODELS, *LIBRARY_MODELS):
        fc_dim = []
        if model.encoder in ENCODERS.names():
            fc_dim = ["MODEL.fc_dim", str(ENCODERS.get(model.encoder).channels[-1])]
        options = load_options(None, ["DATASET.num_class", "21", *model.options, *fc_dim, *opts])
        found[options.MODEL.name] = options
    return found


def run(
    recipes: Mapping[str, Options | Config],
    device: torch.device,
    size: tuple[int, int],
    out: str | Path = "",
) -> list[Profile]:
    """Profile recipes and print a table.

    A recipe that fails is reported and skipped, unless it is the only one.

    Args:
        recipes: name -> configuration.
        device: where to compute.
        size: height and width of the image in pixels.
        out: folder of `profile.md`, `profile.json` and `profile.png`; "" for no files.

    Raises:
        ValueError: an invalid `size`, or the only recipe fails.
    """
    _check_size(size)
    found = []
    for name, cfg in tqdm(recipes.items(), disable=len(recipes) == 1, leave=False):
        try:
            found.append(profile(cfg, device, size, name=name))
        except (ValueError, RuntimeError) as error:  # includes OutOfMemoryError
            if len(recipes) == 1:
                raise
            reason = one_line(error, 200)
            tqdm.write(f"error: {name} is skipped: {reason}", file=sys.stderr)
            continue
        if out:
            _write(found, device, size, Path(out))
    if found:
        print(table(found, size))
    return found


def table(found: Sequence[Profile], size: tuple[int, int]) -> str:
    """A Markdown table, with padded columns."""
    head = ["recipe", *COLUMNS.values()]
    rows = [[one.name, *(f"{getattr(one, key):.4g}" for key in COLUMNS)] for one in found]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [f"One image of {size[1]}x{size[0]}:", ""]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _write(
    found: Sequence[Profile], device: torch.device, size: tuple[int, int], folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.md").write_text(table(found, size) + "\n", "utf-8")
    plain = {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "size": size,
        "recipes": [asdict(one) for one in found],
    }
    (folder / "profile.json").write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    slowest = min(one.images_per_second for one in found)
    ratio_bars(
        [
            ("images per second", one.name, one.images_per_second / slowest)
            for one in sorted(found, key=lambda one: -one.images_per_second)
        ],
        folder / "profile.png",
        title="Speed relative to the slowest",
    )
