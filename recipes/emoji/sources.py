"""Reads the drawings of each style as square RGBA images.

Axes: Y = X = `image_size` pixels, four channels, straight alpha. The 3-D set is WebP at 256 pixels; the four vector
sets are SVG bodies, rasterised by resvg with their aspect ratio kept.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from recipes.emoji.concepts import code_point_key
from recipes.emoji.packages import (
    FLUENT_3D,
    FLUENT_FLAT,
    NOTO,
    NOTO_V1,
    TWEMOJI,
    CorpusError,
    Package,
    read_json,
    read_members,
)

# The first package holds the drawings. The second, if any, says which code points are kept (fluent-3d) or which code
# point a name stands for (noto-v1, whose own table is empty).
STYLE_PACKAGES: dict[str, tuple[Package, ...]] = {
    "fluent-3d": (FLUENT_3D, FLUENT_FLAT),
    "fluent-flat": (FLUENT_FLAT,),
    "noto": (NOTO,),
    "noto-v1": (NOTO_V1, NOTO),
    "twemoji": (TWEMOJI,),
}


def read_style(
    style: str, tarballs: Mapping[Package, Path], code_points: tuple[str, ...], image_size: int
) -> Iterator[tuple[str, UInt8[np.ndarray, "Y X 4"]]]:
    """Yields code point and image of each drawing that a style has, in the order of `code_points`.

    Args:
        style: A key of `STYLE_PACKAGES`.
        tarballs: Verified tarballs of the packages of that style.
        code_points: What to read, normalised by `code_point_key`; those that the style lacks are skipped.
        image_size: Height and width of the images.
    """
    drawings, names = (tarballs[package] for package in (STYLE_PACKAGES[style][0], STYLE_PACKAGES[style][-1]))
    chars: dict[str, str] = read_json(names, "chars.json")
    name_of = {code_point_key(raw): name for raw, name in chars.items()}
    if style == "fluent-3d":
        return _read_webp(drawings, [one for one in code_points if one in name_of], image_size)
    return _read_svg(drawings, {one: name_of[one] for one in code_points if one in name_of}, image_size)


def _read_webp(
    tarball: Path, code_points: list[str], image_size: int
) -> Iterator[tuple[str, UInt8[np.ndarray, "Y X 4"]]]:
    files = {code_point_key(name.removesuffix(".webp")): raw for name, raw in read_members(tarball, ".webp")}
    for code_point in code_points:
        if code_point in files:
            yield code_point, _decode(files[code_point], image_size)


def _read_svg(
    tarball: Path, names: Mapping[str, str], image_size: int
) -> Iterator[tuple[str, UInt8[np.ndarray, "Y X 4"]]]:
    # Imported here: only builders of the vector styles need the rasteriser.
    import resvg_py  # noqa: PLC0415

    icons = read_json(tarball, "icons.json")
    for code_point, name in names.items():
        svg = svg_of_icon(icons, name, image_size)
        if svg is not None:
            yield code_point, _decode(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True), image_size)


def svg_of_icon(icons: Mapping[str, Any], name: str, image_size: int) -> str | None:
    """Makes a square SVG document of one icon, following aliases; None if the set has no such icon.

    Args:
        icons: Parsed `icons.json` of an Iconify set.
        name: Name of an icon or of an alias.
        image_size: Height and width of the document; an oblong icon is centred in it.

    Raises:
        CorpusError: If an alias turns or flips in a way that is not handled.
    """
    flips = False
    while name in icons.get("aliases", {}):
        alias = icons["aliases"][name]
        if set(alias) - {"parent", "hFlip", "hidden"}:
            raise CorpusError(f"icon alias must have parent and hFlip only, got {sorted(alias)} in {name!r}")
        flips ^= bool(alias.get("hFlip", False))
        name = alias["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = f'<g transform="translate({width} 0) scale(-1 1)">{icon["body"]}</g>' if flips else icon["body"]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{image_size}" height="{image_size}" viewBox="0 0 {width} {height}">{body}</svg>'
    )


def _decode(raw: bytes, image_size: int) -> UInt8[np.ndarray, "Y X 4"]:
    with Image.open(io.BytesIO(raw)) as opened:
        image = opened.convert("RGBA")
    if image.size != (image_size, image_size):
        # Pillow premultiplies RGBA while it resizes, so no colour leaks out of transparent pixels.
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    # The copy is writable; colour without alpha is noise of the encoder and would make equal drawings differ.
    image_YXc = np.array(image)
    image_YXc[image_YXc[..., 3] == 0] = 0
    return image_YXc
