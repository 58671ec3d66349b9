"""What the transformers of all families share: prepared conditions, and the few steps around the blocks.

What the conditions alone decide (the modulation of every block and of the head, keys and values of the text) is
computed once per request, not once per scale.
Axes: n packed tokens, R rows, P blocks, C width, Z latent channels, V outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.cost import ModelShape
from foveate.core.protocols import BlockContext, Change, Prepared
from foveate.core.rows import Rows
from foveate.core.transfer import numbers
from foveate.kernels.linear import Linear
from foveate.models.attention import TextMemory
from foveate.models.layers import HeadNorm, linear32, narrowed, running_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedConditions:
    """What the conditions alone decide, per row: start, modulation of every block and of the head, text of every block.

    Modulation is gates, factors (1 + scale) and shifts, two of each, as published; the head has a factor and a shift.
    Where nothing attends to a text there is no memory.
    """

    start_RC: Float[Tensor, "R C"]
    modulation_PR6C: Float[Tensor, "P R 6 C"]
    head_R2C: Float[Tensor, "R 2 C"]
    memory: tuple[TextMemory, ...] = ()

    @classmethod
    def of(
        cls,
        start_RC: Float[Tensor, "R C"],
        modulation: Sequence[Float[Tensor, "R 6 C"]],
        head_R2C: Float[Tensor, "R 2 C"],
        memory: Sequence[TextMemory] = (),
    ) -> "PreparedConditions":
        """Turns the scales of every block, and those of the head in place, into factors."""
        modulation_PR6C = torch.stack(tuple(modulation))
        modulation_PR6C[:, :, 2:4] += 1
        head_R2C[:, :1] += 1
        return cls(start_RC=start_RC, modulation_PR6C=modulation_PR6C, head_R2C=head_R2C, memory=tuple(memory))

    def keep(self, rows: Sequence[int]) -> "PreparedConditions":
        """The same for some rows, in the given order."""
        index = numbers(rows, self.start_RC.device)
        return PreparedConditions(
            start_RC=self.start_RC[index],
            modulation_PR6C=self.modulation_PR6C[:, index],
            head_R2C=self.head_R2C[index],
            memory=tuple(memory.keep(rows) for memory in self.memory),
        )

    def join(self, others: Sequence[Prepared]) -> "PreparedConditions":
        """These rows and those of other requests behind them."""
        parts = [self, *(own(other) for other in others)]
        return PreparedConditions(
            start_RC=torch.cat([part.start_RC for part in parts]),
            modulation_PR6C=torch.cat([part.modulation_PR6C for part in parts], dim=1),
            head_R2C=torch.cat([part.head_R2C for part in parts]),
            memory=tuple(first.join([part.memory[i] for part in parts[1:]]) for i, first in enumerate(self.memory)),
        )

    def of_block(
        self, block: int, part: int
    ) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"], Float[Tensor, "R C"]]:
        """Gate, factor and shift of a block's self-attention (0) or feed-forward net (1)."""
        gate_RC, factor_RC, shift_RC = self.modulation_PR6C[block].unbind(1)[part::2]
        return gate_RC, factor_RC, shift_RC


def own(prepared: Prepared) -> PreparedConditions:
    """Narrows what the engine hands back, which knows no model by name.

    Raises:
        TypeError: It does not come from this model.
    """
    if not isinstance(prepared, PreparedConditions):
        raise TypeError(f"a block needs what its model's prepare returned, got {type(prepared).__name__}")
    return prepared


class TransformerBlock(nn.Module, ABC):
    """One block of a family."""

    num_sublayers: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights of its linear layers."""
        return self.linear_weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype that they compute in."""
        return running_dtype(self.linear_weight)

    @property
    @abstractmethod
    def linear_weight(self) -> Tensor:
        """The weight of one of its linear layers, which all have one dtype."""

    @abstractmethod
    def change(self, sublayer: int, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Change:
        """What one sublayer adds to the hidden states."""


class Transformer(nn.Module, ABC):
    """The steps around the blocks; a family adds its blocks, conditions and positions."""

    shape: ModelShape
    word_embed: Linear
    head_nm: HeadNorm
    head: Linear

    @abstractmethod
    def block(self, index: int) -> TransformerBlock:
        """The block of this index."""

    @abstractmethod
    def level(self, scale: int) -> Float[Tensor, "*l C"]:
        """What is added to the tokens of a scale, to all of them or to each; float32."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the linear layers of the blocks."""
        return self.block(0).compute_dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def narrowed(self, index: int, dtype: torch.dtype) -> TransformerBlock:
        """A copy of a block in another dtype."""
        return narrowed(self.block(index), dtype)

    def start(self, prepared: Prepared) -> Float[Tensor, "R C"]:
        """Hidden state of the first token of every row."""
        return own(prepared).start_RC

    def embed(self, input_BZhw: Float[Tensor, "B Z h w"], scale: int) -> Float[Tensor, "B l C"]:
        """Embeds the resized latent and adds what belongs to the scale; float32."""
        tokens_BlZ = input_BZhw.flatten(2).transpose(1, 2).to(self.word_embed.weight.dtype)
        return self.word_embed(tokens_BlZ).float() + self.level(scale)

    def prefix(self, prepared: Prepared) -> None:
        """Nothing stands in front of the first scale."""

    def head_input(self, x_nC: Float[Tensor, "n C"], rows: Rows, prepared: Prepared) -> Float[Tensor, "n C"]:
        """Normed and modulated hidden states, float32."""
        return self.head_nm(x_nC, own(prepared).head_R2C, rows)

    def head_logits(self, h_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n V"]:
        """Float32 logits: two per bit, or one per code."""
        return linear32(self, "head", h_nC)
