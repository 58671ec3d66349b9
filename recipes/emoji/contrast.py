"""Measures how well each drawing stands out from each background colour, by its rim.

Axes: N images, K backgrounds in the order of `BACKGROUNDS`, Y = X pixels, y = x the pixels looked at.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from recipes.emoji.colours import BACKGROUNDS, cielab

_LOOKED_AT = 64
_OPAQUE = 128


def rim_contrast(images_NYXc: UInt8[np.ndarray, "N Y X 4"]) -> Float[np.ndarray, "N K"]:
    """Returns the mean CIELAB distance of each drawing's rim to each background.

    The rim is what is opaque (alpha at least 128) and touches what is not, or the edge of the image. It is looked for
    in about 64 x 64 of the pixels. An empty drawing has distance 0.

    Args:
        images_NYXc: Straight alpha; may be mapped from disk, one image is read at a time.
    """
    step = max(1, images_NYXc.shape[1] // _LOOKED_AT)
    colours_Kc = cielab(np.array(list(BACKGROUNDS.values()), dtype=np.float64))
    contrast_NK = np.zeros((len(images_NYXc), len(colours_Kc)))
    for row, image_YXc in enumerate(images_NYXc):
        seen_yxc = image_YXc[step // 2 :: step, step // 2 :: step]
        rim_nc = cielab(seen_yxc[_rim(seen_yxc[..., 3] >= _OPAQUE)][:, :3].astype(np.float64))
        if len(rim_nc):
            contrast_NK[row] = np.linalg.norm(rim_nc[:, None] - colours_Kc, axis=-1).mean(0)
    return contrast_NK


def _rim(is_opaque_yx: Bool[np.ndarray, "y x"]) -> Bool[np.ndarray, "y x"]:
    padded = np.pad(is_opaque_yx, 1)
    is_inner_yx = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return is_opaque_yx & ~is_inner_yx
