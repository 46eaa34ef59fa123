"""`mit-semseg data import | view`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mit_semseg.dataset.annotations import Choices, convert
from mit_semseg.dataset.class_files import ClassFile
from mit_semseg.tools.view import view


def run(args: argparse.Namespace) -> int:
    """Runs one of the subcommands; returns 1 if an import leaves something out."""
    if args.action == "view":
        print(f"Open {view(args.place, args.out, args.images)}")
        return 0
    choices = Choices(
        Path(args.images) if args.images else None,
        ClassFile.load(args.classes) if args.classes else None,
        args.binary,
    )
    imported = convert(
        *(args.dir, args.out, args.source, choices),
        unlabelled=args.unlabelled,
        ignore=args.ignore,
        split=args.split,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    print(imported.describe())
    text = json.dumps(imported.to_dict(), indent=1)
    (imported.out / "import.json").write_text(text + "\n", encoding="utf-8")
    page = view(str(imported.recipe), imported.out / "page.html")
    print(f"Recipe {imported.recipe}\nOpen {page} and check the masks by eye")
    return 1 if imported.problems else 0
