"""A text encoder that is in memory only while it works."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from foveate.conditioning.text import Conditioner
from foveate.core.conditions import Condition


@dataclass(kw_only=True, eq=False)
class OnDemand:
    """Reads a conditioner when there are prompts to encode and drops it afterwards.

    The conditions of the last call are kept, a few megabytes, so that the same prompts again read nothing.

    Attributes:
        load: Reads the conditioner onto a device, the same one every time.
        device: Where it computes.
    """

    load: Callable[[torch.device], Conditioner]
    device: torch.device
    _last: dict[str, tuple[Condition, int]] = field(default_factory=dict, init=False)

    def encode(self, prompts: list[str]) -> list[Condition]:
        """The conditions that the conditioner gives; each prompt by itself, so they are the same bits.

        Raises:
            CheckpointError: The files are gone or have changed since the model was loaded.
        """
        last = self._last
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in last]
        found: dict[str, tuple[Condition, int]] = {}
        if new:
            text = self.load(self.device)
            found = {prompt: (read, text.num_cut(prompt)) for prompt, read in zip(new, text.encode(new), strict=True)}
        # One assignment: calls of several threads may end between each other's lines.
        kept = {prompt: found[prompt] if prompt in found else last[prompt] for prompt in prompts}
        self._last = kept
        return [kept[prompt][0] for prompt in prompts]

    def num_cut(self, prompt: str) -> int:
        """Tokens that were left out of a prompt, which the last call must have encoded."""
        return self._last[prompt][1]
