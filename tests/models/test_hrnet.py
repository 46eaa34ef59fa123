"""HRNetV2 encoder."""

from encoder_tester import EncoderTester


class TestHRNetV2(EncoderTester):
    arch = "hrnetv2"
    published = "encoder/hrnetv2"
