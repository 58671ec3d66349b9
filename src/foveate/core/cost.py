"""What a plan costs: tokens, FLOPs and bytes of the cache, from counts alone.

FLOPs are 2 x multiply-accumulates of linear layers, of Q K^T and P V over the keys really visible, of the head, and of
the text path as often as we compute it; useful rows only; no norms, softmax, interpolation; encoder and decoder apart.
Axes: P blocks; a row is one image in one branch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Row = tuple[int, bool]
"""Image index, and whether it is the conditional branch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a transformer that its cost depends on.

    `ff_matrices` is 2 for a plain feed-forward net and 3 for a gated one. `row_flops` and `text_token_flops` are spent
    once per request, by every row and by every text token of a row: pooling, modulation, text keys and values of all
    blocks. Where a model is not `is_cached` the tokens of a scale see only each other.
    """

    num_blocks: int
    width: int
    ff_width: int
    num_heads: int
    head_width: int
    head_outputs: int
    input_channels: int
    has_cross_attention: bool = False
    ff_matrices: int = 2
    row_flops: int = 0
    text_token_flops: int = 0
    is_cached: bool = True

    def token_flops(self) -> int:
        """FLOPs of the linear layers of one block for one token."""
        attention = 4 * self.width**2
        cross = 2 * self.width**2 if self.has_cross_attention else 0
        return 2 * (attention + cross + self.ff_matrices * self.width * self.ff_width)

    def attention_flops(self, queries: int, keys: int) -> int:
        """FLOPs of Q K^T and P V of one block and row."""
        return 2 * 2 * queries * keys * self.num_heads * self.head_width

    def request_flops(self, text_tokens: int) -> int:
        """FLOPs of one row that are spent once per request."""
        return self.row_flops + text_tokens * self.text_token_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class RowWork:
    """What one row ran at one scale: tokens per block, and tokens that reached the head."""

    block_tokens: tuple[int, ...]
    head_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleWork:
    """What all rows ran at one scale; `grid_tokens` is 0 where the scale did not run."""

    scale: int
    grid_tokens: int
    rows: Mapping[Row, RowWork]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Totals of a request. `tokens` counts tokens that reached the head in the conditional branch."""

    flops: int
    tokens: int
    kv_bytes: int


def request_cost(
    work: Sequence[ScaleWork], shape: ModelShape, text_tokens: Mapping[Row, int], bytes_per_element: int = 4
) -> Cost:
    """Adds up what a request ran.

    Args:
        work: The scales in order.
        shape: The model.
        text_tokens: Text length of every row that exists at the start.
        bytes_per_element: Of the cache.

    Returns:
        FLOPs, tokens, and the bytes of keys and values held at the end of the last stored scale if no row were
        released (the last scale that runs is never stored, and none where the model is not cached).
    """
    flops = sum(shape.request_flops(tokens) for tokens in text_tokens.values())
    cached: dict[tuple[Row, int], int] = {}
    ran = [w for w in work if w.grid_tokens]
    for w in ran:
        images = {image for image, _ in w.rows}
        flops += 2 * len(images) * w.grid_tokens * shape.input_channels * shape.width * (w.scale > 0)
        for row, row_work in w.rows.items():
            flops += 2 * row_work.head_tokens * shape.width * shape.head_outputs
            for block, tokens in enumerate(row_work.block_tokens):
                keys = cached.get((row, block), 0) + tokens
                flops += tokens * shape.token_flops() + shape.attention_flops(tokens, keys)
                if shape.has_cross_attention:
                    flops += shape.attention_flops(tokens, text_tokens[row])
                if w is not ran[-1] and shape.is_cached:
                    cached[(row, block)] = keys
    per_token = 2 * shape.num_heads * shape.head_width * bytes_per_element
    tokens_kept = sum(r.head_tokens for w in ran for (_, is_cond), r in w.rows.items() if is_cond)
    return Cost(flops=flops, tokens=tokens_kept, kv_bytes=per_token * sum(cached.values()))
