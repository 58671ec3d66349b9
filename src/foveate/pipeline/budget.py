"""A call that asks for a share of the compute, with the policy that spends it.

What a setting costs is counted for one image with a prompt of `PROMPT_TOKENS` tokens and not for the prompts of the
call, so that an image does not depend on its company. Other lengths cost more or less once per image: with 200 tokens
on Infinity-2B a share of 40 % is still met within 2 % of it, and the report says what was really spent.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from foveate.core.cost import ModelShape
from foveate.core.guidance import GuidanceSchedule
from foveate.core.policy import Policy
from foveate.core.schedule import ScaleSchedule
from foveate.engine.forecast import forecast, full_cost
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request
from foveate.pipeline.call import Job
from foveate.policies.fit_budget import Dial, fit_share

PROMPT_TOKENS = 32
"""A sentence or two."""


def request_of(schedule: ScaleSchedule, guidance: GuidanceSchedule, num_images: int = 1) -> Request:
    """Images as costs are counted."""
    return Request(
        schedule=schedule,
        guidance=guidance,
        temperatures=(1.0,) * len(schedule),
        filters=(Filter(top_k=0, top_p=0.0),) * len(schedule),
        sampler=KeyedSampler(seeds=(0,) * num_images),
        conditions=(torch.empty(PROMPT_TOKENS, 0, device="cpu"),) * num_images,
        num_images=num_images,
    )


def share_of(policy: Policy, schedule: ScaleSchedule, guidance: GuidanceSchedule, shape: ModelShape) -> float:
    """FLOPs of a policy over those of the full run; an upper bound where the image decides."""
    request = request_of(schedule, guidance)
    return forecast(policy.bind(schedule, shape), request, shape).flops / full_cost(request, shape).flops


@lru_cache(maxsize=64)
def fitted(
    policy: Policy, budget: float, schedule: ScaleSchedule, guidance: GuidanceSchedule, shape: ModelShape
) -> Policy:
    """The setting of a policy that spends a share of the compute; known ones are not counted again.

    Raises:
        FoveateError: The policy has no dial, or no setting comes within 2 % of the share.
    """
    dial = Dial.of(policy, schedule, shape)
    return fit_share(dial, budget, lambda setting: share_of(setting, schedule, guidance, shape))


def with_budget(job: Job, shape: ModelShape) -> Job:
    """The call with the fitted policy in place of its family; as it was if it asks for no share.

    Raises:
        FoveateError: As `fitted`.
    """
    budget = job.options["budget"]
    if budget is None:
        return job
    policy = fitted(job.policy, float(budget), job.schedule, job.guidance, shape)
    is_static = policy.bind(job.schedule, shape).is_static
    notes = () if is_static else (f"the image decides with {policy.spec}: the budget is an upper bound",)
    return replace(with_policy(job, policy), notes=notes)


def with_policy(job: Job, policy: Policy) -> Job:
    """The call with another policy, which its images keep."""
    return replace(job, policy=policy, kept={**job.kept, "policy": policy})
