"""The Infinity transformer: text-conditioned, bit labels, shared adaptive norm, 2-D rotary positions.

Parameter names are those of the published checkpoints. One block is three sublayers: self-attention, cross-attention to
the text and feed-forward; what the text alone decides (modulation, text keys and values) is computed once.
Axes: n packed tokens, R rows, C width, E text width, T text tokens, N heads, D head width, Z bits of a token.
Source: Infinity (arXiv 2412.04431) and its published checkpoints; the residual stream and the head are float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.conditions import Condition
from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.layers import Embedding
from foveate.core.protocols import BlockContext, Change
from foveate.core.rows import Rows
from foveate.core.schedule import ScaleSchedule
from foveate.kernels.linear import Linear
from foveate.kernels.norm import norm_modulate
from foveate.models.attention import CrossAttention, SelfAttention
from foveate.models.layers import FeedForward, HeadNorm, Modulation, axial_frequencies, rms_norm, rotation_of
from foveate.models.transformer import PreparedConditions, Transformer, TransformerBlock, own

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


class InfinityBlock(TransformerBlock):
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
        """Initialises what the block adds to the shared modulation."""
        self.ada_gss.normal_(std=self.ada_gss.shape[-1] ** -0.5)

    @property
    def linear_weight(self) -> Tensor:
        """That of the feed-forward net's first layer."""
        return self.ffn.fc1.weight

    def change(self, sublayer: int, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Change:
        """What self-attention (0), cross-attention (1) or the feed-forward net (2) adds."""
        prepared = own(context.prepared)
        rows, dtype = context.rows, self.dtype
        if sublayer == 1:
            weight_1C, bias_1C = self.ca_norm.weight.float()[None], self.ca_norm.bias.float()[None]
            x_nC = norm_modulate(x_nC, weight_1C, bias_1C, Rows((rows.total,)), dtype)
            return Change(value_nC=self.ca(x_nC, rows, prepared.memory[self.index]))
        gate_RC, factor_RC, shift_RC = prepared.of_block(self.index, sublayer // 2)
        x_nC = norm_modulate(x_nC, factor_RC, shift_RC, rows, dtype)
        return Change(value_nC=self.sa(x_nC, context) if sublayer == 0 else self.ffn(x_nC), gate_RC=gate_RC)


class TextPool(nn.Module):
    """Wrapper that gives the pooling attention its published name."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ca = CrossAttention(config.width, config.pool_heads, config.text_width, is_pool=True)


class BlockChunk(nn.Module):
    """A group of blocks, as the published checkpoints name them."""

    def __init__(self, blocks: Sequence[InfinityBlock]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class Infinity(Transformer):
    """All weights of a transformer and the few steps around its blocks."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cfg_uncond = nn.Parameter(torch.zeros(config.text_tokens, config.text_width))
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.text_norm = nn.RMSNorm(config.text_width)
        self.text_proj_for_sos = TextPool(config)
        self.text_proj_for_ca = nn.Sequential(
            Linear(config.text_width, width), nn.GELU(approximate="tanh"), Linear(width, width)
        )
        self.lvl_embed = Embedding(NUM_LEVELS, width)
        self.word_embed = Linear(config.bits, width)
        self.shared_ada_lin = Modulation(width, 6)
        blocks = [InfinityBlock(config, i) for i in range(config.depth)]
        size = config.depth // config.chunks
        self.block_chunks = nn.ModuleList(BlockChunk(blocks[i : i + size]) for i in range(0, config.depth, size))
        self.head_nm = HeadNorm(width)
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
            draws_bits=True,
            row_flops=2 * 9 * width**2,
            text_token_flops=2 * width * (3 * config.text_width + 2 + width + 2 * config.depth * width),
        )

    def init_own_weights(self) -> None:
        """Initialises the text of the unconditional branch and the start position."""
        self.cfg_uncond.normal_(std=self.config.text_width**-0.5)
        self.pos_start.normal_(std=(3 * self.config.width) ** -0.5)

    def block(self, index: int) -> InfinityBlock:
        """The block of this index, counted over all chunks."""
        size = self.config.depth // self.config.chunks
        block: InfinityBlock = self.block_chunks[index // size].module[index % size]  # type: ignore[assignment,index]
        return block

    def unconditional(self, num_tokens: int) -> Float[Tensor, "T E"]:
        """The learned features that stand for no prompt; they depend on how long the prompt is.

        Raises:
            FoveateError: The model holds fewer rows than the prompt has tokens.
        """
        if num_tokens > self.cfg_uncond.shape[0]:
            raise FoveateError(f"prompt has {num_tokens} tokens, the model takes {self.cfg_uncond.shape[0]}")
        return self.cfg_uncond[:num_tokens]

    def prepare(self, conditions: Sequence[Condition], is_guided: bool = False) -> PreparedConditions:
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
        shared_R6C = self.shared_ada_lin(pooled_RC)
        text_TC = self.text_proj_for_ca(text_TE)
        blocks = [self.block(i) for i in range(self.config.depth)]
        return PreparedConditions.of(
            start_RC=pooled_RC + self.pos_start[0].float() + self.level(0),
            modulation=[shared_R6C + block.ada_gss[0].float() for block in blocks],
            head_R2C=self.head_nm.ada_lin(pooled_RC),
            memory=[block.ca.memory(text_TC, lengths) for block in blocks],
        )

    def level(self, scale: int) -> Float[Tensor, " C"]:
        """Embedding of the scale; float32."""
        return self.lvl_embed.weight[scale].float()

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
        frequency = axial_frequencies(self.config.width // self.config.heads)
        row = (torch.arange(grid[0], device="cpu").float() * (finest[0] / grid[0])).round()
        column = (torch.arange(grid[1], device="cpu").float() * (finest[1] / grid[1])).round()
        rows_hw = torch.outer(row, frequency)[:, None].expand(-1, grid[1], -1)
        columns_hw = torch.outer(column, frequency)[None].expand(grid[0], -1, -1)
        angles = torch.cat((rows_hw, columns_hw), dim=-1).flatten(0, 1)
        return rotation_of(angles, self.device)


def _features(condition: Condition) -> Float[Tensor, "T E"]:
    """Narrows a condition to token features."""
    if not isinstance(condition, Tensor):
        raise TypeError(f"Infinity reads token features (T, E), got {type(condition).__name__}")
    return condition
