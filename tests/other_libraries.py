"""Tiny networks of transformers and segmentation_models.pytorch, saved by these libraries."""

import json

import torch

NAMES = ("wall", "floor", "lamp", "plant", "door")
SEMANTIC = ("segformer", "upernet", "dpt", "beit")
MASKS = ("maskformer", "mask2former", "oneformer", "eomt", "eomt_dinov3")
SIDE = 64  # of images, in pixels; the only one that some take


def _swin():
    from transformers import SwinConfig

    return SwinConfig(
        image_size=SIDE,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def config_of(kind):
    """A configuration without dropout, of five classes."""
    import transformers as t

    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    vit = {"hidden_size": 32, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 16}
    layers = {"num_hidden_layers": 4, "intermediate_size": 32}
    queries = {"num_queries": 6, "train_num_points": 64}
    mask2former = {
        "encoder_feedforward_dim": 16,
        "dim_feedforward": 16,
        "hidden_dim": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "dropout": 0.0,
        **queries,
        **labels,
    }
    eomt = {**vit, **queries, "num_hidden_layers": 2, "num_blocks": 1, "num_upscale_blocks": 1}
    if kind == "segformer":
        return t.SegformerConfig(
            hidden_sizes=[16, 16, 32, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
            classifier_dropout_prob=0.0,
            drop_path_rate=0.0,
            **labels,
        )
    if kind == "upernet":
        stages = ["stage1", "stage2", "stage3", "stage4"]
        backbone = t.ConvNextConfig(
            hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], out_features=stages
        )
        return t.UperNetConfig(
            backbone_config=backbone,
            hidden_size=16,
            auxiliary_channels=16,
            auxiliary_in_channels=16,
            **labels,
        )
    if kind == "dpt":
        return t.DPTConfig(
            **vit,
            **layers,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            semantic_classifier_dropout=0.0,
            **labels,
        )
    if kind == "beit":
        return t.BeitConfig(
            **vit,
            **layers,
            out_indices=[1, 2, 3, 4],
            auxiliary_channels=16,
            use_relative_position_bias=True,
            drop_path_rate=0.0,
            **labels,
        )
    if kind == "maskformer":
        decoder = t.DetrConfig(
            encoder_layers=0,
            decoder_layers=1,
            d_model=16,
            decoder_attention_heads=2,
            decoder_ffn_dim=16,
            num_queries=6,
            dropout=0.0,
        )
        return t.MaskFormerConfig(
            backbone_config=_swin(),
            decoder_config=decoder,
            fpn_feature_size=32,
            mask_feature_size=32,
            **labels,
        )
    if kind == "mask2former":
        return t.Mask2FormerConfig(
            backbone_config=_swin(),
            feature_size=32,
            mask_feature_size=32,
            **mask2former,
        )
    if kind == "oneformer":
        return t.OneFormerConfig(
            backbone_config=_swin(),
            conv_dim=32,
            mask_dim=32,
            query_dec_layers=1,
            is_training=False,
            **mask2former,
        )
    if kind == "eomt":
        return t.EomtConfig(**eomt, num_register_tokens=1, **labels)
    assert kind == "eomt_dinov3"
    return t.EomtDinov3Config(**eomt, intermediate_size=32, num_register_tokens=1, **labels)


def saved_hf(kind, folder, **preprocessing):
    """A network of transformers with random weights, saved by `save_pretrained`."""
    import transformers as t

    auto = (
        t.AutoModelForUniversalSegmentation if kind in MASKS else t.AutoModelForSemanticSegmentation
    )
    torch.manual_seed(0)
    model = auto.from_config(config_of(kind))
    with torch.no_grad():  # as they are initialised, all classes have nearly equal scores
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and any(x in name for x in ("class", "head", "quer", "mask")):
                parameter.mul_(10)
    model.save_pretrained(folder)
    if kind == "oneformer":
        tokenizer(folder)
    if preprocessing:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return model.eval()


def tokenizer(folder):
    """Files of a tokenizer as OneFormer has it, which knows the letters only."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')


def saved_smp(arch, folder, **options):
    """A network of segmentation_models.pytorch with random weights, saved by itself."""
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    options = {"encoder_name": "tu-test_resnet", "encoder_weights": None, "classes": 5} | options
    model = smp.create_model(arch, **options)
    model.save_pretrained(str(folder))
    return model.eval()
