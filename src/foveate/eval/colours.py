"""Background colours that captions name and checks recognise: the one table of both.

They lie far apart in CIELAB, so that the nearest one to a measured colour is never in doubt.
"""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "grey": (150, 150, 150),
    "red": (214, 48, 49),
    "orange": (243, 146, 40),
    "yellow": (250, 219, 74),
    "green": (62, 160, 78),
    "mint": (178, 228, 200),
    "sky blue": (150, 205, 240),
    "blue": (44, 92, 196),
    "purple": (128, 70, 170),
    "pink": (248, 176, 198),
    "brown": (121, 82, 54),
}
"""sRGB, by the name that a caption uses; white is what a caption without a colour means."""
