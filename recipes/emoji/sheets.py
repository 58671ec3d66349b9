"""Contact sheets of unselected images, each over its prompt."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from recipes.emoji.examiner import Examiner
from recipes.emoji.scenes import Kind
from recipes.emoji.tokens import spread

COLUMNS, ROWS = 12, 8
_CELL, _TEXT = 128, 28
_PADDING = 3


def contact_sheet(images: UInt8[np.ndarray, "n Y X 3"], captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """Puts images in rows, each over its caption in at most two lines."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * _CELL, rows * (_CELL + _TEXT)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * _CELL, i // columns * (_CELL + _TEXT)
        sheet.paste(Image.fromarray(image).resize((_CELL, _CELL), Image.Resampling.LANCZOS), (x, y))
        for line, text in enumerate(_lines(caption, pen, font)):
            pen.text((x + _PADDING, y + _CELL + 12 * line), text, fill=(32, 36, 44), font=font)
    return sheet


def single_sheet(examiner: Examiner) -> Image.Image:
    """One thing per image: labels evenly spread over the training split."""
    drawings = spread(examiner.train, COLUMNS * ROWS)
    prompts = [examiner.prompt_of(one) for one in drawings]
    return contact_sheet(examiner.draw(prompts), prompts)


def composed_sheet(examiner: Examiner) -> Image.Image:
    """Colours, numbers, sizes and pairs: two rows of each."""
    kinds: tuple[Kind, ...] = ("single", "count", "beside", "sized")
    count = min(COLUMNS * ROWS // len(kinds), examiner.num_prompts)
    prompts = [scene.caption for kind in kinds for scene in examiner.scenes(kind, count, white_share=0.2)]
    return contact_sheet(examiner.draw(prompts), prompts)


def _lines(caption: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) <= _CELL - 2 * _PADDING or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == 1:
            lines.append(word)
        else:
            lines[-1] += "..."
            break
    return lines
