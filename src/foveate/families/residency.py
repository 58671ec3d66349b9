"""Which modules of a model are in memory, and where."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Residency:
    """How memory is saved; the images are the same bits either way.

    Attributes:
        offload: Parts wait in main memory, and only the one that works sits on the device.
        release_text_encoder: The text encoder is read when prompts are encoded and dropped afterwards.
    """

    offload: bool = False
    release_text_encoder: bool = False
