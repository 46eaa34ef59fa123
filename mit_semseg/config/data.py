"""Settings of data sets and preprocessing (`DATASET`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mit_semseg.config.schema import Section, key, settings


@dataclass(frozen=True)
class DataOptions(Section):
    """Data sets and preprocessing.

    Example:
        >>> DataOptions(imgSizes=450).imgSizes
        (450,)
    """

    SECTION: ClassVar[str] = "DATASET"

    format: str = key(
        "odgt",
        "format of the data: `odgt`, `folder`, `colors`, or a public [data set](data.md#the-sets)",
    )
    root_dataset: str = key(
        "./data/",
        "folder of the data, to which paths in lists and paths of lists are relative",
    )
    list_train: str | tuple[str, ...] = key(
        "./data/training.odgt",
        "training data, one entry or a list of them: list files (`odgt`), `images_dir:labels_dir` "
        "(`folder`, `colors`), `images_dir:FILE.json` (`coco`), or names of splits of a public "
        "data set",
    )
    list_val: str | tuple[str, ...] = key(
        "./data/validation.odgt", "validation data, in the same form"
    )
    num_class: int = key(150, "number of classes", least=1)
    classes: str = key(
        "",
        "class table, a CSV file with columns `Idx,Name[,R,G,B]` (`colors`: in any "
        "[form](annotations.md#class-tables) with colours); empty: that of the data set, or "
        "of ADE20K for 150 classes, or `class 0`, `class 1`, ...",
    )
    label_offset: int = key(
        1,
        "the class is the mask value minus this; smaller values are ignored (formats `odgt` and "
        "`folder`). `index` images store the class plus this, in every format",
    )
    ignore_label: tuple[int, ...] = key(
        (),
        "mask values that are ignored, one or a list; with `colors` the numbers of rows of the "
        "class table, from 0",
        advice="give a mask value, or several as (0, 255)",
    )
    label_map: tuple[tuple[int, ...], ...] = key(
        (),
        "pairs `[mask value, class]`, class -1 for ignored, instead of `label_offset` (formats "
        "`odgt` and `folder`)",
        fits=lambda pairs: all(len(pair) == 2 and pair[0] >= 0 for pair in pairs),
        advice="give pairs [mask value, class] of integers, class -1 for ignored, as "
        "[[0, 0], [255, 1]]",
    )
    imgSizes: tuple[int, ...] = key(
        (300, 375, 450, 525, 600),
        "short sides in pixels, one or several: training samples one per batch (with `crop_size` "
        "one per image); evaluation and prediction average the scores of all. 0: the image's own "
        "size, whatever `imgMaxSize` is",
        fits=lambda sides: len(sides) > 0 and min(sides) >= 0,
        advice="give short sides in pixels, such as 450 or (300, 450), or 0 for the image's own",
    )
    scales: tuple[float, ...] = key(
        (),
        "factors of the image's own size, whatever `imgMaxSize` is, at which evaluation and "
        "prediction average the scores, such as `(0.5, 0.75, 1, 1.25, 1.5, 1.75)`; they replace "
        "`imgSizes` there, and training does not use them",
        fits=lambda factors: all(0 < factor <= 8 for factor in factors),
        advice="give factors of the image's size above 0 and up to 8, such as (0.5, 1, 1.5)",
    )
    imgMaxSize: int = key(1000, "upper limit of the long side, in pixels", least=1)
    padding_constant: int = key(
        8,
        "sides of the network's input are multiples of this (the encoder's largest stride), in "
        "pixels",
        least=1,
    )
    segm_downsampling_rate: int = key(
        8,
        "labels are downsampled by this factor in training; a divisor of `padding_constant`",
        least=1,
    )
    batching: str = key(
        "aspect",
        "training batches. `aspect`: whole images of the same orientation, resized with their "
        "aspect ratio and padded to the largest; `crop`: random crops of one size (`crop_size`)",
        words=("aspect", "crop"),
    )
    random_flip: bool = key(True, "random horizontal flips in training")
    crop_size: tuple[int, ...] = key(
        (),
        "(height, width) in pixels of random crops in training, after resizing; empty: whole "
        "images, as published. Required by `batching crop`, in multiples of `padding_constant`",
        lengths=(0, 2),
        least=1,
        advice="give (height, width), or () for whole images",
    )
    color_jitter: float = key(
        0.0,
        "strength of random brightness, contrast and saturation in training, in [0, 1]; 0 as "
        "published",
        least=0,
        most=1,
    )
    scale_jitter: tuple[float, ...] = key(
        (0.5, 2.0),
        "minimum and maximum of a random scale relative to the size given by `imgSizes` and "
        "`imgMaxSize` (`batching crop`)",
        lengths=(2,),
        fits=lambda ends: 0 < ends[0] <= ends[1],
        advice="give minimum and maximum, as (0.5, 2.0)",
        old={"random_scale": None},
    )
    random_rotation: float = key(
        10.0,
        "maximum angle of a random rotation in either direction, in degrees (`batching crop`)",
        least=0,
        most=180,
        advice="give degrees in [0, 180]",
    )
    random_blur: float = key(
        0.5,
        "probability of a Gaussian blur, sigma 0.1 to 2 pixels (`batching crop`)",
        least=0,
        most=1,
        advice="give a probability in [0, 1]",
    )
    cutmix: float = key(
        0.0,
        "probability with which a training sample takes a random rectangle of another one of its "
        "batch",
        least=0,
        most=1,
        advice="give a probability in [0, 1]",
    )
    classmix: float = key(
        0.0,
        "probability with which a training sample takes half of the classes of another one of its "
        "batch",
        least=0,
        most=1,
        advice="give a probability in [0, 1]",
    )
    transform: str = key(
        "",
        "`module:function`: a transform of your own on training samples, after those above; see "
        "[data](data.md#transforms-of-your-own)",
    )
    bands: tuple[str, ...] = key(
        (),
        "names or numbers (from 1) of the bands to read, in this order, from images of any bands "
        "([multispectral images](data.md#multispectral-images)), `MODEL.in_channels` of them; "
        "empty: red, green and blue",
    )
    mean: tuple[float, ...] = key(
        (0.485, 0.456, 0.406),
        "mean per channel in `color_order`: the network's input is (pixel / 255 · `value_range` - "
        "`mean`) / `std`. With `bands`, mean per band in the units of the files: the input is "
        "(value - `mean`) / `std`",
        fits=len,
        advice="give a number per channel",
    )
    std: tuple[float, ...] = key(
        (0.229, 0.224, 0.225),
        "standard deviation per channel or band, above 0",
        fits=lambda values: len(values) > 0 and min(values) > 0,
        advice="give a number above 0 per channel",
    )
    color_order: str = key(
        "RGB", "order of the channels that the encoder expects", words=("RGB", "BGR")
    )
    value_range: float = key(
        1.0,
        "value of a white pixel before normalisation, 1 or 255. The oldest published checkpoints "
        "(`*_dilated8`, `*_bilinear`) need `BGR`, 255, mean `[102.9801, 115.9465, 122.7717]`, std "
        "`[1, 1, 1]`",
        fits=lambda value: value in (1, 255),
        advice="give 1 or 255",
    )
    depth: bool = key(
        False,
        "read a depth image as a fourth channel (`MODEL.in_channels 4`): see [data](data.md#depth)",
    )
    depth_scale: float | str = key(
        "auto",
        "stored units per metre (1000: millimetres), or `sunrgbd`: millimetres with bits rotated "
        "by three; `auto`: that of the data set, 1000 for lists. A stored 0 means no depth",
        words=("auto", "sunrgbd"),
        fits=lambda units: units > 0,
        advice="give stored units per metre (1000), sunrgbd or auto",
    )
    depth_mean: float = key(
        2.378,
        "mean depth in metres: the fourth channel is (depth - `depth_mean`) / `depth_std`, and 0 "
        "for no depth. Default: that of SUN RGB-D",
    )
    depth_std: float = key(
        1.235,
        "standard deviation of the depth in metres, above 0",
        fits=lambda metres: metres > 0,
        advice="give metres above 0, such as 1.235",
    )
    on_error: str = key(
        "stop",
        "what training does with a sample that cannot be read: `stop`, or `skip`, which uses "
        "another sample and reports the file. Evaluation and prediction always skip and report "
        "such files",
        words=("stop", "skip"),
    )

    def _check(self) -> None:
        """Check combinations of values, and the classes of `label_map`."""
        self._check_bands()
        if self.transform and self.depth:
            raise ValueError(
                f"DATASET.transform is {self.transform} and DATASET.depth True: transforms do not "
                "support depth; remove one of them"
            )
        stored = [value for value, _ in self.label_map]
        for value, number in self.label_map:
            if not -1 <= number < self.num_class:
                raise ValueError(
                    f"DATASET.label_map has class {number}, but DATASET.num_class is "
                    f"{self.num_class}: classes are 0..{self.num_class - 1}, -1 for ignored"
                )
            if stored.count(value) > 1:
                raise ValueError(f"DATASET.label_map has the mask value {value} twice")
        if self.batching != "crop":
            return
        if not self.crop_size:
            raise ValueError(
                "DATASET.batching crop needs a crop size: set DATASET.crop_size [height, width]"
            )
        multiple = self.padding_constant  # itself a multiple of segm_downsampling_rate
        if any(side % multiple for side in self.crop_size):
            raise ValueError(
                f"DATASET.crop_size is {list(self.crop_size)}; DATASET.batching crop needs "
                f"multiples of DATASET.padding_constant {multiple}, such as "
                f"{[-(-side // multiple) * multiple for side in self.crop_size]}"
            )

    def _check_bands(self) -> None:
        """Check what the number and kind of channels allow."""
        count = len(self.bands)
        for name in ("mean", "std"):
            given = getattr(self, name)
            if len(given) != (count or 3) and not (count and not self.has_statistics):
                raise ValueError(
                    f"DATASET.{name} is {list(given)}; give "
                    + (
                        f"a number for each of the bands {', '.join(self.bands)}"
                        if count
                        else "three numbers, one per colour channel"
                    )
                )
        if count and (self.depth or self.color_jitter):
            key = "depth" if self.depth else "color_jitter"
            raise ValueError(
                f"DATASET.{key} is {getattr(self, key)}, which is for RGB images, and "
                f"DATASET.bands {', '.join(self.bands)}: remove one of them"
            )

    @property
    def has_statistics(self) -> bool:
        """Whether `mean` or `std` are others than those of ImageNet's colours."""
        return (self.mean, self.std) != (DataOptions.mean, DataOptions.std)

    def at_scales(
        self, sizes: int | Sequence[int], factors: float | Sequence[float] = ()
    ) -> DataOptions:
        """These options with other sizes of evaluation and prediction.

        Args:
            sizes: `imgSizes`, one or several.
            factors: `scales`, one or several; used instead of `sizes` if there are any.

        Returns:
            The options, unchanged if both are empty.
        """
        known = settings(DataOptions)
        if not isinstance(factors, Sequence) or factors:
            return replace(self, scales=known["scales"].read(factors))
        if isinstance(sizes, Sequence) and not sizes:
            return self
        return replace(self, imgSizes=known["imgSizes"].read(sizes), scales=())

    @property
    def sizes_text(self) -> str:
        """The sizes of evaluation and prediction, for reports."""
        if self.scales:
            return f"{', '.join(f'{x:g}' for x in self.scales)} times the image's size"
        return f"short sides {', '.join(map(str, self.imgSizes))}"
