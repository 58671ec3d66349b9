"""How strongly the conditional branch is pushed away from the unconditional one, per scale.

Combined logits (or hidden states) are `uncond + w * (cond - uncond)`; w = 1 adds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.core.errors import FoveateError


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceSchedule:
    """One weight w per scale, and where the branches are combined.

    `hidden_blocks` are blocks after which the hidden states of both branches are replaced by their combination;
    `on_logits` combines the logits as well.
    """

    weights: tuple[float, ...]
    hidden_blocks: tuple[int, ...] = ()
    on_logits: bool = True

    def is_needed(self, scale: int) -> bool:
        """Whether the unconditional branch has to run: not only where w != 1 but also before, to fill its cache."""
        return any(w != 1.0 for w in self.weights[scale:])

    @classmethod
    def from_infinity(
        cls, cfg: float | Sequence[float], num_scales: int, insertions: Sequence[int] = (0,), num_blocks: int = 0
    ) -> "GuidanceSchedule":
        """From the Infinity family's `cfg`: a number, or one per scale.

        The branches meet at every one of `insertions`: 0 is on the logits, -j after block `num_blocks - j`.

        Raises:
            FoveateError: A list with fewer values than scales, or an insertion outside the blocks.
        """
        values = _per_scale(cfg, num_scales)
        for item in insertions:
            if item > 0 or (item and num_blocks + item <= 0):
                raise FoveateError(f"cfg_insertion_layer must be 0 or -1 ... -{num_blocks - 1}, got {item}")
        hidden = tuple(num_blocks + int(item) for item in insertions if item)
        return cls(weights=values, hidden_blocks=hidden, on_logits=0 in insertions)

    @classmethod
    def from_var(
        cls, cfg: float | Sequence[float], num_scales: int, first: int = 0, end: int | None = None
    ) -> "GuidanceSchedule":
        """From the VAR family's `cfg`, a number or one per scale: w = 1 + cfg * s / (S - 1), so scale 0 is unguided.

        Guidance acts from scale `first` up to scale `end` without it (Switti's window); elsewhere w = 1.

        Raises:
            FoveateError: A list with fewer values than scales.
        """
        window = range(first, num_scales if end is None else end)
        values = _per_scale(cfg, num_scales)
        last = max(num_scales - 1, 1)
        return cls(weights=tuple(1.0 + cfg * s / last if s in window else 1.0 for s, cfg in enumerate(values)))


def _per_scale(cfg: float | Sequence[float], num_scales: int) -> tuple[float, ...]:
    values = [cfg] * num_scales if isinstance(cfg, int | float) else list(cfg)
    if len(values) < num_scales:
        raise FoveateError(f"guidance_scale needs {num_scales} values, one per scale, got {len(values)}")
    return tuple(float(value) for value in values[:num_scales])
