"""Training: seeded, resumed exactly from any step, validated as it goes, and never hanging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mit_semseg.config import Options
from mit_semseg.config.node import Config
from mit_semseg.engine.training.build import build
from mit_semseg.engine.training.trainer import Trainer
from mit_semseg.errors import one_line


def train(
    cfg: Options | Config,
    devices: Sequence[torch.device],
    *,
    rank: int = 0,
    world: int = 1,
    resume: bool | str = False,
    job: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Train the configured model and leave its checkpoint folder in `cfg.DIR`.

    SIGTERM and SIGINT make it finish the step, save its state and return. Killed at any moment and
    resumed it continues from its newest state; on the CPU its weights are then, bit by bit, those
    of a run that was never killed.

    Args:
        cfg: `Options`, or a yacs tree such as `launch.read_config` gives.
        devices: devices of this process; several are driven by UserScatteredDataParallel.
        rank, world: place in torchrun's process group (`rendezvous.join_process_group`).
        resume: "auto" or True continues from the newest state in `cfg.DIR` that is whole, and
            starts anew where there is none; otherwise a state file, or a folder with one.
        job: name of the job that this run is part of (`launch.job_name`): one that comes back
            after it has lost a rank resumes its own states, whatever `resume` says.
        progress: show tqdm bars.

    Returns:
        `best_mean_iou` (None when nothing was validated), `checkpoint` (best.pth, or the last
        epoch), `history`, `step`, `steps`, and `stopped`, the signal that ended the run before its
        last step ("" when it was completed).

    Raises:
        ValueError: unusable data or configuration, before the first step.
        FloatingPointError: the loss is not finite; the files of the batch are named.
        ChildProcessError: a loading process died.
        TimeoutError: no batch came for TRAIN.stall_seconds.
        ConnectionError: another rank was lost.
        MemoryError: a GPU is out of memory.
        OSError: the checkpoint folder cannot be written to.

    When nothing moves for TRAIN.stall_seconds and no exception reaches what hangs, the whole
    process is ended, with exit status 3 and a line that says what it waited for.
    """
    try:
        parts = build(cfg, devices, rank, world, progress and rank == 0, resume, job)
        return Trainer(parts).fit()
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(
            f"{one_line(error, 200)}: lower TRAIN.batch_size_per_gpu (and raise "
            "TRAIN.accumulate), set TRAIN.precision bf16 or TRAIN.activation_checkpointing True, "
            "or lower DATASET.imgMaxSize"
        ) from error
