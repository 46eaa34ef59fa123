"""Build the parts of a training run; no other training module reads the whole configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mit_semseg.config import Options, TrainOptions
from mit_semseg.config.node import Config, tree_of
from mit_semseg.dataset import ClassTable, Split, TrainDataset, build_split, check_sample
from mit_semseg.engine.cpu import (
    cpu_count,
    fixed_threads,
    keep_freed_memory,
    local_ranks,
    set_threads,
)
from mit_semseg.engine.evaluate import evaluate_model, val_dataset
from mit_semseg.engine.from_model import recipe
from mit_semseg.engine.scoring import Evaluation
from mit_semseg.engine.threads import ThreadTuner
from mit_semseg.engine.training.balance import class_weights
from mit_semseg.engine.training.checkpoints import RunFolder
from mit_semseg.engine.training.earlier_runs import EarlierRuns
from mit_semseg.engine.training.finetune import freeze, layer_scales
from mit_semseg.engine.training.fsdp import Sharding, check_torch
from mit_semseg.engine.training.loader import TrainLoader
from mit_semseg.engine.training.loggers import Loggers, check_installed
from mit_semseg.engine.training.metrics_log import History, MetricsLog
from mit_semseg.engine.training.optim import MovingAverage, OptimizerState, build_optimizer
from mit_semseg.engine.training.pictures import ValidationPictures
from mit_semseg.engine.training.run_lock import RunLock
from mit_semseg.engine.training.state import (
    Progress,
    RandomNumbers,
    RunState,
    seed_everything,
)
from mit_semseg.engine.training.step import TrainStep
from mit_semseg.engine.training.supervisor import STALLED, Supervisor, lost_peers
from mit_semseg.engine.watchdog import reading_watchdog
from mit_semseg.errors import counted
from mit_semseg.lib.nn import UserScatteredDataParallel
from mit_semseg.losses import build_loss
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.activation_checkpointing import checkpoint_activations
from mit_semseg.models.compilation import compile_for_training
from mit_semseg.models.lora import add_adapters
from mit_semseg.precision import Precision

# Batches on a GPU are padded to multiples of this. cuDNN searches execution plans for every new
# shape, and torch caches 10,000 plans, enough for about a hundred shapes. Batches of 2 images with
# the sizes of ADE20K have 423 shapes in 5000 steps: 133 if padded to multiples of 32 (5 % more
# pixels), and 72 with multiples of 64 (12 % more).
SHAPE_BUCKET = 64


@dataclass(frozen=True)
class TrainProcess:
    """Devices and rank of a training process.

    Attributes:
        devices: of this process; several are used through UserScatteredDataParallel.
        rank: of this process.
        world: number of processes.
        progress: whether to show progress bars.
    """

    devices: Sequence[torch.device]
    rank: int = 0
    world: int = 1
    progress: bool = True

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.devices[0]

    @property
    def name(self) -> str:
        """`rank N` for messages; empty for a single process."""
        return f"rank {self.rank}" if self.world > 1 else ""

    def is_sharded(self, train: TrainOptions) -> bool:
        """Whether the network is divided among the ranks."""
        return train.parallel == "fsdp" and self.world > 1


@dataclass(frozen=True)
class Plan:
    """Values derived from options, data and devices.

    Attributes:
        epoch_iters: steps per epoch.
        batches_per_step: batches per step of all ranks together.
        fixed_size: whether all batches have the same height and width.
        summary: model, data and batch size in one line, for the log.
        config: the configuration as YAML.
    """

    epoch_iters: int
    batches_per_step: int
    fixed_size: bool
    summary: str
    config: str


@dataclass(frozen=True)
class Parts:
    """The parts that `Trainer` combines; none of them knows the others."""

    process: TrainProcess
    options: TrainOptions
    plan: Plan
    loader: Callable[..., TrainLoader]  # (first=, micro_steps=)
    step: TrainStep
    validate: Callable[..., Evaluation] | None  # (module, stop=); None without validation
    classes: ClassTable
    progress: Progress
    history: History
    random: RandomNumbers
    state: RunState
    folder: RunFolder
    lock: RunLock
    sharding: Sharding | None  # None: every rank has the whole network
    describe: Callable[[], None]  # writes configuration and class table to the folder
    metrics: MetricsLog
    earlier: EarlierRuns
    supervisor: Supervisor
    threads: ThreadTuner


def build(
    cfg: Options | Config,
    devices: Sequence[torch.device],
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    resume: bool | str = False,
    job: str = "",
) -> Parts:
    """Read the data and create all parts; the arguments are those of `train`."""
    options = Options.read(cfg)
    train = options.TRAIN
    process = TrainProcess(list(devices), rank, world, progress)
    _check(options, process)
    if process.device.type == "cpu":
        set_threads(fixed_threads() or cpu_count() // local_ranks())
        keep_freed_memory()
    seed_everything(train.seed)
    with reading_watchdog(train.stall_seconds, process.name, STALLED):
        split, data = _training_data(options, process)
        validate = _validation(options, process, split) if train.eval_epochs else None
        weights = class_weights(options, split, progress=progress)
    plan = _plan(options, process, split, data)
    folder, lock = RunFolder(options.DIR), RunLock(Path(options.DIR))
    earlier = EarlierRuns(
        folder,
        lock,
        resume="auto" if resume is True else resume or "",
        job=job,
        start_epoch=train.start_epoch,
        epoch_iters=plan.epoch_iters,
        batches_per_step=plan.batches_per_step,
    )
    module = _initial(options, weights, split.classes.names, earlier.may_exist())
    step, sharding = _step(train, process, module, folder)
    position = Progress(plan.epoch_iters, plan.epoch_iters * train.num_epoch)
    history = History()
    metrics = _metrics(options, process, split.classes, validate)
    random = RandomNumbers(train.seed, process.devices, rank, world, position)
    return Parts(
        process=process,
        options=train,
        plan=plan,
        loader=partial(
            TrainLoader,
            data,
            process.devices,
            rank,
            world,
            workers=train.workers,
            stall_seconds=train.stall_seconds,
        ),
        step=step,
        validate=validate,
        classes=split.classes,
        progress=position,
        history=history,
        random=random,
        state=_state(train.optim, plan.config, step, position, history, random),
        folder=folder,
        lock=lock,
        sharding=sharding,
        describe=partial(
            folder.prepare,
            options,
            split.classes,
            getattr(step.module.encoder, "architecture", None),
        ),
        metrics=metrics,
        earlier=earlier,
        supervisor=Supervisor(
            train.stall_seconds,
            process.name,
            ranks=world,
            silent_failure=world > 1 and process.device.type == "cuda",
        ),
        # Not with several ranks: a step then includes the time of the slowest rank. Not with
        # compiled code, which is recompiled for each number of threads.
        threads=ThreadTuner(process.device.type == "cpu" and world == 1 and not train.compile),
    )


def _check(options: Options, process: TrainProcess) -> None:
    """Checks that depend on the devices, and the loss, before the data is read."""
    train = options.TRAIN
    build_loss(train.loss, options.DATASET.num_class)
    check_installed(train.logger)
    Precision.of(train.precision, process.device, "TRAIN.precision")
    if process.device.type == "mps" and train.precision == "fp16":
        raise ValueError(
            "TRAIN.precision fp16 scales the loss, for which torch before 2.8 needs float64, which "
            "Apple GPUs do not have: use bf16 or fp32"
        )
    if train.eval_epochs:
        Precision.of(options.VAL.precision, process.device, "VAL.precision")
    if process.is_sharded(train):
        check_torch()
    if train.compile and (count := len(process.devices) * process.world) > 1:
        raise ValueError(
            f"TRAIN.compile with {count} devices: synchronized BatchNorm cannot be compiled; set "
            "TRAIN.compile False, or train on one device"
        )


def _training_data(options: Options, process: TrainProcess) -> tuple[Split, TrainDataset]:
    data, train = options.DATASET, options.TRAIN
    split = build_split(data, "train")
    check_sample(split, on_error=data.on_error, options=data)
    dataset = TrainDataset(
        data.root_dataset,
        split.records,
        data,
        batch_per_gpu=train.batch_size_per_gpu,
        seed=train.seed,
        label_map=split.label_map,
        normalized=False,  # uint8 is transferred; the module normalises on its device
        pad_to=shape_bucket(train.shape_bucket, process.device, bool(data.crop_size)),
    )
    return split, dataset


def shape_bucket(wanted: int | str, device: torch.device, fixed_size: bool) -> int:
    """Multiple that the sides of batches are padded to, in pixels; 1 for no extra padding.

    Args:
        wanted: `TRAIN.shape_bucket`.
        device: of the network.
        fixed_size: whether all batches have the same height and width.
    """
    if wanted == "auto":
        return SHAPE_BUCKET if device.type == "cuda" and not fixed_size else 1
    return 1 if wanted == "off" else int(wanted)


def _validation(options: Options, process: TrainProcess, training: Split) -> partial[Evaluation]:
    """A function that scores a module on the validation data."""
    data = val_dataset(options)
    if process.rank == 0:
        # Find unusable masks now, not after the first epoch.
        split = build_split(options.DATASET, "val")
        if split.classes.names != training.classes.names:
            raise ValueError(
                "DATASET.list_train and DATASET.list_val have different classes, "
                f"{', '.join(training.classes.names[:8])} and "
                f"{', '.join(split.classes.names[:8])}; both need the same classes in the same "
                "order"
            )
        check_sample(split, n=16, on_error=options.DATASET.on_error, options=options.DATASET)
    return partial(
        evaluate_model,
        dataset=data,
        cfg=options,
        device=process.device,
        progress=process.progress,
        share=(process.rank, process.world),
    )


def _metrics(
    options: Options,
    process: TrainProcess,
    classes: ClassTable,
    validate: partial[Evaluation] | None,
) -> MetricsLog:
    """The metrics, with loggers in rank 0, for which `validate` is made to draw pictures."""
    folder, names = Path(options.DIR), dict.fromkeys(options.TRAIN.logger)
    if not names or process.rank:
        return MetricsLog(folder, process.rank)
    loggers = Loggers([*names], folder, options, recipe(options), classes.names)
    if validate is None:
        return MetricsLog(folder, process.rank, loggers)
    count, batch = len(validate.keywords["dataset"]), options.VAL.batch_size
    bands = options.DATASET.bands
    pictures = ValidationPictures(count, batch, process.world, classes.colors, bands)
    validate.keywords["figures"] = pictures
    return MetricsLog(folder, process.rank, loggers, pictures)


def _plan(options: Options, process: TrainProcess, split: Split, data: TrainDataset) -> Plan:
    model, train = options.MODEL, options.TRAIN
    count = len(process.devices) * process.world
    if isinstance(train.epoch_iters, str):  # auto
        epoch_iters = math.ceil(data.batches_per_pass / (count * train.accumulate))
    else:
        epoch_iters = train.epoch_iters
    return Plan(
        epoch_iters=epoch_iters,
        batches_per_step=count * train.accumulate,
        fixed_size=bool(options.DATASET.crop_size),
        summary=f"{model.name} on {counted(len(split.records), 'image')}: "
        f"{counted(train.num_epoch, 'epoch')} of {counted(epoch_iters, 'step')}, batch size "
        f"{train.batch_size_per_gpu * train.accumulate} x {counted(count, 'device')}, "
        f"{train.precision}",
        config=tree_of(options).dump(),
    )


def _initial(
    options: Options, class_weights: Tensor | None, classes: Sequence[str], resumes: bool
) -> SegmentationModule:
    """The network with its initial weights."""
    if resumes:
        # They are replaced by the state, and their file or url may no longer exist.
        options = options.without_weights()
    return ModelBuilder.from_config(
        options, inference=False, class_weights=class_weights, classes=classes
    )


def _step(
    train: TrainOptions, process: TrainProcess, module: SegmentationModule, folder: RunFolder
) -> tuple[TrainStep, Sharding | None]:
    """Moves the network to its devices and creates optimizer, EMA and loss scaler."""
    device, sharded = process.device, process.is_sharded(train)
    # Kept casts of all weights would defeat the sharding.
    precision = replace(Precision.of(train.precision, device), keeps_casts=not sharded)
    frozen: list[nn.Module] = []
    if train.lora_rank:  # before the network is moved: the same adapters on every device
        adapters = train.lora_rank, train.lora_alpha, train.lora_targets
        frozen += add_adapters(module, *adapters)
    channels_last = keeps_channels_last(train.channels_last, precision, module)
    if not sharded:  # sharding moves one block at a time, whose weights have to be contiguous
        module.to(device)
        if channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen += freeze(module, train.freeze)
    average = MovingAverage(module, train.ema) if train.ema else None
    sharding = Sharding(module, device) if sharded else None
    if sharding and average:
        sharding.shard(average.module)
    deeper = module.decoder.encoder_layers()
    scales = (
        layer_scales(module.encoder, train.layer_decay, deeper) if train.layer_decay != 1 else None
    )
    optimizer = build_optimizer(
        train.optim,
        (module.encoder, train.lr_encoder),
        (module.decoder, train.lr_decoder),
        beta1=train.beta1,
        weight_decay=train.weight_decay,
        scales=scales,
        of_first=deeper,
        sharded=sharded,
    )
    if train.activation_checkpointing:
        checkpoint_activations(module.encoder)
    if train.compile:
        compile_for_training(module)
    step = TrainStep(
        module,
        module if sharded else _parallel(module, process, train.stall_seconds),
        optimizer,
        device=device,
        precision=precision,
        # fp16 gradients underflow without loss scaling; bf16 has the range of fp32.
        scaler=torch.amp.GradScaler(device.type, enabled=precision.dtype is torch.float16),
        average=average,
        accumulate=train.accumulate,
        clip_grad=train.clip_grad,
        channels_last=channels_last,
        fixed=(module,) if train.fix_bn else frozen,
        on_nan=train.on_nan,
        rank=process.rank,
        world=process.world,
        save_batch=partial(
            folder.save_batch, mark=f"_{process.name}".replace(" ", "_").rstrip("_")
        ),
    )
    return step, sharding


def keeps_channels_last(wanted: bool | str, precision: Precision, module: nn.Module) -> bool:
    """Whether a network is trained in the channels-last memory format.

    Args:
        wanted: `TRAIN.channels_last`.
        precision: of the training, with its device.
        module: the network.
    """
    if wanted != "auto":
        return bool(wanted)
    if precision.device.type != "cuda":
        return precision.device.type != "mps"  # as in `inference_copy`
    # Tensor cores prefer channels last in reduced precision. With depthwise convolutions, however,
    # cuDNN's search for plans is slow in this format. On an H200 with mobilenetv2dilated, the first
    # step with a new batch shape takes 3185 ms channels last and 177 ms contiguous, later ones 21
    # and 23 ms; with resnet50dilated + ppm_deepsup 289 and 316 ms, later 51 and 47 ms.
    depthwise = any(
        isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
        for layer in module.modules()
    )
    return precision.dtype != torch.float32 and not depthwise


def _parallel(module: SegmentationModule, process: TrainProcess, timeout: float) -> nn.Module:
    """The module, or its data-parallel wrapper for several ranks or devices."""
    if process.world > 1:
        ids = [process.device.index] if process.device.type == "cuda" else None
        with lost_peers(1):
            return nn.parallel.DistributedDataParallel(
                module,
                device_ids=ids,
                broadcast_buffers=False,
                find_unused_parameters=module.encoder.spare_parameters,
            )
    if len(process.devices) > 1:
        return UserScatteredDataParallel(module, device_ids=process.devices, timeout=timeout)
    return module


def _state(
    optim: str,
    config: str,
    step: TrainStep,
    progress: Progress,
    history: History,
    random: RandomNumbers,
) -> RunState:
    """The state of the run, assembled from its parts."""
    state = RunState(config=config)
    state.register("encoder", step.module.encoder)
    state.register("decoder", step.module.decoder)
    restart = step.average.restart if step.average else None
    state.register("average", step.average, fallback=restart)
    state.register("scaler", step.scaler, fallback=_keep)
    state.include(OptimizerState(optim, step.optimizer))
    state.include(progress)
    state.include(history)
    state.include(random)
    return state


def _keep() -> None:
    """Fallback for a missing state: the part stays as it was created."""
