"""Measurements in turns, A B A B ..., so that a machine that slows down affects all sides alike."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from foveate.core.errors import is_out_of_memory

T = TypeVar("T")


class Stop(StrEnum):
    """Why a measurement ended before its last round; what was complete until then counts."""

    INTERRUPTED = "interrupted"
    OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds(Generic[T]):
    """Complete rounds after the warm-up, one measurement of every side in each; `stopped` if some are missing."""

    rounds: tuple[tuple[T, ...], ...]
    stopped: Stop | None

    def of(self, side: int) -> list[T]:
        """The measurements of one side, round by round."""
        return [measured[side] for measured in self.rounds]


def alternate(
    once: Callable[[int, int], T], num_sides: int, *, runs: int, warmup: int, after_round: Callable[[], object]
) -> Rounds[T]:
    """Measures every side once per round.

    Ctrl-C and a device without memory end it early; nothing is raised for them.

    Args:
        once: Measures a side (from 0) in a round (from 0, the warm-up included).
        num_sides: How many there are.
        runs: Rounds that count.
        warmup: Rounds before them, of which nothing is kept.
        after_round: Called after every round, outside of what is measured.
    """
    counted: list[tuple[T, ...]] = []
    stopped = None
    try:
        for index in range(warmup + runs):
            measured = tuple(once(side, index) for side in range(num_sides))
            if index >= warmup:
                counted.append(measured)
            after_round()
    except KeyboardInterrupt:
        stopped = Stop.INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        stopped = Stop.OUT_OF_MEMORY
    return Rounds(rounds=tuple(counted), stopped=stopped)
