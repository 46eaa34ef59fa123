"""All settings, and checks that involve several sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mit_semseg.config.data import DataOptions
from mit_semseg.config.inference import EvalOptions, PredictOptions
from mit_semseg.config.model import ModelOptions
from mit_semseg.config.schema import Section, Setting, key, settings
from mit_semseg.config.train import TrainOptions

# Keys that models of other libraries define themselves.
_OF_PARTS = (
    *("MODEL.arch_encoder", "MODEL.arch_decoder", "MODEL.fc_dim", "MODEL.output_stride"),
    *("MODEL.out_indices", "MODEL.vit_pyramid"),
)
_STATISTICS = ("DATASET.mean", "DATASET.std")
_COLORS = ("DATASET.color_order", "DATASET.value_range")


@dataclass(frozen=True)
class Options(Section):
    """All settings; `options.SECTION.key` is `SECTION.key` in a file.

    Example:
        >>> Options(TRAIN=TrainOptions(num_epoch=3)).TRAIN.num_epoch
        3
    """

    DIR: str = key(
        "ckpt/ade20k-resnet50dilated-ppm_deepsup",
        "folder of a model: checkpoints, configuration, logs and figures",
    )
    DATASET: DataOptions = DataOptions()
    MODEL: ModelOptions = ModelOptions()
    TRAIN: TrainOptions = TrainOptions()
    VAL: EvalOptions = EvalOptions()
    TEST: PredictOptions = PredictOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        trained = self.MODEL.trained_with()
        data = self.DATASET
        if trained is None or data.bands or (data.color_order, data.value_range) != ("RGB", 1):
            return
        mean, std = trained
        if not data.has_statistics:
            object.__setattr__(self, "DATASET", replace(data, mean=mean, std=std))
        elif (data.mean, data.std) != (mean, std) and not self.MODEL.weights_encoder:
            raise ValueError(
                f"DATASET.mean is {list(data.mean)} and DATASET.std {list(data.std)}; the weights "
                f"of {self.MODEL.arch_encoder} were trained with {list(mean)} and {list(std)}: "
                "leave both out, or set MODEL.weights_encoder none or a file"
            )

    @classmethod
    def read(cls, given: Any) -> Options:
        """Options from a yacs tree, or any object or dict with some of the sections.

        Raises:
            ValueError: a wrong value, or an invalid combination of values.
        """
        if isinstance(given, cls):
            return given
        values: dict[str, Any] = {}
        for name, section in {"DIR": None, **SECTIONS}.items():
            has = name in given if isinstance(given, Mapping) else hasattr(given, name)
            if has:
                value = given[name] if isinstance(given, Mapping) else getattr(given, name)
                values[name] = section.read(value) if section else value
        return cls(**values)

    def _check(self) -> None:
        """Check values of different sections against each other."""
        depth, weights = self.DATASET.depth, self.TRAIN.class_weights
        if self.MODEL.arch and depth:
            raise ValueError(
                f"MODEL.arch {self.MODEL.arch} takes no depth: set DATASET.depth False and "
                "MODEL.in_channels 3"
            )
        bands = self.DATASET.bands
        if bands and self.MODEL.in_channels != len(bands):
            raise ValueError(
                f"MODEL.in_channels is {self.MODEL.in_channels} and DATASET.bands "
                f"{', '.join(bands)}: set MODEL.in_channels {len(bands)}"
            )
        if not bands and self.MODEL.in_channels != 3 + depth:
            raise ValueError(
                f"MODEL.in_channels is {self.MODEL.in_channels} and DATASET.depth {depth}: set "
                f"MODEL.in_channels {3 + depth}, or DATASET.depth {not depth}, or DATASET.bands"
            )
        if isinstance(weights, tuple) and len(weights) != self.DATASET.num_class:
            raise ValueError(
                f"TRAIN.class_weights has {len(weights)} numbers, but DATASET.num_class is "
                f"{self.DATASET.num_class}: give one weight per class"
            )
        if isinstance(weights, tuple) and not any(weights):
            raise ValueError("TRAIN.class_weights are all 0: give a positive weight to some class")

    def without_weights(self) -> Options:
        """These options with random initial weights, for a network that loads a checkpoint."""
        model = replace(self.MODEL, weights_encoder="none", weights_decoder="none")
        return replace(self, MODEL=model)

    def without_effect(self) -> list[str]:
        """One line for each setting that has no effect because of other settings."""
        crops = self.DATASET.batching == "crop"
        own, bands = not self.MODEL.arch, bool(self.DATASET.bands)
        needs = {
            "TRAIN.lr_pow": (self.TRAIN.schedule == "poly", "without TRAIN.schedule poly"),
            "TRAIN.gamma": (self.TRAIN.milestones, "without TRAIN.schedule multi_step"),
            "TRAIN.label_smoothing": ("smooth" in self.TRAIN.loss, "without the loss smooth"),
            "TRAIN.deep_sup_scale": (not self.TRAIN.aux_weights, "with TRAIN.aux_weights"),
            "VAL.overlap": (self.VAL.window, "without VAL.window"),
            "TEST.overlap": (self.TEST.window, "without TEST.window"),
            "DATASET.scale_jitter": (crops, "without DATASET.batching crop"),
            "DATASET.random_rotation": (crops, "without DATASET.batching crop"),
            "DATASET.random_blur": (crops, "without DATASET.batching crop"),
            "DATASET.depth_scale": (self.DATASET.depth, "without DATASET.depth True"),
            "DATASET.depth_mean": (self.DATASET.depth, "without DATASET.depth True"),
            "DATASET.depth_std": (self.DATASET.depth, "without DATASET.depth True"),
            **dict.fromkeys(_OF_PARTS, (own, "with MODEL.arch")),
            **dict.fromkeys(_STATISTICS, (own or bands, "with MODEL.arch")),
            **dict.fromkeys(
                _COLORS,
                (own and not bands, "with DATASET.bands" if bands else "with MODEL.arch"),
            ),
        }
        return [
            f"{name} has no effect {when}"
            for name, (used, when) in needs.items()
            if not used and self[name] != SETTINGS[name].default
        ]

    def __getitem__(self, dotted: str) -> Any:
        """The value of a dotted key, `options["TRAIN.optim"]`."""
        value: Any = self
        for part in dotted.split("."):
            value = getattr(value, part)
        return value


SECTIONS: dict[str, type[Section]] = {
    "DATASET": DataOptions,
    "MODEL": ModelOptions,
    "TRAIN": TrainOptions,
    "VAL": EvalOptions,
    "TEST": PredictOptions,
}
# Every key by its dotted name.
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in settings(Options).values()} | {
    setting.name: setting for kind in SECTIONS.values() for setting in settings(kind).values()
}
