"""Background colours that captions name and checks recognise: the one table of both.

They lie far apart in CIELAB, so that the nearest one to a measured colour is never in doubt.
"""

import numpy as np
from jaxtyping import Float

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

# The sRGB primaries under D65 (IEC 61966-2-1), each row divided by the white point, so that white is (1, 1, 1).
_XYZ_OF_RGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
# Below this share of full the curve of sRGB is a straight line.
_LINEAR_BELOW = 0.04045


def cielab(rgb: Float[np.ndarray, "*any 3"]) -> Float[np.ndarray, "*any 3"]:
    """Converts sRGB in [0, 255] to CIELAB under D65; distances of about 2 are just visible.

    Source: CIE 15:2004, equations 8.3 to 8.9.
    """
    coded = rgb / 255
    linear = np.where(coded <= _LINEAR_BELOW, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    xyz = linear @ (_XYZ_OF_RGB / _XYZ_OF_RGB.sum(1, keepdims=True)).T
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
