"""A call that asks for a share of the compute, with the policy that spends it.

What a setting costs is counted for one image with a prompt of `PROMPT_TOKENS` tokens and not for the prompts of the
call, so that an image does not depend on its company. Other lengths cost more or less once per image: with 200 tokens
on Infinity-2B a share of 40 % is still met within 2 % of it, and the report says what was really spent. Where a
transformer reads as many tokens of every prompt (`ModelShape.padded_tokens`), these are counted.
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


def request_of(
    schedule: ScaleSchedule,
    guidance: GuidanceSchedule,
    shape: ModelShape,
    *,
    num_images: int = 1,
    has_negative: bool = False,
) -> Request:
    """Images as costs are counted.

    Args:
        schedule: Their size.
        guidance: Decides which rows there are.
        shape: Says how many text tokens there are where all prompts have as many.
        num_images: In one request.
        has_negative: Whether a prompt stands on the unconditional side, too.
    """
    prompt, nothing = shape.padded_tokens or (PROMPT_TOKENS, PROMPT_TOKENS)
    lengths = [prompt] * num_images + [prompt if has_negative else nothing] * num_images
    return Request(
        schedule=schedule,
        guidance=guidance,
        temperatures=(1.0,) * len(schedule),
        filters=(Filter(top_k=0, top_p=0.0),) * len(schedule),
        sampler=KeyedSampler(seeds=(0,) * num_images),
        conditions=tuple(torch.empty(length, 0, device="cpu") for length in lengths),
        num_images=num_images,
    )


def share_of(policy: Policy, request: Request, shape: ModelShape) -> float:
    """FLOPs of a policy over those of the full run; an upper bound where the image decides."""
    return forecast(policy.bind(request.schedule, shape), request, shape).flops / full_cost(request, shape).flops


@lru_cache(maxsize=64)
def fitted(
    policy: Policy,
    budget: float,
    schedule: ScaleSchedule,
    guidance: GuidanceSchedule,
    shape: ModelShape,
    has_negative: bool = False,
) -> Policy:
    """The setting of a policy that spends a share of the compute; known ones are not counted again.

    Args:
        policy: With a dial.
        budget: The share, in (0, 1].
        schedule: The size.
        guidance: Of the call.
        shape: Of the model.
        has_negative: As `request_of`.

    Raises:
        FoveateError: The policy has no dial, or no setting comes within 2 % of the share.
    """
    dial, request = Dial.of(policy, schedule, shape), request_of(schedule, guidance, shape, has_negative=has_negative)
    return fit_share(dial, budget, lambda setting: share_of(setting, request, shape))


def with_budget(job: Job, shape: ModelShape) -> Job:
    """The call with the fitted policy in place of its family; as it was if it asks for no share.

    Raises:
        FoveateError: As `fitted`.
    """
    budget = job.options["budget"]
    if budget is None:
        return job
    policy = fitted(job.policy, float(budget), job.schedule, job.guidance, shape, job.negatives is not None)
    is_static = policy.bind(job.schedule, shape).is_static
    notes = () if is_static else (f"the image decides with {policy.spec}: the budget is an upper bound",)
    return replace(with_policy(job, policy), notes=notes)


def with_policy(job: Job, policy: Policy) -> Job:
    """The call with another policy, which its images keep."""
    return replace(job, policy=policy, kept={**job.kept, "policy": policy})
