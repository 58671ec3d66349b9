"""Which tokens of a scale run: rules from a mask, or from a score, to tokens; pure functions and data.

Axes: B images, l tokens of the scale.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.transfer import to_device


class Rule(Enum):
    """How many tokens a score keeps."""

    MASS = "mass"
    """The fewest tokens that hold a share of the total score, and all that tie with the last of them."""
    COUNT = "count"
    """A share of the tokens, rounded up; ties by index."""


def keep_by_mass(score_Bl: Float[Tensor, "B l"], share: float) -> Bool[Tensor, "B l"]:
    """Keeps the fewest highest scores that reach `share` of each image's sum, and every score that ties with the last.

    Sums are float64. A share of 1 and a sum of zero keep everything. Scores must not be negative.
    """
    if share >= 1:
        return torch.ones_like(score_Bl, dtype=torch.bool)
    score_Bl = score_Bl.double()
    descending_Bl = score_Bl.sort(dim=-1, descending=True).values
    cumulative_Bl = descending_Bl.cumsum(-1)
    total_B1 = cumulative_Bl[:, -1:]
    last_B1 = (cumulative_Bl < share * total_B1).sum(-1, keepdim=True)
    return (score_Bl >= descending_Bl.gather(-1, last_B1)) | (total_B1 <= 0)


def keep_by_count(score_Bl: Float[Tensor, "B l"], count: int | Int[Tensor, "B 1"]) -> Bool[Tensor, "B l"]:
    """Keeps the `count` highest scores of each image, equal scores by index; never waits for the device."""
    order_Bl = score_Bl.sort(dim=-1, descending=True, stable=True).indices
    is_high_Bl = (torch.arange(score_Bl.shape[-1], device=score_Bl.device) < count).expand_as(order_Bl)
    return torch.zeros_like(score_Bl, dtype=torch.bool).scatter_(-1, order_Bl, is_high_Bl)


class Selection(ABC):
    """One rule that keeps some of the tokens that earlier rules left; one entry speaks for all images."""

    @property
    @abstractmethod
    def token_map(self) -> Tensor:
        """The mask or the score, (B, l) or (1, l)."""

    @abstractmethod
    def count(self, num_survivors: int, num_tokens: int) -> int | None:
        """How many of so many survivors of a scale stay, or None where the content decides."""

    @abstractmethod
    def narrow(self, survivors_Bl: Bool[Tensor, "B l"]) -> Bool[Tensor, "B l"]:
        """The survivors that stay; never waits for the device."""

    @abstractmethod
    def on(self, device: torch.device) -> "Selection":
        """The same with its map on a device."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenSelection(Selection):
    """One score per token and how much of it to keep."""

    score_Bl: Float[Tensor, "B l"]
    share: float
    rule: Rule

    @property
    def token_map(self) -> Tensor:
        """The score."""
        return self.score_Bl

    def count(self, num_survivors: int, num_tokens: int) -> int | None:
        """The share, rounded up; a mass depends on the content."""
        if self.rule is Rule.COUNT:
            return min(num_survivors, math.ceil(self.share * num_survivors - 1e-9))
        return num_survivors if self.share >= 1 else None

    def narrow(self, survivors_Bl: Bool[Tensor, "B l"]) -> Bool[Tensor, "B l"]:
        """Ranks the survivors of earlier selections and returns those that stay; never waits for the device."""
        score_Bl = self.score_Bl.expand(survivors_Bl.shape)
        if self.rule is Rule.MASS:
            return survivors_Bl & keep_by_mass(score_Bl.masked_fill(~survivors_Bl, 0.0), self.share)
        ranked_Bl = score_Bl.masked_fill(~survivors_Bl, -torch.inf)
        count_B1 = (self.share * survivors_Bl.sum(-1, keepdim=True).double() - 1e-9).ceil().long()
        return survivors_Bl & keep_by_count(ranked_Bl, count_B1)

    def on(self, device: torch.device) -> "TokenSelection":
        """The same with its score on a device."""
        return replace(self, score_Bl=to_device(self.score_Bl, device))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskSelection(Selection):
    """Tokens that are named one by one.

    `kept` says how many a mask keeps of every image. Without it the engine reads the device once at that scale, and the
    policy is not static.
    """

    mask_Bl: Bool[Tensor, "B l"]
    kept: int | None

    @property
    def token_map(self) -> Tensor:
        """The mask."""
        return self.mask_Bl

    def count(self, num_survivors: int, num_tokens: int) -> int | None:
        """`kept` where all tokens survived so far; which survivors a mask holds depends on the content."""
        return self.kept if num_survivors == num_tokens else None

    def narrow(self, survivors_Bl: Bool[Tensor, "B l"]) -> Bool[Tensor, "B l"]:
        """The survivors under the mask."""
        return survivors_Bl & self.mask_Bl

    def on(self, device: torch.device) -> "MaskSelection":
        """The same with its mask on a device."""
        return replace(self, mask_Bl=to_device(self.mask_Bl, device))
