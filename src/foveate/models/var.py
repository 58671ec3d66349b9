"""The VAR transformer: class-conditional, one id per token, learned positions, adaptive norm per block or shared.

Parameter names are those of the published checkpoints. One block is two sublayers: self-attention and feed-forward.
What the class alone decides (the modulation of every block and of the head) is computed once, not once per scale.
Axes: n packed tokens, R rows, P blocks, C width, N heads, D head width, Z latent channels, L tokens of all scales.
Source: VAR (arXiv 2404.02905) and its published checkpoints; residual stream, modulation and head are float32, keys
are kept in the compute dtype (the published demo keeps them in float32).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.conditions import ClassLabel, Condition
from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.layers import Embedding
from foveate.core.protocols import BlockContext, Change
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.core.transfer import numbers
from foveate.kernels.linear import Linear
from foveate.kernels.norm import norm_modulate
from foveate.models.attention import SelfAttention
from foveate.models.layers import FeedForward, HeadNorm, Modulation
from foveate.models.transformer import PreparedConditions, Transformer, TransformerBlock, own

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


class VARBlock(TransformerBlock):
    """Self-attention and feed-forward, both with gate, scale and shift."""

    num_sublayers = 2

    def __init__(self, config: VARConfig, index: int) -> None:
        super().__init__()
        self.index = index
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        else:
            self.ada_lin = Modulation(config.width, 6)
        self.attn = SelfAttention(config.width, config.heads)
        self.has_shared_aln = config.shared_aln
        self.ffn = FeedForward(config.width, config.hidden)

    def init_own_weights(self) -> None:
        """Initialises what the block adds to the shared modulation, where there is one."""
        if self.has_shared_aln:
            self.ada_gss.normal_(std=self.ada_gss.shape[-1] ** -0.5)

    @property
    def linear_weight(self) -> Tensor:
        """That of the feed-forward net's first layer."""
        return self.ffn.fc1.weight

    def change(self, sublayer: int, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Change:
        """What self-attention (0) or the feed-forward net (1) adds."""
        gate_RC, factor_RC, shift_RC = own(context.prepared).of_block(self.index, sublayer)
        x_nC = norm_modulate(x_nC, factor_RC, shift_RC, context.rows, self.dtype)
        return Change(value_nC=self.attn(x_nC, context) if sublayer == 0 else self.ffn(x_nC), gate_RC=gate_RC)


class VAR(Transformer):
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
            self.shared_ada_lin = Modulation(width, 6)
        self.blocks = nn.ModuleList(VARBlock(config, i) for i in range(config.depth))
        self.head_nm = HeadNorm(width)
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
        """Initialises the start position and those of all tokens."""
        for positions in (self.pos_start, self.pos_1LC):
            positions.normal_(std=(3 * self.config.width) ** -0.5)

    def block(self, index: int) -> VARBlock:
        """The block of this index."""
        block: VARBlock = self.blocks[index]  # type: ignore[assignment]
        return block

    def prepare(self, conditions: Sequence[Condition], is_guided: bool = False) -> PreparedConditions:
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
        return PreparedConditions.of(
            start_RC=class_RC + self.pos_start[0].float() + self.level(0),
            modulation=self._modulation(class_RC),
            head_R2C=self.head_nm.ada_lin(class_RC),
        )

    def _index(self, condition: Condition) -> int:
        """Row of a class in the embedding; the one behind the last class stands for none."""
        if not isinstance(condition, ClassLabel):
            raise TypeError(f"VAR generates classes and needs a ClassLabel, got {type(condition).__name__}")
        if not 0 <= condition.index <= self.config.num_classes:
            last = self.config.num_classes - 1
            raise FoveateError(f"class must be 0 to {last}, or {last + 1} for none, got {condition.index}")
        return condition.index

    def _modulation(self, class_RC: Float[Tensor, "R C"]) -> list[Float[Tensor, "R 6 C"]]:
        """Gates, scales and shifts of every block; float32."""
        blocks = [self.block(i) for i in range(self.config.depth)]
        if not self.config.shared_aln:
            return [block.ada_lin(class_RC) for block in blocks]
        shared_R6C = self.shared_ada_lin(class_RC)
        return [shared_R6C + block.ada_gss[0].float() for block in blocks]

    def level(self, scale: int) -> Float[Tensor, "l C"]:
        """Level and absolute positions of a scale's tokens; float32."""
        begin, end = self.config.starts[scale : scale + 2]
        return self.lvl_embed.weight[scale].float() + self.pos_1LC[0, begin:end].float()

    def positions(self, schedule: ScaleSchedule, scale: int) -> Float[Tensor, "l 0"]:
        """Nothing per token: positions are learned and `start` and `embed` add them.

        Raises:
            FoveateError: The schedule is not the one that the positions were learned for.
        """
        if schedule.grids != self.config.grids:
            known, got = (" ".join(f"{h}x{w}" for h, w in grids) for grids in (self.config.grids, schedule.grids))
            raise FoveateError(f"the model has positions for the grids {known} only, got {got}; use its own schedule")
        return torch.empty(schedule.scales[scale].num_tokens, 0, dtype=torch.float32, device=self.device)
