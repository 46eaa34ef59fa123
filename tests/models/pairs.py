"""The encoders and decoders that tests combine, and how they are built."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from mit_semseg.losses import build_loss
from mit_semseg.models import ENCODERS, ModelBuilder, SegmentationModule

CLASSES = 5


@dataclass(frozen=True)
class Pair:
    """An encoder with a decoder, and what is known of them.

    Attributes:
        stride: image pixels per pixel of the scores.
        multiple: sides of the image are padded to a multiple of it.
        folds: whether prediction folds BatchNorms into convolutions.
        rounding: how far scores may be off on average, in standard deviations, in bfloat16 and
            float16.
        slow: large, or like another pair.
    """

    encoder: str
    decoder: str
    stride: int = 1
    multiple: int = 1
    folds: bool = True
    rounding: tuple[float, float] = (0.15, 0.03)
    slow: bool = False

    def __str__(self):
        return f"{self.encoder}-{self.decoder}"

    def build(self, classes=CLASSES, **options):
        """With random weights, attention whose share is not 0, no block dropped, and options of the
        encoder."""
        torch.manual_seed(0)
        encoder = ModelBuilder.build_encoder(self.encoder, weights="none", **options)
        decoder = ModelBuilder.build_decoder(
            self.decoder, num_class=classes, channels=encoder.channels, strides=encoder.strides
        )
        scale = 0.4 if any(head.weight is None for head in decoder.auxiliary) else None
        module = SegmentationModule(encoder, decoder, build_loss("nll", classes), scale)
        set_gammas(module)
        for layer in module.modules():
            if isinstance(layer, StochasticDepth):
                layer.p = 0.0
        return module

    @torch.no_grad()
    def trained(self):
        """In evaluation mode, with the BatchNorm statistics of a batch."""
        module = self.build().train()
        for layer in randomise(module):
            layer.momentum = 1.0
        module.logits(torch.randn(2, 3, 64, 96))
        return module.eval()


PAIRS = (
    Pair("mobilenetv2dilated", "c1_deepsup", 8),
    Pair("resnet18dilated", "ppm_deepsup", 8),
    Pair("resnet18dilated", "upernet", 4, slow=True),
    # Its last layers see a single pixel here.
    Pair("resnext101", "c1", 32, rounding=(0.4, 0.08), slow=True),
    Pair("hrnetv2", "c1", 4, slow=True),
    Pair("drn_c_26", "c1", 8),
    Pair("xception65", "c1", 16, slow=True),
    Pair("vgg16", "fcn8s", 8, folds=False),  # there is no BatchNorm
    Pair("torchvision_resnet18dilated", "fcn_head_deepsup", 8),
    Pair("unet", "unet"),
    Pair("unet_bilinear", "unet_bilinear", slow=True),
    Pair("resnet18dilated", "unet", 4),
    # Of two maxima as good as equal it prefers the other: pooling indices jump.
    Pair("vgg16_bn_indices", "segnet", rounding=(0.6, 0.3)),
    Pair("resnet18", "linknet"),
    Pair("enet", "enet"),
    Pair("fcdensenet56", "fcdensenet56", folds=False),  # BatchNorms come before convolutions
    Pair("fcdensenet67", "fcdensenet67", folds=False, slow=True),
    Pair("fcdensenet103", "fcdensenet103", folds=False, slow=True),
    Pair("resnet18dilated", "deeplabv3_deepsup", 8),
    Pair("resnet18_dilated16", "deeplabv3plus", 4),
    Pair("densenet121dilated", "denseaspp", 8),
    Pair("resnet18dilated", "encnet", 8),
    # Half of its fifty layers see a single pixel.
    Pair("icnet_resnet50", "icnet", 4, 8, rounding=(0.4, 0.08)),
    Pair("bisenet_resnet18", "bisenet", 8),
    Pair("ddrnet_23_slim", "ddrnet_23_slim", 8),
    Pair("pidnet_s", "pidnet_s", 8),
    Pair("bisenetv2", "bisenetv2", 8),
    Pair("stdc1", "stdc", 8),
    Pair("stdc1", "ppliteseg_t", 8, slow=True),
    Pair("mscan_t", "hamburger", 8),
    Pair("resnet18", "segformer", 4, slow=True),
    Pair("resnet18", "linear", 4, slow=True),
    Pair("resnet18dilated", "danet", 8),
    Pair("resnet18dilated", "ocnet_base", 8),
    Pair("resnet18dilated", "ocnet_pyramid", 8, slow=True),
    Pair("resnet18dilated", "ocnet_asp", 8, slow=True),
    Pair("resnet18", "dunet"),
    Pair("mobilenetv3_large_dilated16", "lraspp", 8),
    Pair("timm:mobilenetv3_small_050", "deeplabv3plus", 4),
    Pair("timm:pvt_v2_b0", "upernet_lite", 4),
)


@cache
def on_meta(arch):
    """An encoder without memory: for shapes without arithmetic."""
    with torch.device("meta"):
        return ENCODERS.get(arch)().eval()


def declared_maps(arch, batch, height, width):
    """The feature maps that an encoder declares, on the meta device."""
    encoder = ENCODERS.get(arch)
    return [
        torch.zeros(batch, c, math.ceil(height / s), math.ceil(width / s), device="meta")
        for c, s in zip(encoder.channels, encoder.strides, strict=True)
    ]


def set_gammas(module):
    """The share of attention to 0.5: at 0, where it starts, no gradient reaches its layers."""
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)


@torch.no_grad()
def randomise(module, statistics=False):
    """Give BatchNorms weights, and statistics, unlike the initial ones; the layers."""
    norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for layer in norms:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, std=0.1)
        if statistics:
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return norms


def without_gradient(module):
    """Parameters whose gradient is missing, zero or not finite."""
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return [n for n, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]
