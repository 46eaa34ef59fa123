"""MobileNetV2 encoders."""

from encoder_tester import EncoderTester


class TestMobileNetV2Dilated(EncoderTester):
    arch = "mobilenetv2dilated"
    published = "encoder/mobilenetv2dilated"


class TestMobileNetV2(EncoderTester):
    arch = "mobilenetv2"
    published = "encoder/mobilenetv2dilated"
