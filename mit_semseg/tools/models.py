"""Trained models that `Segmenter.from_pretrained` and `MODEL.arch` load by name."""

from __future__ import annotations

from typing import NamedTuple

from mit_semseg import shipped
from mit_semseg.weights import MODELS


class HubModel(NamedTuple):
    """A model on huggingface.co.

    Attributes:
        name: name of the repository, whose page states the licence.
        mean_iou: in percent at one scale on ADE20K's validation images, as its authors report it.
        licence: of the weights, as their publisher states it.
        millions: of parameters.
        source: where the mean IoU, and a licence that the page calls "other", are stated.
    """

    name: str
    mean_iou: float
    licence: str
    millions: float
    source: str


_NVIDIA, _META = "NVIDIA, not commercial", "CC BY-NC 4.0"
_SEGFORMER = "arXiv:2105.15203, table 1; https://github.com/NVlabs/SegFormer"
_MMSEG = "https://github.com/open-mmlab/mmsegmentation/tree/main/configs/"
_MASKS = "https://github.com/facebookresearch/%s/blob/main/MODEL_ZOO.md"
_ONEFORMER = "https://github.com/SHI-Labs/OneFormer, crops of 640x640"
_EOMT = "https://github.com/tue-mps/eomt/blob/master/model_zoo/dinov2.md"
HUB: tuple[HubModel, ...] = (
    HubModel("nvidia/segformer-b0-finetuned-ade-512-512", 37.4, _NVIDIA, 3.8, _SEGFORMER),
    HubModel("nvidia/segformer-b1-finetuned-ade-512-512", 42.2, _NVIDIA, 13.7, _SEGFORMER),
    HubModel("nvidia/segformer-b2-finetuned-ade-512-512", 46.5, _NVIDIA, 27.5, _SEGFORMER),
    HubModel("nvidia/segformer-b3-finetuned-ade-512-512", 49.4, _NVIDIA, 47.3, _SEGFORMER),
    HubModel("nvidia/segformer-b4-finetuned-ade-512-512", 50.3, _NVIDIA, 64.1, _SEGFORMER),
    HubModel("nvidia/segformer-b5-finetuned-ade-640-640", 51.0, _NVIDIA, 84.7, _SEGFORMER),
    HubModel("openmmlab/upernet-convnext-tiny", 46.1, "MIT", 60.2, _MMSEG + "convnext"),
    HubModel("openmmlab/upernet-swin-tiny", 44.4, "MIT", 59.9, _MMSEG + "swin"),
    HubModel("facebook/maskformer-swin-tiny-ade", 46.7, _META, 41.8, _MASKS % "MaskFormer"),
    HubModel(
        "facebook/mask2former-swin-tiny-ade-semantic", 47.7, _META, 47.4, _MASKS % "Mask2Former"
    ),
    HubModel("shi-labs/oneformer_ade20k_swin_large", 57.0, "MIT", 218.8, _ONEFORMER),
    HubModel("tue-mps/ade20k_semantic_eomt_large_512", 58.4, "MIT", 316.0, _EOMT),
)


def listing() -> str:
    """The table, a line for each model."""
    rows = [("name", "mean IoU", "licence", "MB"), (shipped.MODEL, "75.10", "not stated", "9")]
    rows += [
        (name, f"{model.mean_iou:.2f}", "not stated", f"{4 * model.millions:.0f}")
        for name, model in sorted(MODELS.items())
    ]
    rows += [(f"hf:{x.name}", f"{x.mean_iou:.1f}", x.licence, f"{4 * x.millions:.0f}") for x in HUB]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    notes = (
        "",
        f"{shipped.MODEL} is installed: {shipped.ABOUT}, where its mean IoU was measured.",
        "The others are trained on ADE20K. Mean IoU is in percent at one scale on its validation "
        "images, as",
        "the authors report it; it is not measured here. MB: parameters in float32.",
        "hf: needs pip install 'mit_semseg[hf]'; other models of the same architectures on "
        "huggingface.co work, too.",
        "Folders saved by this toolkit, transformers or segmentation_models.pytorch are loaded as "
        "well.",
    )
    return "\n".join(line.rstrip() for line in [*lines, *notes])
