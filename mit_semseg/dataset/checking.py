"""Statistics and errors of a list of samples: `mit-semseg data check`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, DataFormat
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.label_map import LabelMap, label_warnings
from mit_semseg.dataset.listing import options_of, shortened
from mit_semseg.dataset.loading import load_depth_of, load_raw
from mit_semseg.dataset.records import Record, locate, read_odgt
from mit_semseg.dataset.split import absolute
from mit_semseg.errors import counted
from mit_semseg.files import PathLike

# Stored values that usually mean "no label", in 8 and 16 bits.
_CUSTOMARY_IGNORE = (255, 65535)


@dataclass
class _Finding:
    """Properties of one sample; only `error` if it cannot be used."""

    record: Record
    error: str = ""
    size: str = ""
    image_mode: str = ""
    mask_mode: str = ""
    counts: dict[int, int] = field(default_factory=dict)  # stored value -> pixels
    colors: dict[int, tuple[int, ...]] = field(default_factory=dict)  # their palette colours
    sums: np.ndarray | None = None  # (3, C): count, sum and sum of squares of each band


def check(
    source: str | Sequence[Record],
    root: PathLike | None = None,
    *,
    data_format: str = "odgt",
    num_class: int | None = None,
    label_offset: int = 1,
    ignore_label: Iterable[int] = (),
    classes: ClassTable | None = None,
    label_map: LabelMap | Sequence[tuple[int, int]] | None = None,
    data: DataOptions | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Read every sample of a list, and report statistics, errors and warnings.

    Args:
        source: list file, or an entry of `DATASET.list_train` for `data_format`, or records.
        root: `DATASET.root_dataset`; None: the working folder, or the list's folder or one of its
            parents, wherever the images are.
        data_format: `DATASET.format`.
        num_class: None: that of a public data set, or else what the stored values need.
        label_offset, ignore_label: as in `DATASET`.
        classes: class table; None: that of the format.
        label_map: None: that of the format; or pairs (stored value, class), for formats odgt and
            folder.
        data: options of a recipe, whose depth images and `bands` are read.
        progress: show a progress bar.

    Returns:
        A dict for `json.dump`: `ok`, `records`, `root`, `num_class`, `sizes`, `image_modes`,
        `mask_modes` (value -> number of samples), `stored_values`, `classes` (per class: `id`,
        `name`, `pixels`, `share` of labelled pixels, `images`), `absent`, `ignored_share`, `bands`
        (per band: `name`, and `mean` and `std` in the units of the files), and lists of messages:
        `unreadable`, `out_of_range`, `warnings`.

    Raises:
        FileNotFoundError, ValueError: the list itself cannot be read.
    """
    formats: DataFormat = FORMATS.get(data_format)()
    if label_map is not None and not isinstance(label_map, LabelMap):
        if formats.num_class is not None:
            raise ValueError(
                f"a label map can be given for formats odgt and folder; {data_format} defines its "
                "own"
            )
        options = options_of(label_map)
        if num_class is not None:
            options = DataOptions.read({"num_class": num_class, "label_map": options.label_map})
        label_map = LabelMap.of_options(options).ignoring(ignore_label)
    entries = [source] if isinstance(source, str) else []
    if num_class is None:
        if label_map is not None:
            num_class = label_map.num_class
        elif entries:
            num_class = formats.count_for(Path(root or ""), entries[0])
        else:
            num_class = formats.num_class
    wanted = DataOptions(num_class=num_class or DataOptions.num_class)
    records, base = _resolve(source, root, formats, wanted)
    data = data or DataOptions()
    findings = list(_inspect(records, data, progress))
    usable = [f for f in findings if not f.error]

    stored: Counter[int] = Counter()
    in_images: Counter[int] = Counter()
    for finding in usable:
        stored.update(finding.counts)
        in_images.update(finding.counts.keys())
    ignored_values = tuple(ignore_label)
    if num_class is None:
        named = [v for v in stored if v not in (*ignored_values, *_CUSTOMARY_IGNORE)]
        num_class = max(max(named, default=0) - label_offset + 1, 1)
    options = DataOptions(num_class=num_class, label_offset=label_offset)
    table = classes or formats.classes_for(Path(root or ""), entries, options)
    mapping = label_map or formats.label_map(records, options).ignoring(ignored_values)

    complaints = [mapping.complaint(f.counts, f.record["fpath_segm"], stored) for f in usable]
    out_of_range = [message for message in complaints if message]
    pixels, images = _by_class(usable, mapping)
    total, labelled = sum(stored.values()), int(pixels.sum())
    ignored = sum(n for v, n in stored.items() if mapping.values.get(v) == -1)
    unreadable = [f.error for f in findings if f.error]
    return {
        "ok": not unreadable and not out_of_range,
        "records": len(records),
        "root": base,
        "num_class": num_class,
        "sizes": _ranked(f.size for f in usable),
        "image_modes": _ranked(f.image_mode for f in usable),
        "mask_modes": _ranked(f.mask_mode for f in usable),
        "stored_values": {
            str(v): {"pixels": stored[v], "images": in_images[v]} for v in sorted(stored)
        },
        "classes": [
            {
                "id": k,
                "name": table.names[k],
                "pixels": int(pixels[k]),
                "share": int(pixels[k]) / labelled if labelled else 0.0,
                "images": int(images[k]),
            }
            for k in range(num_class)
        ],
        "absent": [table.names[k] for k in range(num_class) if not images[k]],
        "ignored_share": ignored / total if total else 0.0,
        "bands": _statistics(usable, data.bands),
        "unreadable": unreadable,
        "out_of_range": out_of_range,
        "warnings": [
            *label_warnings(
                *(stored, ignored, total, f"{len(usable)} masks"),
                {k: table.names[k] for k in range(num_class) if images[k]},
                num_class,
            ),
            *_palette_warnings(usable),
        ],
    }


def _statistics(findings: Iterable[_Finding], bands: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation of each band over all values of all images."""
    sums = sum((f.sums for f in findings if f.sums is not None), np.zeros((3, len(bands))))
    count, total, squares = sums
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
    return [
        {"name": name, "mean": float(m), "std": float(s)} for name, m, s in zip(bands, mean, std)
    ]


def _by_class(findings: Iterable[_Finding], mapping: LabelMap) -> tuple[np.ndarray, np.ndarray]:
    """Number of pixels of each class, and of images with it, (num_class,) int64 each."""
    pixels, images = np.zeros((2, mapping.num_class), dtype=np.int64)
    for finding in findings:
        ids = {value: mapping.values.get(value, -1) for value in finding.counts}
        images[list({*ids.values()} - {-1})] += 1
        for value, count in finding.counts.items():
            if ids[value] >= 0:
                pixels[ids[value]] += count
    return pixels, images


def _ranked(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _resolve(
    source: str | Sequence[Record],
    root: PathLike | None,
    formats: DataFormat,
    options: DataOptions,
) -> tuple[list[Record], str]:
    """Records with absolute paths, and the folder that their paths were relative to."""
    if not isinstance(source, str):
        base = os.fspath(root or "")
        return [absolute(record, base) for record in source], base
    if not source.endswith(".odgt"):
        base = os.fspath(root or "")
        found = formats.records_for(Path(base), source, options)
        return [absolute(r, base) for r in found], base
    path = locate(source, root or "")
    records = read_odgt(path)
    first = records[0]["fpath_img"]
    if root is not None:
        places = [os.fspath(root)]
    else:
        places = ["", *(os.fspath(parent) for parent in path.resolve().parents)]
    for place in places:
        if os.path.exists(os.path.join(place, first)):
            return [absolute(record, place) for record in records], place or "."
    if root is None:
        raise FileNotFoundError(
            f"{first}, the first image of {path}, is neither in the working folder nor beside the "
            "list; set --root to the folder that the paths are relative to"
        )
    return [absolute(record, places[0]) for record in records], places[0]


def _inspect(records: Sequence[Record], options: DataOptions, progress: bool) -> Iterator[_Finding]:
    """Findings in the order of the records; files are read in threads."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from tqdm(
            pool.map(partial(_look, options), records),
            total=len(records),
            desc="checking",
            disable=None if progress else True,
            leave=False,
        )


def _look(options: DataOptions, record: Record) -> _Finding:
    try:
        image, raw = load_raw(record, options=options)
        load_depth_of(record, "", options, (image.shape[1], image.shape[0]))
        modes: list[str] = []
        palette: list[int] = []
        for key in (record["fpath_img"], record["fpath_segm"]):
            if key.lower().endswith(".mat"):
                modes.append("MATLAB")
                continue
            if options.bands and not modes:
                modes.append(f"{len(options.bands)} bands")
                continue
            with Image.open(key) as file:
                modes.append(file.mode)
                palette = (file.getpalette("RGB") or []) if file.mode == "P" else []
    except (ValueError, FileNotFoundError) as error:
        return _Finding(record, error=str(error))
    values, counts = np.unique(raw, return_counts=True)
    sums = None
    if options.bands:
        known, wide = ~np.isnan(image), np.nan_to_num(image).astype(np.float64)
        sums = np.stack([x.sum((0, 1)) for x in (known, wide, wide**2)])
    return _Finding(
        record,
        size=f"{image.shape[1]}x{image.shape[0]}",
        image_mode=modes[0],
        mask_mode=modes[1],
        counts=dict(zip(values.tolist(), counts.tolist())),
        colors={v: tuple(palette[3 * v : 3 * v + 3]) for v in values.tolist() if palette},
        sums=sums,
    )


def _palette_warnings(findings: Iterable[_Finding]) -> list[str]:
    """A warning if palettes differ: each file may have numbered its colours independently."""
    seen: dict[int, tuple[tuple[int, ...], str]] = {}
    for finding in findings:
        for value, color in finding.colors.items():
            first, file = seen.setdefault(value, (color, finding.record["fpath_segm"]))
            if first != color:
                return [
                    f"stored value {value} has the colour {first} in {file} and {color} in "
                    f"{finding.record['fpath_segm']}: if colours are classes, the files number "
                    "them differently, so stored values are not classes; save all with one palette"
                ]
    return []


def describe_check(report: dict[str, Any]) -> str:
    """The report of `check` as text for a terminal."""

    def listing(table: dict[str, int], most: int = 5) -> str:
        text = ", ".join(f"{name} ({count})" for name, count in list(table.items())[:most])
        return text + (f", and {len(table) - most} more" if len(table) > most else "")

    lines = [
        f"{report['records']} samples, paths from {report['root'] or 'the working folder'}",
        f"sizes        {listing(report['sizes'])}",
        f"image modes  {listing(report['image_modes'])}",
        f"mask modes   {listing(report['mask_modes'])}",
        f"ignored      {100 * report['ignored_share']:.2f} % of pixels",
        "",
        f"{'class':>5}  {'name':24} {'pixels':>14} {'share':>8} {'images':>7}",
    ]
    for row in report["classes"]:
        lines.append(
            f"{row['id']:5}  {row['name'][:24]:24} {row['pixels']:14} "
            f"{100 * row['share']:7.2f}% {row['images']:7}"
        )
    if report["absent"]:
        names = ", ".join(report["absent"][:20]) + (" ..." if len(report["absent"]) > 20 else "")
        lines.append(f"{counted(len(report['absent']), 'class')} in no mask: {names}")
    if report["bands"]:
        lines += ["", "bands, with the statistics to set:"]
        lines.append(f"  bands: [{', '.join(band['name'] for band in report['bands'])}]")
        for key in ("mean", "std"):
            lines.append(f"  {key}: [{', '.join(f'{band[key]:.6g}' for band in report['bands'])}]")
    for key, title in (
        ("unreadable", "samples that cannot be used"),
        ("out_of_range", "masks with labels outside the classes"),
        ("warnings", "warnings"),
    ):
        if report[key]:
            lines += ["", f"{len(report[key])} {title}:", *shortened(report[key])]
    lines += ["", "No errors." if report["ok"] else "There are errors; see above."]
    return "\n".join(lines)
