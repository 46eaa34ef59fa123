"""The command line.

Each command imports its modules, and torch, when it runs, so that `--help` and argument errors are
fast.
"""

from __future__ import annotations

import argparse
import atexit
import io
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mit_semseg import __version__
from mit_semseg.arguments import PAPERS, build_parser, is_key
from mit_semseg.command_settings import read_settings, settings_of
from mit_semseg.compat import json_configs
from mit_semseg.compat.flags import replacement
from mit_semseg.errors import one_line

if TYPE_CHECKING:
    from mit_semseg.config import Options


def run_train(args: argparse.Namespace) -> int:
    """Train in one process, in one process per GPU, or as a rank of torchrun."""
    if is_key(args.resume) and not os.path.exists(args.resume):
        # `--resume TRAIN.num_epoch 30`: argparse takes the first override for a path.
        args.opts.insert(0, args.resume)
        args.resume = "auto"
    options = settings_of(args)
    if args.model:
        args.words = _keep_recipe(options, args)
    from mit_semseg.engine import processes
    from mit_semseg.engine.checkpoint import make_writable
    from mit_semseg.engine.devices import resolve_devices, use_device
    from mit_semseg.engine.launch import checked
    from mit_semseg.engine.rendezvous import job_name, join_process_group, leave_process_group
    from mit_semseg.engine.signals import die_with_parent, ignore_stops
    from mit_semseg.engine.train import train
    from mit_semseg.utils import setup_logger

    checked(options)
    devices = resolve_devices(args.devices)
    if processes.wanted(options.TRAIN.parallel, devices):
        make_writable(options.DIR, "DIR")
        return processes.start(args.words, len(devices), options.TRAIN.stall_seconds)
    if processes.started_here():
        die_with_parent(signal.SIGTERM)
    rank, world, devices = join_process_group(devices, options.TRAIN.stall_seconds)
    use_device(devices[0])
    if rank == 0:
        make_writable(options.DIR, "DIR")
    # Without ranks in the log if the command has started the processes itself.
    setup_logger(
        rank, named=world > 1 and not (processes.started_here() and rank == 0), folder=options.DIR
    )
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        args.resume = args.resume or "auto"  # torchrun restarted the job after a failure
    atexit.register(ignore_stops)
    result = train(options, devices, rank=rank, world=world, resume=args.resume, job=job_name())
    leave_process_group()
    if rank == 0:
        _print_end(options.DIR, result)
    return 0


def _keep_recipe(options: Options, args: argparse.Namespace) -> list[str]:
    """Write the settings to DIR; returns the arguments of the same training with that file."""
    from mit_semseg.engine.checkpoint import make_writable
    from mit_semseg.engine.from_model import RECIPE, recipe

    make_writable(options.DIR, "DIR")
    file = os.path.join(options.DIR, RECIPE)
    with open(file, "w", encoding="utf-8") as opened:
        opened.write(recipe(options))
    print(f"These settings are kept as {file}")
    words = ["train", "--cfg", file]
    words += ["--gpus", args.devices] if args.devices else []
    words += ["--resume", args.resume] if args.resume else []
    return [*words, *(["--threads", str(args.threads)] if args.threads else [])]


def _print_end(folder: str, result: dict[str, Any]) -> None:
    if result["stopped"]:
        print(
            f"Stopped by {result['stopped']} after step {result['step']} of {result['steps']}; "
            f"the state is saved. Resume with:\n  {_resume_command()}"
        )
        return
    best = result["best_mean_iou"]
    figure = "" if best is None else f", mean IoU {best:.4f}"
    print(f"Training done: {os.path.join(folder, result['checkpoint'])}{figure}")


def _resume_command() -> str:
    """The command line that resumes this training."""
    words = list(sys.argv[1:])
    if "--resume" in words:
        at = words.index("--resume")
        value = words[at + 1 : at + 2]
        named = value and not value[0].startswith("--") and not is_key(value[0])
        del words[at : at + (2 if named else 1)]
    words = [word for word in words if not word.startswith("--resume=")]
    words = words[1:] if words[:1] == ["train"] else words
    return f"{_called('train')} --resume auto {shlex.join(words)}"


def _called(command: str) -> str:
    """The beginning of the command line with which a command was started."""
    script = os.path.basename(sys.argv[0])
    if not script.endswith(".py") or script == "__main__.py":
        return f"mit-semseg {command}"
    from mit_semseg.engine.processes import started_here

    torchrun = "TORCHELASTIC_RUN_ID" in os.environ and not started_here()
    run = "torchrun ..." if torchrun else "python"
    words = [sys.argv[0], *([command] if sys.argv[1:2] == [command] else [])]
    return f"{run} {shlex.join(words)}"


def run_eval(args: argparse.Namespace) -> int:
    """Evaluate with worker processes or as a rank of torchrun; returns 1 if images failed."""
    options = settings_of(args)
    from mit_semseg.engine.checkpoint import make_writable
    from mit_semseg.engine.devices import resolve_devices, use_device
    from mit_semseg.engine.evaluate import evaluate
    from mit_semseg.engine.launch import checked
    from mit_semseg.engine.rendezvous import join_process_group, leave_process_group
    from mit_semseg.utils import setup_logger

    checked(options)
    devices, workers = resolve_devices(args.devices), args.workers
    rank, world, devices = join_process_group(devices, options.VAL.timeout)
    setup_logger(rank, named=world > 1)
    if args.model and not args.out:
        args.out = "result_eval"  # the folder of the model may be that of the package
    if rank == 0:
        make_writable(args.out or options.DIR, "--out" if args.out else "DIR")
    if args.single_process:
        devices, workers = devices[:1], 1
    if len(devices) * workers == 1:  # otherwise worker processes compute
        use_device(devices[0])
    place = {"out_dir": args.out, "rank": rank, "world": world}
    result = evaluate(
        options, devices, workers=workers, keep=args.keep, report=args.report, **place
    )
    leave_process_group()
    return 1 if result["failed"] else 0


def run_predict(args: argparse.Namespace) -> int:
    """Predict with one process per device or as a rank of torchrun; returns 1 if images failed."""
    images, args.opts = split_overrides([*args.imgs, *args.images])
    if not images:
        raise ValueError(
            "no image is given: name files, folders, globs, urls, videos, the number of a camera, "
            "or - for standard input"
        )
    options = settings_of(args)
    from mit_semseg.engine.checkpoint import make_writable
    from mit_semseg.engine.devices import resolve_devices, use_device
    from mit_semseg.engine.launch import checked
    from mit_semseg.engine.rendezvous import join_process_group, leave_process_group
    from mit_semseg.engine.video import predict_all
    from mit_semseg.utils import setup_logger

    setup_logger()
    checked(options)
    devices = resolve_devices(args.devices, "--gpu")
    rank, world, devices = join_process_group(devices, options.TEST.timeout)
    setup_logger(rank, named=world > 1)
    if rank == 0:
        make_writable(options.TEST.result, "TEST.result")
    if args.devices is None:
        devices = devices[:1]  # as published
    if len(devices) == 1:  # otherwise worker processes compute
        use_device(devices[0])
    results = predict_all(options, images, devices, rank=rank, world=world)
    leave_process_group()
    return 1 if any("error" in result for result in results) else 0


def run_server(args: argparse.Namespace) -> int:
    """Answer HTTP requests, or show a page, until a signal."""
    from mit_semseg.serving.command import run

    return run(args)


def run_pack(args: argparse.Namespace) -> int:
    """Copy a checkpoint in half precision, or in the form of its library."""
    from mit_semseg.engine.checkpoint import CheckpointFolder, pack, pack_for_library

    if args.library:
        print(pack_for_library(args.source, args.out, args.checkpoint))
        return 0
    path = pack(args.source, args.out, args.checkpoint, suffix=f".{args.format}")
    files = CheckpointFolder(path).files(f"best.{args.format}")
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{path}: weights of {size:.1f} MB")
    return 0


def run_push(args: argparse.Namespace) -> int:
    """Upload a model, or write the files that would be uploaded."""
    from mit_semseg.engine.share import prepare, push

    if args.out:
        folder = prepare(args.source, args.out, args.repo, args.checkpoint, args.license)
        print(f"{folder}: what would be uploaded")
        return 0
    settings = {"checkpoint": args.checkpoint, "private": args.private, "license": args.license}
    print(push(args.source, args.repo, **settings))
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Export a model, and compare it with this toolkit."""
    from mit_semseg.tools.export import run
    from mit_semseg.utils import setup_logger

    setup_logger()
    return run(args)


def run_models(args: argparse.Namespace) -> int:
    """List trained models."""
    from mit_semseg.tools.models import listing

    print(listing())
    return 0


def run_config(args: argparse.Namespace) -> int:
    """Print all settings."""
    from mit_semseg.config import load_config
    from mit_semseg.config.listing import listing

    print(listing(load_config(args.cfg, args.opts), args.only))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """Run benchmarks; returns 0 even if a target is missed."""
    if args.backends:
        from mit_semseg.benchmarks.backends import backends

        backends(args.model, args.out, args.images)
        return 0
    if args.model or args.images:
        raise ValueError("--model and --images are for bench --backends")
    from mit_semseg.benchmarks.command import bench

    bench(args.device, args.out, quick=args.quick, only=args.only)
    return 0


def run_overfit(args: argparse.Namespace) -> int:
    """Overfit one image; returns 1 if the model does not."""
    options = settings_of(args)
    from mit_semseg.engine.checkpoint import make_writable
    from mit_semseg.engine.devices import resolve_devices, use_device
    from mit_semseg.engine.launch import checked
    from mit_semseg.tools.overfit import TARGET, run
    from mit_semseg.utils import setup_logger

    setup_logger()
    checked(options)
    make_writable(args.out, "--out")
    device = resolve_devices(args.devices)[0]
    use_device(device)
    name = os.path.splitext(os.path.basename(args.cfg))[0]
    found = run(options, device, args.out, name=name, steps=args.steps, side=args.side)
    return 0 if found.accuracy >= TARGET else 1


def run_profile(args: argparse.Namespace) -> int:
    """Profile recipes; returns 1 if one of them failed."""
    files, opts = split_overrides(args.recipes)
    read = {file: read_settings(file, opts) for file in files if file != PAPERS}
    from mit_semseg.engine.checkpoint import make_writable
    from mit_semseg.engine.devices import resolve_devices, use_device
    from mit_semseg.engine.launch import checked
    from mit_semseg.tools.profile import of_papers, run
    from mit_semseg.tools.recipes import named

    recipes = of_papers(opts) if PAPERS in files else {}
    recipes |= {name: checked(read[file]) for name, file in named(read).items()}
    if args.out:
        make_writable(args.out, "--out")
    device = resolve_devices(args.devices)[0]
    use_device(device)
    found = run(recipes, device, tuple(args.size), args.out)
    return 0 if len(found) == len(recipes) else 1


def run_sweep(args: argparse.Namespace) -> int:
    """Train and evaluate recipes; returns 1 if one of them failed."""
    files, opts = split_overrides(args.recipes)
    for file in files:
        read_settings(file, opts)
    from mit_semseg.tools.sweep import run

    settings = {"gpus": args.devices, "minutes": args.minutes, "vary": args.vary, "opts": opts}
    return 1 if run(files, args.out, **settings) else 0


def run_compare(args: argparse.Namespace) -> int:
    """Compare evaluations."""
    from mit_semseg.engine.checkpoint import make_writable
    from mit_semseg.tools.compare import compare, table

    make_writable(args.out, "--out")
    print(f"{table(compare(args.evaluations, args.out))}\n\nResults in {args.out}")
    return 0


def run_data(args: argparse.Namespace) -> int:
    """Download, import, list, check or show data; returns 1 if there are problems."""
    if args.action == "check" and args.cfg:
        args.options = read_settings(args.cfg)
    if args.action in ("import", "view"):
        from mit_semseg.tools.data import run
    else:
        from mit_semseg.dataset.commands import run

    return run(args)


def run_demo(args: argparse.Namespace) -> int:
    """Render the demo's data, or write its page of results."""
    if args.action == "page":
        args.options = read_settings(args.cfg)
    from mit_semseg.demo.command import run

    return run(args)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": run_train,
    "eval": run_eval,
    "predict": run_predict,
    **dict.fromkeys(("serve", "app"), run_server),
    "pack": run_pack,
    "push": run_push,
    "export": run_export,
    "models": run_models,
    "config": run_config,
    "bench": run_bench,
    "overfit": run_overfit,
    "profile": run_profile,
    "sweep": run_sweep,
    "compare": run_compare,
    "data": run_data,
    "demo": run_demo,
}


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `a.jpg b.jpg TEST.result out` into files and configuration overrides."""
    for i, word in enumerate(words):
        if is_key(word) and not os.path.exists(word) and (len(words) - i) % 2 == 0:
            return list(words[:i]), list(words[i:])
    return list(words), []


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 2 for a user's mistake, 130 for an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may not be valid UTF-8
            stream.reconfigure(errors="backslashreplace")
    return guarded(lambda: _dispatch(arguments))


def script(*command: str) -> int:
    """Main function of a top-level script with the published name of `command`."""
    return main([*command, *sys.argv[1:]])


def guarded(run: Callable[[], int]) -> int:
    """Call `run` and print errors that a user can fix as one line, without a traceback."""
    from mit_semseg.engine.processes import report, started_here

    status, message, lost = 0, "", False
    try:
        status = run()
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        status, message, lost = 2, one_line(error), isinstance(error, ConnectionError)
    if started_here():
        report(status, message if status == 2 else "", lost)
    elif message:
        print(f"{_rank()}{'error: ' if status == 2 else ''}{message}", file=sys.stderr)
    return status


def _rank() -> str:
    """`rank N: ` under torchrun, for messages."""
    return f"rank {os.environ['RANK']}: " if "TORCHELASTIC_RUN_ID" in os.environ else ""


def _dispatch(arguments: list[str]) -> int:
    _refuse_early_flags(arguments)
    parser = build_parser()
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    args, rest = parser.parse_known_args(arguments)
    # Words after an option, where argparse does not expect more of them.
    images = hasattr(args, "images") and not any(word.startswith("--") for word in rest)
    if rest and not (images or hasattr(args, "recipes") and is_key(rest[0])):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        (args.images if images else args.recipes).extend(rest)
    if args.threads is not None:
        from mit_semseg.engine.cpu import fix_threads

        fix_threads(args.threads)
    args.words = arguments
    return COMMANDS[args.command](args)


def _refuse_early_flags(arguments: list[str]) -> None:
    if not arguments:
        return
    command, *words = arguments
    if words[:1] == ["--single-process"] and words[:1] != sys.argv[1:2]:
        words = words[1:]  # added by eval.py
    for word, after in itertools.pairwise(words):
        if word in ("-c", "--config") and after.endswith(".json"):
            raise ValueError(json_configs.advice(after))
    if advice := replacement(command, words, _called(command)):
        raise ValueError(advice)


if __name__ == "__main__":
    sys.exit(main())
