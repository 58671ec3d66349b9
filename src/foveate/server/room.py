"""The memory that images may take, by the memory model: measured once at the start, then reserved and given back."""

from dataclasses import dataclass, field

from foveate.core.errors import FoveateError
from foveate.families.available import available_bytes
from foveate.families.memory import resident_bytes
from foveate.families.residency import Residency
from foveate.pipeline.bulk import need_of
from foveate.pipeline.call import Job
from foveate.pipeline.pipeline import Pipeline

_UNKNOWN = 1 << 62
"""The budget where the system does not say how much memory is left: the number of images bounds it."""

_KNOWN = 256
"""Kinds of calls that are remembered."""


@dataclass(kw_only=True, slots=True)
class Room:
    """Bytes for images, and how many of them are reserved; `decoder` are those of decoding one, which are left out."""

    pipe: Pipeline
    budget: int = _UNKNOWN
    decoder: int = 0
    reserved: int = 0
    _needs: dict[object, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe: Pipeline, job: Job, share: float) -> "Room":
        """A share of what is free now, less what decoding an image of a call takes beside the others."""
        model = pipe.model
        available = available_bytes(model.device)
        if available is None:
            return cls(pipe=pipe)
        need, precision = need_of(pipe, job), model.precision
        resident = resident_bytes(model.spec, precision.dtype, precision.quantization, Residency())
        weights = need.phases["transformer"] - need.drawing
        return cls(pipe=pipe, budget=int(share * available) + resident - weights - need.decoder, decoder=need.decoder)

    def need(self, job: Job) -> int:
        """Bytes that an image of a call takes while it is generated; known ones are not counted again.

        Raises:
            FoveateError: More than there is when nothing else runs.
        """
        key = (job.policy, job.schedule, job.guidance.is_needed(0), "latency_budget_ms" in job.asked)
        need = self._needs.get(key)
        if need is None:
            found = need_of(self.pipe, job)
            need = found.drawing + max(0, found.decoder - self.decoder)
            if len(self._needs) >= _KNOWN:
                self._needs.clear()
            self._needs[key] = need
        if need > self.budget:
            raise FoveateError(
                f"an image of this size takes {need / 1e6:,.0f} MB beside the weights, and {self.budget / 1e6:,.0f} MB "
                "are there; choose a smaller size"
            )
        return need

    def holds(self, need: int) -> bool:
        """Whether so many bytes are free."""
        return self.reserved + need <= self.budget
