"""The small diffusion head of HART: what a code leaves over of a latent, for each token by itself, in eight steps.

Parameter names are those of the published checkpoints. A step is a few modulated residual layers; both branches of
guidance see the conditional branch's state. State, norms and modulation are float32, the layers' matmuls in the dtype
of the weights.
Axes: n tokens of one or two branches, k tokens, C width of the transformer, W width of the head, Z latent channels, S
steps.
Source: HART (arXiv 2410.10812); the sampler is that of Improved DDPM (arXiv 2102.09672) with learned variances and
spaced steps, on a cosine schedule of 1000.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.transfer import to_device
from foveate.kernels.activation import silu
from foveate.kernels.linear import Linear
from foveate.models.layers import linear32

NUM_STEPS = 8
"""Steps that the published code takes of those of the schedule."""
SCHEDULE_STEPS = 1000
RESIDUAL_FACTOR = 0.6
"""Of the result, as published."""

_ANGLES = 128
"""Sines of a step's embedding, and as many cosines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionStep:
    """One step back: from what is left of the signal (`kept`, its share of the variance) to what was left before it."""

    step: int
    kept: float
    kept_before: float
    log_least: float

    @property
    def is_last(self) -> bool:
        """Whether no noise follows."""
        return self.step == 0

    @property
    def beta(self) -> float:
        """Variance of the noise that the step takes back."""
        return 1 - self.kept / self.kept_before

    def mean(self, x_kZ: Float[Tensor, "k Z"], noise_kZ: Float[Tensor, "k Z"]) -> Float[Tensor, "k Z"]:
        """Mean of the state before, given the noise in this one."""
        start_kZ = (x_kZ * self.kept**-0.5 - noise_kZ * (1 / self.kept - 1) ** 0.5).clamp(-1, 1)
        gone = 1 - self.kept
        of_start = self.beta * self.kept_before**0.5 / gone
        of_state = (1 - self.kept_before) * (1 - self.beta) ** 0.5 / gone
        return of_start * start_kZ + of_state * x_kZ

    def deviation(self, variance_kZ: Float[Tensor, "k Z"]) -> Float[Tensor, "k Z"]:
        """Standard deviation of the state before; the network's output places its logarithm between two bounds."""
        share_kZ = (variance_kZ + 1) / 2
        return (0.5 * (share_kZ * math.log(self.beta) + (1 - share_kZ) * self.log_least)).exp()


@cache
def spaced_steps(count: int = NUM_STEPS) -> Sequence[DiffusionStep]:
    """The steps, last ones of the schedule first."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    kept, total = list[float](), 1.0
    for i in range(SCHEDULE_STEPS):
        total *= 1 - min(1 - signal((i + 1) / SCHEDULE_STEPS) / signal(i / SCHEDULE_STEPS), 0.999)
        kept.append(total)
    numbers = [round(i * (SCHEDULE_STEPS - 1) / (count - 1)) for i in range(count)]
    pairs = [(kept[b], 1.0 if a is None else kept[a]) for a, b in zip([None, *numbers], numbers, strict=False)]
    least = [(1 - now / before) * (1 - before) / (1 - now) for now, before in pairs]
    # The first step has no variance; it takes that of the second.
    least[0] = least[1]
    steps = [
        DiffusionStep(step=number, kept=now, kept_before=before, log_least=math.log(variance))
        for number, (now, before), variance in zip(numbers, pairs, least, strict=True)
    ]
    return tuple(reversed(steps))


class StepEmbedding(nn.Module):
    """A number as cosines and sines, through two linear layers; float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * _ANGLES, width), nn.SiLU(), Linear(width, width))

    def forward(self, number: int) -> Float[Tensor, " W"]:
        """Embeds a step of the diffusion, or the index of a scale."""
        exponents = torch.arange(_ANGLES, dtype=torch.float32, device="cpu") / _ANGLES
        angles = number * torch.exp(-math.log(10000.0) * exponents)
        waves = to_device(torch.cat((angles.cos(), angles.sin())), next(self.parameters()).device)
        return linear32(self.mlp, "2", F.silu(linear32(self.mlp, "0", waves[None])))[0]


def modulated(
    h_nW: Float[Tensor, "n W"],
    norm: nn.LayerNorm | None,
    shift_nW: Float[Tensor, "n W"],
    scale_nW: Float[Tensor, "n W"],
) -> Float[Tensor, "n W"]:
    """Layer norm, times 1 + scale, plus shift; float32."""
    weight, bias = (None, None) if norm is None else (norm.weight.float(), norm.bias.float())
    normed_nW = F.layer_norm(h_nW, h_nW.shape[-1:], weight, bias, eps=1e-6)
    return normed_nW * (1 + scale_nW) + shift_nW


class ResidualLayer(nn.Module):
    """One modulated residual layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))

    def forward(self, h_nW: Float[Tensor, "n W"], y_nW: Float[Tensor, "n W"]) -> Float[Tensor, "n W"]:
        """Runs the layer; `y_nW` is SiLU of the condition, in the dtype of the weights."""
        shift_nW, scale_nW, gate_nW = self.adaLN_modulation[1](y_nW).float().chunk(3, dim=-1)
        x_nW = modulated(h_nW, self.in_ln, shift_nW, scale_nW).to(y_nW.dtype)
        return h_nW + gate_nW * self.mlp[2](silu(self.mlp[0](x_nW))).float()


class FinalLayer(nn.Module):
    """Noise and variance of every channel."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, h_nW: Float[Tensor, "n W"], y_nW: Float[Tensor, "n W"]) -> Float[Tensor, "n o"]:
        """Runs the layer; as `ResidualLayer`."""
        shift_nW, scale_nW = self.adaLN_modulation[1](y_nW).float().chunk(2, dim=-1)
        return self.linear(modulated(h_nW, None, shift_nW, scale_nW).to(y_nW.dtype)).float()


class ResidualNetwork(nn.Module):
    """The network of one step."""

    def __init__(self, channels: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.time_embed = StepEmbedding(hidden)
        self.cond_embed = Linear(width, hidden)
        self.input_proj = Linear(channels, hidden)
        self.res_blocks = nn.ModuleList(ResidualLayer(hidden) for _ in range(depth))
        self.final_layer = FinalLayer(hidden, 2 * channels)

    def forward(
        self, x_nZ: Float[Tensor, "n Z"], step: int, condition_nW: Float[Tensor, "n W"]
    ) -> tuple[Float[Tensor, "n Z"], Float[Tensor, "n Z"]]:
        """Noise and where the log variance lies between its bounds (-1 to 1); float32.

        Args:
            x_nZ: State.
            step: Of the schedule.
            condition_nW: Embedded condition, float32.
        """
        y_nW = silu(self.time_embed(step) + condition_nW).to(self.cond_embed.weight.dtype)
        h_nW = linear32(self, "input_proj", x_nZ)
        for layer in self.res_blocks:
            h_nW = layer(h_nW, y_nW)
        noise_nZ, variance_nZ = self.final_layer(h_nW, y_nW).chunk(2, dim=-1)
        return noise_nZ, variance_nZ


class ResidualDiffusion(nn.Module):
    """The network, and the way back from noise."""

    def __init__(self, channels: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.net = ResidualNetwork(channels, width, hidden, depth)

    @staticmethod
    def token_flops(channels: int, width: int, hidden: int, depth: int) -> int:
        """FLOPs of all steps for one token of one branch; the embedding of a step, shared by all tokens, left out.

        Arguments as the constructor's.
        """
        layers = depth * (3 + 2) * hidden**2
        ends = channels * hidden + 2 * hidden**2 + 2 * channels * hidden
        return 2 * (width * hidden + NUM_STEPS * (layers + ends))

    def forward(
        self,
        cond_kC: Float[Tensor, "k C"],
        uncond_kC: Float[Tensor, "k C"] | None,
        weight: float,
        noise_SkZ: Float[Tensor, "S k Z"],
    ) -> Float[Tensor, "k Z"]:
        """The residual of each token, float32.

        Args:
            cond_kC: What the conditional branch knows of the tokens.
            uncond_kC: The same of the unconditional branch; None leaves guidance out.
            weight: Of guidance.
            noise_SkZ: The state at the start, then the noise added behind each step but the last.
        """
        branches = [cond_kC] if uncond_kC is None else [cond_kC, uncond_kC]
        condition_nW = linear32(self.net, "cond_embed", torch.cat(branches))
        x_kZ = noise_SkZ[0]
        for i, step in enumerate(spaced_steps()):
            noises_nZ, variances_nZ = self.net(torch.cat([x_kZ] * len(branches)), step.step, condition_nW)
            noise_kZ, variance_kZ = noises_nZ[: len(x_kZ)], variances_nZ[: len(x_kZ)]
            if uncond_kC is not None:
                noise_kZ = weight * noise_kZ + (1 - weight) * noises_nZ[len(x_kZ) :]
            x_kZ = step.mean(x_kZ, noise_kZ)
            if not step.is_last:
                x_kZ = x_kZ + step.deviation(variance_kZ) * noise_SkZ[i + 1]
        return RESIDUAL_FACTOR * x_kZ
