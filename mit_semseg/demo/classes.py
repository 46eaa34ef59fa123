"""The classes of a scene, and the colours of their materials."""

from __future__ import annotations

from mit_semseg.demo.canvas import Colour

# Name and display colour of every class; its index is its id, the stored value is id + 1.
CLASSES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("sky", (126, 182, 232)),
    ("building", (132, 112, 142)),
    ("road", (74, 78, 92)),
    ("marking", (240, 236, 214)),
    ("pavement", (214, 166, 128)),
    ("vegetation", (104, 158, 78)),
    ("car", (44, 84, 196)),
    ("pedestrian", (222, 54, 82)),
    ("pole", (150, 226, 216)),
    ("sign", (246, 196, 48)),
)
SKY, BUILDING, ROAD, MARKING, PAVEMENT, VEGETATION, CAR, PEDESTRIAN, POLE, SIGN = range(
    len(CLASSES)
)

# Colours of classes hardly overlap, so that a model can learn them in minutes.
WALLS: tuple[Colour, ...] = (
    (176, 96, 74), (208, 176, 132), (226, 206, 172), (170, 140, 120), (196, 126, 88),
    (212, 160, 142), (140, 100, 92), (222, 190, 120),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((110, 62, 50), (88, 70, 72), (142, 84, 60), (104, 78, 72))
AWNINGS: tuple[Colour, ...] = ((136, 58, 48), (92, 66, 52), (120, 92, 60), (236, 222, 190))
PAINTS: tuple[Colour, ...] = (
    (204, 24, 32), (22, 64, 176), (240, 240, 244), (20, 96, 150), (150, 20, 40), (90, 150, 214),
    (24, 34, 92),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (255, 128, 24), (252, 214, 50), (240, 60, 160), (176, 56, 196), (255, 96, 96),
)  # fmt: skip
SKINS: tuple[Colour, ...] = ((240, 200, 170), (206, 152, 112), (150, 100, 70), (96, 64, 48))
LEAVES: tuple[Colour, ...] = (
    (72, 128, 48), (58, 112, 54), (98, 146, 50), (84, 130, 60), (70, 120, 40), (176, 158, 40),
)  # fmt: skip
STEEL: tuple[Colour, ...] = ((30, 92, 98), (36, 80, 92))
