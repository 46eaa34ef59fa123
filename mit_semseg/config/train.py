"""Settings of training (`TRAIN`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mit_semseg.arguments import PRECISIONS
from mit_semseg.config.schema import Section, key


@dataclass(frozen=True)
class TrainOptions(Section):
    """Schedule, optimizer, loss, computation, checkpoints and resuming."""

    SECTION: ClassVar[str] = "TRAIN"

    batch_size_per_gpu: int = key(2, "images per device and step", least=1)
    num_epoch: int = key(20, "number of epochs", least=1)
    start_epoch: int = key(
        0, "continue from the checkpoint of this epoch; 0: start from the beginning", least=0
    )
    epoch_iters: int | str = key(
        5000,
        "steps per epoch; `auto`: one pass over the data",
        words=("auto",),
        least=1,
        advice="give a number of steps or auto",
    )
    optim: str = key("SGD", "optimizer", words=("SGD", "Adam", "AdamW"))
    lr_encoder: float = key(0.02, "initial learning rate of the encoder", least=0)
    lr_decoder: float = key(0.02, "initial learning rate of the decoder", least=0)
    schedule: str = key(
        "poly",
        "learning rate schedule. `poly`: (1 - step / steps) ** `lr_pow`; `cosine`: half a cosine "
        "to 0; `one_cycle`: rises from 1/25 during the first 30 % (or `warmup_iters`), then falls "
        "to 0; `multi_step`: multiplied by `gamma` after each of `milestones`",
        words=("poly", "cosine", "one_cycle", "multi_step"),
    )
    lr_pow: float = key(0.9, "exponent of the schedule `poly`; 0: constant", least=0)
    milestones: tuple[int, ...] = key(
        (),
        "epochs after which the schedule `multi_step` lowers the learning rates",
        least=1,
        advice="give epochs, such as (60, 90)",
    )
    gamma: float = key(0.1, "factor of the schedule `multi_step`", least=0)
    warmup_iters: int = key(
        0, "steps of a linear warm-up of the learning rate; 0 as published", least=0
    )
    encoder_delay: int = key(
        0, "steps for which the encoder's learning rate is 0, before its warm-up", least=0
    )
    encoder_warmup_iters: int = key(
        0, "steps of the encoder's warm-up; 0: `warmup_iters`. Not of `one_cycle`", least=0
    )
    layer_decay: float = key(
        1.0,
        "factor on the learning rate of each block of the encoder relative to the next deeper one "
        "(layer-wise decay), in (0, 1]; 1: off",
        most=1,
        fits=lambda decay: decay > 0,
        advice="give a factor in (0, 1], such as 0.75",
    )
    freeze: tuple[str, ...] = key(
        (),
        "parts of the network that are not trained, whose BatchNorm stays in evaluation mode: "
        "`encoder`, or names inside encoder and decoder, such as `encoder.layer1`",
    )
    lora_rank: int = key(
        0,
        "rank of low-rank adapters (LoRA) on linear layers of the encoder, the rest of which is "
        "frozen; 0: off. Needs peft: `pip install 'mit_semseg[lora]'`",
        least=0,
    )
    lora_alpha: float = key(
        16.0,
        "scale of the adapters: what they add to a layer is times `lora_alpha` / `lora_rank`",
        least=0,
    )
    lora_targets: tuple[str, ...] = key(
        (),
        "ends of the names of the layers with adapters, such as `qkv`, as in peft's "
        "`target_modules`; empty: all linear layers of attention",
    )
    beta1: float = key(
        0.9,
        "momentum of SGD, first beta of Adam and AdamW, below 1",
        least=0,
        fits=lambda beta: beta < 1,
        advice="give a number in [0, 1), such as 0.9",
    )
    weight_decay: float = key(1e-4, "weight decay of convolution and linear weights", least=0)
    deep_sup_scale: float = key(
        0.4, "weight of the loss of an auxiliary head, unless the decoder defines one", least=0
    )
    aux_weights: tuple[float, ...] = key(
        (),
        "weights of the losses of all auxiliary heads, in the [order](models.md#decoders) of the "
        "decoder, which replace `deep_sup_scale` and the weights of the decoder; empty: these",
        least=0,
        advice="give a weight of 0 or more per auxiliary head, or () for those of the decoder",
    )
    fix_bn: bool = key(
        False,
        "keep BatchNorm in evaluation mode: its running statistics are used and not updated",
    )
    loss: str = key(
        "nll",
        "`nll`, `smooth`, `focal`, `dice`, `focal_dice`, `ohem`, `lovasz`, or a weighted sum such "
        "as `nll+0.5*dice`",
    )
    label_smoothing: float = key(
        0.1,
        "label smoothing of the loss `smooth`, in [0, 1]",
        least=0,
        most=1,
    )
    class_weights: str | tuple[float, ...] = key(
        "none",
        "`none`; computed from a sample of the training labels, whose counts are cached in `DIR`: "
        "`median` (median-frequency balancing), `sqrt` (its square root) or `enet` (1 / ln(1.02 + "
        "share of the class)); or a list with one weight per class",
        words=("none", "sqrt", "median", "enet"),
        advice="give none, sqrt, median, enet or a list",
    )
    ema: float = key(
        0.0,
        "decay of the exponential moving average of the weights, below 1; the average is validated "
        "and saved; 0: off",
        least=0,
        fits=lambda decay: decay < 1,
        advice="give a decay in [0, 1), such as 0.999",
    )
    accumulate: int = key(1, "batches per optimizer step (gradient accumulation)", least=1)
    clip_grad: float = key(0.0, "upper limit of the gradient norm; 0: off", least=0)
    precision: str = key(
        "fp32",
        "`fp32`: float32, without TF32 also in convolutions; `tf32`: float32 with products in "
        "TensorFloat-32, torch's default for convolutions (GPU only); `bf16`; `fp16` (GPU only); "
        "`auto`: `bf16` if the hardware is fast at it, else `tf32` on an NVIDIA GPU, else `fp32`",
        words=PRECISIONS,
    )
    channels_last: bool | str = key(
        "auto",
        "channels-last memory format: `True`, `False`, or `auto`: on the CPU, and on a GPU in bf16 "
        "and fp16 for networks without depthwise convolutions",
        words=("auto",),
        advice="give True, False or auto",
    )
    shape_bucket: int | str = key(
        "auto",
        "pad the sides of batches to multiples of this many pixels, so that a GPU has to select "
        "kernels for few shapes; `off`; `auto`: 64 on a GPU, `off` on the CPU and with "
        "`DATASET.crop_size`",
        words=("auto", "off"),
        least=1,
        advice="give auto, off or a number of pixels, such as 32",
    )
    activation_checkpointing: bool = key(
        False,
        "store only the inputs of the encoder's blocks and recompute their activations in the "
        "backward pass: less memory, more time",
        old={"recompute": None},
    )
    compile: bool = key(
        False,
        "compile encoder and decoder (torch.compile) for images of any size, which takes minutes. "
        "For a single device; needs a C++ compiler, on a GPU Triton",
    )
    parallel: str = key(
        "auto",
        "how a command uses several GPUs. `processes`: one process per GPU, as with torchrun; "
        "`fsdp`: likewise, with parameters, gradients and optimizer state divided among the "
        "processes, also those of torchrun (torch 2.11 or newer); `replicas`: one process with a "
        "thread per GPU; `auto`: processes if torch has NCCL. No effect with one device; the "
        "others have none with torchrun (see [scaling](scaling.md))",
        words=("auto", "processes", "fsdp", "replicas"),
    )
    workers: int = key(
        16,
        "data loader processes per device, limited by the number of cores (half of it when "
        "training on the CPU); 0: load in the training process",
        least=0,
    )
    disp_iter: int = key(20, "steps between lines of `metrics.jsonl`", least=1)
    logger: tuple[str, ...] = key(
        (),
        "loggers of the same figures, and of pictures of the validation: `tensorboard`, `wandb`, "
        "`mlflow`, or a list of them; see [train](train.md#loggers)",
        fits=lambda names: set(names) <= {"tensorboard", "wandb", "mlflow"},
        advice="give tensorboard, wandb, mlflow, or a list of them",
    )
    eval_epochs: int = key(
        1, "epochs between validations; the last epoch is always validated; 0: never", least=0
    )
    patience: int = key(
        0,
        "stop early after so many validations in a row without a better mean IoU; 0: never",
        least=0,
    )
    keep: int = key(
        0,
        "number of latest epochs whose weights are kept, besides the best; 0: all, as published",
        least=0,
        old={"keep_checkpoints": None},
    )
    checkpoint_minutes: float = key(
        30.0,
        "minutes between saved states of the run, of which the newest two are kept; 0: only at the "
        "end of epochs",
        least=0,
    )
    stall_seconds: int = key(
        300,
        "seconds without progress (no batch, no answer from a replica or another rank) before the "
        "run is aborted with an error that says what it waited for",
        least=1,
        old={"timeout": None},
    )
    on_nan: str = key(
        "stop",
        "what to do after a non-finite loss: `stop`, or `skip` the step; the batch is saved for "
        "replay",
        words=("stop", "skip"),
    )
    seed: int = key(304, "random seed", least=0)

    def _check(self) -> None:
        if (self.schedule == "multi_step") != bool(self.milestones):
            raise ValueError(
                f"TRAIN.schedule is {self.schedule} and TRAIN.milestones "
                f"{list(self.milestones)}: multi_step needs milestones, such as (60, 90), and the "
                "other schedules have none"
            )
        if self.schedule == "one_cycle" and (self.encoder_delay or self.encoder_warmup_iters):
            raise ValueError(
                "TRAIN.schedule one_cycle is the same for encoder and decoder: leave out "
                "TRAIN.encoder_delay and TRAIN.encoder_warmup_iters"
            )
        if self.parallel == "fsdp":
            for name, refused, fix in (("compile", True, False), ("precision", "fp16", "bf16")):
                if getattr(self, name) == refused:
                    raise ValueError(
                        f"TRAIN.parallel fsdp does not work with TRAIN.{name} {refused}: set "
                        f"TRAIN.{name} {fix}, or TRAIN.parallel processes"
                    )
        if self.patience and not self.eval_epochs:
            raise ValueError(
                f"TRAIN.patience is {self.patience} and TRAIN.eval_epochs 0: early stopping needs "
                "validations; set TRAIN.eval_epochs 1 or TRAIN.patience 0"
            )
        if self.lora_targets and not self.lora_rank:
            raise ValueError(
                f"TRAIN.lora_targets is {list(self.lora_targets)} and TRAIN.lora_rank 0: set a "
                "rank, such as 16, or leave out TRAIN.lora_targets"
            )
        if self.lora_rank and "encoder" in self.freeze:
            raise ValueError(
                f"TRAIN.lora_rank is {self.lora_rank}, which freezes the encoder, and TRAIN.freeze "
                "would freeze its adapters: leave out encoder in TRAIN.freeze"
            )
        if self.start_epoch > self.num_epoch:
            raise ValueError(
                f"TRAIN.start_epoch {self.start_epoch} is greater than TRAIN.num_epoch "
                f"{self.num_epoch}: raise TRAIN.num_epoch"
            )
