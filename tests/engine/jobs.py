"""Small trainings on six images, in one process or several."""

import json
import os
import re
import sys
from pathlib import Path

from processes import ROOT, Command, exit_codes, free_port
from small_runs import register

from mit_semseg.cli import main
from mit_semseg.config import dump_config, load_config
from mit_semseg.dataset import TrainDataset

# For scripts that import small_runs.
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
SIZES = [(48, 64), (64, 48), (48, 48), (40, 64), (64, 40), (56, 64)]


class Job:
    """A small training on six images."""

    def __init__(self, root):
        self.root = root
        self.data = root / "data"

    def config(self, name, **changes):
        """The configuration of a run in a folder of its own, as a file."""
        settings = {
            "DIR": str(self.root / name),
            "DATASET.root_dataset": str(self.data),
            "DATASET.list_train": str(self.data / "val.odgt"),
            "DATASET.list_val": str(self.data / "val.odgt"),
            "DATASET.num_class": 4,
            "DATASET.label_offset": 0,
            "DATASET.imgSizes": [32],
            "DATASET.segm_downsampling_rate": 4,
            "MODEL.arch_encoder": "small",
            "MODEL.arch_decoder": "c1",
            "MODEL.fc_dim": 16,
            "MODEL.weights_encoder": "none",
            "TRAIN.num_epoch": 1,
            "TRAIN.epoch_iters": "auto",
            "TRAIN.batch_size_per_gpu": 1,
            "TRAIN.workers": 0,
            "TRAIN.disp_iter": 1,
            "VAL.checkpoint": "epoch_1.pth",
            "VAL.timeout": 60,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        cfg = load_config(None, [word for pair in settings.items() for word in pair])
        file = self.root / f"{name}.yaml"
        dump_config(cfg, file)
        return file

    def run(self, *words):
        """Start a script, which may import `small_runs`, and wait for its end."""
        log = self.root / f"log{len(list(self.root.glob('log*')))}.txt"
        command = Command([sys.executable, *words], log, **ENVIRONMENT)
        try:
            command.code(120)
        finally:
            command.destroy()
        return command

    def run_forked(self, *words, ranks=1):
        """Exit codes and output of a command in so many ranks, as if torchrun had started them.

        The samples that are read for training are noted in files `seen_of_RANKS_RANK`.
        """
        log = self.root / f"log{len(list(self.root.glob('log*')))}.txt"
        codes = exit_codes(_rank, ranks, list(map(str, words)), ranks, free_port(), log)
        return codes, log.read_text()


def _rank(rank, words, world, port, log):
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    register()
    read = TrainDataset.__getitem__

    def noted(self, index):
        item = read(self, index)
        with (log.parent / f"seen_of_{world}_{rank}").open("a") as file:
            file.writelines(name + "\n" for name in item["info"])
        return item

    TrainDataset.__getitem__ = noted
    sys.exit(main(list(words)))


def layout(folder):
    """Names of the files, where steps are counted as shares of the run."""
    return {
        re.sub(r"state_step_\d+", "state_step", path.relative_to(folder).as_posix())
        for path in folder.rglob("*")
    }


def phrases(folder):
    """The log without times, numbers and the lines of single steps."""
    lines = (folder / "log.txt").read_text().splitlines()
    output = [line.split("] ", 1)[1] for line in lines if ", step " not in line]
    numbers = [re.sub(r"[\d.]+", "#", line) for line in output]
    return [re.sub(r"(# \w+)s\b", r"\1", line) for line in numbers]  # 1 device, 2 devices


def figures_of(folder, kind="train"):
    """The lines of `metrics.jsonl` so far, in the order in which they were written."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    figures = [json.loads(line) for line in lines if line.endswith("}")]
    return [one for one in figures if one["kind"] == kind]


def steps_of(folder):
    """Steps in the figures."""
    return [one["step"] for one in figures_of(folder)]
