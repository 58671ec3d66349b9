"""Checks weights: no NaN, no infinity, and nothing beyond the dtype that they are converted to.

One such number spoils every image without any error, so what reads or converts weights asks here behind its copy. The
smallest and the largest value say it in one pass, as both are NaN where any value is; that takes as long as the copy.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from foveate.core.errors import CheckpointError


class BrokenWeightError(CheckpointError):
    """A weight holds NaN, an infinity, or more than its dtype can; `name` is the weight's."""

    def __init__(self, name: str, complaint: str) -> None:
        """Puts the name in front of the message."""
        super().__init__(f"{name} {complaint}")
        self.name = name


def names_of_broken(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the weights that hold NaN or an infinity, in order; integers and truth values never do.

    Waits for a device once, not once a weight.
    """
    asked = [(name, weight.detach()) for name, weight in weights if weight.is_floating_point() and weight.numel()]
    # 8-bit dtypes have no minimum of their own.
    ends = [torch.aminmax(weight.float() if weight.element_size() == 1 else weight) for _, weight in asked]
    broken: list[int] = []
    for group in {(low.device, low.dtype) for low, _ in ends}:
        places = [index for index, (low, _) in enumerate(ends) if (low.device, low.dtype) == group]
        is_finite = torch.stack([end for index in places for end in ends[index]]).view(-1, 2).isfinite().all(1)
        broken += [index for index, is_good in zip(places, is_finite.tolist(), strict=True) if not is_good]
    return [asked[index][0] for index in sorted(broken)]


def broken_weight(name: str, stored: Tensor, dtype: torch.dtype, flag: str = "--dtype") -> BrokenWeightError:
    """The error for a weight that is not finite in a dtype: damaged as it is stored, or too large for the dtype.

    Args:
        name: Of the weight.
        stored: Its values before they were converted.
        dtype: What they are converted to.
        flag: The option that chose it.
    """
    values = stored.detach()
    values = values if values.dtype == torch.float64 else values.float()
    counts = {"NaN": int(values.isnan().sum()), "infinity": int(values.isinf().sum())}
    if any(counts.values()):
        found = " and ".join(f"{what} at {count}" for what, count in counts.items() if count)
        return BrokenWeightError(
            name,
            f"holds {found} of {values.numel()} values; the file is damaged or its training diverged: fetch it again, "
            "or take an earlier checkpoint",
        )
    return too_large(name, float(values.abs().max()), dtype, flag)


def too_large(name: str, magnitude: float, dtype: torch.dtype, flag: str = "--dtype") -> BrokenWeightError:
    """The error for a weight whose largest magnitude is beyond a dtype."""
    known, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    wider = f"{flag} bfloat16 or float32" if dtype == torch.float16 else f"{flag} float32"
    return BrokenWeightError(name, f"reaches {magnitude:.6g}, but {known} ends at {limit:.6g}; take {wider}")


def largest_magnitude(weight: Tensor) -> float:
    """The largest absolute value of a weight; NaN if it holds one."""
    low, high = torch.aminmax(weight.detach())
    return max(-float(low), float(high))
