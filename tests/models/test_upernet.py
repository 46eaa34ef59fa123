"""UPerNet decoders."""

from decoder_tester import DecoderTester


class TestUPerNet(DecoderTester):
    arch = "upernet"
    published = (2048,)
    min_feature_maps = 2


class TestUPerNetLite(DecoderTester):
    arch = "upernet_lite"
    published = (2048,)
    min_feature_maps = 2
