"""The Switti transformer: text-conditioned, one id a token, norms before and after every sublayer, rotary positions.

Parameter names are those of the published checkpoints. One block is three sublayers: self-attention, cross-attention to
the text and a gated feed-forward net; what the text alone decides (modulation, text keys and values) is computed once.
Only the autoregressive variant remembers earlier scales; in the other one a scale sees itself alone.
Axes: n packed tokens, R rows, C width, E text width, F width of the pooled text, N heads, D head width, P blocks.
Source: Switti (arXiv 2412.01819) and its published checkpoints. Theirs run wholly in bfloat16; here the residual
stream, modulation, crop condition and head are float32 whatever the dtype of the weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.conditions import Condition, PooledText
from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.layers import Embedding
from foveate.core.protocols import BlockContext, Change
from foveate.core.schedule import ScaleSchedule
from foveate.kernels.linear import Linear
from foveate.models.attention import CrossAttention, SelfAttention, TextMemory
from foveate.models.layers import (
    GatedFeedForward,
    HeadNorm,
    Modulation,
    axial_frequencies,
    linear32,
    rms_norm,
    rotation_of,
)
from foveate.models.transformer import PreparedConditions, Transformer, TransformerBlock, own

CROP = (512.0, 512.0, 0.0, 0.0)
"""Height, width, top and left that the published pipeline states for every image, also for those of 1024 pixels."""

POSITION_SPAN = 128.0
"""The last row and column of every grid stand here; the one token of scale 0 stands at 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SwittiConfig:
    """Shape of a transformer. `use_ar` is the published name of the variant that remembers earlier scales.

    `num_levels` is the number of scales that have an embedding; the published models have heads 64 wide.
    """

    depth: int
    width: int
    heads: int
    codebook_size: int
    latent_channels: int
    num_levels: int
    use_ar: bool = False
    text_width: int = 2048
    pooled_width: int = 1280
    ff_width: int | None = None

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be built."""
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise FoveateError(f"width / heads must be a multiple of 4, got {self.width} / {self.heads}")
        if self.width % 8:
            raise FoveateError(f"width must be a multiple of 8, for the crop embedding, got {self.width}")

    @property
    def hidden(self) -> int:
        """Width of the feed-forward net: 8/3 of the width, rounded down as published."""
        return self.ff_width or self.width * 8 // 3


class SwittiBlock(TransformerBlock):
    """Self-attention and feed-forward with gate, scale and shift; plain cross-attention between them.

    The norm modules hold the weights under their published names; the norms run in float32.
    """

    num_sublayers = 3

    def __init__(self, config: SwittiConfig, index: int) -> None:
        super().__init__()
        self.index = index
        width = config.width
        self.attn = SelfAttention(width, config.heads, norms_width=True)
        self.cross_attn = CrossAttention(width, config.heads, config.text_width, norms_width=True)
        self.ffn = GatedFeedForward(width, config.hidden)
        self.self_attention_norm1, self.self_attention_norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.cross_attention_norm1, self.cross_attention_norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention_y_norm = nn.RMSNorm(config.text_width)
        self.ada_lin = Modulation(width, 6)
        self.crop_cond_scales = nn.Parameter(torch.zeros(1, width))

    def modulation(self, pooled_RC: Float[Tensor, "R C"], crop_RC: Float[Tensor, "R C"]) -> Float[Tensor, "R 6 C"]:
        """Two gates, two scales and two shifts of every row; float32."""
        return self.ada_lin(pooled_RC + self.crop_cond_scales.float() * crop_RC)

    def memory(self, text_TE: Float[Tensor, "t E"], lengths: tuple[int, ...]) -> TextMemory:
        """Keys and values of packed texts."""
        normed_TE = rms_norm(text_TE, self.attention_y_norm.weight)
        return self.cross_attn.memory(normed_TE.to(self.dtype), lengths)

    @property
    def linear_weight(self) -> Tensor:
        """That of the feed-forward net's first layer."""
        return self.ffn.up_proj.weight

    def change(self, sublayer: int, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Change:
        """What self-attention (0), cross-attention (1) or the feed-forward net (2) adds."""
        prepared, rows, dtype = own(context.prepared), context.rows, self.dtype
        if sublayer == 1:
            x_nC = rms_norm(x_nC, self.cross_attention_norm1.weight).to(dtype)
            change_nC = self.cross_attn(x_nC, rows, prepared.memory[self.index])
            return Change(value_nC=rms_norm(change_nC, self.cross_attention_norm2.weight))
        gate_RC, factor_RC, shift_RC = prepared.of_block(self.index, sublayer // 2)
        norm1, norm2 = (
            (self.ffn_norm1, self.ffn_norm2) if sublayer else (self.self_attention_norm1, self.self_attention_norm2)
        )
        normed_nC = rms_norm(x_nC, norm1.weight)
        x_nC = torch.addcmul(rows.spread(shift_RC), normed_nC, rows.spread(factor_RC)).to(dtype)
        change_nC = self.ffn(x_nC) if sublayer else self.attn(x_nC, context)
        return Change(value_nC=rms_norm(change_nC, norm2.weight), gate_RC=gate_RC)


class CropEmbedding(nn.Module):
    """Sines and cosines of four numbers at learned frequencies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width // 8))

    def init_own_weights(self) -> None:
        """Initialises the frequencies."""
        self.weight.normal_()

    def forward(self, numbers: Sequence[float]) -> Float[Tensor, " C"]:
        """Embeds four numbers; float32, in the published order of products: angles reach thousands."""
        numbers_41 = torch.tensor(numbers, dtype=torch.float32, device=self.weight.device)[:, None]
        angles = numbers_41 * self.weight.float() * 2 * math.pi
        return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten()


class Switti(Transformer):
    """All weights of a transformer and the few steps around its blocks."""

    def __init__(self, config: SwittiConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.text_pooler = Linear(config.pooled_width, width)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.lvl_embed = Embedding(config.num_levels, width)
        self.word_embed = Linear(config.latent_channels, width)
        self.crop_embed = CropEmbedding(width)
        self.crop_proj = Linear(width, width)
        self.blocks = nn.ModuleList(SwittiBlock(config, i) for i in range(config.depth))
        self.head_nm = HeadNorm(width)
        self.head = Linear(width, config.codebook_size)
        self.shape = ModelShape(
            num_blocks=config.depth,
            width=width,
            ff_width=config.hidden,
            num_heads=config.heads,
            head_width=width // config.heads,
            head_outputs=config.codebook_size,
            input_channels=config.latent_channels,
            has_cross_attention=True,
            ff_matrices=3,
            row_flops=2 * width * (config.pooled_width + width * (1 + 6 * config.depth + 2)),
            text_token_flops=2 * config.depth * config.text_width * 2 * width,
            is_cached=config.use_ar,
        )

    def init_own_weights(self) -> None:
        """Initialises the start position."""
        self.pos_start.normal_(std=(3 * self.config.width) ** -0.5)

    def block(self, index: int) -> SwittiBlock:
        """The block of this index."""
        block: SwittiBlock = self.blocks[index]  # type: ignore[assignment]
        return block

    def prepare(self, conditions: Sequence[Condition], is_guided: bool = False) -> PreparedConditions:
        """Computes start, modulation and text memory.

        Args:
            conditions: The text of each image, `PooledText`; with guidance followed by as many negative ones.
            is_guided: Must be False: nothing learned stands for no prompt.

        Raises:
            TypeError: A condition is no `PooledText`, or unconditional rows are asked for.
        """
        if is_guided:
            raise TypeError("Switti has no unconditional features of its own: give negative conditions, such as of ''")
        texts = [_pooled_text(condition) for condition in conditions]
        lengths = tuple(text.tokens_TE.shape[0] for text in texts)
        text_TE = torch.cat([text.tokens_TE for text in texts])
        pooled_RC = linear32(self, "text_pooler", torch.stack([text.pooled_F for text in texts]))
        crop_RC = linear32(self, "crop_proj", self.crop_embed(CROP).expand(len(texts), -1))
        blocks = [self.block(i) for i in range(self.config.depth)]
        return PreparedConditions.of(
            start_RC=pooled_RC + self.pos_start[0].float() + self.level(0),
            modulation=[block.modulation(pooled_RC, crop_RC) for block in blocks],
            head_R2C=self.head_nm.ada_lin(pooled_RC),
            memory=[block.memory(text_TE, lengths) for block in blocks],
        )

    def level(self, scale: int) -> Float[Tensor, " C"]:
        """Embedding of the scale; float32."""
        return self.lvl_embed.weight[scale].float()

    def positions(self, schedule: ScaleSchedule, scale: int) -> Float[Tensor, "l D"]:
        """Cosines and sines of the rotary angles of a scale's tokens, columns before rows; float32."""
        height, width = schedule.grids[scale]
        frequency = axial_frequencies(self.config.width // self.config.heads)
        # The span multiplies the frequencies and not the indices, as published: float32 rounds the two differently.
        row_hf = torch.outer(
            torch.arange(height, device="cpu").float(), frequency * (POSITION_SPAN / max(height - 1, 1))
        )
        column_wf = torch.outer(
            torch.arange(width, device="cpu").float(), frequency * (POSITION_SPAN / max(width - 1, 1))
        )
        angles = torch.cat((column_wf.repeat(height, 1), row_hf.repeat_interleave(width, 0)), dim=-1)
        return rotation_of(angles, self.device)


def _pooled_text(condition: Condition) -> PooledText:
    """Narrows a condition."""
    if not isinstance(condition, PooledText):
        raise TypeError(f"Switti reads PooledText (token features and a pooled vector), got {type(condition).__name__}")
    return condition
