"""MobileNetV3 encoders; their results are compared with torchvision's in test_torchvision.py."""

from encoder_tester import EncoderTester


class TestMobileNetV3LargeDilated16(EncoderTester):
    arch = "mobilenetv3_large_dilated16"
