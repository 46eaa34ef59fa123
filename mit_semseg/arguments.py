"""The arguments of all commands.

This module imports the standard library alone, so that help and argument errors are instant.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_CONFIG = "config/ade20k-resnet50dilated-ppm_deepsup.yaml"
# What an override may begin with, among the images of `predict`.
SECTIONS = ("DIR", "DATASET.", "MODEL.", "TRAIN.", "VAL.", "TEST.")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "auto")
# Data sets as the help shows them: those to download, and all formats. What is accepted is for
# the registry to say, once the command runs; a test holds these beside it.
SOURCES = (
    *("ade20k", "camvid", "cityscapes", "coco", "coco_panoptic", "cocostuff", "lip", "sbu"),
    *("sunrgbd", "voc2012", "vocaug"),
)
FORMATS = ("folder", "odgt", *SOURCES)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; it names the command in `command`, a subcommand in `action`."""
    parser = argparse.ArgumentParser(
        prog="mit-semseg", description="Scene parsing: train, evaluate and run on images."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model")
    _add_gpus(train)
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default="",
        metavar="auto|PATH",
        help="continue from the newest whole state in DIR, or from a state file or folder",
    )
    _add_config(train, "TRAIN")

    evaluate = commands.add_parser("eval", help="evaluate a model on the validation list")
    _add_gpus(evaluate)
    evaluate.add_argument("--workers", type=int, default=1, help="processes per device (1)")
    evaluate.add_argument(
        "--single-process", action="store_true", help="evaluate in this process, on one device"
    )
    evaluate.add_argument("--out", default=None, help="folder for figures and pictures")
    evaluate.add_argument(
        "--keep",
        type=int,
        default=0,
        metavar="N",
        help="keep class ids of N images (labels/*.npy)",
    )
    _add_config(evaluate, "VAL")

    predict = commands.add_parser("predict", help="run a model on images")
    predict.add_argument("--imgs", required=True, nargs="+", help="files, folders or globs")
    predict.add_argument(
        "--gpu",
        "--gpus",  # as the other commands call it
        dest="devices",
        default=None,
        help="0, 0-3 (which share the images) or cpu (default: GPU 0 if any)",
    )
    _add_config(predict, "TEST")

    pack = commands.add_parser("pack", help="copy a checkpoint in half precision, to hand on")
    pack.add_argument("source", metavar="CHECKPOINT_FOLDER")
    pack.add_argument("out", metavar="OUT")
    pack.add_argument(
        "--checkpoint",
        default=None,
        help="epoch_N.pth or best.pth (default: best, else the latest)",
    )
    pack.add_argument(
        "--library",
        action="store_true",
        help="write a model of MODEL.arch for its own library (save_pretrained), in float32",
    )

    commands.add_parser("models", help="list trained models that can be loaded by name")

    config = commands.add_parser("config", help="print all settings: value, origin, meaning")
    config.add_argument("--only", default="", metavar="TEXT", help="keys with TEXT in their name")
    config.add_argument("--cfg", default=None, metavar="FILE", help="configuration file (none)")
    config.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY value", help="override configuration keys"
    )

    bench = commands.add_parser("bench", help="measure against the published procedure")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    bench.add_argument("--quick", action="store_true", help="fewer calls of each side, no peers")
    bench.add_argument(
        "--only", default="", metavar="TEXT", help="only rows with TEXT in their group or name"
    )
    bench.add_argument("--out", default="bench", metavar="DIR", help="folder of the results")

    _add_tools(commands)

    data = commands.add_parser("data", help="download data, make and check sample lists")
    _add_data(data.add_subparsers(dest="action", required=True))

    demo = commands.add_parser("demo", help="the rendered demo data and its result page")
    _add_demo(demo.add_subparsers(dest="action", required=True))
    _add_threads(commands)
    return parser


def _add_tools(commands: Subparsers) -> None:
    overfit = commands.add_parser("overfit", help="check that a model can overfit one image")
    _add_gpus(overfit)
    overfit.add_argument("--steps", type=int, default=400, metavar="N", help="at most (400)")
    overfit.add_argument("--side", type=int, default=96, metavar="PIXELS", help="short side (96)")
    overfit.add_argument("--out", default="overfit", metavar="DIR", help="folder of the results")
    _add_config(overfit, "TRAIN")

    profile = commands.add_parser(
        "profile", help="parameters, operations, memory, speed of recipes"
    )
    profile.add_argument("recipes", nargs="+", metavar="CONFIG", help="files, then KEY value")
    _add_gpus(profile)
    profile.add_argument(
        "--size", type=int, nargs=2, default=[512, 512], metavar=("H", "W"), help="pixels (512 512)"
    )
    profile.add_argument("--out", default="", metavar="DIR", help="write table and chart here, too")

    sweep = commands.add_parser("sweep", help="train and evaluate recipes one after the other")
    sweep.add_argument("recipes", nargs="+", metavar="CONFIG", help="files, then KEY value")
    _add_gpus(sweep)
    sweep.add_argument(
        "--minutes", type=float, default=0.0, help="of training for each (as the recipe says)"
    )
    sweep.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="with each of these values; several --vary: every combination",
    )
    sweep.add_argument("--out", default="sweep", metavar="DIR", help="folder of the results")

    compare = commands.add_parser("compare", help="evaluations side by side: table, chart")
    compare.add_argument(
        "evaluations", nargs="+", metavar="DIR", help="folders that hold an eval.json"
    )
    compare.add_argument("--out", default="compare", metavar="DIR", help="folder of the results")


def _add_data(subparsers: Subparsers) -> None:
    make = subparsers.add_parser("make-odgt", help="sample lists from image and mask folders")
    make.add_argument("--images", required=True, metavar="DIR")
    make.add_argument("--labels", required=True, metavar="DIR", help="masks, named as the images")
    make.add_argument("--out", required=True, metavar="DIR", help="folder for the two lists")
    make.add_argument("--split", type=float, default=0.9, help="share for training (0.9)")
    make.add_argument("--seed", type=int, default=304, help="of the random split")
    make.add_argument("--image-suffix", default="", help="what only image names end with")
    make.add_argument("--label-suffix", default="", help="what only mask names end with (_mask)")
    make.add_argument("--overwrite", action="store_true", help="replace lists that are there")
    _add_label_map(make)

    look = subparsers.add_parser("check", help="read every sample of a list and report")
    look.add_argument(
        "list",
        metavar="LIST",
        help="an .odgt file, images_dir:labels_dir, images_dir:FILE.json (COCO), a split name of "
        "a public data set, or with --cfg: train or val",
    )
    look.add_argument("--cfg", default=None, metavar="FILE", help="take all settings from here")
    look.add_argument("--root", default=None, metavar="DIR", help="DATASET.root_dataset")
    look.add_argument(
        "--format",
        default=None,
        metavar=_one_of(FORMATS),
        help="DATASET.format (odgt; where LIST has a colon folder, or coco for a .json)",
    )
    look.add_argument("--num-class", type=int, default=None, metavar="K")
    look.add_argument("--label-offset", type=int, default=1, metavar="N")
    look.add_argument("--ignore-label", type=int, nargs="+", default=[], metavar="V")
    _add_label_map(look)
    look.add_argument("--classes", default="", metavar="CSV", help="class names")
    look.add_argument("--json", default="", metavar="FILE", help="write the report here as well")

    get = subparsers.add_parser("download", help="fetch a public data set")
    get.add_argument("name", metavar=_one_of(SOURCES))
    get.add_argument("--to", default="", metavar="DIR", help="folder (data/<name of the set>)")


def _add_label_map(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--label-map",
        default="",
        metavar="PAIRS",
        help='stored value to class, -1 for ignored, as "[[0, 0], [255, 1]]"',
    )


def _add_demo(subparsers: Subparsers) -> None:
    render = subparsers.add_parser("render", help="draw street scenes with labels, as a data set")
    render.add_argument("--out", default="demo/data", metavar="DIR", help="folder (demo/data)")
    render.add_argument("--train", type=int, default=160, metavar="N", help="scenes to train on")
    render.add_argument("--val", type=int, default=32, metavar="N", help="scenes held out")
    render.add_argument("--seed", type=int, default=304, help="of all scenes")
    render.add_argument(
        "--size", type=int, nargs=2, default=[240, 320], metavar=("H", "W"), help="pixels (240 320)"
    )

    page = subparsers.add_parser("page", help="show a trained, evaluated model on one page")
    page.add_argument("--cfg", default="config/demo.yaml", metavar="FILE")
    page.add_argument(
        "--evaluation", default="demo/evaluation", metavar="DIR", help="what eval_multipro.py wrote"
    )
    page.add_argument("--commands", default="", metavar="FILE", help="lines of SECONDS<tab>COMMAND")
    page.add_argument("--out", default="demo", metavar="DIR", help="folder of index.html (demo)")
    page.add_argument("--images", type=int, default=12, metavar="N", help="rows on the page")


def _add_threads(parsers: Subparsers) -> None:
    """`--threads` for every command, after the command's name and its action."""
    for parser in parsers.choices.values():
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in inner:
            _add_threads(action)
        if not inner:
            parser.add_argument(
                "--threads",
                type=int,
                default=None,
                metavar="N",
                help="compute threads (as many as cores, fewer while other programs use them)",
            )


def _add_gpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        dest="devices",
        default=None,
        help="0-3, 0,2 or cpu (default: all GPUs, else the CPU)",
    )


def _add_config(parser: argparse.ArgumentParser, section: str) -> None:
    parser.add_argument("--cfg", default=DEFAULT_CONFIG, metavar="FILE", help="configuration file")
    parser.add_argument(
        "--precision", default=None, choices=PRECISIONS, help=f"instead of {section}.precision"
    )
    parser.set_defaults(section=section)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY value", help="override configuration keys"
    )


def _one_of(names: tuple[str, ...]) -> str:
    return f"{{{','.join(names)}}}"
