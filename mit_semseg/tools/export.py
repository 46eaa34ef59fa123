"""`mit-semseg export`: writes a trained model for another library, and compares the two."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mit_semseg.demo.photos import pictures
from mit_semseg.engine.evaluate import evaluate
from mit_semseg.engine.export import export_model
from mit_semseg.engine.from_model import model_options
from mit_semseg.export import FORMATS

# Images of the comparison.
IMAGES = 3


def run(args: argparse.Namespace) -> int:
    """Export a model as the arguments of the command say."""
    if args.int8 != bool(args.calibration):
        raise ValueError("--int8 needs --calibration DIR, a folder of images, and the reverse")
    if args.int8 and not FORMATS[args.format].int8:
        kinds = " and ".join(name for name, form in FORMATS.items() if form.int8)
        raise ValueError(f"--int8 is for the formats {kinds}, not {args.format}")
    files = export_model(
        args.model,
        args.format,
        args.out or None,
        raw=args.raw,
        size=tuple(args.size) if args.size else None,
        resize=args.resize,
        photos=pictures(args.images, IMAGES),
        calibration=args.calibration,
    )
    for file in files:
        print(f"{file}: {size_of(file) / 1e6:.1f} MB")
    if args.data:
        print(accuracies([args.model, *files], args.data))
    return 0


def accuracies(models: Sequence[str | Path], data: str) -> str:
    """Mean IoU of several models on data, as a table.

    Args:
        models: as for `load_pretrained`.
        data: as for `engine.from_model.on_data`.
    """
    lines = [f"{'mean IoU':>8}  {'accuracy':>8}  model"]
    for model in models:
        options = model_options(str(model), "VAL", (), data)
        with tempfile.TemporaryDirectory() as folder:
            found = evaluate(options, [torch.device("cpu")], progress=False, out_dir=folder)
        lines.append(f"{found['mean_iou']:8.4f}  {found['pixel_accuracy']:8.4f}  {model}")
    return "\n".join(lines)


def size_of(file: Path) -> int:
    """Bytes of an exported file or folder, and of the weights beside it."""
    weights = file.with_suffix(".bin") if file.suffix == ".xml" else Path(f"{file}.data")
    parts = [file, weights]
    inner = [x for part in parts for x in (part.rglob("*") if part.is_dir() else [part])]
    return sum(x.stat().st_size for x in inner if x.is_file())
