"""C1 decoders."""

from decoder_tester import DecoderTester


class TestC1(DecoderTester):
    arch = "c1"
    published = (512, 720)


class TestC1DeepSup(DecoderTester):
    arch = "c1_deepsup"
    published = (320, 512)
    min_feature_maps = 2
    auxiliary = True
