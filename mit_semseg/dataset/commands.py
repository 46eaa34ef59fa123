"""`mit-semseg data make-odgt | check | download`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mit_semseg.config.options import SETTINGS
from mit_semseg.dataset.base import FORMATS
from mit_semseg.dataset.checking import check, describe_check
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.downloads import download, sources
from mit_semseg.dataset.listing import describe_made, make_odgt
from mit_semseg.dataset.split import build_split
from mit_semseg.registry import closest


def run(args: argparse.Namespace) -> int:
    """Runs one of the subcommands; returns 0, or 1 if there are problems in the data."""
    if args.action == "make-odgt":
        report = make_odgt(
            args.images,
            args.labels,
            args.out,
            args.split,
            args.seed,
            args.image_suffix,
            args.label_suffix,
            args.overwrite,
            _label_map(args.label_map),
        )
        print(describe_made(report))
        return 0
    if args.action == "check":
        report = _check(args)
        print(describe_check(report))
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
        return 0 if report["ok"] else 1
    known = sources()
    if args.name not in known:
        raise ValueError(
            f"no data set {args.name!r} to download{closest(args.name, list(known))} "
            f"(known: {', '.join(known)})"
        )
    return 0 if download(args.name, args.to or f"data/{known[args.name].folder}") else 1


def _check(args: argparse.Namespace) -> dict[str, Any]:
    if args.format is not None:
        FORMATS.get(args.format)  # an unknown name is an error, even if --cfg is used instead
    if args.cfg:
        data = args.options.DATASET
        split = build_split(data, args.list)
        return check(
            split.records,
            classes=split.classes,
            label_map=split.label_map,
            data=data,
        )
    return check(
        args.list,
        args.root,
        data_format=args.format or _format_of(args.list),
        num_class=args.num_class,
        label_offset=args.label_offset,
        ignore_label=args.ignore_label,
        classes=ClassTable.load(args.classes) if args.classes else None,
        label_map=_label_map(args.label_map) or None,
    )


def _label_map(text: str) -> list[Any]:
    """The parsed, unchecked pairs."""
    return list(SETTINGS["DATASET.label_map"].read(text, "--label-map"))


def _format_of(listing: str) -> str:
    if ":" not in listing or listing.endswith(".odgt"):
        return "odgt"
    return "coco" if listing.lower().endswith(".json") else "folder"
