"""Models of papers, as pairs of an encoder and a decoder or, of other libraries, as a whole."""

from __future__ import annotations

from typing import NamedTuple


class PaperModel(NamedTuple):
    """A model of a paper; docs/models.md lists deviations.

    Attributes:
        name: its usual name.
        encoder, decoder: MODEL.arch_encoder and MODEL.arch_decoder; without a decoder, the encoder
            is MODEL.arch.
    """

    name: str
    encoder: str
    decoder: str

    @property
    def options(self) -> list[str]:
        """Overrides of the configuration, other than MODEL.fc_dim, that select it."""
        if not self.decoder:
            return ["MODEL.arch", self.encoder]
        return ["MODEL.arch_encoder", self.encoder, "MODEL.arch_decoder", self.decoder]


PAPER_MODELS: tuple[PaperModel, ...] = (
    PaperModel("FCN-32s", "vgg16", "fcn32s"),
    PaperModel("FCN-16s", "vgg16", "fcn16s"),
    PaperModel("FCN-8s", "vgg16", "fcn8s"),
    PaperModel("U-Net", "unet", "unet"),
    PaperModel("U-Net, bilinear, half as wide", "unet_bilinear", "unet_bilinear"),
    PaperModel("U-Net on a ResNet", "resnet101dilated", "unet"),
    PaperModel("SegNet", "vgg16_bn_indices", "segnet"),
    PaperModel("LinkNet", "resnet18", "linknet"),
    PaperModel("LinkNet", "resnet34", "linknet"),
    PaperModel("FC-DenseNet56", "fcdensenet56", "fcdensenet56"),
    PaperModel("FC-DenseNet67", "fcdensenet67", "fcdensenet67"),
    PaperModel("FC-DenseNet103", "fcdensenet103", "fcdensenet103"),
    PaperModel("ENet", "enet", "enet"),
    PaperModel("DRN-C-26", "drn_c_26", "c1"),
    PaperModel("LR-ASPP", "mobilenetv3_large_dilated16", "lraspp"),
    PaperModel("DeepLabv3", "resnet50dilated", "deeplabv3"),
    PaperModel("DeepLabv3", "resnet101dilated", "deeplabv3"),
    PaperModel("DeepLabv3+", "resnet50_dilated16", "deeplabv3plus"),
    PaperModel("DeepLabv3+", "resnet101_dilated16", "deeplabv3plus"),
    PaperModel("DeepLabv3+", "xception65", "deeplabv3plus"),
    PaperModel("DeepLabv3+", "mobilenetv2_dilated16", "deeplabv3plus"),
    PaperModel("PSPNet", "resnet50dilated", "ppm_deepsup"),
    PaperModel("ICNet", "icnet_resnet50", "icnet"),
    PaperModel("DenseASPP", "densenet121dilated", "denseaspp"),
    PaperModel("DenseASPP", "densenet161dilated", "denseaspp"),
    PaperModel("DenseASPP", "densenet169dilated", "denseaspp"),
    PaperModel("DenseASPP", "densenet201dilated", "denseaspp"),
    PaperModel("EncNet", "resnet50dilated", "encnet"),
    PaperModel("BiSeNet", "bisenet_resnet18", "bisenet"),
    PaperModel("DANet", "resnet50dilated", "danet"),
    PaperModel("OCNet, base", "resnet50dilated", "ocnet_base"),
    PaperModel("OCNet, pyramid", "resnet50dilated", "ocnet_pyramid"),
    PaperModel("OCNet, ASP", "resnet50dilated", "ocnet_asp"),
    PaperModel("DUNet", "resnet50dilated", "dunet"),
    PaperModel("UPerNet", "resnet50", "upernet"),
    PaperModel("HRNetV2", "hrnetv2", "c1"),
    PaperModel("DDRNet-23-slim", "ddrnet_23_slim", "ddrnet_23_slim"),
    PaperModel("DDRNet-23", "ddrnet_23", "ddrnet_23"),
    PaperModel("PIDNet-S", "pidnet_s", "pidnet_s"),
    PaperModel("PIDNet-M", "pidnet_m", "pidnet_m"),
    PaperModel("PIDNet-L", "pidnet_l", "pidnet_l"),
    PaperModel("BiSeNetV2", "bisenetv2", "bisenetv2"),
    PaperModel("STDC1-Seg", "stdc1", "stdc"),
    PaperModel("STDC2-Seg", "stdc2", "stdc"),
    PaperModel("PP-LiteSeg-T", "stdc1", "ppliteseg_t"),
    PaperModel("PP-LiteSeg-B", "stdc2", "ppliteseg_b"),
    PaperModel("SegNeXt-T", "mscan_t", "hamburger"),
    PaperModel("SegNeXt-S", "mscan_s", "hamburger"),
    PaperModel("SegNeXt-B", "mscan_b", "hamburger_b"),
    PaperModel("SegNeXt-L", "mscan_l", "hamburger_l"),
)

# Those that need an extra: `timm`, or `smp` for the encoder of SegFormer.
LIBRARY_MODELS: tuple[PaperModel, ...] = (
    PaperModel("SegFormer-B0", "smp:Segformer:mit_b0", ""),
    PaperModel("SegFormer-B1", "smp:Segformer:mit_b1", ""),
    PaperModel("SegFormer's head on PVTv2-B0", "timm:pvt_v2_b0", "segformer"),
    PaperModel("SegFormer's head on PVTv2-B2", "timm:pvt_v2_b2", "segformer_wide"),
    PaperModel("UPerNet on ConvNeXt-T", "timm:convnext_tiny", "upernet"),
    PaperModel("UPerNet on Swin-T", "timm:swin_tiny_patch4_window7_224", "upernet"),
    PaperModel("DeepLabv3+ on EfficientNet-Lite2", "timm:tf_efficientnet_lite2", "deeplabv3plus"),
    PaperModel("Linear head on DINOv2-S", "timm:vit_small_patch14_dinov2", "linear"),
    PaperModel("EoMT-S", "eomt:vit_small_patch16_dinov3", ""),
    PaperModel("EoMT-B", "eomt:vit_base_patch16_dinov3", ""),
    PaperModel("EoMT-L", "eomt:vit_large_patch16_dinov3", ""),
)
