"""The HART transformer: a text in front of the first scale, one id a token, no modulation, and a head for residuals.

Parameter names are those of the published checkpoints. One block is two sublayers, self-attention and a gated
feed-forward net, behind one norm. The text runs the blocks once and stays in the cache; its last token stands for the
1x1 scale. Tokens that are equal at one position (all of the unconditional text) are given once and counted in the
attention (`PlacedText`). What the text alone decides is computed once per request.
Axes: n packed tokens, R rows, k tokens of a row, C width, E text width, N heads, D head width, h half of it, Z latent
channels, T text tokens.
Source: HART (arXiv 2410.10812) and its published checkpoint. Theirs computes in float16, the residual stream too; here
that, the positions and the modulation of the head are float32 whatever the dtype of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.conditions import Condition, PlacedText
from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.protocols import BlockContext, Change, PrefixTokens, Prepared
from foveate.core.rows import Rows
from foveate.core.schedule import ScaleSchedule
from foveate.core.transfer import numbers, to_device
from foveate.kernels.linear import Linear, linear
from foveate.models.layers import GatedFeedForward, HeadNorm, axial_frequencies, linear32, rms_norm
from foveate.models.residual_diffusion import ResidualDiffusion, StepEmbedding
from foveate.models.transformer import Transformer, TransformerBlock

SOFTMAX_FACTOR = 0.25
"""Scores are multiplied by this over the root of the head width, as published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HARTConfig:
    """Shape of a transformer; `diff_width` and `diff_depth` are those of the residual's head.

    `text_tokens` are those of every prompt, padding included.
    """

    depth: int
    width: int
    heads: int
    codebook_size: int = 4096
    latent_channels: int = 32
    text_width: int = 1536
    text_tokens: int = 300
    ff_width: int | None = None
    diff_width: int = 1024
    diff_depth: int = 6

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be built."""
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise FoveateError(f"width / heads must be a multiple of 4, got {self.width} / {self.heads}")

    @property
    def hidden(self) -> int:
        """Width of the feed-forward net: 8/3 of the width, rounded up to a multiple of 256 as published."""
        return self.ff_width or (8 * self.width // 3 + 255) // 256 * 256


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedText:
    """What the texts alone decide, per row: the last token, those in front of it, the head's modulation, positions.

    `turn_R2D` are cosines and sines of the position of the last text token, at the frequencies of text and of images;
    `places` are the positions of the tokens in front, counted from it. `copies` is what the first token counts as.
    """

    start_RC: Float[Tensor, "R C"]
    head_R2C: Float[Tensor, "R 2 C"]
    turn_R2D: Float[Tensor, "R 2 D"]
    ahead: tuple[Float[Tensor, "_t C"], ...]
    places: tuple[tuple[int, ...], ...]
    copies: tuple[int, ...]

    def keep(self, rows: Sequence[int]) -> "PreparedText":
        """The same for some rows, in the given order."""
        index = numbers(rows, self.start_RC.device)
        return PreparedText(
            start_RC=self.start_RC[index],
            head_R2C=self.head_R2C[index],
            turn_R2D=self.turn_R2D[index],
            ahead=tuple(self.ahead[row] for row in rows),
            places=tuple(self.places[row] for row in rows),
            copies=tuple(self.copies[row] for row in rows),
        )

    def join(self, others: Sequence[Prepared]) -> "PreparedText":
        """These rows and those of other requests behind them."""
        parts = [self, *(_own(other) for other in others)]
        return PreparedText(
            start_RC=torch.cat([part.start_RC for part in parts]),
            head_R2C=torch.cat([part.head_R2C for part in parts]),
            turn_R2D=torch.cat([part.turn_R2D for part in parts]),
            ahead=tuple(row for part in parts for row in part.ahead),
            places=tuple(row for part in parts for row in part.places),
            copies=tuple(row for part in parts for row in part.copies),
        )


class HARTAttention(nn.Module):
    """Self-attention without normalised queries and keys; keys have no bias."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, SOFTMAX_FACTOR * (width // heads) ** -0.5
        self.qkv_proj = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width), persistent=False)
        self.proj = Linear(width, width)

    def forward(self, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Float[Tensor, "n C"]:
        """Runs the sublayer on packed tokens."""
        prepared = _own(context.prepared)
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv_nC = linear(x_nC, self.qkv_proj.weight, bias, self.qkv_proj.tile_rows, self.qkv_proj.whole_rows)
        q_nND, k_nND, v_nND = qkv_nC.unflatten(-1, (3, self.heads, -1)).unbind(1)
        angles_n4h = placed(context.rotation_nD, prepared.turn_R2D, context.rows)
        q_nND, k_nND = (turned(part_nND.float(), angles_n4h).to(v_nND.dtype) for part_nND in (q_nND, k_nND))
        return self.proj(context.slot.attend(q_nND, k_nND, v_nND, self.scale, prepared.copies).flatten(1))


class HARTBlock(TransformerBlock):
    """Self-attention and a gated feed-forward net, both behind the same norm, which is learned in spite of its name."""

    num_sublayers = 2

    def __init__(self, config: HARTConfig) -> None:
        super().__init__()
        self.ln_wo_grad = nn.RMSNorm(config.width)
        self.attn = HARTAttention(config.width, config.heads)
        self.ffn = GatedFeedForward(config.width, config.hidden)

    @property
    def linear_weight(self) -> Tensor:
        """That of the feed-forward net's first layer."""
        return self.ffn.up_proj.weight

    def change(self, sublayer: int, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Change:
        """What self-attention (0) or the feed-forward net (1) adds."""
        x_nC = rms_norm(x_nC, self.ln_wo_grad.weight).to(self.dtype)
        return Change(value_nC=self.ffn(x_nC) if sublayer else self.attn(x_nC, context))


class HART(Transformer):
    """All weights of a transformer and of the residual's head, and the few steps around the blocks."""

    def __init__(self, config: HARTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.context_norm = nn.RMSNorm(config.text_width)
        self.context_embed = Linear(config.text_width, width)
        self.word_embed = Linear(config.latent_channels, width)
        self.lvl_embed = StepEmbedding(width)
        self.blocks = nn.ModuleList(HARTBlock(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(width, is_root=True)
        self.head = Linear(width, config.codebook_size)
        self.decoder_norm = nn.RMSNorm(width)
        self.diffloss = ResidualDiffusion(config.latent_channels, width, config.diff_width, config.diff_depth)
        self.shape = ModelShape(
            num_blocks=config.depth,
            width=width,
            ff_width=config.hidden,
            num_heads=config.heads,
            head_width=width // config.heads,
            head_outputs=config.codebook_size,
            input_channels=config.latent_channels,
            ff_matrices=3,
            row_flops=2 * 2 * width**2,
            text_token_flops=2 * config.text_width * width,
            has_text_prefix=True,
            padded_tokens=(config.text_tokens, min(config.text_tokens, 2)),
            refined_token_flops=2 * config.latent_channels * width
            + ResidualDiffusion.token_flops(config.latent_channels, width, config.diff_width, config.diff_depth),
        )

    def block(self, index: int) -> HARTBlock:
        """The block of this index."""
        block: HARTBlock = self.blocks[index]  # type: ignore[assignment]
        return block

    def prepare(self, conditions: Sequence[Condition], is_guided: bool = False) -> PreparedText:
        """Embeds the texts and computes the modulation of the head.

        Args:
            conditions: The text of each image, `PlacedText`; with guidance followed by as many negative ones
                (`PlacedText.nothing` is that of no prompt).
            is_guided: Must be False: what stands for no prompt is a condition.

        Raises:
            TypeError: A condition is no `PlacedText`, or unconditional rows are asked for.
        """
        if is_guided:
            raise TypeError("HART has no unconditional rows of its own: give negatives, such as PlacedText.nothing")
        texts = [_placed_text(condition) for condition in conditions]
        normed_TE = rms_norm(torch.cat([text.tokens_TE for text in texts]), self.context_norm.weight)
        embedded_TC = linear32(self, "context_embed", normed_TE)
        rows = embedded_TC.split([len(text.tokens_TE) for text in texts])
        head_R2C = self.head_nm.ada_lin(torch.stack([row_TC.amax(0) for row_TC in rows]))
        head_R2C[:, :1] += 1
        level_C = self.level(0)
        return PreparedText(
            start_RC=torch.stack([row_TC[-1] for row_TC in rows]) + level_C,
            head_R2C=head_R2C,
            turn_R2D=torch.stack([self._turn(text.positions[-1]) for text in texts]),
            ahead=tuple(row_TC[:-1] + level_C for row_TC in rows),
            places=tuple(tuple(place - text.positions[-1] for place in text.positions[:-1]) for text in texts),
            copies=tuple(text.first_copies for text in texts),
        )

    def _turn(self, position: int) -> Float[Tensor, "2 D"]:
        """Cosines and sines of one position, at the frequencies of text and of images; float32."""
        angles_2h = position * torch.stack((self._text_frequencies(), axial_frequencies(self._head_width).repeat(2)))
        return to_device(torch.cat((angles_2h.cos(), angles_2h.sin()), dim=-1), self.device)

    @property
    def _head_width(self) -> int:
        return self.config.width // self.config.heads

    def _text_frequencies(self) -> Float[Tensor, " h"]:
        exponents = torch.arange(0, self._head_width, 2, device="cpu").float() / self._head_width
        return 1.0 / 10000.0**exponents

    def start(self, prepared: Prepared) -> Float[Tensor, "R C"]:
        """Hidden state of the last text token of every row."""
        return _own(prepared).start_RC

    def prefix(self, prepared: Prepared) -> PrefixTokens | None:  # type: ignore[override]
        """All text tokens but the last, row after row."""
        own = _own(prepared)
        counts = tuple(len(row) for row in own.places)
        if not sum(counts):
            return None
        places = torch.tensor([place for row in own.places for place in row], dtype=torch.float32, device="cpu")
        return PrefixTokens(x_nC=torch.cat(own.ahead), rotation_nD=self._text_rotation(places), counts=counts)

    def level(self, scale: int) -> Float[Tensor, " C"]:
        """Embedding of the scale; float32."""
        return self.lvl_embed(scale)

    def positions(self, schedule: ScaleSchedule, scale: int) -> Float[Tensor, "l D"]:
        """Cosines and sines of a scale's tokens, as `placed` reads them, for a text that ends at position 0.

        Every grid is spread over the last one's rows and columns.
        """
        if scale == 0:
            return self._text_rotation(torch.zeros(1, dtype=torch.float32, device="cpu"))
        sides, spans = schedule.grids[scale], schedule.grids[-1]
        rows, columns = (
            torch.arange(side, dtype=torch.float32, device="cpu") / side * span
            for side, span in zip(sides, spans, strict=True)
        )
        frequencies = axial_frequencies(self._head_width).repeat(2)
        row_hF, column_wF = torch.outer(rows, frequencies), torch.outer(columns, frequencies)
        angles = (row_hF.repeat_interleave(sides[1], 0), column_wF.repeat(sides[0], 1))
        return self._rotation(*angles, is_text=False)

    def _text_rotation(self, places_T: Float[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """The same of text tokens, whose two halves turn alike."""
        angles_Th = torch.outer(places_T, self._text_frequencies())
        return self._rotation(angles_Th, angles_Th, is_text=True)

    def _rotation(self, first_nh: Tensor, second_nh: Tensor, *, is_text: bool) -> Float[Tensor, "n D"]:
        kind_n1 = torch.full((len(first_nh), 1), float(is_text), device="cpu")
        parts = (first_nh.cos(), first_nh.sin(), second_nh.cos(), second_nh.sin(), kind_n1)
        return to_device(torch.cat(parts, dim=-1), self.device)

    def head_input(self, x_nC: Float[Tensor, "n C"], rows: Rows, prepared: Prepared) -> Float[Tensor, "n C"]:
        """Normed and modulated hidden states, float32."""
        return self.head_nm(x_nC, _own(prepared).head_R2C, rows)

    def residual_condition(
        self, hidden_kC: Float[Tensor, "k C"], codes_kZ: Float[Tensor, "k Z"]
    ) -> Float[Tensor, "k C"]:
        """What the residual's head reads of a branch: hidden states and embedded codes, normed; float32."""
        return rms_norm(hidden_kC + linear32(self, "word_embed", codes_kZ), self.decoder_norm.weight)


def placed(
    rotation_nD: Float[Tensor, "n _r"], turn_R2D: Float[Tensor, "R 2 _d"], rows: Rows
) -> Float[Tensor, "n 4 _h"]:
    """Cosines and sines of row and column of packed tokens, moved by where the text of their row ends.

    Sums and differences of products alone: unlike cosines they have the same bits wherever a token stands.

    Args:
        rotation_nD: As `HART.positions` returns it: four parts, and 1 for text or 0 for images behind them.
        turn_R2D: As `PreparedText` holds it.
        rows: Which tokens belong to which row.
    """
    by_n4h, is_text_n1 = rotation_nD[:, :-1].unflatten(-1, (4, -1)), rotation_nD[:, -1:] > 0
    text_RD, image_RD = turn_R2D.unbind(1)
    cos_nh, sin_nh = torch.where(is_text_n1, rows.spread(text_RD), rows.spread(image_RD)).chunk(2, dim=-1)
    moved = []
    for cos_part_nh, sin_part_nh in (by_n4h[:, :2].unbind(1), by_n4h[:, 2:].unbind(1)):
        moved += [cos_part_nh * cos_nh - sin_part_nh * sin_nh, sin_part_nh * cos_nh + cos_part_nh * sin_nh]
    return torch.stack(moved, dim=1)


def turned(x_nND: Float[Tensor, "n N D"], angles_n4h: Float[Tensor, "n 4 _h"]) -> Float[Tensor, "n N D"]:
    """Puts positions into queries or keys, as published: the first half by rows, the second by columns.

    Not a rotation for images: it does not keep lengths, and scores depend on more than differences of positions.
    """
    cos_row, sin_row, cos_column, sin_column = angles_n4h.unsqueeze(2).unbind(1)
    first, second = x_nND.chunk(2, dim=-1)
    return torch.cat((first * cos_row - second * sin_row, second * cos_column + first * sin_column), dim=-1)


def _own(prepared: Prepared) -> PreparedText:
    """Narrows what the engine hands back, which knows no model by name."""
    if not isinstance(prepared, PreparedText):
        raise TypeError(f"a block needs what its model's prepare returned, got {type(prepared).__name__}")
    return prepared


def _placed_text(condition: Condition) -> PlacedText:
    """Narrows a condition."""
    if not isinstance(condition, PlacedText):
        raise TypeError(f"HART reads PlacedText (token features with positions), got {type(condition).__name__}")
    return condition
