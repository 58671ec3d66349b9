"""What a plan costs: tokens, FLOPs and bytes of the cache, from counts alone.

FLOPs are 2 x multiply-accumulates of linear layers, of Q K^T and P V over the keys really visible, of the head, of a
refiner, and of the text path as often as we compute it; useful rows only; no norms, softmax, interpolation; encoder and
decoder apart.
Axes: P blocks; a row is one image in one branch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

PREFIX_SCALE = -1
"""The scale under which a family's prefix is counted: it is never evicted."""

Row = tuple[int, bool]
"""Image index, and whether it is the conditional branch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a transformer that its cost depends on.

    `ff_matrices` is 2 for a plain feed-forward net and 3 for a gated one. `row_flops` and `text_token_flops` are spent
    once per request, by every row and by every text token of a row: pooling, modulation, text keys and values of all
    blocks. Where a model is not `is_cached` the tokens of a scale see only each other. With `has_text_prefix` a row's
    text runs all blocks in front of the first scale, and its last token stands for that scale. `draws_bits` says that a
    token holds bits and not an id of a codebook. `refined_token_flops` are those of a family's refiner, for one token
    of the last scale in one branch. `padded_tokens` are the text tokens of every prompt and of none, where all prompts
    have as many.
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
    has_text_prefix: bool = False
    draws_bits: bool = False
    refined_token_flops: int = 0
    padded_tokens: tuple[int, int] | None = None

    @property
    def sublayer_flops(self) -> tuple[int, ...]:
        """FLOPs of the linear layers of each sublayer of a block for one token: attention, cross-attention, FFN."""
        cross = (2 * 2 * self.width**2,) if self.has_cross_attention else ()
        return (2 * 4 * self.width**2, *cross, 2 * self.ff_matrices * self.width * self.ff_width)

    def attention_flops(self, queries: int, keys: int) -> int:
        """FLOPs of Q K^T and P V of one block and row."""
        return 2 * 2 * queries * keys * self.num_heads * self.head_width

    def prefix_tokens(self, text_tokens: int) -> int:
        """Tokens of a row in front of its first scale."""
        return text_tokens - 1 if self.has_text_prefix else 0

    def request_flops(self, text_tokens: int) -> int:
        """FLOPs of one row that are spent once per request."""
        return self.row_flops + text_tokens * self.text_token_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class RowWork:
    """What one row ran at one scale: tokens per block, and tokens that reached the head.

    `attended_twice` are the blocks whose self-attention ran once more, for its entropy. `sublayer_tokens` has an entry
    for each block whose sublayers ran fewer tokens than it: one count per sublayer. `refined_tokens` are those that a
    family's refiner read.
    """

    block_tokens: tuple[int, ...]
    head_tokens: int
    sublayer_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    attended_twice: tuple[int, ...] = ()
    refined_tokens: int = 0

    def tokens_of(self, block: int, num_sublayers: int) -> tuple[int, ...]:
        """Tokens that ran each sublayer of a block."""
        return self.sublayer_tokens.get(block, (self.block_tokens[block],) * num_sublayers)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleWork:
    """What all rows ran at one scale; `grid_tokens` is 0 where the scale did not run.

    `evicted` are the scales whose keys and values went after this one.
    """

    scale: int
    grid_tokens: int
    rows: Mapping[Row, RowWork]
    evicted: tuple[int, ...] = ()

    @property
    def token_blocks(self) -> int:
        """Blocks that all tokens ran, in all rows."""
        return sum(sum(row.block_tokens) for row in self.rows.values())

    @property
    def blocks_run(self) -> int:
        """Blocks that any token ran."""
        return sum(map(any, zip(*(row.block_tokens for row in self.rows.values()), strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Totals of a request.

    `tokens` counts tokens that reached the head in the conditional branch; `token_blocks` how many blocks all tokens of
    both branches ran, which shows a saving by depth or by branch, too. `refiner_flops` are a part of `flops`.
    """

    flops: int
    tokens: int
    token_blocks: int
    kv_bytes: int
    refiner_flops: int = 0


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
        FLOPs, tokens, token-blocks, and the most bytes of keys and values held at the end of a scale if no row were
        released: the last scale that runs is never stored, and none where the model is not cached.
    """
    refiner_flops = shape.refined_token_flops * sum(row.refined_tokens for w in work for row in w.rows.values())
    flops = refiner_flops + sum(shape.request_flops(tokens) for tokens in text_tokens.values())
    store = _Store(shape.num_blocks)
    ran = [w for w in work if w.grid_tokens]
    for w in work:
        images = {image for image, _ in w.rows}
        flops += 2 * len(images) * w.grid_tokens * shape.input_channels * shape.width * (w.scale > 0)
        for row, row_work in w.rows.items():
            flops += 2 * row_work.head_tokens * shape.width * shape.head_outputs
            flops += sum(_block_flops(shape, row_work, b, store.keys(row, b), text_tokens[row])
                         for b in range(len(row_work.block_tokens)))  # fmt: skip
            if ran and w is not ran[-1] and shape.is_cached:
                ahead = shape.prefix_tokens(text_tokens[row]) if w.scale == 0 else 0
                own = [row_work.tokens_of(b, 1)[0] - ahead for b in range(len(row_work.block_tokens))]
                store.add(w.scale, row, own)
                store.add(PREFIX_SCALE, row, [ahead] * len(own) if ahead else [])
        store.end_scale(w.evicted)
    per_token = 2 * shape.num_heads * shape.head_width * bytes_per_element
    tokens_kept = sum(r.head_tokens for w in ran for (_, is_cond), r in w.rows.items() if is_cond)
    token_blocks = sum(w.token_blocks for w in ran)
    return Cost(
        flops=flops,
        tokens=tokens_kept,
        token_blocks=token_blocks,
        kv_bytes=per_token * store.most,
        refiner_flops=refiner_flops,
    )


def flops_by_image(work: Sequence[ScaleWork], shape: ModelShape, text_tokens: Mapping[Row, int]) -> tuple[int, ...]:
    """FLOPs of every image of a request, in order; they add up to those of the request."""
    found = []
    for image in sorted({image for image, _ in text_tokens}):
        own = [replace(w, rows={row: ran for row, ran in w.rows.items() if row[0] == image}) for w in work]
        texts = {row: tokens for row, tokens in text_tokens.items() if row[0] == image}
        found.append(request_cost(own, shape, texts).flops)
    return tuple(found)


def scale_flops(work: Sequence[ScaleWork], shape: ModelShape, text_tokens: Mapping[Row, int]) -> list[int]:
    """FLOPs of every scale; they add up to those of the request, as the first one holds what is spent once."""
    until = [request_cost(work[:count], shape, text_tokens).flops for count in range(1, len(work) + 1)]
    return [after - before for before, after in zip([0, *until], until, strict=False)]


def _block_flops(shape: ModelShape, work: RowWork, block: int, past: int, text_tokens: int) -> int:
    """FLOPs of one block for one row; `past` are the keys of earlier scales."""
    parts = shape.sublayer_flops
    tokens = work.tokens_of(block, len(parts))
    flops = sum(n * per_token for n, per_token in zip(tokens, parts, strict=True))
    flops += (1 + (block in work.attended_twice)) * shape.attention_flops(tokens[0], past + tokens[0])
    return flops + (shape.attention_flops(tokens[1], text_tokens) if shape.has_cross_attention else 0)


class _Store:
    """How many keys each row and block holds, scale by scale."""

    def __init__(self, num_blocks: int) -> None:
        self.scales: dict[int, dict[Row, Sequence[int]]] = {}
        self.held: dict[Row, list[int]] = {}
        self.num_blocks, self.most = num_blocks, 0

    def keys(self, row: Row, block: int) -> int:
        """Keys of earlier scales."""
        return self.held[row][block] if row in self.held else 0

    def add(self, scale: int, row: Row, counts: Sequence[int]) -> None:
        """Stores a row's keys of a scale."""
        self.scales.setdefault(scale, {})[row] = counts
        held = self.held.setdefault(row, [0] * self.num_blocks)
        for block, count in enumerate(counts):
            held[block] += count

    def end_scale(self, evicted: Sequence[int]) -> None:
        """Notes the most that was held, then lets scales go."""
        self.most = max(self.most, sum(sum(held) for held in self.held.values()))
        for scale in evicted:
            for row, counts in self.scales.pop(scale, {}).items():
                for block, count in enumerate(counts):
                    self.held[row][block] -= count
