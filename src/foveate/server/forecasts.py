"""What an image will take before it runs: FLOPs per scale, bytes, and the scales whose partial images are sent."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from foveate.core.cost import ModelShape, scale_flops
from foveate.core.guidance import GuidanceSchedule
from foveate.core.policy import Policy
from foveate.core.schedule import ScaleSchedule
from foveate.engine.forecast import forecast_work, full_work
from foveate.pipeline.budget import request_of
from foveate.pipeline.call import Job
from foveate.pipeline.profile import Profile

SHARES = {0: (), 1: (0.2,), 2: (0.05, 0.6), 3: (0.05, 0.2, 0.6)}
"""Shares of the full run's FLOPs that partial images come nearest to, by how many are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """FLOPs of one image per scale, both branches: under its policy, at most, and in the full run."""

    flops: tuple[float, ...]
    flops_full: tuple[float, ...]

    def partial_scales(self, count: int) -> tuple[int, ...]:
        """The scales whose images are sent before the last one's, in order; fewer where there are not as many scales.

        Args:
            count: How many are asked for, 0 to 3.
        """
        total = sum(self.flops_full)
        reached = [done / total for done in accumulate(self.flops_full)]
        free = list(range(len(reached) - 1))
        found = []
        for share in SHARES[count]:
            if free:
                nearest = min(free, key=lambda scale: abs(reached[scale] - share))
                found.append(nearest)
                free.remove(nearest)
        return tuple(sorted(found))


@lru_cache(maxsize=256)
def forecast_of(
    policy: Policy,
    schedule: ScaleSchedule,
    guidance: GuidanceSchedule,
    shape: ModelShape,
    has_negative: bool = False,
) -> Forecast:
    """The forecast of one image; known ones are not counted again.

    Args:
        policy: That of the call.
        schedule: Its size.
        guidance: Decides which rows there are.
        shape: Of the model.
        has_negative: Whether a prompt stands on the unconditional side, too.
    """
    request = request_of(schedule, guidance, shape, has_negative=has_negative)
    tokens = request.text_tokens()
    run = scale_flops(forecast_work(policy.bind(schedule, shape), request, shape), shape, tokens)
    full = scale_flops(full_work(request, shape), shape, tokens)
    return Forecast(flops=tuple(map(float, run)), flops_full=tuple(map(float, full)))


def profiled(profile: Profile, job: Job, shape: ModelShape) -> list[tuple[float, float]]:
    """GFLOPs of each scale of a call's full run and the milliseconds that a profile predicts; without the first one."""
    request = request_of(job.schedule, job.guidance, shape)
    work, tokens = full_work(request, shape), request.text_tokens()
    flops = [number / 1e9 for number in scale_flops(work, shape, tokens)]
    return list(zip(flops, profile.scale_ms(work, shape, tokens), strict=True))[1:]
