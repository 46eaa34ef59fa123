"""Training with validation, checkpoints and exact resuming."""

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
    """Train the configured model and write its checkpoint folder `cfg.DIR`.

    SIGTERM and SIGINT finish the step, save the state and return. A run that is killed continues
    from its newest state when resumed; on the CPU its weights are then bit-identical to those of an
    uninterrupted run.

    Without progress for `TRAIN.stall_seconds` the process is ended with exit status 3 and a message
    that says what it waited for.

    Args:
        cfg: `Options`, or a yacs tree, for example from `launch.read_config`.
        devices: of this process; several are used through UserScatteredDataParallel.
        rank: in torchrun's process group (`rendezvous.join_process_group`).
        world: number of ranks.
        resume: "auto" or True resumes from the newest undamaged state in `cfg.DIR`, or starts from
            the beginning if there is none; otherwise a state file or a folder with one.
        job: name of the torchrun job (`rendezvous.job_name`); if torchrun restarts the job after a
            failure, it resumes its own state for any `resume`.
        progress: show tqdm bars.

    Returns:
        `best_mean_iou` (None without validation), `checkpoint` (best.pth or the last epoch),
        `history`, `step`, `steps`, and `stopped`, the signal that ended the run before its last
        step ("" if it is complete).

    Raises:
        ValueError: unusable data or configuration, before the first step.
        FloatingPointError: a non-finite loss, with the files of the batch, or a non-finite weight.
        ChildProcessError: a data loader process died.
        TimeoutError: no batch for `TRAIN.stall_seconds`.
        ConnectionError: another rank was lost.
        MemoryError: a GPU is out of memory.
        OSError: the checkpoint folder cannot be written to.
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
