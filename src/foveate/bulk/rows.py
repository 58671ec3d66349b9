"""What a line of the input asks for, and one that cannot be read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.pipeline.options import Options


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of an input, which asks for one image or several of a prompt.

    Attributes:
        index: Its position in the input, from 0.
        id: Its `id` column, or the index where there is none.
        prompt: The text.
        options: What the row itself says, under the names of `OPTIONS`; no aliases. Ranges are not checked.
        extra: All other columns, as JSON values.
    """

    index: int
    id: str
    prompt: str
    options: Options
    extra: Mapping[str, Any]

    @property
    def num_images(self) -> int | None:
        """How many images the row asks for, or None if it does not say."""
        number = self.options.get("num_images_per_prompt")
        return None if number is None else int(number)


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """One row of an input that cannot be read.

    Attributes:
        index: Its position in the input, from 0.
        id: Its `id` column where that can be read, or the index.
        where: Its place, such as `prompts.jsonl line 17`.
        reason: What is wrong with it, in one line.
    """

    index: int
    id: str
    where: str
    reason: str
