"""ResNeXt encoders."""

from encoder_tester import EncoderTester


class TestResNeXt101(EncoderTester):
    arch = "resnext101"
    published = "encoder/resnext101"


class TestResNeXt50(EncoderTester):
    arch = "resnext50"
