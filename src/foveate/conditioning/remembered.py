"""A text encoder that reads a prompt once for many calls."""

from collections import OrderedDict
from dataclasses import dataclass, field

from foveate.conditioning.text import Conditioner
from foveate.core.conditions import Condition
from foveate.core.errors import FoveateError


@dataclass(kw_only=True, eq=False)
class Remembered:
    """Keeps the conditions of the prompts that were read last; not for several threads at once.

    Attributes:
        inner: Reads prompts, each by itself, so that it does not matter when.
        count: Prompts to keep at the most, 1 or more; those of one call are always kept.
    """

    inner: Conditioner
    count: int
    _kept: OrderedDict[str, tuple[Condition, int]] = field(default_factory=OrderedDict, init=False)

    def __post_init__(self) -> None:
        """Refuses to keep nothing."""
        if self.count < 1:
            raise FoveateError(f"the number of prompts to remember must be 1 or more, got {self.count}")

    def encode(self, prompts: list[str]) -> list[Condition]:
        """The conditions that the conditioner gives; only prompts that it does not know are read."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if new:
            read = self.inner.encode(new)
            for prompt, condition in zip(new, read, strict=True):
                self._kept[prompt] = (condition, self.inner.num_cut(prompt))
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        found = [self._kept[prompt][0] for prompt in prompts]
        while len(self._kept) > max(self.count, len(set(prompts))):
            self._kept.popitem(last=False)
        return found

    def num_cut(self, prompt: str) -> int:
        """Tokens that were left out of a prompt."""
        return self._kept[prompt][1] if prompt in self._kept else self.inner.num_cut(prompt)
