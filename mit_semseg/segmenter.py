"""`Segmenter`: segmentation of images with a checkpoint folder, in one line."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mit_semseg import scores, shipped
from mit_semseg.config import Options
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.clips import Clip
from mit_semseg.dataset.loading import load_depth_beside, load_input
from mit_semseg.dataset.rasters import missing_pixels, normalized_bands
from mit_semseg.dataset.sources import Source, as_file, as_image, as_images, is_one, is_url
from mit_semseg.engine.checkpoint import CheckpointFolder, load_model
from mit_semseg.engine.devices import usable_device
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.pretrained import load_pretrained
from mit_semseg.engine.transfer import on_device, stacked
from mit_semseg.engine.video import Smoothing
from mit_semseg.export import format_of
from mit_semseg.models import SegmentationModule
from mit_semseg.models.tiles import AUTO_PIXELS, Sliding
from mit_semseg.precision import Precision
from mit_semseg.result import Result
from mit_semseg.visualize.bands import picture

# One computation at a time on the GPUs of this process: memory is that of one, and TF32 is a
# setting of the process.
_GPU = threading.Lock()


class Segmenter:
    """Segments images with a trained model.

    Several threads may call one segmenter: they read their images at the same time, and one of
    them computes at a time. In a `with` statement, or with `close`, it frees its memory.

    Attributes:
        classes: names and colours of the classes.
        opt: `cfg.DATASET`: scales and normalisation of the input.

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
        self._predictor: Predictor | None = Predictor(
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
        self._lock = threading.Lock() if self.predictor.device.type == "cpu" else _GPU

    @property
    def predictor(self) -> Predictor:
        """What computes; to be called from one thread at a time.

        Raises:
            ValueError: the segmenter is closed.
        """
        if self._predictor is None:
            raise ValueError("this Segmenter is closed; create another one")
        return self._predictor

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        precision: str = "fp32",
        checkpoint: str | None = None,
        imgSizes: int | Sequence[int] | None = None,
        scales: float | Sequence[float] = (),
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
            scales: factors of the image's own size whose scores are averaged, instead of sizes.
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
        sizes = imgSizes, scales
        made = cls._of(module, folder.classes(), options, sizes, device, precision, compile, tile)
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
        scales: float | Sequence[float] = (),
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
                `mmseg:FILE`, a name in `weights.MODELS`, which is downloaded once, a checkpoint
                folder of this toolkit, or a file of `mit-semseg export`.
            device: where to compute; default: the first GPU, else the CPU; for exported files the
                CPU.
            precision: fp32 | tf32 | bf16 | fp16 | auto.
            imgSizes: short sides in pixels whose scores are averaged, instead of the model's own.
            scales: factors of the image's own size whose scores are averaged, instead of sizes.
            compile: compile the network, which pays off for many images of few sizes.
            tile: "auto", "off", or a side in pixels, instead of the model's own.

        Raises:
            FileNotFoundError: no such folder or name.
            ValueError: no trained weights, a library is not installed, or there is no such device.
            OSError: it cannot be read or downloaded.
        """
        device = usable_device("cpu" if device is None and format_of(source) else device)
        module, classes, options = load_pretrained(source)
        sizes = imgSizes, scales
        return cls._of(module, classes, options, sizes, device, precision, compile, tile)

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
        sizes: tuple[int | Sequence[int] | None, float | Sequence[float]],
        device: torch.device,
        precision: str,
        compile: bool,
        tile: str | int | None,
    ) -> Segmenter:
        """A segmenter with the settings of `TEST`, except for those that are given."""
        test = options.TEST
        short, factors = sizes
        data = options.DATASET.at_scales(test.imgSizes, test.scales)
        return cls(
            module,
            classes,
            data.at_scales(() if short is None else short, factors),
            device=device,
            precision=precision,
            flip=test.flip,
            compile=compile,
            tile=test.tile if tile is None else tile,
            window=Sliding.of(test) if tile is None else None,
        )

    @overload
    def __call__(  # type: ignore[overload-overlap]  # text is an iterable, of no images
        self,
        x: Source,
        depth: np.ndarray | None = None,
        *,
        probabilities: bool = False,
        batch_size: int = 8,
    ) -> Result: ...
    @overload
    def __call__(
        self, x: Iterable[Source], *, probabilities: bool = False, batch_size: int = 8
    ) -> list[Result]: ...
    def __call__(
        self,
        x: Source | Iterable[Source],
        depth: np.ndarray | None = None,
        *,
        probabilities: bool = False,
        batch_size: int = 8,
    ) -> Result | list[Result]:
        """Segment one image, or several.

        Args:
            x: a path; an http or https url; the bytes of an image file; a file object opened with
                mode "rb"; a Pillow image of any mode; an array (H, W), (H, W, 1), (H, W, 3) RGB or
                (H, W, 4) RGBA; or a tensor with channels first: (H, W), (1, H, W), (3, H, W) or
                (4, H, W). Arrays and tensors are uint8, or float in [0, 1]. Files and Pillow
                images are rotated by their EXIF orientation; an alpha channel is ignored. Several
                images are an iterable of these, an array (N, H, W, C) or a tensor (N, C, H, W).
                For a model with `DATASET.bands`: a path, url or bytes, or an array (H, W, C) of
                these bands in the units of the files, NaN where there is no value.
            depth: (H, W) metres, 0 for no depth, for a model with `DATASET.depth` and a single
                image. Default: the file that `dataset.records.find_depth` finds.
            probabilities: keep what `Result.probabilities` and `uncertainty` need.
            batch_size: of several images, those of equal sizes share a forward pass if they are
                among this many neighbours and have at most 4 million pixels together. Their scores
                differ from those of single images by rounding.

        Returns:
            A Result, or for several images a list of Results, in order.

        Raises:
            FileNotFoundError: the file, or its depth image, does not exist.
            ValueError: not an image file, a url that cannot be downloaded, an array of another
                shape, type or range, or the segmenter is closed.
        """
        if is_one(x):
            return self._results([self._read(x, depth)], probabilities)[0]
        if depth is not None:
            raise ValueError("depth is for a single image: call once per image")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        images: Any = as_images(x) if isinstance(x, (np.ndarray, Tensor)) else x
        if not isinstance(images, Iterable):
            as_image(images)  # the error of a wrong type
        results: list[Result] = []
        several = iter(images)
        while chunk := [self._read(one) for one in islice(several, batch_size)]:
            results += self._results(chunk, probabilities)
        return results

    def video(self, source: str | os.PathLike[str] | int, smooth: float = 0) -> Iterator[Result]:
        """Segment the frames of a video, one at a time, in order.

        Args:
            source: path of a file, number of a camera, or an rtsp, http or https url.
            smooth: weight of the frames before in an exponential average of the probabilities, in
                [0, 1), against flicker (see `engine.video.Smoothing`).

        Yields:
            A Result for each frame.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a video, a wrong weight, a model of other images than RGB, or the
                segmenter is closed.
        """
        smoothing = Smoothing(smooth)
        with Clip(source) as clip:
            for frame in clip:
                yield self._results([self._read(frame)], False, smoothing)[0]

    def warm_up(self, shape: tuple[int, int], batch_size: int = 1) -> None:
        """Compute images of a size, so that later ones of that size do not wait.

        This compiles the network if `compile` is set, and records CUDA graphs.

        Args:
            shape: (height, width) in pixels.
            batch_size: number of images in the forward pass.

        Raises:
            ValueError: the segmenter is closed, or a number is below 1.
        """
        if min(*shape, batch_size) < 1:
            raise ValueError(f"warm_up({shape}, {batch_size}): give numbers of at least 1")
        options = self.predictor.options
        if options.bands:
            image = np.zeros((*shape, len(options.bands)), dtype=np.float32)
        else:
            image = np.zeros((*shape, 3), dtype=np.uint8)
        depth = np.zeros(shape, dtype=np.float32) if options.depth else None
        scales = self.predictor.scales(image, depth)
        images = [torch.cat([scale] * batch_size) for scale in scales]
        # The second image of a shape records its graph.
        for _ in range(3 if self.predictor.device.type == "cuda" else 1):
            self._compute(images, shape)

    def close(self) -> None:
        """Free the model and the memory of its device; nothing else can be computed afterwards."""
        with self._lock:
            if self._predictor is not None:
                self._predictor.free_memory()
            self._predictor = None

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, source: Source, depth: np.ndarray | None = None) -> _Input:
        """Read and resize an image; in any thread."""
        predictor = self.predictor
        bands = predictor.options.bands
        image = self._bands(source) if bands else as_image(source)
        scales = predictor.scales(image, self._depth(source, image, depth))
        return _Input(source, image, scales)

    def _results(
        self, inputs: Sequence[_Input], probabilities: bool, smoothing: Smoothing | None = None
    ) -> list[Result]:
        """Compute images, those of equal sizes in one forward pass."""
        results: dict[int, Result] = {}
        options = self.predictor.options
        sizes = [one.size for one in inputs]
        for group, scales in _passes([one.scales for one in inputs], sizes):
            logits, labels = self._compute(scales, sizes[group[0]], probabilities, smoothing)
            for n, i in enumerate(group):
                source, image = inputs[i].source, inputs[i].image
                found = labels[n].astype(np.int64)
                if options.bands:
                    found[missing_pixels(image)] = -1
                results[i] = Result(
                    image=picture(image, options.bands),
                    labels=found,
                    classes=self.classes,
                    source=_named(source),
                    label_offset=options.label_offset,
                    logits=tuple(x[n : n + 1].clone() for x in logits),
                )
        return [results[i] for i in range(len(inputs))]

    def _compute(
        self,
        scales: Sequence[Tensor],
        size: tuple[int, int],
        keep: bool = False,
        smoothing: Smoothing | None = None,
    ) -> tuple[list[Tensor], np.ndarray]:
        """Logits, if they are to be kept, and (N, H, W) class ids, on the CPU."""
        dtype = scores.label_dtype(len(self.classes))
        with self._lock, on_device(self.predictor.device):
            predictor = self.predictor  # again, as it may have been closed while waiting
            logits = predictor.logits(scales)
            if smoothing is not None:
                logits = smoothing(logits)
            labels = predictor.labels(logits, size, dtype).cpu().numpy()
            return [x.cpu() for x in logits] if keep else [], labels

    def _bands(self, source: Source) -> np.ndarray:
        """(H, W, C) float32, normalised, NaN where there is no value."""
        options = self.predictor.options
        if is_one(source) and not isinstance(source, (np.ndarray, Tensor, Image.Image)):
            with as_file(source) as path:
                return load_input(path, options)
        count = len(options.bands)
        if not isinstance(source, np.ndarray) or source.ndim != 3 or source.shape[2] != count:
            shown = getattr(source, "shape", type(source).__name__)
            raise ValueError(
                f"this model takes the bands {', '.join(options.bands)}: give a file or an array "
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
        if isinstance(source, (str, os.PathLike)) and not is_url(source):
            return load_depth_beside(source, options, (image.shape[1], image.shape[0]))
        raise ValueError("this model has a depth input (DATASET.depth): give the argument depth")


@dataclass(frozen=True)
class _Input:
    """An image that is read, and its tensor for each scale."""

    source: Any
    image: np.ndarray
    scales: list[Tensor]

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]


def _passes(
    inputs: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """As `stacked`, of limited size: as many pixels as an image has that is computed whole."""
    for positions, scales in stacked(inputs, sizes):
        most = max(1, AUTO_PIXELS // max(math.prod(x.shape[-2:]) for x in scales))
        for i in range(0, len(positions), most):
            yield positions[i : i + most], [x[i : i + most] for x in scales]


def _named(source: Any) -> Path | str | None:
    """`Result.source` of an image."""
    if is_url(source):
        return str(source)
    return Path(source) if isinstance(source, (str, os.PathLike)) else None
