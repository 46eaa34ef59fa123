"""Command line arguments of all commands.

This module imports only the standard library, so that help and argument errors are fast.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

CONFIG = "config.yaml"  # in a checkpoint folder
DEFAULT_CONFIG = "config/ade20k-resnet50dilated-ppm_deepsup.yaml"
_SECTIONS = ("DATASET.", "MODEL.", "TRAIN.", "VAL.", "TEST.")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "auto")
PAPERS = "papers"  # in place of files, to `profile`
# Data sets and formats for the help; checked against the registry when a command runs, and by a
# test.
SOURCES = (
    *("ade20k", "camvid", "cityscapes", "coco", "coco_panoptic", "cocostuff", "lip", "sbu"),
    *("sunrgbd", "voc2012", "vocaug"),
)
FORMATS = ("colors", "folder", "odgt", *SOURCES)
# Formats of `data import`; checked by a test.
ANNOTATIONS = ("supervisely", "label-studio", "coco", "labelme", "yolo", "masks")
# Formats of `export`; checked by a test.
EXPORTS = ("onnx", "torchscript", "pt2", "openvino", "coreml", "executorch", "tensorrt")


def is_key(word: str) -> bool:
    """Whether an argument is a configuration key, which begins the overrides."""
    return word == "DIR" or word.startswith(_SECTIONS)


def build_parser() -> argparse.ArgumentParser:
    """The parser; `command` is the command, `action` its subcommand."""
    parser = argparse.ArgumentParser(
        prog="mit-semseg",
        description="Semantic segmentation: train, evaluate and predict. All settings: "
        "`mit-semseg config`; any of them can be overridden with KEY value at the end.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(commands, "train", "train a model")
    _add_gpus(train)
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default="",
        metavar="auto|PATH",
        help="resume from the newest state in DIR (auto), or from a state file or folder",
    )
    model = "instead of --cfg, a trained model to start from, on --data"
    _add_config(train, "TRAIN", model, data=True)

    evaluate = _command(commands, "eval", "evaluate a model on the validation list")
    _add_gpus(evaluate)
    _option(evaluate, "--workers N", 1, "processes per device")
    evaluate.add_argument(
        "--single-process", action="store_true", help="evaluate in this process, on one device"
    )
    _option(evaluate, "--out DIR", None, "folder of the results (result_eval in DIR)")
    _option(evaluate, "--keep N", 0, "save the predicted class ids of N images as labels/*.npy")
    evaluate.add_argument(
        "--report", action="store_true", help="write report.html: worst images, calibration, ..."
    )
    _add_config(evaluate, "VAL", "instead of --cfg, a trained model", data=True)

    predict = _command(commands, "predict", "run a model on images")
    predict.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="files, folders, globs, urls, - for the bytes of one on standard input, videos, or "
        "the number of a camera; "
        "configuration overrides, KEY value, at the end",
    )
    predict.add_argument(
        "--imgs", nargs="+", default=[], metavar="IMAGE", help="the same, as an option"
    )
    predict.add_argument(
        "--gpu",
        "--gpus",  # as in the other commands
        dest="devices",
        default=None,
        metavar="GPUS",
        help="0, cpu, mps, or several that share the images, 0-3 (default: GPU 0, else the CPU)",
    )
    model = "instead of --cfg, a trained model (default: the shipped one, of street scenes)"
    _add_config(predict, "TEST", model, default=None, overrides=False)
    predict.set_defaults(opts=[])

    serve = _command(commands, "serve", "answer HTTP requests with the results of a model")
    help = "a trained model, as for `predict --model` (default: the shipped one)"
    serve.add_argument("model", nargs="?", metavar="MODEL", help=help)
    _add_server(serve, port=8000)
    _option(serve, "--queue N", 64, "most requests at a time; others are answered with 503")
    help_batch = "most images of a forward pass (8 on a GPU, 1 on the CPU)"
    _option(serve, "--batch N", None, help_batch, type=int)
    _option(serve, "--window MS", 5.0, "milliseconds to wait for images of the same size")
    _option(serve, "--timeout S", 60.0, "most seconds of a request")

    app = _command(commands, "app", "try a model, or compare two, in a browser")
    app.add_argument("model", nargs="*", metavar="MODEL", help=help)
    _add_server(app, port=7860)

    pack = _command(commands, "pack", "copy a checkpoint in half precision, to share it")
    pack.add_argument("source", metavar="CHECKPOINT_FOLDER", help="folder to copy from")
    pack.add_argument("out", metavar="OUT", help="folder to create")
    _option(pack, "--checkpoint NAME", None, "such as epoch_N.pth (the best, else the latest)")
    pack.add_argument(
        "--format", default="pth", choices=("pth", "safetensors"), help="of the weights (pth)"
    )
    pack.add_argument(
        "--library",
        action="store_true",
        help="save a model of MODEL.arch for its own library (save_pretrained), in float32",
    )

    push = _command(commands, "push", "upload a model to the Hugging Face Hub, with a model card")
    push.add_argument("source", metavar="CHECKPOINT_FOLDER", help="folder of the model")
    push.add_argument("repo", metavar="USER/NAME", help="repository; created if needed")
    _option(push, "--checkpoint NAME", None, "such as epoch_N.pth (the best, else the latest)")
    _option(push, "--license NAME", "", "of the weights, as the hub names it: mit, cc-by-4.0, ...")
    push.add_argument("--private", action="store_true", default=None, help="a private repository")
    _option(push, "--out DIR", "", "write the files to this folder instead of uploading them")

    _add_export(commands)

    _command(commands, "models", "list trained models that can be loaded by name")

    config = _command(commands, "config", "print all settings: value, origin, meaning")
    _option(config, "--only TEXT", "", "keys with TEXT in their name")
    _option(config, "--cfg FILE", None, "configuration file (none)")
    _add_overrides(config)

    bench = _command(commands, "bench", "compare speed with the published procedure")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device (cpu)")
    bench.add_argument("--quick", action="store_true", help="fewer repetitions, no other libraries")
    _option(bench, "--only TEXT", "", "only rows with TEXT in their group or name")
    bench.add_argument(
        "--backends", action="store_true", help="instead, a model in ONNX Runtime and OpenVINO"
    )
    _option(bench, "--model MODEL", "", "with --backends: the model (the shipped one)")
    bench.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGE", help="with --backends: its images"
    )
    _option(bench, "--out DIR", "bench", "folder of the results")

    _add_tools(commands)

    data = _command(commands, "data", "download data sets, create and check sample lists")
    _add_data(data.add_subparsers(dest="action", required=True, metavar="ACTION"))

    demo = _command(commands, "demo", "render the demo data, and a page of its results")
    _add_demo(demo.add_subparsers(dest="action", required=True, metavar="ACTION"))
    _add_threads(commands)
    return parser


def _add_export(commands: Subparsers) -> None:
    export = _command(commands, "export", "write a model for ONNX Runtime, OpenVINO, ...")
    model = "a checkpoint folder, hf:NAME, or a name that `mit-semseg models` lists"
    export.add_argument("model", metavar="MODEL", help=model)
    export.add_argument("--format", default="onnx", choices=EXPORTS, help="format (onnx)")
    _option(export, "--out FILE", "", "the file (name of the model in this folder)")
    export.add_argument(
        "--raw", action="store_true", help="without normalisation and argmax: floats to scores"
    )
    export.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=None,
        metavar=("H", "W"),
        help="height and width of all images (any multiples of the padding constant)",
    )
    export.add_argument(
        "--resize", action="store_true", help="with --size: resize to the recipe's scale inside"
    )
    compared = "images on which labels are compared: files, folders or globs (rendered scenes)"
    export.add_argument("--images", nargs="+", default=[], metavar="IMAGE", help=compared)
    export.add_argument(
        "--int8", action="store_true", help="also write an INT8 file (onnx and openvino)"
    )
    _option(export, "--calibration DIR", "", "images for --int8, such as those of the training")
    _option(export, "--data DATA", "", "also evaluate the files: images_dir:masks_dir, ...")


def _add_tools(commands: Subparsers) -> None:
    overfit = _command(commands, "overfit", "check that a model can overfit one image")
    _add_gpus(overfit)
    _option(overfit, "--steps N", 400, "most steps per learning rate")
    _option(overfit, "--side PIXELS", 96, "short side of the image")
    _option(overfit, "--out DIR", "overfit", "folder of the results")
    _add_config(overfit, "TRAIN")

    profile = _command(commands, "profile", "parameters, operations, memory and speed of recipes")
    _add_recipes(profile, f"configuration files, or {PAPERS} for all models of papers")
    _add_gpus(profile)
    _option(profile, "--size H W", [512, 512], "height and width of the image in pixels")
    _option(profile, "--out DIR", "", "also write table and chart to this folder")

    sweep = _command(commands, "sweep", "train and evaluate recipes one after the other")
    _add_recipes(sweep)
    _add_gpus(sweep)
    _option(sweep, "--minutes N", 0.0, "training time of each, 0: the epochs of the recipe")
    sweep.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="run each recipe with each value; repeat for all combinations of several keys",
    )
    _option(sweep, "--out DIR", "sweep", "folder of the results")

    compare = _command(commands, "compare", "table and chart of several evaluations")
    compare.add_argument("evaluations", nargs="+", metavar="DIR", help="folders with an eval.json")
    _option(compare, "--out DIR", "compare", "folder of the results")


def _add_data(actions: Subparsers) -> None:
    make = _command(actions, "make-odgt", "create sample lists from folders")
    _option(make, "--images DIR", None, "folder of images", required=True)
    _option(make, "--labels DIR", None, "folder of masks with the same names", required=True)
    _option(make, "--out DIR", None, "folder of the two lists", required=True)
    _option(make, "--split SHARE", 0.9, "share for training")
    _option(make, "--seed N", 304, "seed of the random split")
    _option(make, "--image-suffix TEXT", "", "suffix of image names, such as _img")
    _option(make, "--label-suffix TEXT", "", "suffix of mask names, such as _mask")
    make.add_argument("--overwrite", action="store_true", help="replace existing lists")
    _add_label_map(make)

    check = _command(actions, "check", "read every sample of a list and report problems")
    check.add_argument(
        "list",
        metavar="LIST",
        help="an .odgt file, images_dir:labels_dir, images_dir:FILE.json (COCO), a split of a "
        "public data set, or with --cfg: train or val",
    )
    _option(check, "--cfg FILE", None, "configuration file, instead of the options")
    _option(check, "--root DIR", None, "DATASET.root_dataset")
    formats = f"DATASET.format: {', '.join(FORMATS)} (default: from LIST)"
    _option(check, "--format NAME", None, formats)
    classes = "DATASET.num_class (default: of the data set, or from the mask values)"
    _option(check, "--num-class K", None, classes, type=int)
    _option(check, "--label-offset N", 1, "DATASET.label_offset")
    check.add_argument(
        "--ignore-label", type=int, nargs="+", default=[], metavar="V", help="DATASET.ignore_label"
    )
    _add_label_map(check)
    _option(check, "--classes CSV", "", "DATASET.classes")
    _option(check, "--json FILE", "", "also write the report as JSON")

    take = _command(actions, "import", "convert annotations of other tools to masks and lists")
    take.add_argument("dir", metavar="DIR", help="folder of the annotations")
    _option(take, "--out DIR", None, "folder of masks, lists, recipe and page", required=True)
    sources = f"format: auto, {', '.join(ANNOTATIONS)}"
    _option(take, "--from FORMAT", "auto", sources, dest="source")
    _option(take, "--images DIR", "", "folder of the images, if they are not in DIR")
    _option(take, "--classes FILE", "", "class table: names, and colours or values of the masks")
    _option(take, "--binary NAME", "", "masks are black and white, and white is this class")
    _option(take, "--unlabelled WHAT", "background", "pixels without annotation: or ignore")
    take.add_argument(
        "--ignore", nargs="+", default=[], metavar="CLASS", help="names of classes to ignore"
    )
    _option(take, "--split SHARE", 0.9, "share for training, if there are no splits")
    _option(take, "--seed N", 304, "seed of the random split")
    take.add_argument("--overwrite", action="store_true", help="replace an earlier import")

    look = _command(actions, "view", "write a page of a data set, odd samples first")
    look.add_argument(
        "place", metavar="DIR|RECIPE", help="a recipe, an imported folder, or annotations"
    )
    _option(look, "--out FILE", "data.html", "the page")
    _option(look, "--images N", 60, "samples with pictures")

    get = _command(actions, "download", "download a public data set")
    get.add_argument("name", metavar="NAME", help=", ".join(SOURCES))
    _option(get, "--to DIR", "", "folder (data/NAME)")


def _add_demo(actions: Subparsers) -> None:
    render = _command(actions, "render", "render a data set of street scenes")
    _option(render, "--out DIR", "demo/data", "folder of the data set")
    _option(render, "--train N", 160, "training scenes")
    _option(render, "--val N", 32, "validation scenes")
    _option(render, "--seed N", 304, "seed of the scenes")
    _option(render, "--size H W", [240, 320], "height and width in pixels")

    page = _command(actions, "page", "write a page with the results of a model")
    _option(page, "--cfg FILE", "config/demo.yaml", "configuration file")
    _option(page, "--evaluation DIR", "demo/evaluation", "output folder of the evaluation")
    _option(page, "--commands FILE", "", "commands to show, one SECONDS<tab>COMMAND per line")
    _option(page, "--out DIR", "demo", "folder of index.html")
    _option(page, "--images N", 12, "images shown")


# ------------------------------------------------------------------------------ shared options
def _add_gpus(parser: argparse.ArgumentParser) -> None:
    help = "0-3, 0,2, cpu, or mps for an Apple GPU (default: all other GPUs, else the CPU)"
    _option(parser, "--gpus GPUS", None, help, dest="devices")


def _add_config(
    parser: argparse.ArgumentParser,
    section: str,
    model: str = "",
    data: bool = False,
    default: str | None = DEFAULT_CONFIG,
    overrides: bool = True,
) -> None:
    either: Any = parser.add_mutually_exclusive_group()
    _option(either, "--cfg FILE", default, "configuration file, or checkpoint folder")
    if model:
        source = "a checkpoint folder, hub:USER/NAME, hf:NAME, or a name of `mit-semseg models`"
        _option(either, "--model MODEL", None, f"{model}: {source}")
    if data:
        kinds = "images_dir:masks_dir, images_dir:FILE.json, FILE.odgt, or a public data set"
        _option(parser, "--data DATA", "", f"with --model: {kinds}")
    parser.add_argument(
        "--precision", default=None, choices=PRECISIONS, help=f"overrides {section}.precision"
    )
    parser.set_defaults(section=section)
    if overrides:
        _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    help = "configuration overrides, after all options"
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY value", help=help)


def _add_server(parser: argparse.ArgumentParser, port: int) -> None:
    _option(parser, "--host ADDRESS", "127.0.0.1", "address to listen on; 0.0.0.0 for all")
    _option(parser, "--port N", port, "port, 0 for any that is free")
    help = "0, cpu or mps (default: GPU 0, else the CPU)"
    _option(parser, "--gpu GPU", None, help, dest="devices")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="precision (fp32)")
    _option(parser, "--megabytes X", 20.0, "largest upload, in 10^6 bytes")
    _option(parser, "--megapixels X", 16.0, "largest image, in 10^6 pixels")


def _add_recipes(parser: argparse.ArgumentParser, what: str = "configuration files") -> None:
    help = f"{what}, followed by KEY value overrides"
    parser.add_argument("recipes", nargs="+", metavar="CONFIG", help=help)


def _add_label_map(parser: argparse.ArgumentParser) -> None:
    help = 'DATASET.label_map: pairs [mask value, class], such as "[[0, 0], [255, 1]]"'
    _option(parser, "--label-map PAIRS", "", help)


def _add_threads(parsers: Subparsers) -> None:
    """Add `--threads` to every command and subcommand."""
    for parser in parsers.choices.values():
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in inner:
            _add_threads(action)
        if not inner:
            default = "one per core, fewer while other programs use the cores"
            help = f"compute threads per process (default: {default})"
            _option(parser, "--threads N", None, help, type=int)


def _command(parsers: Subparsers, name: str, text: str) -> argparse.ArgumentParser:
    return parsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")


def _option(
    parser: argparse.ArgumentParser, spec: str, default: Any, text: str, **more: Any
) -> None:
    """Add an option such as `--out DIR` with the type of its default, which the help shows."""
    name, *metavar = spec.split()
    values = default if isinstance(default, list) else [default]
    if default is not None:
        more |= {"type": type(values[0])}
    if default not in (None, "", 0):
        text = f"{text} ({' '.join(map(str, values))})"
    if len(metavar) > 1:
        more |= {"nargs": len(metavar)}
    names = tuple(metavar) if len(metavar) > 1 else metavar[0]
    parser.add_argument(name, default=default, metavar=names, help=text, **more)
