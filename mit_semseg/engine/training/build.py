"""From a configuration to the parts of a run: the only place of a training that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from mit_semseg.engine.scoring import Evaluation
from mit_semseg.engine.threads import ThreadTuner
from mit_semseg.engine.training.balance import class_weights
from mit_semseg.engine.training.checkpoints import RunFolder
from mit_semseg.engine.training.earlier_runs import EarlierRuns
from mit_semseg.engine.training.finetune import freeze, layer_scales
from mit_semseg.engine.training.loader import TrainLoader
from mit_semseg.engine.training.metrics_log import History, MetricsLog
from mit_semseg.engine.training.optim import MovingAverage, OptimizerState, build_optimizer
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
from mit_semseg.lib.nn import UserScatteredDataParallel
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.activation_checkpointing import checkpoint_activations
from mit_semseg.models.compilation import compile_for_training
from mit_semseg.precision import Precision

# Batches on a GPU are padded to multiples of this: for every shape cuDNN looks for plans anew, and
# torch keeps 10,000 of them, those of about a hundred shapes. Batches of 2 images of sizes as in
# ADE20K are of 423 shapes in 5000 steps, of 133 in multiples of 32 and of 72 in multiples of 64,
# which have 12 % more pixels (32: 5 %).
SHAPE_BUCKET = 64


@dataclass(frozen=True)
class Place:
    """Where a process stands in a run.

    Attributes:
        devices: its own; several are driven by UserScatteredDataParallel.
        rank, world: place among the processes.
        progress: whether to show bars.
    """

    devices: Sequence[torch.device]
    rank: int = 0
    world: int = 1
    progress: bool = True

    @property
    def device(self) -> torch.device:
        """The one that holds the weights."""
        return self.devices[0]

    @property
    def name(self) -> str:
        """Of this process, in messages."""
        return f"rank {self.rank}" if self.world > 1 else ""


@dataclass(frozen=True)
class Plan:
    """What follows from the settings, the data and the place of a run.

    Attributes:
        epoch_iters: steps per epoch.
        batches_a_step: batches that all ranks together take for one step.
        fixed_size: whether all batches are of one size.
        summary: what is trained on what, for the log.
        config: the configuration, as yaml.
    """

    epoch_iters: int
    batches_a_step: int
    fixed_size: bool
    summary: str
    config: str


@dataclass(frozen=True)
class Parts:
    """What `Trainer` puts together: each of them knows its own part of a run only."""

    place: Place
    options: TrainOptions
    plan: Plan
    loader: Callable[..., TrainLoader]  # (first=, micro_steps=)
    step: TrainStep
    validate: Callable[..., Evaluation] | None  # (module, stop=)
    classes: ClassTable
    progress: Progress
    history: History
    random: RandomNumbers
    state: RunState
    folder: RunFolder
    lock: RunLock
    describe: Callable[[], None]  # writes configuration and classes into the folder
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
    """Read the data, make the network and all else; the arguments are those of `train`."""
    options = Options.read(cfg)
    train = options.TRAIN
    place = Place(list(devices), rank, world, progress)
    _check(train, place)
    if place.device.type == "cpu":
        set_threads(fixed_threads() or cpu_count() // local_ranks())
        keep_freed_memory()
    seed_everything(train.seed)
    with reading_watchdog(train.stall_seconds, place.name, STALLED):
        split, data = _training_data(options, place)
        validate = _validation(options, place, split) if train.eval_epochs else None
        weights = class_weights(options, split, progress=progress)
    plan = _plan(options, place, split, data)
    folder, lock = RunFolder(options.DIR), RunLock(Path(options.DIR))
    earlier = EarlierRuns(
        folder,
        lock,
        resume="auto" if resume is True else resume or "",
        job=job,
        start_epoch=train.start_epoch,
        epoch_iters=plan.epoch_iters,
        batches_a_step=plan.batches_a_step,
    )
    module = _initial(options, weights, split.classes.names, earlier.may_exist())
    step = _step(train, place, module, folder)
    passed = Progress(plan.epoch_iters, plan.epoch_iters * train.num_epoch)
    history = History()
    random = RandomNumbers(train.seed, place.devices, rank, world, passed)
    return Parts(
        place=place,
        options=train,
        plan=plan,
        loader=partial(
            TrainLoader,
            data,
            place.devices,
            rank,
            world,
            workers=train.workers,
            stall_seconds=train.stall_seconds,
        ),
        step=step,
        validate=validate,
        classes=split.classes,
        progress=passed,
        history=history,
        random=random,
        state=_state(train.optim, plan.config, step, passed, history, random),
        folder=folder,
        lock=lock,
        describe=partial(
            folder.prepare,
            options,
            split.classes,
            getattr(step.module.encoder, "architecture", None),
        ),
        metrics=MetricsLog(folder.path, rank),
        earlier=earlier,
        supervisor=Supervisor(
            train.stall_seconds,
            place.name,
            ranks=world,
            silent_loss=world > 1 and place.device.type == "cuda",
        ),
        # Ranks wait for each other: what one of them measures is not its own time. And compiled
        # code is compiled again for each number of threads.
        threads=ThreadTuner(place.device.type == "cpu" and world == 1 and not train.compile),
    )


def _check(train: TrainOptions, place: Place) -> None:
    if train.compile and (count := len(place.devices) * place.world) > 1:
        raise ValueError(
            f"TRAIN.compile with {count} devices: BatchNorm over all of them cannot be "
            "compiled; set TRAIN.compile False, or train on one device"
        )


def _training_data(options: Options, place: Place) -> tuple[Split, TrainDataset]:
    data, train = options.DATASET, options.TRAIN
    split = build_split(data, "train")
    check_sample(split, on_error=data.on_error)
    dataset = TrainDataset(
        data.root_dataset,
        split.records,
        data,
        batch_per_gpu=train.batch_size_per_gpu,
        seed=train.seed,
        label_map=split.label_map,
        normalized=False,  # bytes travel; the module normalises them where it computes
        pad_to=shape_bucket(train.shape_bucket, place.device, bool(data.crop_size)),
    )
    return split, dataset


def shape_bucket(wanted: int | str, device: torch.device, fixed_size: bool) -> int:
    """What the sides of batches are padded to multiples of, 1 for no more than they need.

    Args:
        wanted: TRAIN.shape_bucket.
        device: where the batches are computed.
        fixed_size: whether they are crops of one size anyway.
    """
    if wanted == "auto":
        return SHAPE_BUCKET if device.type == "cuda" and not fixed_size else 1
    return 1 if wanted == "off" else int(wanted)


def _validation(options: Options, place: Place, training: Split) -> Callable[..., Evaluation]:
    """What validates a module, which is given to it."""
    data = val_dataset(options)
    if place.rank == 0:
        # A mask that cannot be used is to be found now, not after the first epoch.
        split = build_split(options.DATASET, "val")
        if split.classes.names != training.classes.names:
            raise ValueError(
                "DATASET.list_train and DATASET.list_val are of different classes, "
                f"{', '.join(training.classes.names[:8])} and "
                f"{', '.join(split.classes.names[:8])}; give both the same, in one order"
            )
        check_sample(split, n=8, on_error=options.DATASET.on_error)
    return partial(
        evaluate_model,
        dataset=data,
        cfg=options,
        device=place.device,
        progress=place.progress,
        share=(place.rank, place.world),
    )


def _plan(options: Options, place: Place, split: Split, data: TrainDataset) -> Plan:
    model, train = options.MODEL, options.TRAIN
    count = len(place.devices) * place.world
    if isinstance(train.epoch_iters, str):  # auto
        epoch_iters = math.ceil(data.batches_per_pass / (count * train.accumulate))
    else:
        epoch_iters = train.epoch_iters
    return Plan(
        epoch_iters=epoch_iters,
        batches_a_step=count * train.accumulate,
        fixed_size=bool(options.DATASET.crop_size),
        summary=f"{model.name} on {len(split.records)} images: "
        f"epochs {train.num_epoch}, steps each {epoch_iters}, batch "
        f"{train.batch_size_per_gpu * train.accumulate} x {count} devices, {train.precision}",
        config=tree_of(options).dump(),
    )


def _initial(
    options: Options, class_weights: Tensor | None, classes: Sequence[str], resumes: bool
) -> SegmentationModule:
    """The network as training begins."""
    if resumes:
        # The weights that training began with may be gone, or on a host that cannot be reached.
        options = options.without_weights()
    return ModelBuilder.from_config(
        options, inference=False, class_weights=class_weights, classes=classes
    )


def _step(
    train: TrainOptions, place: Place, module: SegmentationModule, folder: RunFolder
) -> TrainStep:
    """The network on its devices, with all that a step needs."""
    device = place.device
    precision = Precision.of(train.precision, device)
    channels_last = keeps_channels_last(train.channels_last, precision, module)
    module.to(device)
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = freeze(module, train.freeze)
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
    )
    average = MovingAverage(module, train.ema) if train.ema else None
    if train.activation_checkpointing:
        checkpoint_activations(module.encoder)
    if train.compile:
        compile_for_training(module)
    return TrainStep(
        module,
        _parallel(module, place, train.stall_seconds),
        optimizer,
        device=device,
        precision=precision,
        # fp16 overflows without loss scaling; bf16 has the range of fp32.
        scaler=torch.amp.GradScaler(device.type, enabled=precision.dtype is torch.float16),
        average=average,
        accumulate=train.accumulate,
        clip_grad=train.clip_grad,
        channels_last=channels_last,
        fixed=(module,) if train.fix_bn else frozen,
        on_nan=train.on_nan,
        rank=place.rank,
        world=place.world,
        save_batch=partial(folder.save_batch, mark=f"_{place.name}".replace(" ", "_").rstrip("_")),
    )


def keeps_channels_last(wanted: bool | str, precision: Precision, module: nn.Module) -> bool:
    """Whether a network is trained in the memory format channels last.

    Args:
        wanted: TRAIN.channels_last.
        precision: what it is trained in, and where.
        module: the network.
    """
    if wanted != "auto":
        return bool(wanted)
    if precision.device.type != "cuda":
        return True
    # Tensor cores read reduced types channels last. But cuDNN's plans for depthwise convolutions
    # are slow to find in that format: on an H200 the first step with a new shape of batch takes
    # 3185 ms with mobilenetv2dilated, and 177 ms contiguous, where later ones take 21 and 23;
    # with resnet50dilated + ppm_deepsup 289 and 316, and 51 and 47.
    depthwise = any(
        isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
        for layer in module.modules()
    )
    return precision.dtype != torch.float32 and not depthwise


def _parallel(module: SegmentationModule, place: Place, timeout: float) -> nn.Module:
    """What a batch is given to: the module, or its wrapper for several ranks or devices."""
    if place.world > 1:
        ids = [place.device.index] if place.device.type == "cuda" else None
        with lost_peers(1):
            return nn.parallel.DistributedDataParallel(
                module,
                device_ids=ids,
                broadcast_buffers=False,
                find_unused_parameters=module.encoder.spare_parameters,
            )
    if len(place.devices) > 1:
        return UserScatteredDataParallel(module, device_ids=place.devices, timeout=timeout)
    return module


def _state(
    optim: str,
    config: str,
    step: TrainStep,
    progress: Progress,
    history: History,
    random: RandomNumbers,
) -> RunState:
    """What the run resumes from, part by part."""
    state = RunState(config=config)
    state.register("encoder", step.module.encoder)
    state.register("decoder", step.module.decoder)
    restart = step.average.restart if step.average else None
    state.register("average", step.average, otherwise=restart)
    state.register("scaler", step.scaler, otherwise=_keep)
    state.include(OptimizerState(optim, step.optimizer))
    state.include(progress)
    state.include(history)
    state.include(random)
    return state


def _keep() -> None:
    """Leave a part as it was made."""
