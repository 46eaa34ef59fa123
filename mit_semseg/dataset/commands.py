"""`mit-semseg data make-odgt | check | download`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mit_semseg.dataset.base import FORMATS, ClassTable, build_split
from mit_semseg.dataset.downloads import download, sources
from mit_semseg.dataset.tools import check, describe_check, describe_made, make_odgt


def add_arguments(subparsers: Any) -> None:
    """Add the subcommands to `mit-semseg data`."""
    make = subparsers.add_parser("make-odgt", help="sample lists from image and mask folders")
    make.add_argument("--images", required=True, metavar="DIR")
    make.add_argument("--labels", required=True, metavar="DIR", help="masks, named as the images")
    make.add_argument("--out", required=True, metavar="DIR", help="folder for the two lists")
    make.add_argument("--split", type=float, default=0.9, help="share for training (0.9)")
    make.add_argument("--seed", type=int, default=304, help="of the random split")
    make.add_argument("--image-suffix", default="", help="what only image names end with")
    make.add_argument("--label-suffix", default="", help="what only mask names end with (_mask)")
    make.set_defaults(action="make-odgt")

    look = subparsers.add_parser("check", help="read every sample of a list and report")
    look.add_argument(
        "list",
        metavar="LIST",
        help="an .odgt file, images_dir:labels_dir, a split name of a public data set, or with "
        "--cfg: train or val",
    )
    look.add_argument("--cfg", default=None, metavar="FILE", help="take all settings from here")
    look.add_argument("--root", default=None, metavar="DIR", help="DATASET.root_dataset")
    look.add_argument(
        "--format",
        default=None,
        choices=FORMATS.names(),
        help="DATASET.format (odgt, or folder where LIST has a colon)",
    )
    look.add_argument("--num-class", type=int, default=None, metavar="K")
    look.add_argument("--label-offset", type=int, default=1, metavar="N")
    look.add_argument("--ignore-label", type=int, nargs="+", default=[], metavar="V")
    look.add_argument("--classes", default="", metavar="CSV", help="class names")
    look.add_argument("--json", default="", metavar="FILE", help="write the report here as well")
    look.set_defaults(action="check")

    get = subparsers.add_parser("download", help="fetch a public data set")
    get.add_argument("name", choices=sorted(sources()))
    get.add_argument("--to", default="", metavar="DIR", help="folder (data/<name of the set>)")
    get.set_defaults(action="download")


def run(args: argparse.Namespace) -> int:
    """Run one of the subcommands; 0 when all is well, 1 when it found or met problems."""
    if args.action == "make-odgt":
        report = make_odgt(
            args.images,
            args.labels,
            args.out,
            args.split,
            args.seed,
            args.image_suffix,
            args.label_suffix,
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
    return 0 if download(args.name, args.to or f"data/{sources()[args.name].folder}") else 1


def _check(args: argparse.Namespace) -> dict[str, Any]:
    if args.cfg:
        from mit_semseg.config import load_config

        split = build_split(load_config(args.cfg, []).DATASET, args.list)
        return check(split.records, classes=split.classes, label_map=split.label_map)
    return check(
        args.list,
        args.root,
        data_format=args.format or _format_of(args.list),
        num_class=args.num_class,
        label_offset=args.label_offset,
        ignore_label=args.ignore_label,
        classes=ClassTable.load(args.classes) if args.classes else None,
    )


def _format_of(listing: str) -> str:
    return "folder" if ":" in listing and not listing.endswith(".odgt") else "odgt"
