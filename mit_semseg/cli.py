"""The command line: arguments in, one library call, clear errors out."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

DEFAULT_CONFIG = "config/ade20k-resnet50dilated-ppm_deepsup.yaml"

# torch is imported by the command that runs, not here: `--help` and argument errors are instant.


# Commands with subcommands of their own, which bring their arguments along when they are called.
ROOMS = {
    "data": ("mit_semseg.dataset.commands", "download data, make and check sample lists"),
    "demo": ("mit_semseg.engine.demo", "the rendered demo data and its result page"),
}
PRECISIONS = ("fp32", "bf16", "fp16", "auto")
SECTIONS = ("DIR", "DATASET.", "MODEL.", "TRAIN.", "VAL.", "TEST.")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line; `command` is the one about to run, whose subcommands are filled in."""
    parser = argparse.ArgumentParser(
        prog="mit-semseg", description="Scene parsing: train, evaluate and run on images."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model")
    _add_gpus(train)
    train.add_argument("--resume", action="store_true", help="continue from the newest epoch")
    _add_config(train, "TRAIN")
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser("eval", help="evaluate a model on the validation list")
    _add_gpus(evaluate)
    evaluate.add_argument("--workers", type=int, default=1, help="processes with --gpus cpu")
    evaluate.add_argument(
        "--single-process", action="store_true", help="evaluate in this process, on one device"
    )
    evaluate.add_argument("--out", default=None, help="folder for figures and pictures")
    _add_config(evaluate, "VAL")
    evaluate.set_defaults(run=run_eval)

    predict = commands.add_parser("predict", help="run a model on images")
    predict.add_argument("--imgs", required=True, nargs="+", help="files, folders or globs")
    predict.add_argument(
        "--gpu",
        dest="devices",
        default=None,
        help="number of a GPU, or cpu (default: GPU 0 if any)",
    )
    _add_config(predict, "TEST")
    predict.set_defaults(run=run_predict)

    pack = commands.add_parser("pack", help="copy a checkpoint in half precision, to hand on")
    pack.add_argument("source", metavar="CHECKPOINT_FOLDER")
    pack.add_argument("out", metavar="OUT")
    pack.add_argument("--checkpoint", default=None, help="epoch_N.pth or best.pth (default: best)")
    pack.set_defaults(run=run_pack)

    bench = commands.add_parser("bench", help="measure against the published procedure")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    bench.add_argument("--quick", action="store_true", help="fewer calls of each side, no peers")
    bench.add_argument(
        "--only", default="", metavar="TEXT", help="only rows with TEXT in their group or name"
    )
    bench.add_argument("--out", default="bench", metavar="DIR", help="folder of the results")
    bench.set_defaults(run=run_bench)

    for name, (module, text) in ROOMS.items():
        room = commands.add_parser(name, help=text)
        if name == command:
            part = importlib.import_module(module)
            part.add_arguments(room.add_subparsers(dest="action", required=True))
            room.set_defaults(run=part.run)
    return parser


def run_train(args: argparse.Namespace) -> int:
    """Train, on one process or as one rank of torchrun."""
    opts = _overrides(args)
    from mit_semseg.engine.launch import (
        leave_process_group,
        rank_devices,
        read_config,
        resolve_devices,
    )
    from mit_semseg.engine.train import train
    from mit_semseg.utils import setup_logger

    cfg = read_config(args.cfg, opts)
    devices = resolve_devices(args.devices)
    rank, world, devices = rank_devices(devices)
    setup_logger(distributed_rank=rank, filename=os.path.join(cfg.DIR, "log.txt"))
    result = train(cfg, devices, rank=rank, world=world, resume=args.resume)
    leave_process_group()
    if rank == 0:
        best = result["best_mean_iou"]
        figure = "" if best is None else f", mean IoU {best:.4f}"
        print(f"Training done: {os.path.join(cfg.DIR, result['checkpoint'])}{figure}")
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Evaluate, one worker process a device."""
    opts = _overrides(args)
    from mit_semseg.engine.evaluate import evaluate
    from mit_semseg.engine.launch import read_config, resolve_devices
    from mit_semseg.utils import setup_logger

    setup_logger(filename="")
    cfg = read_config(args.cfg, opts)
    devices, workers = resolve_devices(args.devices), args.workers
    if args.single_process:
        devices, workers = devices[:1], 1
    evaluate(cfg, devices, workers=workers, out_dir=args.out)
    return 0


def run_predict(args: argparse.Namespace) -> int:
    """Predict; 1 when some images failed."""
    images, more = split_overrides(args.imgs)
    opts = _overrides(args, more)
    from mit_semseg.engine.launch import read_config, resolve_devices
    from mit_semseg.engine.predict import predict
    from mit_semseg.utils import setup_logger

    setup_logger(filename="")
    cfg = read_config(args.cfg, opts)
    # One image runs on one device; by default the first there is.
    devices = resolve_devices(args.devices, "--gpu")[:1]
    results = predict(cfg, images, devices[0])
    return 1 if any("error" in result for result in results) else 0


def run_pack(args: argparse.Namespace) -> int:
    """Pack one checkpoint."""
    from mit_semseg.engine.checkpoint import pack

    path = pack(args.source, args.out, args.checkpoint)
    size = sum(file.stat().st_size for file in path.glob("*.pth")) / 1e6
    print(f"{path}: weights of {size:.1f} MB")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """Measure; 0 even where a target is missed, which the table says."""
    from mit_semseg.benchmarks.command import bench

    bench(args.device, args.out, quick=args.quick, only=args.only)
    return 0


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part `--imgs a.jpg b.jpg TEST.result out` into images and configuration overrides."""
    for i, word in enumerate(words):
        if word.startswith(SECTIONS) and not os.path.exists(word) and (len(words) - i) % 2 == 0:
            return list(words[:i]), list(words[i:])
    return list(words), []


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; user errors print one line and return 2, an interrupt returns 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments))


def script(*command: str) -> int:
    """The body of a top-level script that keeps a published name for `command`."""
    return main([*command, *sys.argv[1:]])


def guarded(run: Callable[[], int]) -> int:
    """Call `run`; what the user can mend is printed as one line instead of a traceback."""
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    args = build_parser(arguments[0] if arguments else None).parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _one_line(error: BaseException) -> str:
    # Errors out of loader processes carry a whole traceback; its last line is the message.
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    last = lines[-1]
    name, _, rest = last.partition(": ")
    return (
        rest if len(lines) > 1 and name.endswith("Error") else last if len(lines) > 1 else lines[0]
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


def _overrides(args: argparse.Namespace, more: Sequence[str] = ()) -> list[str]:
    """`KEY value` pairs, with what options say behind them, so that options win.

    Mistakes in the configuration and in the devices' names are looked for here, too: this takes
    no time, while what comes next imports torch.
    """
    from mit_semseg.config import load_config

    opts = [*more, *args.opts]
    load_config(args.cfg, opts)
    if args.devices is not None:
        from mit_semseg.utils import parse_devices

        parse_devices(args.devices)
    if args.precision:
        opts += [f"{args.section}.precision", args.precision]
    return opts


def _add_gpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        dest="devices",
        default=None,
        help="0-3, 0,2 or cpu (default: all GPUs, else the CPU)",
    )


if __name__ == "__main__":
    sys.exit(main())
