"""The contract that every policy must pass, for policies of this and of other packages.

`check_policy(MyPolicy, [MyPolicy(strength=2)])` runs all of it on tiny real models, in a few seconds; each part can be
called by itself too. An AssertionError names what does not hold.
"""

from foveate.testing.contract import check_plans, check_policy, check_record, check_runs, plans_of, random_signals
from foveate.testing.toys import TINY_GRIDS, tiny_engine, tiny_request

__all__ = [
    "TINY_GRIDS",
    "check_plans",
    "check_policy",
    "check_record",
    "check_runs",
    "plans_of",
    "random_signals",
    "tiny_engine",
    "tiny_request",
]
