"""The twin of a captured graph for any device: it remembers the function and calls it again."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(kw_only=True, slots=True, eq=False)
class Recalled:
    """Work that a device would have captured."""

    work: Callable[[], Tensor]
    out: Tensor

    @classmethod
    def capture(cls, work: Callable[[], Tensor]) -> "Recalled":
        """Runs it twice, as a device does, and remembers it."""
        work()
        return cls(work=work, out=work())

    def replay(self) -> None:
        """Calls the function."""
        self.out.copy_(self.work())
