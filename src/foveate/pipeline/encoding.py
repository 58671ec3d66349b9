"""Images to files and back, with a text beside the pixels: PNG, JPEG and WebP.

The text stands in a text chunk of a PNG and in the EXIF field `UserComment` of the others. An encoder is plain data, so
that a file can say how it was encoded.
"""

import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError, features

from foveate.core.errors import FoveateError
from foveate.core.suffixes import SUFFIXES

CHUNK = "foveate"
"""Name of the PNG's text chunk, and the first word of an EXIF comment."""

DEFAULT_QUALITY = 95

JPEG_TEXT_BYTES = 65_000
"""A text of a JPEG must fit into one segment of 64 KiB."""

_REST_BYTES = 16_384
"""Of a JPEG's text, what everything but prompts may take."""

_PNG_LEVEL = 1
"""Of zlib: a quarter of the time of its default of 6, in files that are a fifth larger."""

_EXIF_IFD, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """How pixels become a file.

    Attributes:
        format: `png`, `jpeg` or `webp`.
        quality: 1 to 100 where it is lossy, as a JPEG always is; None where it is not.
    """

    format: str = "png"
    quality: int | None = None

    def __post_init__(self) -> None:
        """Refuses what the format cannot do."""
        if self.format not in SUFFIXES.values():
            raise FoveateError(
                f"format must be one of {', '.join(dict.fromkeys(SUFFIXES.values()))}, got {self.format!r}"
            )
        quality = self.quality
        if quality is None and self.format == "jpeg":
            raise FoveateError("a jpeg is never lossless; give a quality, or write png or webp")
        if quality is not None and self.format == "png":
            raise FoveateError("png is lossless and takes no quality; leave it out, or write jpg or webp")
        if quality is not None and (type(quality) is not int or quality not in range(1, 101)):
            raise FoveateError(f"quality must be a whole number from 1 to 100, got {quality!r}")
        if self.format == "webp" and not features.check("webp"):
            raise FoveateError("this installation of pillow writes no webp; write png or jpg")

    @classmethod
    def for_file(cls, path: str | Path, quality: int | None = None, *, is_lossless: bool = False) -> "Encoder":
        """The encoder that a file's ending asks for.

        Args:
            path: Ends in one of `SUFFIXES`.
            quality: Of a JPEG or a lossy WebP; None takes `DEFAULT_QUALITY`.
            is_lossless: Keeps every pixel of a WebP; a PNG always does.

        Raises:
            FoveateError: Another ending, or a quality where there is none.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in SUFFIXES:
            raise FoveateError(f"cannot write {path}: an image file ends in {', '.join(SUFFIXES)}")
        found = SUFFIXES[suffix]
        if is_lossless and quality is not None:
            raise FoveateError("a lossless image has no quality; leave one of the two out")
        if is_lossless or (found == "png" and quality is None):
            return cls(format=found)
        return cls(format=found, quality=DEFAULT_QUALITY if quality is None else quality)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Encoder":
        """Reads what `to_json` wrote."""
        return cls(format=data["format"], quality=data["quality"])

    @property
    def is_lossless(self) -> bool:
        """Whether the decoded pixels are those that were encoded."""
        return self.quality is None

    def to_json(self) -> dict[str, Any]:
        """Format, quality and whether it is lossless; where it is not, also the versions that decide the pixels."""
        found: dict[str, Any] = {"format": self.format, "quality": self.quality, "lossless": self.is_lossless}
        if self.is_lossless:
            return found
        library = "libjpeg_turbo" if self.format == "jpeg" and features.check("libjpeg_turbo") else self.format
        name = {"jpeg": "jpg"}.get(library, library)
        return {**found, "pillow": features.version("pil"), "codec": f"{name} {features.version(name)}"}

    def encode(self, image: Image.Image, text: str | None = None) -> bytes:
        """The file of an image.

        Args:
            image: RGB.
            text: ASCII, to be read by `read_text`.

        Raises:
            FoveateError: The text does not fit into a JPEG.
        """
        file = io.BytesIO()
        if self.format == "png":
            chunks = PngImagePlugin.PngInfo()
            if text is not None:
                chunks.add_text(CHUNK, text)
            image.save(file, format="PNG", pnginfo=chunks, compress_level=_PNG_LEVEL)
            return file.getvalue()
        exif = b"" if text is None else _exif(text)
        if self.format == "jpeg":
            if text is not None and len(text) > JPEG_TEXT_BYTES:
                raise FoveateError(
                    f"the configuration takes {len(text)} bytes and a jpeg holds {JPEG_TEXT_BYTES}; write png or webp"
                )
            # Full resolution of the colours: small coloured things are what these images have.
            image.save(file, format="JPEG", quality=self.quality, subsampling=0, exif=exif)
        elif self.is_lossless:
            image.save(file, format="WEBP", lossless=True, method=4, exif=exif)
        else:
            image.save(file, format="WEBP", quality=self.quality, method=4, exif=exif)
        return file.getvalue()

    def decoded(self, image: Image.Image) -> Image.Image:
        """The image as a reader of the file sees it."""
        if self.is_lossless:
            return image
        with Image.open(io.BytesIO(self.encode(image))) as found:
            return found.convert("RGB")


def read_text(path: str | Path) -> str | None:
    """The text that `Encoder.encode` put beside the pixels; None where there is none of ours.

    Raises:
        FoveateError: There is no such file, or it is no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            chunk = image.info.get(CHUNK)
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise FoveateError(f"cannot read {path} as an image: {_reason(error)}") from None
    if isinstance(chunk, str):
        return chunk
    raw = comment if isinstance(comment, bytes) else str(comment or "").encode()
    mark = f"{CHUNK} ".encode()
    body = raw.removeprefix(_ASCII)
    return body.removeprefix(mark).decode("ascii", "replace") if body.startswith(mark) else None


def _reason(error: Exception) -> str:
    """Why a file is no image, without its name, which the caller says."""
    if isinstance(error, UnidentifiedImageError):
        return "it is in no known format"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def text_of(config: Mapping[str, Any]) -> str:
    """A configuration as the text of a file: JSON in ASCII, whatever the prompts are written in."""
    return json.dumps(config, separators=(",", ":"))


def fits_jpeg(lengths: Iterable[int]) -> bool:
    """Whether prompts fit into a JPEG beside the rest of its text; `lengths` are those of `prompt_bytes`."""
    return sum(lengths) <= JPEG_TEXT_BYTES - _REST_BYTES


def prompt_bytes(prompt: str, negative: str | Sequence[str] | None) -> int:
    """What a prompt and its negative one take in the text of a file."""
    return len(text_of({"": [prompt, negative]}))


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + f"{CHUNK} {text}".encode("ascii")
    return exif.tobytes()
