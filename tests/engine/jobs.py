"""Small trainings on six images, in one process or several."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from processes import Command, torchrun

from mit_semseg.config import dump_config, load_config

SIZES = [(48, 64), (64, 48), (48, 48), (40, 64), (64, 40), (56, 64)]


class Job:
    """A small training on six images; `run` it in one process or in several ranks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"

    def config(self, name: str, **changes: Any) -> Path:
        """The configuration of a run in a folder of its own, as a file."""
        settings: dict[str, Any] = {
            "DIR": str(self.root / name),
            "DATASET.root_dataset": str(self.data),
            "DATASET.list_train": str(self.data / "val.odgt"),
            "DATASET.list_val": str(self.data / "val.odgt"),
            "DATASET.num_class": 4,
            "DATASET.label_offset": 0,
            "DATASET.imgSizes": [32],
            "MODEL.arch_encoder": "resnet18dilated",
            "MODEL.arch_decoder": "c1",
            "MODEL.fc_dim": 512,
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

    def run(self, *words: str | Path, ranks: int = 1) -> Command:
        """Start a script, under torchrun for more than one rank, and wait for its end."""
        start = [sys.executable]
        if ranks > 1:
            start = torchrun("--standalone", "--nproc-per-node", str(ranks))
        log = self.root / f"log{len(list(self.root.glob('log*')))}.txt"
        command = Command([*start, *words], log, SEEN=str(self.root / f"seen_of_{ranks}_"))
        try:
            command.code(120)
        finally:
            command.destroy()
        return command


def layout(folder: Path) -> set[str]:
    """Names of the files, where steps are counted as shares of the run."""
    return {
        re.sub(r"state_step_\d+", "state_step", path.relative_to(folder).as_posix())
        for path in folder.rglob("*")
    }


def phrases(folder: Path) -> list[str]:
    """The log without times, numbers and the lines of single steps."""
    lines = (folder / "log.txt").read_text().splitlines()
    said = [line.split("] ", 1)[1] for line in lines if ", step " not in line]
    return [re.sub(r"[\d.]+", "#", line) for line in said]


def steps_of(folder: Path) -> list[int]:
    """Steps in the figures, in the order in which they were written."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    figures = [json.loads(line) for line in lines if line.endswith("}")]
    return [one["step"] for one in figures if one["kind"] == "train"]
