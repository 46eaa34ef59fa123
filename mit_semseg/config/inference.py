"""Settings of evaluation (`VAL`) and prediction (`TEST`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mit_semseg.arguments import PRECISIONS
from mit_semseg.config.schema import Section, key

SAVE_KINDS = ("color", "index", "overlay", "prob", "side", "legend")
LEAST_SIDE = 64  # of tiles and windows, in pixels


@dataclass(frozen=True)
class InferenceOptions(Section):
    """Settings of both evaluation and prediction."""

    checkpoint: str = key(
        "epoch_20.pth",
        "`epoch_N.pth` or `best.pth` in `DIR` (or `.safetensors`), or a path in another folder; "
        "`pretrained`: the weights that `MODEL.arch` names",
    )
    batch_size: int = key(
        1, "images per forward pass: neighbours in the list that have the same size", least=1
    )
    imgSizes: tuple[int, ...] = key(
        (),
        "short sides in pixels whose scores are averaged, 0 for the image's own; empty: "
        "`DATASET.imgSizes`, as published",
        least=0,
        advice="give short sides in pixels, such as (300, 450)",
    )
    scales: tuple[float, ...] = key(
        (),
        "factors of the image's own size, which replace `imgSizes`; empty: `DATASET.scales`",
        fits=lambda factors: all(0 < factor <= 8 for factor in factors),
        advice="give factors of the image's size above 0 and up to 8, such as (0.5, 1, 1.5)",
    )
    flip: bool = key(False, "also average over horizontally flipped images")
    precision: str = key("fp32", "as in `TRAIN`", words=PRECISIONS)
    compile: bool = key(
        False, "compile the network (torch.compile), which pays off for many images of few sizes"
    )
    tile: int | str = key(
        "auto",
        "side in pixels: larger images, at network scale, are computed in overlapping tiles whose "
        "scores are blended; `auto`: for images above 4 million pixels; `off`: never",
        words=("auto", "off"),
        least=LEAST_SIDE,
        advice=f"give auto, off or a side of {LEAST_SIDE} pixels or more",
    )
    window: tuple[int, ...] = key(
        (),
        "(height, width) in pixels of a sliding window, for networks trained on crops of that "
        f"size; at least {LEAST_SIDE} and multiples of the encoder's strides. Empty: whole images, "
        "or tiles",
        lengths=(0, 2),
        least=LEAST_SIDE,
        advice=f"give (height, width) of {LEAST_SIDE} pixels or more, or () for none",
    )
    overlap: float = key(
        0.333,
        "overlap of neighbouring windows as a fraction of their size, in [0, 1); the stride is "
        "rounded down to multiples of 32 pixels",
        least=0,
        fits=lambda share: share < 1,
        advice="give a fraction of the window in [0, 1), such as 0.333",
        old={"stride": lambda fraction: round(1 - fraction, 12)},
    )


@dataclass(frozen=True)
class EvalOptions(InferenceOptions):
    """Evaluation, and validation during training."""

    SECTION: ClassVar[str] = "VAL"

    visualize: bool = key(
        False, "save a figure of image, ground truth and prediction for every image"
    )
    boundary: bool = key(
        False,
        "also compute the boundary F-score, with a tolerance of 0.75 % of the image diagonal, "
        "which takes time",
    )
    timeout: int = key(
        600,
        "seconds without a result from any worker process before the evaluation is aborted with "
        "an error that names the images; with a single process: seconds for reading a file",
        least=1,
    )


@dataclass(frozen=True)
class PredictOptions(InferenceOptions):
    """Prediction."""

    SECTION: ClassVar[str] = "TEST"

    result: str = key("./", "folder of the results")
    save: tuple[str, ...] = key(
        ("side", "legend"),
        "output files, any of `color`, `index`, `overlay`, `prob`, `side` (image beside "
        "prediction, as published), `legend`",
        fits=lambda kinds: kinds and set(kinds) <= set(SAVE_KINDS),
        advice=f"give any of {', '.join(SAVE_KINDS)}",
    )
    smooth: float = key(
        0.0,
        "weight of the frames before in an exponential average of the probabilities of a video, in "
        "[0, 1); 0: each frame by itself",
        least=0,
        fits=lambda weight: weight < 1,
        advice="give a weight in [0, 1), such as 0.6",
    )
    timeout: int = key(
        600,
        "seconds for reading a file before the prediction is aborted with an error that names it",
        least=1,
    )
