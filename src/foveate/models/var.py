"""The VAR transformer: class-conditional, one id per token, learned positions, adaptive norm per block or shared.

Parameter names are those of the published checkpoints. One block is two sublayers: self-attention and feed-forward.
What the class alone decides (the modulation of every block and of the head) is computed once, not once per scale.
Axes: n packed tokens, R rows, P blocks, C width, N heads, D head width, Z latent channels, L tokens of all scales.
Source: VAR (arXiv 2404.02905) and its published checkpoints; residual stream, modulation and head are float32, keys
are kept in the compute dtype (the published demo keeps them in float32).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.conditions import ClassLabel, Condition
from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.layers import Embedding
from foveate.core.protocols import BlockContext, Change, Prepared
from foveate.core.rows import Rows
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.core.transfer import numbers
from foveate.kernels.heads import unit_rotated
from foveate.kernels.linear import Linear, linear
from foveate.kernels.norm import norm_modulate
from foveate.models.layers import FeedForward, linear32, narrowed, running_dtype, with_factors

GRIDS_256: tuple[Grid, ...] = tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
"""The published schedule of 256 pixels."""
GRIDS_512: tuple[Grid, ...] = tuple((n, n) for n in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
"""The published schedule of 512 pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VARConfig:
    """Shape of a transformer; its positions are learned for one schedule, `grids`.

    `shared_aln` makes one projection serve the adaptive norms of all blocks, each with offsets of its own.
    """

    depth: int
    width: int
    heads: int
    num_classes: int = 1000
    codebook_size: int = 4096
    latent_channels: int = 32
    grids: tuple[Grid, ...] = GRIDS_256
    shared_aln: bool = False
    ff_width: int | None = None

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be built."""
        if self.width % self.heads:
            raise FoveateError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.grids[:1] != ((1, 1),):
            raise FoveateError(f"grids must begin with (1, 1), got {self.grids[:1] or 'none'}")

    @property
    def hidden(self) -> int:
        """Width of the feed-forward net; four times the width as published."""
        return self.ff_width or 4 * self.width

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the positions of each scale begin, and their number at the end."""
        return tuple(accumulate((h * w for h, w in self.grids), initial=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class VARPrepared:
    """What the class alone decides, per row: start, modulation of every block and of the head."""

    start_RC: Float[Tensor, "R C"]
    modulation_PR6C: Float[Tensor, "P R 6 C"]
    head_R2C: Float[Tensor, "R 2 C"]

    def keep(self, rows: Sequence[int]) -> "VARPrepared":
        """The same for some rows, in the given order."""
        index = numbers(rows, self.start_RC.device)
        return VARPrepared(
            start_RC=self.start_RC[index],
            modulation_PR6C=self.modulation_PR6C[:, index],
            head_R2C=self.head_R2C[index],
        )

    def join(self, others: Sequence[Prepared]) -> "VARPrepared":
        """These rows and those of other requests behind them."""
        parts = [self, *(own(other) for other in others)]
        return VARPrepared(
            start_RC=torch.cat([part.start_RC for part in parts]),
            modulation_PR6C=torch.cat([part.modulation_PR6C for part in parts], dim=1),
            head_R2C=torch.cat([part.head_R2C for part in parts]),
        )


def own(prepared: Prepared) -> VARPrepared:
    """Narrows what the engine hands back, which knows no model by name.

    Raises:
        TypeError: Another model prepared it.
    """
    if not isinstance(prepared, VARPrepared):
        raise TypeError(f"a VAR block needs what VAR.prepare returned, got {type(prepared).__name__}")
    return prepared


class SelfAttention(nn.Module):
    """Attention with unit-length queries and keys and a learned temperature per head."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width), persistent=False)
        self.proj = Linear(width, width)

    def forward(self, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Float[Tensor, "n C"]:
        """Runs the sublayer on packed tokens."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv_n3ND = linear(x_nC, self.mat_qkv.weight, bias, self.mat_qkv.tile_rows).view(
            x_nC.shape[0], 3, self.heads, -1
        )
        gain_N = self.scale_mul_1H11.float().clamp_max(math.log(100.0)).exp().view(-1)
        q_nND, k_nND, v_nND = unit_rotated(qkv_n3ND, gain_N, context.rotation_nD)
        return self.proj(context.slot.attend(q_nND, k_nND, v_nND, 1.0).flatten(1))


class VARBlock(nn.Module):
    """Self-attention and feed-forward, both with gate, scale and shift."""

    num_sublayers = 2

    def __init__(self, config: VARConfig, index: int) -> None:
        super().__init__()
        self.index = index
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(config.width, 6 * config.width))
        self.attn = SelfAttention(config.width, config.heads)
        self.has_shared_aln = config.shared_aln
        self.ffn = FeedForward(config.width, config.hidden)

    def init_own_weights(self) -> None:
        """Draws what the block adds to the shared modulation, where there is one."""
        if self.has_shared_aln:
            self.ada_gss.normal_(std=self.ada_gss.shape[-1] ** -0.5)

    def change(self, sublayer: int, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Change:
        """What self-attention (0) or the feed-forward net (1) adds."""
        # Published order: both gates, both scales, both shifts.
        gate_RC, factor_RC, shift_RC = own(context.prepared).modulation_PR6C[self.index].unbind(1)[sublayer::2]
        x_nC = norm_modulate(x_nC, factor_RC, shift_RC, context.rows, self.ffn.fc1.weight.dtype)
        return Change(value_nC=self.attn(x_nC, context) if sublayer == 0 else self.ffn(x_nC), gate_RC=gate_RC)


class VAR(nn.Module):
    """All weights of a transformer and the few steps around its blocks."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.class_emb = Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.starts[-1], width))
        self.lvl_embed = Embedding(len(config.grids), width)
        self.word_embed = Linear(config.latent_channels, width)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.blocks = nn.ModuleList(VARBlock(config, i) for i in range(config.depth))
        self.head_nm = nn.ModuleDict({"ada_lin": nn.Sequential(nn.SiLU(), Linear(width, 2 * width))})
        self.head = Linear(width, config.codebook_size)
        num_projections = 1 if config.shared_aln else config.depth
        self.shape = ModelShape(
            num_blocks=config.depth,
            width=width,
            ff_width=config.hidden,
            num_heads=config.heads,
            head_width=width // config.heads,
            head_outputs=config.codebook_size,
            input_channels=config.latent_channels,
            row_flops=2 * (6 * num_projections + 2) * width**2,
        )

    def init_own_weights(self) -> None:
        """Draws the start position and those of all tokens."""
        for positions in (self.pos_start, self.pos_1LC):
            positions.normal_(std=(3 * self.config.width) ** -0.5)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the linear layers of the blocks."""
        return running_dtype(self.block(0).ffn.fc1.weight)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pos_start.device

    def block(self, index: int) -> VARBlock:
        """The block of this index."""
        block: VARBlock = self.blocks[index]  # type: ignore[assignment]
        return block

    def narrowed(self, index: int, dtype: torch.dtype) -> VARBlock:
        """A copy of a block in another dtype."""
        return narrowed(self.block(index), dtype)

    def prepare(self, conditions: Sequence[Condition], is_guided: bool = False) -> VARPrepared:
        """Computes start and modulation.

        Args:
            conditions: The class of each image; with guidance optionally followed by as many negative ones.
            is_guided: Adds a row of the learned class that stands for none per image; rows are all conditional ones
                first, then all unconditional ones.

        Raises:
            FoveateError: A class that the model does not have.
        """
        labels = [self._index(condition) for condition in conditions]
        labels += [self.config.num_classes] * len(labels) if is_guided else []
        class_RC = self.class_emb.weight[numbers(labels, self.device)].float()
        active_RC = F.silu(class_RC)
        return VARPrepared(
            start_RC=class_RC + self.pos_start[0].float() + self._places(0),
            modulation_PR6C=with_factors(torch.stack(self._modulation(active_RC)).unflatten(-1, (6, -1)), 2, 4),
            head_R2C=with_factors(linear32(self, "head_nm.ada_lin.1", active_RC).unflatten(-1, (2, -1)), 0, 1),
        )

    def _index(self, condition: Condition) -> int:
        """Row of a class in the embedding; the one behind the last class stands for none."""
        if not isinstance(condition, ClassLabel):
            raise TypeError(f"VAR draws classes and reads a ClassLabel, got {type(condition).__name__}")
        if not 0 <= condition.index <= self.config.num_classes:
            last = self.config.num_classes - 1
            raise FoveateError(f"class must be 0 to {last}, or {last + 1} for none, got {condition.index}")
        return condition.index

    def _modulation(self, active_RC: Float[Tensor, "R C"]) -> list[Float[Tensor, "R C6"]]:
        """Gates, scales and shifts of every block, side by side; float32."""
        indices = range(self.config.depth)
        if not self.config.shared_aln:
            return [linear32(self.block(i), "ada_lin.1", active_RC) for i in indices]
        shared_RC6 = linear32(self, "shared_ada_lin.1", active_RC)
        return [shared_RC6 + self.block(i).ada_gss.float().view(1, -1) for i in indices]

    def _places(self, scale: int) -> Float[Tensor, "l C"]:
        """Level and absolute positions of a scale's tokens; float32."""
        begin, end = self.config.starts[scale : scale + 2]
        return self.lvl_embed.weight[scale].float() + self.pos_1LC[0, begin:end].float()

    def start(self, prepared: Prepared) -> Float[Tensor, "R C"]:
        """Hidden state of the first token of every row."""
        return own(prepared).start_RC

    def embed(self, input_BZhw: Float[Tensor, "B Z h w"], scale: int) -> Float[Tensor, "B l C"]:
        """Embeds the resized latent and adds level and positions of the scale; float32."""
        tokens_BlZ = input_BZhw.flatten(2).transpose(1, 2).to(self.word_embed.weight.dtype)
        return self.word_embed(tokens_BlZ).float() + self._places(scale)

    def positions(self, schedule: ScaleSchedule, scale: int) -> Float[Tensor, "l 0"]:
        """Nothing per token: positions are learned and `start` and `embed` add them.

        Raises:
            FoveateError: The schedule is not the one that the positions were learned for.
        """
        if schedule.grids != self.config.grids:
            known, got = (" ".join(f"{h}x{w}" for h, w in grids) for grids in (self.config.grids, schedule.grids))
            raise FoveateError(f"the model has positions for the grids {known} only, got {got}; use its own schedule")
        return torch.empty(schedule.scales[scale].num_tokens, 0, dtype=torch.float32, device=self.device)

    def prefix(self, prepared: Prepared) -> None:
        """Nothing stands in front of the first scale."""

    def head_input(self, x_nC: Float[Tensor, "n C"], rows: Rows, prepared: Prepared) -> Float[Tensor, "n C"]:
        """Normed and modulated hidden states, float32."""
        factor_RC, shift_RC = own(prepared).head_R2C[: len(rows.counts)].unbind(1)
        return norm_modulate(x_nC, factor_RC, shift_RC, rows, torch.float32)

    def head_logits(self, h_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n V"]:
        """Float32 logits, one per code."""
        return linear32(self, "head", h_nC)
