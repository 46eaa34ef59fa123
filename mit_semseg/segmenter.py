"""`Segmenter`: segmentation of images with a checkpoint folder, in one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps

from mit_semseg import shipped
from mit_semseg.config import Options
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.images import exif_orientation, is_deep, load_image, to_rgb
from mit_semseg.dataset.loading import load_depth_beside, load_input
from mit_semseg.dataset.rasters import missing_pixels, normalized_bands
from mit_semseg.engine.checkpoint import CheckpointFolder, load_model
from mit_semseg.engine.devices import usable_device
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.pretrained import load_pretrained
from mit_semseg.models import SegmentationModule
from mit_semseg.models.tiles import Sliding
from mit_semseg.precision import Precision
from mit_semseg.visualize import color_encode, overlay
from mit_semseg.visualize.bands import picture
from mit_semseg.visualize.results import area_legend, areas, render

Source = str | os.PathLike[str] | Image.Image | np.ndarray
# Lossless formats that keep palette indices; GIF renumbers them.
EXACT = (".png", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True, eq=False)
class Result:
    """The segmentation of an image.

    Attributes:
        image: (H, W, 3) uint8 RGB; of an image of other bands `visualize.bands.picture`.
        labels: (H, W) int64 class ids, indices into `names`; -1 where bands have no value.
        classes: names and colours.
        source: file of the image; None for an image in memory.
        label_offset: value of class 0 in `index` files, `DATASET.label_offset`.
    """

    image: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    classes: ClassTable = field(repr=False)
    source: Path | None = None
    label_offset: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The class names, in class order."""
        return self.classes.names

    @cached_property
    def areas(self) -> dict[str, float]:
        """Class name -> share of the image in [0, 1], largest first, without absent classes."""
        return areas(self.labels, self.names)

    def color(self) -> Image.Image:
        """The labels in the colours of the classes."""
        return Image.fromarray(color_encode(self.labels, self.classes.colors))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The image blended with the class colours; `alpha` in [0, 1] is their weight."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; give the weight of the colours, in [0, 1]")
        return Image.fromarray(overlay(self.image, self.labels, self.classes.colors, alpha))

    def legend(self) -> Image.Image:
        """Colour, name and area of each class in the image."""
        return Image.fromarray(area_legend(self.labels, self.classes))

    def save(self, path: str | os.PathLike[str], kind: str | None = None) -> Path:
        """Write the result to a file, and create its folder.

        Args:
            path: an image file in the format of its suffix, or `.npy` for the array of class ids.
            kind: overlay (the default), color, index (a palette image with the values class id +
                `label_offset`), side or legend.

        Returns:
            The path.

        Raises:
            ValueError: the path is the source image, the kind or suffix is unknown, or an index
                file has a lossy format.
        """
        path = Path(path)
        if self.source is not None and path.exists() and path.samefile(self.source):
            raise ValueError(f"{path} is the source image; choose another name")
        suffix = path.suffix.lower()
        if suffix == ".npy":
            if kind not in (None, "index"):
                raise ValueError(f"{path}: .npy is for class ids; use an image suffix for {kind}")
        elif suffix not in Image.registered_extensions():
            raise ValueError(f"{path}: unknown image format {suffix!r}; use .png")
        if kind == "index" and suffix not in (*EXACT, ".npy"):
            raise ValueError(f"{path}: {suffix} files change label values; save an index as .png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".npy":
            np.save(path, self.labels)
        else:
            kind = kind or "overlay"
            render(kind, self.image, self.labels, self.classes, self.label_offset).save(path)
        return path


class Segmenter:
    """Segments images with a trained model.

    Example:
        >>> s = Segmenter.from_checkpoint("ckpt/mine")  # doctest: +SKIP
        >>> result = s("photo.jpg")  # doctest: +SKIP
        >>> result.areas  # doctest: +SKIP
        {'road': 0.41, 'sky': 0.33, 'car': 0.26}
    """

    def __init__(
        self,
        module: SegmentationModule,
        classes: ClassTable,
        opt: Any,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        flip: bool = False,
        compile: bool = False,
        tile: str | int = "auto",
        window: Sliding | None = None,
    ) -> None:
        """Copy a model, which is not modified.

        Args:
            module: the model.
            classes: names and colours of its classes.
            opt: `cfg.DATASET`: scales and normalisation of the input.
            device: where to compute.
            precision: fp32 | tf32 | bf16 | fp16 | auto.
            flip: also average over horizontally flipped images.
            compile: compile the network (see `engine.predictor.Predictor`).
            tile: "auto", "off", or a side in pixels: images larger than this at network scale are
                computed in overlapping tiles; "auto" does so above 4 million pixels.
            window: sliding window for images of any size, instead of tiles.

        Raises:
            ValueError: there is no such device, or it does not support the precision.
        """
        self.predictor = Predictor(
            module,
            opt,
            device,
            precision=precision,
            flip=flip,
            tile=tile,
            window=window,
            compile=compile,
        )
        self.classes = classes
        self.opt = opt
        self.checkpoint: Path | None = None  # folder and name, for `push_to_hub`

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        precision: str = "fp32",
        checkpoint: str | None = None,
        imgSizes: int | Sequence[int] | None = None,
        compile: bool = False,
        tile: str | int | None = None,
    ) -> Segmenter:
        """The model of a checkpoint folder, with its class names and colours.

        Args:
            path: a folder with `config.yaml`.
            device: where to compute; default: the first GPU, else the CPU.
            precision: fp32 | tf32 | bf16 | fp16 | auto.
            checkpoint: `best.pth` or `epoch_N.pth`; default: the best, else the latest.
            imgSizes: short sides in pixels whose scores are averaged, instead of `TEST.imgSizes`
                or `DATASET.imgSizes`.
            compile: compile the network, which pays off for many images of few sizes.
            tile: "auto", "off", or a side in pixels, instead of `TEST.tile` and `TEST.window`.

        Raises:
            FileNotFoundError: the configuration or the checkpoint does not exist.
            ValueError: the weights do not fit the configuration, there is no such device, or it
                does not support the precision.
        """
        device = usable_device(device)
        Precision.of(precision, device)  # an error before the weights are read
        folder = CheckpointFolder(shipped.model(path))
        options = folder.options()
        checkpoint = checkpoint or folder.best_or_latest()
        module = load_model(options, checkpoint)
        made = cls._of(
            module, folder.classes(), options, imgSizes, device, precision, compile, tile
        )
        made.checkpoint = folder.path / checkpoint
        return made

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        precision: str = "fp32",
        imgSizes: int | Sequence[int] | None = None,
        compile: bool = False,
        tile: str | int | None = None,
    ) -> Segmenter:
        """A trained model by name or folder, with its class names and colours.

        Images are resized, with their aspect ratio kept, and normalised as by the model's own
        preprocessing.

        Args:
            source: `hub:USER/NAME` or `hub:USER/NAME@REVISION` (a model of this toolkit on the
                Hugging Face Hub, see `push_to_hub`), `hf:OWNER/NAME` or `hf:FOLDER`
                (transformers), a folder that transformers or segmentation_models.pytorch saved,
                `mmseg:FILE`, a name in `weights.MODELS`, which is downloaded once, or a
                checkpoint folder of this toolkit.
            device: where to compute; default: the first GPU, else the CPU.
            precision: fp32 | tf32 | bf16 | fp16 | auto.
            imgSizes: short sides in pixels whose scores are averaged, instead of the model's own.
            compile: compile the network, which pays off for many images of few sizes.
            tile: "auto", "off", or a side in pixels, instead of the model's own.

        Raises:
            FileNotFoundError: no such folder or name.
            ValueError: no trained weights, a library is not installed, or there is no such device.
            OSError: it cannot be read or downloaded.
        """
        device = usable_device(device)
        module, classes, options = load_pretrained(source)
        return cls._of(module, classes, options, imgSizes, device, precision, compile, tile)

    def push_to_hub(self, repo: str, *, private: bool | None = None, license: str = "") -> str:
        """Upload the checkpoint to the Hugging Face Hub, with a model card (`engine.share.push`).

        Args:
            repo: `USER/NAME`; created if needed.
            private: whether a new repository is private; None: as the account's settings say.
            license: of the weights, as the hub names it, such as `cc-by-4.0`.

        Returns:
            The address of the model, which `from_pretrained` loads as `hub:USER/NAME`.

        Raises:
            ValueError: not made by `from_checkpoint`, or huggingface_hub is not installed.
            OSError: the upload failed.
        """
        from mit_semseg.engine.share import push

        if self.checkpoint is None:
            raise ValueError(
                "push_to_hub uploads a checkpoint folder: make the Segmenter by from_checkpoint"
            )
        folder, name = self.checkpoint.parent, self.checkpoint.name
        return push(folder, repo, checkpoint=name, private=private, license=license)

    @classmethod
    def _of(
        cls,
        module: SegmentationModule,
        classes: ClassTable,
        options: Options,
        sizes: int | Sequence[int] | None,
        device: torch.device,
        precision: str,
        compile: bool,
        tile: str | int | None,
    ) -> Segmenter:
        """A segmenter with the settings of `TEST`, except for those that are given."""
        test = options.TEST
        return cls(
            module,
            classes,
            options.DATASET.at_scales(test.imgSizes if sizes is None else sizes),
            device=device,
            precision=precision,
            flip=test.flip,
            compile=compile,
            tile=test.tile if tile is None else tile,
            window=Sliding.of(test) if tile is None else None,
        )

    @overload
    def __call__(self, x: Source, depth: np.ndarray | None = None) -> Result: ...
    @overload
    def __call__(self, x: list[Source] | list[str] | tuple[Source, ...]) -> list[Result]: ...
    def __call__(
        self,
        x: Source | list[Source] | list[str] | tuple[Source, ...],
        depth: np.ndarray | None = None,
    ) -> Result | list[Result]:
        """Segment one image, or several.

        Args:
            x: a path; a Pillow image of any mode; an array (H, W), (H, W, 1), (H, W, 3) RGB or
                (H, W, 4) RGBA, uint8 or float in [0, 1]; or a list of these. Files and Pillow
                images are rotated by their EXIF orientation; an alpha channel is ignored. For a
                model with `DATASET.bands`: a path, or an array (H, W, C) of these bands in the
                units of the files, NaN where there is no value.
            depth: (H, W) metres, 0 for no depth, for a model with `DATASET.depth` and a single
                image. Default: the file that `dataset.records.find_depth` finds.

        Returns:
            A Result, or for a list a list of Results.

        Raises:
            FileNotFoundError: the file, or its depth image, does not exist.
            ValueError: not an image file, or an array of another shape, type or range.
        """
        if isinstance(x, (list, tuple)):
            if depth is not None:
                raise ValueError("depth is for a single image: call once per image")
            return [self._segment(one) for one in x]
        return self._segment(x, depth)

    def _segment(self, source: Source, depth: np.ndarray | None = None) -> Result:
        bands = self.predictor.options.bands
        image = self._bands(source) if bands else as_image(source)
        depth = self._depth(source, image, depth)
        logits = self.predictor.logits(self.predictor.scales(image, depth))
        labels = self.predictor.labels(logits, image.shape[:2])[0].cpu().numpy()
        if bands:
            labels[missing_pixels(image)] = -1
        return Result(
            image=picture(image, bands),
            labels=labels,
            classes=self.classes,
            source=Path(source) if isinstance(source, (str, os.PathLike)) else None,
            label_offset=self.predictor.options.label_offset,
        )

    def _bands(self, source: Source) -> np.ndarray:
        """(H, W, C) float32, normalised, NaN where there is no value."""
        options = self.predictor.options
        if isinstance(source, (str, os.PathLike)):
            return load_input(source, options)
        count = len(options.bands)
        if not isinstance(source, np.ndarray) or source.ndim != 3 or source.shape[2] != count:
            shown = getattr(source, "shape", type(source).__name__)
            raise ValueError(
                f"this model takes the bands {', '.join(options.bands)}: give a path or an array "
                f"(H, W, {count}) in the units of the files, not {shown}"
            )
        values = source.astype(np.float32)
        values[~np.isfinite(values)] = np.nan
        return normalized_bands(values, options)

    def _depth(
        self, source: Source, image: np.ndarray, given: np.ndarray | None
    ) -> np.ndarray | None:
        """(H, W) float32 metres; None for a model without depth."""
        options = self.predictor.options
        if not options.depth:
            if given is not None:
                raise ValueError("this model has no depth input (DATASET.depth is False)")
            return None
        if given is not None:
            if given.shape != image.shape[:2]:
                raise ValueError(f"depth has shape {given.shape}, but the image {image.shape[:2]}")
            return np.where(given > 0, given, 0).astype(np.float32)
        if isinstance(source, (str, os.PathLike)):
            return load_depth_beside(source, options, (image.shape[1], image.shape[0]))
        raise ValueError("this model has a depth input (DATASET.depth): give the argument depth")


def as_image(source: Source) -> np.ndarray:
    """A path, Pillow image or array as (H, W, 3) uint8 RGB; see `Segmenter.__call__`."""
    if isinstance(source, (str, os.PathLike)):
        if not os.path.exists(source):  # the error of load_image is about data sets
            raise FileNotFoundError(f"{os.fspath(source)}: no such file")
        return load_image(source)
    if isinstance(source, Image.Image):
        deep = is_deep(source)  # first, since reading the pixels may change it
        turned = exif_orientation(source) != 1
        return to_rgb(ImageOps.exif_transpose(source) if turned else source, deep=deep)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise ValueError(
        f"cannot segment a {type(source).__name__}; give a path, a Pillow image or a NumPy array"
    )


def _from_array(array: np.ndarray) -> np.ndarray:
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"image array of shape {shape}; give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"float image array with values {low:g}..{high:g}; scale it to [0, 1], or convert "
                "it to uint8"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"image array of type {array.dtype}; give uint8, or float in [0, 1]")
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array[:, :, :3])
