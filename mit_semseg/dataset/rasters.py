"""Images of any number of bands, read and written by rasterio (`DATASET.bands`).

Values are those of the file, of any real type, as float32. A value is missing where the file's
nodata value, alpha band or mask says so, and where it is not finite; a pixel without any value is
ignored in training and evaluation.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from PIL import Image

from mit_semseg.config import DataOptions
from mit_semseg.dataset.images import check_file
from mit_semseg.dataset.reading import READINGS
from mit_semseg.errors import one_line
from mit_semseg.files import PathLike, replacing

# Many images have no georeference.
warnings.filterwarnings("ignore", message="Dataset has no geotransform")
_FAR = 20  # standard deviations from the mean, which values in the same units never are
_GEO_KEYS = 34735  # TIFF tag
Block = tuple[int, int, int, int]  # left, top, width, height in pixels


class RasterFile:
    """An open raster of which some bands are read; interface as that of `images.ImageFile`.

    Args:
        path: any raster that GDAL reads.
        options: `bands` are read, and normalised by `mean` and `std`.

    Attributes:
        path: the file.
        size: (width, height) in pixels.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: rasterio is not installed, the file is not a raster, or it lacks a band.
    """

    def __init__(self, path: PathLike, options: DataOptions) -> None:
        self.path, self.options = path, options
        with READINGS.of(path), ExitStack() as opened:
            self._file = opened.enter_context(opened_raster(path))
            self._numbers = _numbers(self._file, options.bands, os.fspath(path))
            self._masked = _has_mask(self._file, self._numbers)
            self._opened = opened.pop_all()
        self.size: tuple[int, int] = (self._file.width, self._file.height)

    def __enter__(self) -> RasterFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def values(self, block: Block | None = None) -> np.ndarray:
        """The bands in the units of the file, (H, W, C) float32, NaN where a value is missing.

        Args:
            block: what to read; None: the whole image.

        Raises:
            ValueError: the file is damaged.
        """
        rasterio = load_rasterio()
        window = None if block is None else rasterio.windows.Window(*block)
        try:
            with READINGS.of(self.path):
                planes = self._file.read(self._numbers, window=window, out_dtype=np.float32)
                missing = ~np.isfinite(planes)
                if self._masked:
                    missing |= self._file.read_masks(self._numbers, window=window) == 0
        except rasterio.errors.RasterioError as error:
            raise ValueError(
                f"{os.fspath(self.path)}: damaged or truncated image ({one_line(error)})"
            ) from error
        planes[missing] = np.nan
        return np.ascontiguousarray(planes.transpose(1, 2, 0))

    def pixels(self, block: Block | None = None) -> np.ndarray:
        """As `values`, normalised."""
        return normalized_bands(self.values(block), self.options)


def normalized_bands(values: np.ndarray, options: DataOptions) -> np.ndarray:
    """(value - `mean`) / `std` of (H, W, C) float32 values, in place.

    Raises:
        ValueError: `mean` and `std` are not those of the bands.
    """
    check_statistics(options)
    values -= np.array(options.mean, dtype=np.float32)
    values /= np.array(options.std, dtype=np.float32)
    return values


def check_statistics(options: DataOptions) -> None:
    """ValueError if there are `bands` and no `mean` and `std` of them."""
    if options.bands and not options.has_statistics:
        raise ValueError(
            "DATASET.bands needs DATASET.mean and DATASET.std of the bands in the units of the "
            "files: mit-semseg data check train --cfg FILE prints them"
        )


def units_warning(values: np.ndarray, options: DataOptions, name: str) -> str:
    """A line if values, as of `RasterFile.values`, are far from `mean`; empty otherwise."""
    planes = np.moveaxis(normalized_bands(values.copy(), options), 2, 0)
    for band, plane in zip(options.bands, planes):
        known = plane[~np.isnan(plane)]
        distance = float(np.median(np.abs(known))) if known.size else 0.0
        if distance > _FAR:
            return (
                f"{name}: band {band} is {distance:.0f} standard deviations from its mean: "
                "DATASET.mean and std are in the units of the files (mit-semseg data check)"
            )
    return ""


def missing_pixels(image: np.ndarray) -> np.ndarray:
    """Where no band of (H, W, C) float32 has a value, (H, W) bool."""
    return np.isnan(image).all(axis=2)


def load_rasterio() -> Any:
    """The module rasterio.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("rasterio")
    except ImportError as error:
        raise ValueError("DATASET.bands needs rasterio: pip install 'mit_semseg[geo]'") from error


@contextmanager
def opened_raster(path: PathLike) -> Iterator[Any]:
    """A file opened by rasterio.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: rasterio is not installed, or the file is not a raster.
    """
    rasterio = load_rasterio()
    check_file(path)
    try:
        file = rasterio.open(path)
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f"{os.fspath(path)}: not a readable raster ({one_line(error)})") from error
    with file:
        yield file


def raster_size(path: PathLike) -> tuple[int, int]:
    """(width, height) in pixels of a raster of any bands; errors as those of `RasterFile`."""
    with opened_raster(path) as file:
        return file.width, file.height


def to_lon_lat(path: PathLike) -> Callable[[np.ndarray], np.ndarray] | None:
    """The place on Earth of the pixels of an image file, by its transform and reference system.

    Args:
        path: any image.

    Returns:
        A function from corners of pixels, (n, 2) x and y with (0, 0) the upper left corner of the
        image, to (n, 2) float64 longitude and latitude in degrees (WGS 84); None if the file has
        no georeference, or one by control points only.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is a GeoTIFF, and rasterio is not installed.
    """
    check_file(path)
    try:
        rasterio = load_rasterio()
    except ValueError as error:
        if not _is_geotiff(path):
            return None
        raise ValueError(
            f"{os.fspath(path)} is georeferenced, which needs rasterio: pip install "
            "'mit_semseg[geo]'"
        ) from error
    try:
        with rasterio.open(path) as file:
            crs, transform = file.crs, file.transform
    except rasterio.errors.RasterioIOError:  # a format that GDAL does not know
        return None
    if crs is None or transform.is_identity:
        return None
    warp = importlib.import_module("rasterio.warp")

    def place(corners: np.ndarray) -> np.ndarray:
        a, b, c, d, e, f = transform[:6]
        x, y = corners.T
        return np.column_stack(
            warp.transform(crs, "EPSG:4326", a * x + b * y + c, d * x + e * y + f)
        )

    return place


def write_labels(
    path: PathLike,
    image: PathLike,
    colors: np.ndarray,
    offset: int,
    parts: Iterable[tuple[Block | None, np.ndarray]],
) -> None:
    """Writes class ids as a GeoTIFF with the georeference of an image.

    Pixels are class id + `offset`, and where there is no class the file's nodata value: 0 if
    `offset` is above 0, else the largest of its type. Types are uint8, with the colours of the
    classes, or uint16.

    Args:
        path: the file, in an existing folder.
        image: a raster of the same size.
        colors: (K, 3) uint8 RGB.
        offset: added to every class id.
        parts: blocks of the image, None for all of it, with their class ids, (h, w) integers, -1
            for none.

    Raises:
        OSError: the file cannot be written.
    """
    rasterio = load_rasterio()
    largest = len(colors) - 1 + offset
    dtype = np.uint8 if largest + (not offset) <= 255 else np.uint16
    nodata = 0 if offset else int(np.iinfo(dtype).max)
    with opened_raster(image) as source:
        points, of_points = source.gcps
        place = {"crs": source.crs, "transform": source.transform}
        if points:
            place = {"crs": of_points, "gcps": points}
        profile = {
            "driver": "GTiff",
            "width": source.width,
            "height": source.height,
            "count": 1,
            "dtype": dtype,
            "nodata": nodata,
            "compress": "deflate",
            "tiled": True,
            "bigtiff": "IF_SAFER",
            **place,
        }
    with replacing(path) as part, rasterio.open(part, "w", **profile) as file:
        if dtype is np.uint8:
            file.write_colormap(1, {i + offset: (*map(int, c), 255) for i, c in enumerate(colors)})
        for block, labels in parts:
            values = np.where(labels < 0, nodata, labels + offset).astype(dtype)
            window = None if block is None else rasterio.windows.Window(*block)
            file.write(values, 1, window=window)


def _is_geotiff(path: PathLike) -> bool:
    """Whether a file is a TIFF with the tag of a geographic reference system."""
    try:
        with Image.open(path) as image:
            return _GEO_KEYS in getattr(image, "tag_v2", {})
    except OSError:
        return False


def _numbers(file: Any, bands: Sequence[str], name: str) -> list[int]:
    """The numbers, from 1, of bands given by name or number."""
    names = _names(file)
    numbers = []
    for band in bands:
        same = [i for i, own in enumerate(names, 1) if own.casefold() == band.casefold()]
        if band.isdecimal():
            same = [int(band)] if 1 <= int(band) <= len(names) else []
        if len(same) != 1 or "complex" in file.dtypes[same[0] - 1]:
            listed = ", ".join(
                f"{i} {own or 'without name'} {kind}"
                for i, (own, kind) in enumerate(zip(names, file.dtypes), 1)
            )
            raise ValueError(
                f"{name} has {'several bands' if len(same) > 1 else 'no real band'} {band} of "
                f"DATASET.bands; its bands are {listed}"
            )
        numbers += same
    return numbers


def _has_mask(file: Any, numbers: Sequence[int]) -> bool:
    """Whether values of these bands may be missing.

    GDAL takes the last of 4 bands of 8 bits for alpha. It is one unless it is read, or has another
    name.
    """
    alpha = load_rasterio().enums.ColorInterp.alpha
    bands = enumerate(zip(file.colorinterp, file.descriptions), 1)
    of_values = any(
        kind == alpha and (i in numbers or (name or "alpha").casefold() != "alpha")
        for i, (kind, name) in bands
    )
    flags = load_rasterio().enums.MaskFlags
    given = [file.mask_flag_enums[number - 1] for number in numbers]
    return any(flags.all_valid not in f and not (of_values and flags.alpha in f) for f in given)


def _names(file: Any) -> list[str]:
    """Descriptions of all bands, or what they are interpreted as (red, nir); empty for none."""
    kinds = [kind.name for kind in file.colorinterp]
    unnamed = ("undefined", "gray", "palette")
    return [
        description or ("" if kind in unnamed else kind)
        for description, kind in zip(file.descriptions, kinds)
    ]
