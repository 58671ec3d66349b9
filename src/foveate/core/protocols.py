"""Interfaces: what the engine needs of a transformer and a tokenizer, and what it passes to a block.

The engine packs the tokens of all rows into one list (`core.rows`), so a block sees `x_nC` and never a batch. A block
is a short list of sublayers; sublayer j returns its *change*, which the engine adds. The only thing a block needs
beside its own weights comes in a `BlockContext`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.conditions import Condition
from foveate.core.cost import ModelShape
from foveate.core.rows import Rows
from foveate.core.schedule import Grid, ScaleSchedule


@runtime_checkable
class KVSlot(Protocol):
    """One block's place in the cache of earlier scales."""

    def attend(
        self,
        q_nND: Float[Tensor, "n N D"],
        k_nND: Float[Tensor, "n N D"],
        v_nND: Float[Tensor, "n N D"],
        scale: float,
        first_copies: Sequence[int] = (),
    ) -> Float[Tensor, "n N D"]:
        """Adds keys and values of these tokens and attends to all that each row holds.

        The first key of a row stands for `first_copies` equal ones, a number per row; without numbers for itself.
        """
        ...


@runtime_checkable
class Prepared(Protocol):
    """What a model computed once from the conditions of a request: one entry per row, owned by the request."""

    def keep(self, rows: Sequence[int]) -> "Prepared":
        """The same for some of the rows, in the given order; the others can be freed."""
        ...

    def join(self, others: Sequence["Prepared"]) -> "Prepared":
        """These rows and those of other requests behind them, so that one matmul serves all."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockContext:
    """What a block sees beside its tokens.

    `rotation_nD` holds what `NextScaleModel.positions` returned, one entry per packed token.
    """

    rows: Rows
    prepared: Prepared
    rotation_nD: Float[Tensor, "n D"]
    slot: KVSlot


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What one sublayer adds to the hidden states: the value times the gate of each token's row.

    The value has the dtype that the sublayer computed in, the gate is float32; no gate means 1.
    """

    value_nC: Float[Tensor, "n C"]
    gate_RC: Float[Tensor, "R C"] | None = None


@runtime_checkable
class Block(Protocol):
    """One transformer block."""

    num_sublayers: int

    def change(self, sublayer: int, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Change:
        """What one sublayer adds to the hidden states; `x_nC` is left as it was."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixTokens:
    """Tokens in front of the first scale's own, row after row, such as a text that self-attention reads.

    They run all blocks at scale 0 and stay in the cache; they reach no head.
    """

    x_nC: Float[Tensor, "n C"]
    rotation_nD: Float[Tensor, "n D"]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RefineInput:
    """What a family's `refine` reads of one image: the tokens that ran, before the head, and what they sampled.

    `weight` is that of guidance; `index_k` are the tokens' places in the grid, None for all in order. `uncond_index_u`
    are the places among these tokens of those that the unconditional branch ran, None where it is all of them. Where
    codes are mixed, `symbols_kd` are the ones drawn before. Noise is keyed by `seed`, or comes from the `generator` of
    the published order of draws.
    """

    scale: int
    grid: Grid
    seed: int | None
    cond_kC: Float[Tensor, "k C"]
    uncond_uC: Float[Tensor, "u C"] | None
    symbols_kd: Tensor
    index_k: Int[Tensor, " k"] | None
    weight: float
    uncond_index_u: Int[Tensor, " u"] | None = None
    generator: torch.Generator | None = None


@runtime_checkable
class Refiner(Protocol):
    """A step of a family between sampling and commit of the last scale, added to the latents of tokens that ran.

    It reads each token of a branch once, for `ModelShape.refined_token_flops`.
    """

    def refine(self, image: RefineInput) -> Float[Tensor, "k Z"]:
        """Latents to add, one row per token; each token by itself."""
        ...


@runtime_checkable
class NextScaleModel(Protocol):
    """A transformer of a family, without a loop."""

    shape: ModelShape

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the linear layers of the blocks, and of keys and values."""
        ...

    def block(self, index: int) -> Block:
        """The block of this index."""
        ...

    def narrowed(self, index: int, dtype: torch.dtype) -> Block:
        """A copy of a block whose linear layers compute in another dtype; its hidden states stay float32."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def prepare(self, conditions: Sequence[Condition], is_guided: bool) -> Prepared:
        """Computes everything that depends on the conditions alone.

        Args:
            conditions: One per image, optionally followed by a negative one per image.
            is_guided: Whether unconditional rows of the model's own shall follow the conditional ones.
        """
        ...

    def start(self, prepared: Prepared) -> Float[Tensor, "R C"]:
        """Hidden states of the one token of scale 0, one per row."""
        ...

    def embed(self, input_BZhw: Float[Tensor, "B Z h w"], scale: int) -> Float[Tensor, "B l C"]:
        """Hidden states that enter the blocks at a scale > 0, all tokens, the same for both branches."""
        ...

    def positions(self, schedule: ScaleSchedule, scale: int) -> Float[Tensor, "l D"]:
        """Position of each token of a scale, in the form that the blocks understand."""
        ...

    def prefix(self, prepared: Prepared) -> PrefixTokens | None:
        """Tokens in front of the first scale's own; None where a family has none."""
        ...

    def head_input(self, x_nC: Float[Tensor, "n C"], rows: Rows, prepared: Prepared) -> Float[Tensor, "n C"]:
        """What the linear layer of the head reads, float32; `rows` are the first rows prepared, some without tokens."""
        ...

    def head_logits(self, h_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n V"]:
        """Float32 logits: one linear layer with a bias."""
        ...


@runtime_checkable
class ScaleTokenizer(Protocol):
    """Codes and pixels of a family. A token holds `d` symbols of `V` values each: d bits, or one id."""

    latent_channels: int

    def symbols(self, logits_nV: Float[Tensor, "n v"]) -> Float[Tensor, "n d V"]:
        """Splits the head's outputs into one distribution per symbol."""
        ...

    def next_input(self, f_hat_BZHW: Float[Tensor, "B Z H W"], grid: Grid) -> Float[Tensor, "B z h w"]:
        """What the transformer reads before a scale of this token grid."""
        ...

    def residual(
        self, symbols_Bld: Int[Tensor, "B l d"] | Float[Tensor, "B l v"], grid: Grid
    ) -> Float[Tensor, "B Z y x"]:
        """Looks codes up, on the latent grid behind the token grid.

        Floats are soft symbols: shares of bit 1, or weights of all codes.
        """
        ...

    def add(
        self, f_hat_BZHW: Float[Tensor, "B Z H W"], residual_BZyx: Float[Tensor, "B Z y x"], scale: int, num_scales: int
    ) -> Float[Tensor, "B Z H W"]:
        """The latent with the residual of a scale added; a new tensor."""
        ...

    def decode(self, f_hat_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Pixels in [-1, 1], float32; each image by itself."""
        ...
