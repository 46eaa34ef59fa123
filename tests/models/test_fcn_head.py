"""FCN head decoders; their results are compared with torchvision's in test_torchvision.py."""

from decoder_tester import DecoderTester
from pair_tester import PairTester


class TestFCNHead(DecoderTester):
    arch = "fcn_head"


class TestFCNHeadDeepSup(DecoderTester):
    arch = "fcn_head_deepsup"
    min_feature_maps = 2
    auxiliary = True


class TestFCNHeadWithResNet18(PairTester):
    encoder, decoder = "torchvision_resnet18dilated", "fcn_head_deepsup"
    stride = 8
