"""Checkpoints of the published toolkit: whole models trained on ADE20K."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mit_semseg.download import fetch
from mit_semseg.registry import closest
from mit_semseg.weights.archive import read_state_dict
from mit_semseg.weights.sources import HOST, mirrored


class PublishedModel(NamedTuple):
    """A model whose checkpoint is published.

    Attributes:
        encoder, decoder: their names here.
        fc_dim: channels of the encoder's last feature map.
        multiple: sides of the input are multiples of this (`DATASET.padding_constant`).
        epoch: epoch of the checkpoint.
        mean_iou: in percent at one scale, as its authors report it in their README.
        millions: of parameters.
    """

    encoder: str
    decoder: str
    fc_dim: int
    multiple: int
    epoch: int
    mean_iou: float
    millions: float


MODELS: dict[str, PublishedModel] = {
    f"ade20k-{row[0]}-{row[1]}": PublishedModel(*row)
    for row in (
        ("mobilenetv2dilated", "c1_deepsup", 320, 8, 20, 34.84, 2.2),
        ("resnet18dilated", "c1_deepsup", 512, 8, 20, 33.82, 12.2),
        ("resnet18dilated", "ppm_deepsup", 512, 8, 20, 38.00, 24.6),
        ("resnet50dilated", "ppm_deepsup", 2048, 8, 20, 41.26, 51.6),
        ("resnet101dilated", "ppm_deepsup", 2048, 8, 25, 42.19, 70.6),
        ("resnet50", "upernet", 2048, 32, 30, 40.44, 64.2),
        ("resnet101", "upernet", 2048, 32, 50, 42.00, 83.2),
        ("hrnetv2", "c1", 720, 32, 30, 42.03, 66.5),
    )
}
"""The published checkpoints, all trained on ADE20K; no licence is stated for the weights."""

PUBLISHED: dict[str, int] = {name: model.epoch for name, model in MODELS.items()}
"""Configurations with published ADE20K checkpoints, and the epoch that was scored."""

SAMPLE_IMAGE = (
    "http://sceneparsing.csail.mit.edu/data/ADEChallengeData2016/images/validation/"
    "ADE_val_00001519.jpg"
)


def published_checkpoint(config_name: str) -> tuple[list[str], list[str]]:
    """URLs of the encoder and of the decoder of a published ADE20K model.

    Args:
        config_name: for example "ade20k-resnet50dilated-ppm_deepsup".

    Raises:
        ValueError: there is no published model of this name.
    """
    # The recipe's file name is shorter than the published folder's.
    config_name = {"ade20k-hrnetv2": "ade20k-hrnetv2-c1"}.get(config_name, config_name)
    if config_name not in PUBLISHED:
        raise ValueError(
            f"no checkpoint is published for {config_name!r}; published are "
            f"{', '.join(sorted(PUBLISHED))}{closest(config_name, list(PUBLISHED))}"
        )
    urls = []
    for part in ("encoder", "decoder"):
        path = f"{config_name}/{part}_epoch_{PUBLISHED[config_name]}.pth"
        urls.append(mirrored(path, [f"{HOST}pytorch/{path}"]))
    return urls[0], urls[1]


def fetch_published(name: str, dest_dir: str | Path, *, image: bool = True) -> list[Path]:
    """Downloads a published ADE20K model, and the sample image, into a folder.

    Args:
        name: for example "ade20k-resnet50dilated-ppm_deepsup".
        dest_dir: folder for `encoder_epoch_N.pth`, `decoder_epoch_N.pth` and
            `ADE_val_00001519.jpg`.
        image: also download the sample image.

    Returns:
        Paths of the encoder, the decoder and the image.

    Raises:
        ValueError: there is no published model of this name.
        DownloadError: a file could not be downloaded.
    """
    dest = Path(dest_dir)
    paths = []
    for urls in published_checkpoint(name):
        path = fetch(urls, dest / urls[-1].rsplit("/", 1)[-1])
        read_state_dict(path)  # no digest is published, so check that it can be read
        paths.append(path)
    if image:
        paths.append(
            fetch(mirrored("ADE_val_00001519.jpg", [SAMPLE_IMAGE]), dest / "ADE_val_00001519.jpg")
        )
    return paths
