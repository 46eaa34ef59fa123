"""All settings of a run: the sections, and what they must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mit_semseg.config.data import DataOptions
from mit_semseg.config.inference import EvalOptions, PredictOptions
from mit_semseg.config.model import ModelOptions
from mit_semseg.config.schema import Section, Setting, key, settings
from mit_semseg.config.train import TrainOptions

# What models of other libraries bring along.
_OF_PARTS = (
    *("MODEL.arch_encoder", "MODEL.arch_decoder", "MODEL.fc_dim"),
    *("DATASET.mean", "DATASET.std", "DATASET.color_order", "DATASET.value_range"),
)


@dataclass(frozen=True)
class Options(Section):
    """Every setting; a field of a section is what `SECTION.key` is in a file.

    Example:
        >>> Options(TRAIN=TrainOptions(num_epoch=3)).TRAIN.num_epoch
        3
    """

    DIR: str = key(
        "ckpt/ade20k-resnet50dilated-ppm_deepsup",
        "folder of checkpoints, configuration, logs and pictures of one model",
    )
    DATASET: DataOptions = DataOptions()
    MODEL: ModelOptions = ModelOptions()
    TRAIN: TrainOptions = TrainOptions()
    VAL: EvalOptions = EvalOptions()
    TEST: PredictOptions = PredictOptions()

    @classmethod
    def read(cls, given: Any) -> Options:
        """Options from a yacs tree, or anything else with some of these attributes or keys.

        Raises:
            ValueError: a value cannot be used, or not together with others.
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
        """Refuses sections that contradict each other."""
        depth, weights = self.DATASET.depth, self.TRAIN.class_weights
        if self.MODEL.arch and depth:
            raise ValueError(
                f"MODEL.arch {self.MODEL.arch} takes no depth: set DATASET.depth False and "
                "MODEL.in_channels 3"
            )
        if self.MODEL.in_channels != 3 + depth:
            raise ValueError(
                f"MODEL.in_channels is {self.MODEL.in_channels} and DATASET.depth {depth}: set "
                f"MODEL.in_channels {3 + depth}, or DATASET.depth {not depth}"
            )
        if isinstance(weights, tuple) and len(weights) != self.DATASET.num_class:
            raise ValueError(
                f"TRAIN.class_weights has {len(weights)} numbers; DATASET.num_class is "
                f"{self.DATASET.num_class}"
            )
        if isinstance(weights, tuple) and not any(weights):
            raise ValueError("TRAIN.class_weights are all 0: nothing would be learned")

    def without_weights(self) -> Options:
        """The same for a network whose weights come from elsewhere: none are fetched."""
        model = replace(self.MODEL, weights_encoder="none", weights_decoder="none")
        return replace(self, MODEL=model)

    def without_effect(self) -> list[str]:
        """One line for each setting that others leave without effect."""
        crops = self.DATASET.batching == "crop"
        needs = {
            "TRAIN.label_smoothing": ("smooth" in self.TRAIN.loss, "the loss smooth"),
            "TRAIN.deep_sup_scale": (not self.TRAIN.aux_weights, "TRAIN.aux_weights ()"),
            "VAL.overlap": (self.VAL.window, "VAL.window"),
            "TEST.overlap": (self.TEST.window, "TEST.window"),
            "DATASET.scale_jitter": (crops, "DATASET.batching crop"),
            "DATASET.random_rotation": (crops, "DATASET.batching crop"),
            "DATASET.random_blur": (crops, "DATASET.batching crop"),
            "DATASET.depth_scale": (self.DATASET.depth, "DATASET.depth True"),
            "DATASET.depth_mean": (self.DATASET.depth, "DATASET.depth True"),
            "DATASET.depth_std": (self.DATASET.depth, "DATASET.depth True"),
            **dict.fromkeys(_OF_PARTS, (not self.MODEL.arch, "MODEL.arch ''")),
        }
        return [
            f"{name} has no effect: it is for {what}"
            for name, (has, what) in needs.items()
            if not has and self[name] != SETTINGS[name].default
        ]

    def __getitem__(self, dotted: str) -> Any:
        """The value of a key, such as `options["TRAIN.optim"]`."""
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
