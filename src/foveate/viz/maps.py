"""The compute map: per scale, which tokens ran, how deep and in which branches, drawn over the image.

A panel shows the finished image, dimmed; tokens that ran are lit, the brighter and warmer the more blocks they ran;
tokens that did not run stay dark. Tokens lie in grid order, so a panel's cells are the scale's grid.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from foveate.core.trace import Trace
from foveate.viz.scale_map import ScaleMap, scale_maps

PANEL = 256
"""Longer side of a panel, in pixels."""
_CAPTION = 40
_MIN_CELL, _MIN_SHEET = 230, 720
"""Widths that captions and the legend need."""
_GAP = 12
_INK = (32, 36, 44)
_FAINT = (110, 116, 128)
_RAMP = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)


def ramp(share: Float[np.ndarray, "..."]) -> Float[np.ndarray, "... 3"]:
    """Colour of a share of blocks in [0, 1], violet to yellow."""
    place = np.clip(share, 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    along = (place - low)[..., None]
    return _RAMP[low] * (1 - along) + _RAMP[low + 1] * along


def _enlarged(map_hw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest enlargement of a token map to (width, height) pixels."""
    rows = np.arange(size[1]) * map_hw.shape[0] // size[1]
    columns = np.arange(size[0]) * map_hw.shape[1] // size[0]
    return map_hw[rows][:, columns]


def panel(picture: Image.Image, scale: ScaleMap) -> UInt8[np.ndarray, "Y X 3"]:
    """One scale over the image, which is already at the panel's size."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    grey = pixels.mean(-1, keepdims=True).repeat(3, -1)
    if scale.depth_hw is None:
        return (0.25 * grey + 0.75 * np.array([222, 224, 228])).astype(np.uint8)
    depth = _enlarged(scale.depth_hw, picture.size)[..., None]
    share = depth / scale.num_blocks
    lit = np.where(share >= 1, pixels, 0.45 * pixels + 0.55 * ramp(share[..., 0]))
    out = np.where(depth >= 0, lit, 0.22 * grey + 12)
    return _with_grid(out, scale.grid).astype(np.uint8)


def _with_grid(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Thin lines between tokens, where cells are large enough to see."""
    height, width = pixels.shape[:2]
    if width / grid[1] < 6:
        return pixels
    for r in range(1, grid[0]):
        pixels[r * height // grid[0]] *= 0.8
    for c in range(1, grid[1]):
        pixels[:, c * width // grid[1]] *= 0.8
    return pixels


def compute_map(picture: Image.Image, trace: Trace, image_index: int = 0, columns: int = 4) -> Image.Image:
    """Draws all scales of one image as a sheet of panels, with a legend.

    Args:
        picture: The finished image.
        trace: Recorded with maps (`trace=True`).
        image_index: Which image of the batch.
        columns: Panels in a row.
    """
    height_over_width = picture.height / picture.width
    size = (
        (PANEL, round(PANEL * height_over_width))
        if height_over_width <= 1
        else (round(PANEL / height_over_width), PANEL)
    )
    small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    cells = [
        (Image.fromarray(panel(small, m)), (f"scale {m.scale}   {m.grid[0]} x {m.grid[1]}", m.caption))
        for m in scale_maps(trace, image_index)
    ]
    cells.append((small, ("the image", "")))
    return _sheet(cells, size, columns)


def _sheet(cells: Sequence[tuple[Image.Image, tuple[str, str]]], size: tuple[int, int], columns: int) -> Image.Image:
    rows = -(-len(cells) // columns)
    cell = (max(size[0], _MIN_CELL) + _GAP, size[1] + _CAPTION + _GAP)
    width = max(columns * cell[0] + _GAP, _MIN_SHEET)
    sheet = Image.new("RGB", (width, rows * cell[1] + _GAP + 34), "white")
    draw = ImageDraw.Draw(sheet)
    title, note = ImageFont.load_default(14), ImageFont.load_default(11)
    for i, (image, (head, detail)) in enumerate(cells):
        x, y = _GAP + i % columns * cell[0], _GAP + i // columns * cell[1]
        draw.text((x, y), head, fill=_INK, font=title)
        draw.text((x, y + 19), detail, fill=_FAINT, font=note)
        sheet.paste(image, (x, y + _CAPTION))
    _legend(draw, (_GAP, rows * cell[1] + _GAP), note)
    return sheet


def _legend(draw: ImageDraw.ImageDraw, at: tuple[int, int], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
    x, y = at
    for i in range(120):
        colour = tuple(int(c) for c in ramp(np.array(i / 119)))
        draw.line([(x + i, y), (x + i, y + 12)], fill=colour)
    draw.text((x + 128, y), "few blocks ... most blocks (no tint: all)", fill=_FAINT, font=font)
    draw.rectangle([x + 380, y, x + 392, y + 12], fill=(40, 40, 40))
    draw.text((x + 398, y), "token did not run", fill=_FAINT, font=font)
    draw.rectangle([x + 520, y, x + 532, y + 12], fill=(222, 224, 228))
    draw.text((x + 538, y), "scale did not run", fill=_FAINT, font=font)
