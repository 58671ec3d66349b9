"""LD-Pruning: "Where to Refine, When to Stop" (arXiv 2606.00310). Two rules that read the latent discrepancy.

LHEP (where): a scale refines only tokens whose place in the previous scale's residual holds high-frequency energy. The
others run no block and repeat the previous residual (Eqs. 7-11, 14, 24-27; Algorithm 1).
SATS (when): the unconditional branch stops for good once the gap between the branches' logits changes little from one
scale to the next (Eqs. 12-13).

Where the paper is silent we chose, each as a field or noted here: bilinear enlargement of the energy; averages that
count real neighbours only; odd grids padded by reflection; the gap as a root-mean-square, since a norm grows with the
token count; the gap is watched from one scale before the first that SATS may stop. The latent's own energy beside the
residual's is ours (`energy_of`).
Axes: B images, Z latent channels, (h, w) grids, l tokens, k tokens that ran, V outputs.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.plan import Base, ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.core.selection import Rule, TokenSelection
from foveate.core.signals import BranchLogits, Record, Signal, Signals
from foveate.core.transfer import to_device
from foveate.kernels.gpu import launch

_LOG = logging.getLogger("foveate")

_HAAR = 0.5 * torch.tensor(
    [[[-1.0, 1.0], [-1.0, 1.0]], [[-1.0, -1.0], [1.0, 1.0]], [[-1.0, 1.0], [1.0, -1.0]]],
    dtype=torch.float32,
    device="cpu",
)
"""The three detail kernels of Eq. 8; the low-pass one is left out."""


def _even(map_BZhw: Tensor, axis: int) -> Tensor:
    """Makes an axis even: an odd one grows by its reflection, a single entry by a copy of itself."""
    size = map_BZhw.shape[axis]
    return torch.cat((map_BZhw, map_BZhw.narrow(axis, max(size - 2, 0), 1)), dim=axis) if size % 2 else map_BZhw


def haar_energy(residual_BZhw: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B h2 w2"]:
    """Squared Haar detail of each 2x2 patch, summed over channels and kernels (Eqs. 7-9); half the grid, rounded up."""
    padded = _even(_even(residual_BZhw, -2), -1)
    flat = padded.double().flatten(0, 1).unsqueeze(1)
    detail = F.conv2d(flat, to_device(_HAAR, flat.device, flat.dtype)[:, None], stride=2)
    return detail.square().sum(1).unflatten(0, residual_BZhw.shape[:2]).sum(1)


def smooth_energy(residual_BZhw: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B h2 w2"]:
    """Haar energy of each 2x2 patch, averaged over those of the 3x3 patches around it that exist; float64."""
    raw_B1hw = haar_energy(residual_BZhw)[:, None]
    return F.avg_pool2d(raw_B1hw, 3, stride=1, padding=1, count_include_pad=False)[:, 0]


def detail_energy(residual_BZhw: Float[Tensor, "B Z h w"], grid: Grid) -> Float[Tensor, "B y x"]:
    """High-frequency energy of a residual, smoothed over 3x3 patches, enlarged to the coming grid (Eq. 10); float64."""
    if launch.serves(residual_BZhw):
        smooth_Bhw = launch.run("energy", _triton_energy, smooth_energy, residual_BZhw)
    else:
        smooth_Bhw = smooth_energy(residual_BZhw)
    return F.interpolate(smooth_Bhw[:, None], size=grid, mode="bilinear", align_corners=False)[:, 0]


def _triton_energy(residual_BZhw: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B h2 w2"]:
    energy_Byx: Tensor = launch.kernel("energy").smooth_energy(residual_BZhw)
    return energy_Byx


def share_of_mean(energy_Byx: Float[Tensor, "B y x"]) -> Float[Tensor, "B y x"]:
    """Each image's energy over its mean; a flat image stays zero."""
    mean_B11 = energy_Byx.mean((-2, -1), keepdim=True)
    return torch.where(mean_B11 > 0, energy_Byx / mean_B11, 0.0)


def branch_gap(logits: BranchLogits, norm: Literal["rms", "l2"]) -> Float[Tensor, ""] | None:
    """Distance of the branches' logits where both ran (Eq. 12): root-mean-square, or the literal 2-norm; float64.

    Stays on the device; None where the unconditional branch did not run.
    """
    both = logits.both()
    if both is None:
        return None
    difference_kV = (both[0] - both[1]).double()
    return difference_kV.square().mean().sqrt() if norm == "rms" else difference_kV.square().sum().sqrt()


def branch_gaps(logits: Sequence[BranchLogits], norm: Literal["rms", "l2"]) -> Float[Tensor, " B"] | None:
    """The gap of every image; NaN where one branch ran alone, None if that is so for all."""
    gaps = [branch_gap(both, norm) for both in logits]
    known = next((gap for gap in gaps if gap is not None), None)
    if known is None:
        return None
    return torch.stack([torch.full_like(known, torch.nan) if gap is None else gap for gap in gaps])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _State:
    """Per image: the gap at scale `seen`, whether the branch still runs, and the latest energy and kept tokens.

    All on the device. The gap is NaN where one branch ran alone; nothing is None but what was never computed.
    """

    gap_B: Tensor | None = None
    guided_B: Tensor | None = None
    seen: int = -1
    energy_B1hw: Tensor | None = None
    kept_B1hw: Tensor | None = None


class BoundLDPruning(Bound):
    """LD-Pruning on one schedule."""

    is_static = False

    def __init__(self, policy: "LDPruning", schedule: ScaleSchedule) -> None:
        self.policy, self.schedule = policy, schedule
        num_scales = len(schedule)
        self.last = num_scales - policy.skip_last
        self.first_lhep = max(num_scales - policy.lhep_scales, 1)
        self.first_sats = max(num_scales - policy.sats_scales, 1)
        self.has_lhep = policy.lhep and policy.energy_share < 1 and self.first_lhep < self.last
        self.has_sats = policy.sats and policy.sats_threshold > 0 and self.first_sats < self.last
        wants = (policy.skip_last, self.has_sats, self.has_lhep)
        kinds = (Directive.SCALES, Directive.BRANCH, Directive.TOKENS)
        self.directives = tuple(kind for kind, is_on in zip(kinds, wants, strict=True) if is_on)
        self.is_static = not (self.has_lhep or self.has_sats)
        self.base = Base.PREVIOUS if policy.fill == "base" else Base.ZERO

    def record(self, scale: int) -> frozenset[Record]:
        """The residual for LHEP, the logits for SATS; both from one scale before the first use."""
        wanted: set[Record] = set()
        is_read = scale < self.last - 1
        if is_read and self.has_lhep and scale >= self.first_lhep - 1:
            wanted.add(Signal.RESIDUAL)
            if self.policy.energy_of == "residual+latent":
                wanted.add(Signal.F_HAT)
        if is_read and self.has_sats and scale >= self.first_sats - 1:
            wanted.add(Signal.LOGITS)
        return frozenset(wanted)

    def start(self) -> _State:
        """Nothing seen yet."""
        return _State()

    def ceiling(self, scale: int) -> ScalePlan:
        """Content decides, so the bound is everything but the scales that never run; the base shows what conflicts."""
        is_pruned = self.has_lhep and self.first_lhep <= scale < self.last
        return ScalePlan(runs=scale < self.last, base=self.base if is_pruned else Base.ZERO)

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Prunes by energy and stops branches."""
        if scale >= self.last:
            return ScalePlan(runs=False), state
        if self.has_sats and signals is not None and signals.logits is not None and signals.scale > state.seen:
            state = self._watch_gap(signals, state)
        if not self.has_lhep or scale < self.first_lhep or signals is None or signals.residual_BZhw is None:
            return ScalePlan(guided_B=state.guided_B), state
        energy_B1hw = self._token_energy(signals.residual_BZhw, signals.f_hat_BZHW, scale, state)
        selection = TokenSelection(score_Bl=energy_B1hw.flatten(1), share=self.policy.energy_share, rule=Rule.MASS)
        plan = ScalePlan(guided_B=state.guided_B, selections=(selection,), base=self.base)
        if self.policy.energy_from == "previous":
            return plan, state
        kept_Bl = selection.narrow(torch.ones_like(selection.score_Bl, dtype=torch.bool))
        return plan, replace(state, energy_B1hw=energy_B1hw, kept_B1hw=kept_Bl.view_as(energy_B1hw))

    def _token_energy(
        self, residual_BZhw: Tensor, f_hat_BZHW: Tensor | None, scale: int, state: _State
    ) -> Float[Tensor, "B 1 y x"]:
        """Energy per token: on the latent grid, averaged over the latents of a token.

        With "residual+latent", the energy of the latent on the residual's grid is added, both as shares of their means.
        With "last_computed", a token that did not run at the latest scale keeps the energy it had there.
        """
        grid = self.schedule.latent_grid(scale)
        energy_Byx = detail_energy(residual_BZhw, grid)
        if self.policy.energy_of == "residual+latent" and f_hat_BZHW is not None:
            latent_BZhw = F.interpolate(f_hat_BZHW, size=residual_BZhw.shape[-2:], mode="area")
            energy_Byx = share_of_mean(energy_Byx) + share_of_mean(detail_energy(latent_BZhw, grid))
        energy_B1yx = F.avg_pool2d(energy_Byx[:, None], self.schedule.patch)
        if self.policy.energy_from == "previous" or state.energy_B1hw is None or state.kept_B1hw is None:
            return energy_B1yx
        grid = self.schedule.grids[scale]
        old_B1yx = F.interpolate(state.energy_B1hw, size=grid, mode="bilinear", align_corners=False)
        was_kept_B1yx = F.interpolate(state.kept_B1hw.double(), size=grid, mode="nearest") > 0
        return torch.where(was_kept_B1yx, energy_B1yx, old_B1yx)

    def _watch_gap(self, signals: Signals, state: _State) -> _State:
        """Eq. 13: gamma = |gap - previous gap| / previous gap, below the threshold once is enough."""
        gap_B, guided_B = branch_gaps(signals.logits or (), self.policy.gap_norm), state.guided_B
        if gap_B is not None and state.gap_B is not None and signals.scale >= self.first_sats:
            gamma_B = (gap_B - state.gap_B).abs() / (state.gap_B + 1e-8)
            # Not "at least the threshold": an unknown gap stops nothing.
            goes_on_B = ~(gamma_B < self.policy.sats_threshold)
            guided_B = goes_on_B if guided_B is None else guided_B & goes_on_B
        return replace(state, gap_B=gap_B, guided_B=guided_B, seen=signals.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class LDPruning(Policy):
    """LHEP and SATS.

    `energy_share` (rho, in (0, 1]) of the energy is refined on the last `lhep_scales` scales; the unconditional branch
    may stop on the last `sats_scales` once its gap changes by less than `sats_threshold` (delta). `skip_last` scales do
    not run at all. `energy_from` = "last_computed" lets a dropped token keep the energy it had when it last ran, since
    areas once dropped look flat to later scales. `energy_of` = "residual+latent" adds the energy of the latent so far.
    """

    name: ClassVar[str] = "ld-pruning"
    energy_share: float = 0.5
    sats_threshold: float = 0.15
    lhep: bool = True
    sats: bool = True
    lhep_scales: int = 3
    sats_scales: int = 4
    skip_last: int = 0
    fill: Literal["base", "zero"] = "base"
    energy_from: Literal["previous", "last_computed"] = "previous"
    gap_norm: Literal["rms", "l2"] = "rms"
    energy_of: Literal["residual", "residual+latent"] = "residual"

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(0 < self.energy_share <= 1, "energy_share", "in (0, 1]", self.energy_share)
        require(self.sats_threshold >= 0, "sats_threshold", "0 or more", self.sats_threshold)
        for name in ("lhep_scales", "sats_scales", "skip_last"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        require(self.fill in ("base", "zero"), "fill", "base or zero", self.fill)
        sources = ("previous", "last_computed")
        require(self.energy_from in sources, "energy_from", " or ".join(sources), self.energy_from)
        require(self.gap_norm in ("rms", "l2"), "gap_norm", "rms or l2", self.gap_norm)
        energies = ("residual", "residual+latent")
        require(self.energy_of in energies, "energy_of", " or ".join(energies), self.energy_of)

    @classmethod
    def neutral(cls) -> "LDPruning":
        """All the energy, and a threshold that is never met."""
        return cls(energy_share=1.0, sats_threshold=0.0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule: on 13 scales LHEP acts at 10-12 and SATS at 9-12, as in the paper.

        Raises:
            FoveateError: `skip_last` leaves no scale.
        """
        require(self.skip_last < len(schedule), "skip_last", f"less than the {len(schedule)} scales", self.skip_last)
        left = sum(scale.num_tokens for scale in schedule.scales[: len(schedule) - self.skip_last])
        if 3 * left < schedule.num_tokens:
            _LOG.warning(
                "ld-pruning: skip_last=%d leaves %d of %d tokens on this schedule; expect blurred images",
                self.skip_last,
                left,
                schedule.num_tokens,
            )
        return BoundLDPruning(self, schedule)
