"""`mit-semseg demo render | page`: the first and the last step of the demo.

The steps between them are the usual commands for training, evaluation and prediction.
"""

from __future__ import annotations

import argparse
import csv

from mit_semseg.demo import streets


def run(args: argparse.Namespace) -> int:
    """Runs one of the subcommands."""
    if args.action == "render":
        root = streets.write(args.out, args.train, args.val, args.seed, tuple(args.size))
        print(f"{args.train} training and {args.val} validation scenes in {root}")
        return 0
    from mit_semseg.demo.page import show
    from mit_semseg.engine.launch import checked

    options = checked(args.options)
    page = show(options, args.evaluation, args.out, args.images, _commands(args.commands))
    print(f"Open {page}")
    return 0


def _commands(file: str) -> list[tuple[str, float | None]]:
    if not file:
        return []
    with open(file, newline="", encoding="utf-8") as lines:
        return [(row[1], float(row[0])) for row in csv.reader(lines, delimiter="\t") if row]
