"""Flags of the versions of 2017 to 2019, and of other toolkits, and their replacements.

This module imports the standard library only, so that errors in arguments are printed at once.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from mit_semseg import shipped
from mit_semseg.arguments import is_key

# Flag -> configuration key; {} is the section of the command. `_converted` converts the values.
_KEYS = {
    "arch_encoder": "MODEL.arch_encoder",
    "arch_decoder": "MODEL.arch_decoder",
    "weights_encoder": "MODEL.weights_encoder",
    "weights_decoder": "MODEL.weights_decoder",
    "fc_dim": "MODEL.fc_dim",
    "list_train": "DATASET.list_train",
    "list_val": "DATASET.list_val",
    "root_dataset": "DATASET.root_dataset",
    "num_class": "DATASET.num_class",
    "segDepth": "DATASET.num_class",
    "imgSize": "DATASET.imgSizes",
    "imgMaxSize": "DATASET.imgMaxSize",
    "padding_constant": "DATASET.padding_constant",
    "segm_downsampling_rate": "DATASET.segm_downsampling_rate",
    "random_flip": "DATASET.random_flip",
    "flip": "DATASET.random_flip",
    "batch_size": "{}.batch_size",
    "batch_size_per_gpu": "TRAIN.batch_size_per_gpu",
    "num_epoch": "TRAIN.num_epoch",
    "start_epoch": "TRAIN.start_epoch",
    "epoch_iters": "TRAIN.epoch_iters",
    "optim": "TRAIN.optim",
    "lr_encoder": "TRAIN.lr_encoder",
    "lr_decoder": "TRAIN.lr_decoder",
    "lr_pow": "TRAIN.lr_pow",
    "beta1": "TRAIN.beta1",
    "weight_decay": "TRAIN.weight_decay",
    "deep_sup_scale": "TRAIN.deep_sup_scale",
    "fix_bn": "TRAIN.fix_bn",
    "workers": "TRAIN.workers",
    "seed": "TRAIN.seed",
    "disp_iter": "TRAIN.disp_iter",
    "eval_epoch": "TRAIN.eval_epochs",
    "visualize": "VAL.visualize",
    "suffix": "{}.checkpoint",
    "id": "DIR",
    "ckpt": "DIR",
    "model_path": "DIR",
    "root_img": "DATASET.root_dataset",
    "root_seg": "DATASET.root_dataset",
    "s": "VAL.visualize",
}
# Flag -> option.
_OPTIONS = {
    "num_gpus": "--gpus",
    "gpu_id": "--gpus",
    "devices": "--gpus",
    "test_img": "--imgs",
    "test_imgs": "--imgs",
    "result": "--out",
    "logdir": "--cfg",
}
# Flag without a replacement -> reason.
_GONE = {
    "segSize": "results have the size of the image",
    "lr_step": "the learning rate decays in every step, see TRAIN.lr_pow",
    "num_val": "all of DATASET.list_val is evaluated",
    "vis": "curves are written to DIR",
    "ckpt_epoch": "weights are kept after every epoch, see TRAIN.keep",
}
_SWITCHES = ("fix_bn", "visualize", "flip", "random_flip", "s", "apex")
# Collections of models by name, trained with --model, --backbone and --dataset: model -> decoder,
# and the encoder, where {} is the backbone.
_ZOO = ("model", "backbone", "dataset")
_MODELS = {
    "fcn": ("fcn_head_deepsup", "{}dilated"),
    "psp": ("ppm_deepsup", "{}dilated"),
    "pspnet": ("ppm_deepsup", "{}dilated"),
    "deeplabv3": ("deeplabv3_deepsup", "{}dilated"),
    "deeplabv3_plus": ("deeplabv3plus", "{}_dilated16"),
    "danet": ("danet", "{}dilated"),
    "encnet": ("encnet", "{}dilated"),
    "dunet": ("dunet", "{}dilated"),
    "ocnet": ("ocnet_base", "{}dilated"),
    "denseaspp": ("denseaspp", "{}dilated"),
    "icnet": ("icnet", "icnet_resnet50"),
    "bisenet": ("bisenet", "bisenet_resnet18"),
    "enet": ("enet", "enet"),
}
_DATA_SETS = {
    "pascal_voc": "voc2012",
    "pascal_aug": "vocaug",
    "citys": "cityscapes",
}
_NARROW = ("vgg16", "resnet18", "resnet34")  # 512 channels; other backbones have 2048
_MANY = ("imgSize", "test_imgs")
_COMMANDS = {"train": "TRAIN", "eval": "VAL", "predict": "TEST"}


def replacement(command: str, words: Sequence[str], program: str) -> str:
    """Translates a command line with flags of the early versions.

    Args:
        command: "train", "eval" or "predict"; others had no such flags.
        words: arguments of the command.
        program: the program, such as "python train.py".

    Returns:
        The replacement of each flag, and the new command line; "" if there are no such flags.

    Example:
        >>> replacement("train", ["--num_gpus", "2"], "python train.py")
        'flags have been replaced: --num_gpus by --gpus; run: python train.py --gpus 0-1'
    """
    if command not in _COMMANDS:
        return ""
    given, rest = _split(command, list(words))
    if not given:
        return ""
    for name, values in given.items():
        takes_number = name == "num_gpus"
        wrong = not values or (takes_number and not values[0].isdecimal())
        if wrong and name not in (*_SWITCHES, *_GONE):
            keys = {**_KEYS, **dict.fromkeys(_ZOO, "--cfg")}
            to = _OPTIONS.get(name) or keys[name].format(_COMMANDS[command])
            value = "a number" if takes_number else "a value"
            return f"--{name} needs {value}, and was replaced: use {to} with {value}"
    at = next((i for i, word in enumerate(rest) if is_key(word)), len(rest))
    new = _Translation(command, given)
    now = shlex.join([*rest[:at], *new.options, *rest[at:], *new.pairs])
    replaced = ", ".join(new.notes)
    return f"flags have been replaced: {replaced}; run: {new.before}{program} {now}"


def _split(command: str, words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Splits arguments into early flags with their values, and all others."""
    known = {*_KEYS, *_OPTIONS, *_GONE, "apex"}
    if any(word.partition("=")[0] in ("--backbone", "--dataset") for word in words):
        known |= set(_ZOO)  # otherwise --model is a current option
    if "--logdir" not in (word.partition("=")[0] for word in words):
        known.remove("s")
    if command == "eval":
        known.remove("workers")  # a current option with another meaning
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        dashes = "-" if name == "s" else "--"
        if name not in known or not word.startswith(f"{dashes}{name}"):
            rest.append(word)
            continue
        given[name] = [value] if equals else []
        most = len(words) if name in _MANY else 1
        while words and len(given[name]) < most:
            if words[0].startswith("--") or is_key(words[0]):
                break
            if name in _SWITCHES and words[0].lower() not in ("0", "1", "true", "false"):
                break
            given[name].append(words.pop(0))
    return given, rest


class _Translation:
    """Current options and `KEY value` pairs for early flags.

    Attributes:
        notes: replacement of each flag.
        options, pairs: arguments of the new command line.
        before: a command to run first, followed by "&&", or "".
    """

    def __init__(self, command: str, given: dict[str, list[str]]) -> None:
        self.notes: list[str] = []
        self.options: list[str] = []
        self.pairs: list[str] = []
        self.before = ""
        section, predicting = _COMMANDS[command], command == "predict"
        gone = {**_GONE, **({"visualize": "overlays are always written"} if predicting else {})}
        for name, values in given.items():
            value = values[0] if values else ""
            if name in gone:
                self.notes.append(f"--{name} by nothing ({gone[name]})")
            elif name in _ZOO:
                continue
            elif name == "apex":
                precision = "fp32" if _converted(name, values) == "False" else "fp16"
                self.notes.append(f"--apex by --precision {precision}")
                self.options += ["--precision", precision]
            elif name == "result" and predicting:
                self._key(name, "TEST.result", value)
            elif name in _OPTIONS:
                option = "--gpu" if predicting and name == "gpu_id" else _OPTIONS[name]
                if name == "num_gpus":
                    values = [f"0-{int(value) - 1}" if int(value) > 1 else "0"]
                self.notes.append(f"--{name} by {option}")
                self.options += [option, *values]
            else:
                self._key(name, _KEYS[name].format(section), _converted(name, values))
        if any(name in given for name in _ZOO):
            self._zoo(*("".join(given.get(name, [])) for name in _ZOO))
        if "id" in given or "ckpt" in given:
            folder, model = given.get("ckpt", ["ckpt"]), given.get("id", ["baseline"])
            self._set("DIR", os.path.normpath(os.path.join(*folder, *model)))
        if "root_img" in given or "root_seg" in given:
            ade20k = "./data/ADEChallengeData2016/"
            images = "".join(given.get("root_img", [f"{ade20k}images"]))
            self._roots(images, "".join(given.get("root_seg", [f"{ade20k}annotations"])))

    def _zoo(self, model: str, backbone: str, data: str) -> None:
        """Sets a recipe, and the keys of the model where there is none for it."""
        backbone, data = backbone or "resnet50", data or "ade20k"
        decoder, encoder = _MODELS.get(model or "fcn", (model, "{}"))
        encoder = encoder.format(backbone)
        data = _DATA_SETS.get(data, data)
        name = f"{data}-{encoder}-{decoder}"
        recipe = f"config/{name}.yaml"
        exists = (shipped.HOME / recipe).is_file()
        if not exists:
            folder = shipped.HOME / "config"
            of_data = sorted(folder.glob(f"{data}-*ppm_deepsup.yaml"), key=lambda x: len(x.name))
            of_data = of_data or sorted(folder.glob(f"{data}-*.yaml"))
            recipe = f"config/{of_data[0].name}" if of_data else "mine.yaml"
        keys = f"{recipe} (MODEL.arch_encoder, MODEL.arch_decoder, DATASET.format)"
        self.notes.append(f"--model, --backbone and --dataset by --cfg {keys}")
        self.options += ["--cfg", recipe]
        if not exists:
            self.pairs += ["MODEL.arch_encoder", encoder, "MODEL.arch_decoder", decoder]
            self.pairs += ["MODEL.fc_dim", "512" if backbone in _NARROW else "2048"]
            self.pairs += ["MODEL.weights_encoder", "", "MODEL.weights_decoder", ""]
            self._set("DIR", f"ckpt/{name}")

    def _key(self, name: str, key: str, value: str) -> None:
        self.notes.append(f"{'-' if name == 's' else '--'}{name} by {key}")
        self._set(key, value)

    def _set(self, key: str, value: str) -> None:
        self._drop(key)
        self.pairs += [key, value]

    def _drop(self, *keys: str) -> None:
        pairs = zip(self.pairs[::2], self.pairs[1::2])
        self.pairs = [word for key, value in pairs if key not in keys for word in (key, value)]

    def _roots(self, images: str, masks: str) -> None:
        """Sets data set keys for the folders of images and masks of the lists of 2017."""
        self._drop("DATASET.list_train", "DATASET.list_val", "DATASET.root_dataset")
        images, masks = os.path.normpath(images), os.path.normpath(masks)
        root, folder = os.path.split(images)
        if folder == "images" and masks == os.path.join(root, "annotations"):
            self.pairs += ["DATASET.format", "ade20k", "DATASET.root_dataset", root or "."]
            return
        make_odgt = ["mit-semseg", "data", "make-odgt", "--images", images, "--labels", masks]
        self.before = f"{shlex.join([*make_odgt, '--out', 'lists'])} && "
        self.pairs += ["DATASET.root_dataset", os.path.commonpath([images, masks]) or "."]
        for split in ("training", "validation"):
            key = "DATASET.list_train" if split == "training" else "DATASET.list_val"
            self.pairs += [key, f"lists/{split}.odgt"]


def _converted(name: str, values: list[str]) -> str:
    """The value of a flag, in the form of its key."""
    value = ",".join(values)
    if name in _SWITCHES:
        return "False" if value.lower() in ("0", "false") else "True"
    if name == "suffix":
        return value.removeprefix("_")
    if name == "start_epoch" and value.isdecimal():
        return str(max(int(value) - 1, 0))  # it was the first epoch to train, counted from 1
    return value
