"""`fv.fit_budget`: the setting of a policy that spends a share of the compute, without generating anything."""

from typing import Unpack, cast

from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.pipeline.call import draws_classes
from foveate.pipeline.options import CallOptions, Options
from foveate.pipeline.pipeline import Pipeline


def fit_budget(pipe: Pipeline, **options: Unpack[CallOptions]) -> Policy:
    """Finds the setting of a policy whose FLOPs are a share of those of the full run.

    Args:
        pipe: The model.
        **options: Of the call that it is for: `budget`, `policy` as the family, and what decides the cost beside them,
            such as size and guidance.

    Returns:
        The policy with its dial set, within 2 % of the share; its other fields stay.

    Raises:
        FoveateError: No budget is given, the policy has no dial, or no setting comes that near: what it reaches is
            named.
    """
    if options.get("budget") is None:
        raise FoveateError("fit_budget needs budget, the share of the FLOPs to spend, in (0, 1]")
    prompt = "0" if draws_classes(pipe.model.spec) else "a"
    return pipe.job(prompt, cast(Options, options)).policy
