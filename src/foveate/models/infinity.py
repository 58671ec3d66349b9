"""The Infinity transformer: text-conditioned, bit labels, shared adaptive norm, 2-D rotary positions.

Parameter names are those of the published checkpoints. One block is three sublayers: self-attention, cross-attention to
the text and feed-forward; what the text alone decides (modulation, text keys and values) is computed once.
Axes: n packed tokens, R rows, C width, E text width, T text tokens, N heads, D head width, Z bits of a token.
Source: Infinity (arXiv 2412.04431) and its published checkpoints; the residual stream and the head are float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.conditions import Condition
from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.layers import Embedding
from foveate.core.protocols import BlockContext, Change, Prepared
from foveate.core.rows import Rows
from foveate.core.schedule import ScaleSchedule
from foveate.core.transfer import numbers, to_device
from foveate.kernels.heads import unit_rotated
from foveate.kernels.linear import Linear, linear
from foveate.kernels.norm import norm_modulate
from foveate.models.attention import TextMemory
from foveate.models.layers import FeedForward, linear32, narrowed, rms_norm, running_dtype, with_factors

NUM_LEVELS = 15
"""Rows of the published level embedding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InfinityConfig:
    """Shape of a transformer; `bits` per token is four times the latent channels where tokens are 2x2 patches.

    `restarts_positions` repeats a slip of the reference code that only its path without fused norms has: there the
    tokens of every scale get the rotary positions of the first tokens of the sequence. The published inference script
    takes the other path, and in training both are right; only numbers recorded on the path without differ.
    """

    depth: int
    width: int
    heads: int
    bits: int
    text_width: int
    pool_heads: int
    chunks: int = 1
    text_tokens: int = 512
    ff_width: int | None = None
    restarts_positions: bool = False

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be built."""
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise FoveateError(f"width / heads must be a multiple of 4, got {self.width} / {self.heads}")
        if self.depth % self.chunks:
            raise FoveateError(f"depth must be a multiple of chunks, got {self.depth} and {self.chunks}")
        if self.hidden <= 0:
            raise FoveateError(f"width {self.width} rounds to no feed-forward width; give ff_width")

    @property
    def hidden(self) -> int:
        """Width of the feed-forward net: four times the width, rounded to 256 as published."""
        return self.ff_width or round(self.width * 4 / 256) * 256


@dataclass(frozen=True, kw_only=True, slots=True)
class InfinityPrepared:
    """What the text alone decides, per row: start, modulation of every block and of the head, text memory per block.

    Modulation is gates, factors (1 + scale) and shifts, two of each; the head has a factor and a shift.
    """

    start_RC: Float[Tensor, "R C"]
    modulation_PR6C: Float[Tensor, "P R 6 C"]
    head_R2C: Float[Tensor, "R 2 C"]
    memory: tuple[TextMemory, ...]

    def keep(self, rows: Sequence[int]) -> "InfinityPrepared":
        """The same for some rows, in the given order."""
        index = numbers(rows, self.start_RC.device)
        return InfinityPrepared(
            start_RC=self.start_RC[index],
            modulation_PR6C=self.modulation_PR6C[:, index],
            head_R2C=self.head_R2C[index],
            memory=tuple(memory.keep(rows) for memory in self.memory),
        )

    def join(self, others: Sequence[Prepared]) -> "InfinityPrepared":
        """These rows and those of other requests behind them."""
        parts = [self, *(own(other) for other in others)]
        return InfinityPrepared(
            start_RC=torch.cat([part.start_RC for part in parts]),
            modulation_PR6C=torch.cat([part.modulation_PR6C for part in parts], dim=1),
            head_R2C=torch.cat([part.head_R2C for part in parts]),
            memory=tuple(first.join([part.memory[i] for part in parts[1:]]) for i, first in enumerate(self.memory)),
        )


def own(prepared: Prepared) -> InfinityPrepared:
    """Narrows what the engine hands back, which knows no model by name.

    Raises:
        TypeError: Another model prepared it.
    """
    if not isinstance(prepared, InfinityPrepared):
        raise TypeError(f"an Infinity block needs what Infinity.prepare returned, got {type(prepared).__name__}")
    return prepared


class SelfAttention(nn.Module):
    """Attention with unit-length queries and keys, a learned temperature per head and rotary positions."""

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


class CrossAttention(nn.Module):
    """Attention to the text; where it pools, the queries are learned, one per head."""

    zero_k_bias: Tensor
    mat_q: Any
    """Makes the queries, or holds the learned ones: the published names leave one attribute for both."""

    def __init__(self, width: int, heads: int, text_width: int, is_pool: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        if is_pool:
            self.mat_q = nn.Parameter(torch.zeros(1, heads, width // heads))
        else:
            self.mat_q = Linear(width, width)
        self.mat_kv = Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width), persistent=False)
        self.proj = Linear(width, width)

    def init_own_weights(self) -> None:
        """Draws the learned queries, where there are any."""
        if isinstance(self.mat_q, nn.Parameter):
            self.mat_q.normal_(std=(3 * self.mat_q[0].numel()) ** -0.5)

    def memory(self, text_TE: Float[Tensor, "t E"], lengths: tuple[int, ...]) -> TextMemory:
        """Keys and values of packed texts."""
        bias = torch.cat((self.zero_k_bias, self.v_bias))
        kv_T2ND = linear(text_TE, self.mat_kv.weight, bias, self.mat_kv.tile_rows).view(
            text_TE.shape[0], 2, self.heads, -1
        )
        parts = [part.permute(1, 2, 0, 3).contiguous() for part in kv_T2ND.split(lengths)]
        return TextMemory(lengths=lengths, k_RNTD=tuple(p[0] for p in parts), v_RNTD=tuple(p[1] for p in parts))

    def forward(self, x_nC: Float[Tensor, "n C"], rows: Rows, memory: TextMemory) -> Float[Tensor, "n C"]:
        """Attends from packed tokens to the texts of their rows."""
        q_nND = self.mat_q(x_nC).view(x_nC.shape[0], self.heads, -1)
        return self.proj(memory.attend(q_nND, rows, self.scale).flatten(1))

    def pool(self, text_TE: Float[Tensor, "t E"], lengths: tuple[int, ...]) -> Float[Tensor, "R C"]:
        """One vector per text: attention of the learned queries."""
        memory = self.memory(text_TE, lengths)
        query_RND = self.mat_q.expand(len(lengths), -1, -1).to(text_TE.dtype)
        return self.proj(memory.attend(query_RND, Rows((1,) * len(lengths)), self.scale).flatten(1))


class InfinityBlock(nn.Module):
    """Self-attention and feed-forward with gate, scale and shift; plain cross-attention between them."""

    num_sublayers = 3

    def __init__(self, config: InfinityConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        self.sa = SelfAttention(config.width, config.heads)
        self.ca = CrossAttention(config.width, config.heads, config.width)
        self.ca_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.ffn = FeedForward(config.width, config.hidden)

    def init_own_weights(self) -> None:
        """Draws what the block adds to the shared modulation."""
        self.ada_gss.normal_(std=self.ada_gss.shape[-1] ** -0.5)

    def change(self, sublayer: int, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Change:
        """What self-attention (0), cross-attention (1) or the feed-forward net (2) adds."""
        prepared = own(context.prepared)
        rows, dtype = context.rows, self.ffn.fc1.weight.dtype
        if sublayer == 1:
            weight_1C, bias_1C = self.ca_norm.weight.float()[None], self.ca_norm.bias.float()[None]
            x_nC = norm_modulate(x_nC, weight_1C, bias_1C, Rows((rows.total,)), dtype)
            return Change(value_nC=self.ca(x_nC, rows, prepared.memory[self.index]))
        places = ((0, 2, 4), (1, 3, 5))[sublayer // 2]
        gate_RC, factor_RC, shift_RC = (prepared.modulation_PR6C[self.index, :, i] for i in places)
        x_nC = norm_modulate(x_nC, factor_RC, shift_RC, rows, dtype)
        return Change(value_nC=self.sa(x_nC, context) if sublayer == 0 else self.ffn(x_nC), gate_RC=gate_RC)


class TextPool(nn.Module):
    """Wrapper that gives the pooling attention its published name."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ca = CrossAttention(config.width, config.pool_heads, config.text_width, is_pool=True)


class HeadNorm(nn.Module):
    """Wrapper that gives the head's modulation its published name."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(config.width, 2 * config.width))


class RootMeanSquareNorm(nn.Module):
    """Holds the weight of the text norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class BlockChunk(nn.Module):
    """A group of blocks, as the published checkpoints name them."""

    def __init__(self, blocks: Sequence[InfinityBlock]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class Infinity(nn.Module):
    """All weights of a transformer and the few steps around its blocks."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cfg_uncond = nn.Parameter(torch.zeros(config.text_tokens, config.text_width))
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.text_norm = RootMeanSquareNorm(config.text_width)
        self.text_proj_for_sos = TextPool(config)
        self.text_proj_for_ca = nn.Sequential(
            Linear(config.text_width, width), nn.GELU(approximate="tanh"), Linear(width, width)
        )
        self.lvl_embed = Embedding(NUM_LEVELS, width)
        self.word_embed = Linear(config.bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        blocks = [InfinityBlock(config, i) for i in range(config.depth)]
        size = config.depth // config.chunks
        self.block_chunks = nn.ModuleList(BlockChunk(blocks[i : i + size]) for i in range(0, config.depth, size))
        self.head_nm = HeadNorm(config)
        self.head = Linear(width, 2 * config.bits)
        self.shape = ModelShape(
            num_blocks=config.depth,
            width=width,
            ff_width=config.hidden,
            num_heads=config.heads,
            head_width=width // config.heads,
            head_outputs=2 * config.bits,
            input_channels=config.bits,
            has_cross_attention=True,
            row_flops=2 * 9 * width**2,
            text_token_flops=2 * width * (3 * config.text_width + 2 + width + 2 * config.depth * width),
        )

    def init_own_weights(self) -> None:
        """Draws the text of the unconditional branch and the start position."""
        self.cfg_uncond.normal_(std=self.config.text_width**-0.5)
        self.pos_start.normal_(std=(3 * self.config.width) ** -0.5)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the linear layers of the blocks."""
        return running_dtype(self.block(0).ffn.fc1.weight)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pos_start.device

    def block(self, index: int) -> InfinityBlock:
        """The block of this index, counted over all chunks."""
        size = self.config.depth // self.config.chunks
        block: InfinityBlock = self.block_chunks[index // size].module[index % size]  # type: ignore[assignment,index]
        return block

    def narrowed(self, index: int, dtype: torch.dtype) -> InfinityBlock:
        """A copy of a block in another dtype."""
        return narrowed(self.block(index), dtype)

    def unconditional(self, num_tokens: int) -> Float[Tensor, "T E"]:
        """The learned features that stand for no prompt; they depend on how long the prompt is.

        Raises:
            FoveateError: The model holds fewer rows than the prompt has tokens.
        """
        if num_tokens > self.cfg_uncond.shape[0]:
            raise FoveateError(f"prompt has {num_tokens} tokens, the model takes {self.cfg_uncond.shape[0]}")
        return self.cfg_uncond[:num_tokens]

    def prepare(self, conditions: Sequence[Condition], is_guided: bool = False) -> InfinityPrepared:
        """Computes start, modulation and text memory.

        Args:
            conditions: Text features of each image, at real length; with guidance optionally followed by as many
                negative ones.
            is_guided: Adds an unconditional row per image where no negative features were given; rows are all
                conditional ones first, then all unconditional ones.
        """
        dtype = self.compute_dtype
        texts = [_features(condition) for condition in conditions]
        if is_guided:
            texts += [self.unconditional(text.shape[0]) for text in texts]
        lengths = tuple(text.shape[0] for text in texts)
        text_TE = rms_norm(torch.cat([text.float() for text in texts]), self.text_norm.weight).to(dtype)
        pooled_RC = self.text_proj_for_sos.ca.pool(text_TE, lengths).float()
        active_RC = F.silu(pooled_RC)
        shared_R6C = linear32(self.shared_ada_lin, "1", active_RC).view(len(texts), 6, -1)
        head_R2C = linear32(self.head_nm.ada_lin, "1", active_RC).view(len(texts), 2, -1)
        text_TC = self.text_proj_for_ca(text_TE)
        blocks = [self.block(i) for i in range(self.config.depth)]
        return InfinityPrepared(
            start_RC=pooled_RC + self.pos_start[0].float() + self.lvl_embed.weight[0].float(),
            modulation_PR6C=with_factors(torch.stack([shared_R6C + b.ada_gss[0].float() for b in blocks]), 2, 4),
            head_R2C=with_factors(head_R2C, 0, 1),
            memory=tuple(block.ca.memory(text_TC, lengths) for block in blocks),
        )

    def start(self, prepared: Prepared) -> Float[Tensor, "R C"]:
        """Hidden state of the first token of every row."""
        return own(prepared).start_RC

    def embed(self, input_BZhw: Float[Tensor, "B Z h w"], scale: int) -> Float[Tensor, "B l C"]:
        """Embeds the resized latent and adds the level of the scale; float32."""
        tokens_BlZ = input_BZhw.flatten(2).transpose(1, 2).to(self.word_embed.weight.dtype)
        return self.word_embed(tokens_BlZ).float() + self.lvl_embed.weight[scale].float()

    def positions(self, schedule: ScaleSchedule, scale: int) -> Float[Tensor, "l D"]:
        """Cosines and sines of the rotary angles of a scale's tokens; float32."""
        if not self.config.restarts_positions:
            return self._grid_positions(schedule, scale)
        sequence_LD = torch.cat([self._grid_positions(schedule, s) for s in range(scale + 1)])
        return sequence_LD[: schedule.scales[scale].num_tokens]

    def _grid_positions(self, schedule: ScaleSchedule, scale: int) -> Float[Tensor, "l D"]:
        """The angles of a scale's own grid.

        Grid positions are scaled to the finest grid of the aspect ratio and rounded half to even in float32, as the
        published models were trained.
        """
        grid, finest = schedule.grids[scale], schedule.finest
        num_angles = self.config.width // self.config.heads // 4
        frequency = 1.0 / (10000.0 ** (torch.arange(0, 2 * num_angles, 2, device="cpu").float() / (2 * num_angles)))
        row = (torch.arange(grid[0], device="cpu").float() * (finest[0] / grid[0])).round()
        column = (torch.arange(grid[1], device="cpu").float() * (finest[1] / grid[1])).round()
        rows_hw = torch.outer(row, frequency)[:, None].expand(-1, grid[1], -1)
        columns_hw = torch.outer(column, frequency)[None].expand(grid[0], -1, -1)
        angles = torch.cat((rows_hw, columns_hw), dim=-1).flatten(0, 1)
        return to_device(torch.cat((angles.cos(), angles.sin()), dim=-1), self.pos_start.device)

    def prefix(self, prepared: Prepared) -> None:
        """Nothing stands in front of the first scale."""

    def head_input(self, x_nC: Float[Tensor, "n C"], rows: Rows, prepared: Prepared) -> Float[Tensor, "n C"]:
        """Normed and modulated hidden states, float32."""
        factor_RC, shift_RC = own(prepared).head_R2C[: len(rows.counts)].unbind(1)
        return norm_modulate(x_nC, factor_RC, shift_RC, rows, torch.float32)

    def head_logits(self, h_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n V"]:
        """Float32 logits, two per bit."""
        return linear32(self, "head", h_nC)


def _features(condition: Condition) -> Float[Tensor, "T E"]:
    """Narrows a condition to token features."""
    if not isinstance(condition, Tensor):
        raise TypeError(f"Infinity reads token features (T, E), got {type(condition).__name__}")
    return condition
