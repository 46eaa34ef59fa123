"""Settings of evaluation (`VAL`) and prediction (`TEST`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mit_semseg.arguments import PRECISIONS
from mit_semseg.config.schema import Section, key

SAVE_KINDS = ("color", "index", "overlay", "prob", "side", "legend")
LEAST_SIDE = 64  # of tiles and windows, in pixels


def _overlap_of(stride: float) -> float:
    """The overlap of windows that begin a share of their size apart."""
    return round(1 - stride, 12)


@dataclass(frozen=True)
class InferenceOptions(Section):
    """What evaluation and prediction have in common."""

    checkpoint: str = key(
        "epoch_20.pth",
        "`epoch_N.pth` or `best.pth` in `DIR`; with a folder as prefix, in that folder; "
        "`pretrained`: the weights that `MODEL.arch` names",
    )
    batch_size: int = key(
        1, "neighbours in the list that share a forward pass if their sizes are equal", least=1
    )
    imgSizes: tuple[int, ...] = key(
        (),
        "short sides in pixels whose scores are averaged; empty takes `DATASET.imgSizes`, as "
        "published",
        least=1,
        advice="give short sides in pixels, such as (300, 450)",
    )
    flip: bool = key(False, "add horizontally flipped copies to every scale")
    precision: str = key("fp32", "as in `TRAIN`", words=PRECISIONS)
    compile: bool = key(
        False, "compile the network (torch.compile), which pays off for many images of few sizes"
    )
    tile: int | str = key(
        "auto",
        "side in pixels: images larger than this at network scale are computed in overlapping "
        "tiles, whose scores are blended; `auto` does so above 4 million pixels; `off`: never",
        words=("auto", "off"),
        least=LEAST_SIDE,
        advice=f"give auto, off or a side of {LEAST_SIDE} or more",
    )
    window: tuple[int, ...] = key(
        (),
        f"(height, width) in pixels, each {LEAST_SIDE} or more and a multiple of the encoder's "
        "strides, of a sliding window, for networks trained on crops of that size; empty: whole "
        "images, or tiles",
        lengths=(0, 2),
        least=LEAST_SIDE,
        advice=f"give (height, width) of {LEAST_SIDE} pixels or more, or () for none",
    )
    overlap: float = key(
        0.333,
        "overlap of neighbouring windows as a share of their size, in [0, 1); the stride is "
        "rounded down to multiples of 32 pixels",
        least=0,
        fits=lambda share: share < 1,
        advice="a share of the window below 1, such as 0.333",
        old={"stride": _overlap_of},
    )


@dataclass(frozen=True)
class EvalOptions(InferenceOptions):
    """Evaluation, also the validation of a training."""

    SECTION: ClassVar[str] = "VAL"

    visualize: bool = key(
        False, "save a figure of image, ground truth and prediction for every image"
    )
    boundary: bool = key(
        False,
        "compute the boundary F-score, too, with a tolerance of 0.75 % of the image diagonal; this "
        "takes time",
    )
    timeout: int = key(
        600,
        "seconds without a result from any worker process before the evaluation stops with an "
        "error that names the images; by a single process: seconds for reading a file",
        least=1,
    )


@dataclass(frozen=True)
class PredictOptions(InferenceOptions):
    """Prediction."""

    SECTION: ClassVar[str] = "TEST"

    result: str = key("./", "folder of the results")
    save: tuple[str, ...] = key(
        ("side", "legend"),
        "any of `color`, `index`, `overlay`, `prob`, `side` (image beside prediction, as "
        "published), `legend`",
        fits=lambda kinds: kinds and set(kinds) <= set(SAVE_KINDS),
        advice=f"it takes any of {', '.join(SAVE_KINDS)}",
    )
    timeout: int = key(
        600,
        "seconds for reading a file before the prediction stops with an error that names it",
        least=1,
    )
