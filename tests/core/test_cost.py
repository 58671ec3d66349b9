"""Costs against counts written out block by block, and guidance schedules."""

import random

import pytest

from foveate.core.cost import ModelShape, RowWork, ScaleWork, request_cost
from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from tests.randomness import seed_of

SHAPE = ModelShape(
    num_blocks=2,
    width=8,
    ff_width=20,
    num_heads=2,
    head_width=4,
    head_outputs=6,
    input_channels=3,
    has_cross_attention=True,
    row_flops=2 * 9 * 8**2,
    text_token_flops=2 * 8 * (3 * 5 + 2 + 8 + 2 * 2 * 8),
)
BARE = ModelShape(num_blocks=1, width=8, ff_width=20, num_heads=2, head_width=4, head_outputs=6, input_channels=3)


def multiply_accumulates(work, text_tokens) -> int:
    """The contract, one matrix after the other: (rows, inner, columns) of each."""
    products = []
    for tokens in text_tokens.values():
        products += [(tokens, 5, 2 * 8), (1, 8, tokens), (1, tokens, 8), (1, 8, 8)]
        products += [(1, 8, 6 * 8), (1, 8, 2 * 8), (tokens, 5, 8), (tokens, 8, 8)]
        products += [(tokens, 8, 2 * 8)] * 2
    held = {}
    ran = [w for w in work if w.grid_tokens]
    for w in ran:
        if w.scale:
            products += [(w.grid_tokens, 3, 8)] * len({image for image, _ in w.rows})
        for row, part in w.rows.items():
            products.append((part.head_tokens, 8, 6))
            for block, n in enumerate(part.block_tokens):
                keys = held.get((row, block), 0) + n
                products += [(n, 8, 3 * 8), (n, 8, 8), (n, 8, keys), (n, keys, 8)]
                products += [(n, 8, 8), (n, 8, 8), (n, 8, text_tokens[row]), (n, text_tokens[row], 8)]
                products += [(n, 8, 20), (n, 20, 8)]
                held[(row, block)] = keys
    return sum(a * b * c for a, b, c in products)


def random_work(seed: int) -> list[ScaleWork]:
    """Scales that grow, skip, and lose unconditional rows."""
    draw = random.Random(seed_of(seed))
    rows = draw.choice([[(0, True)], [(0, True), (0, False)], [(0, True), (1, True), (1, False)]])
    work, grid = [], 1
    for scale in range(draw.randint(1, 4)):
        grid += draw.randint(0, 5)
        if scale and draw.random() < 0.3:
            work.append(ScaleWork(scale=scale, grid_tokens=0, rows={}))
            continue
        counts = {r: [draw.randint(0, grid) for _ in range(3)] for r in rows}
        parts = {r: RowWork(block_tokens=(a, b), head_tokens=c) for r, (a, b, c) in counts.items()}
        work.append(ScaleWork(scale=scale, grid_tokens=grid, rows=parts))
        rows = rows if draw.random() < 0.7 else [r for r in rows if r[1]]
    return work


@pytest.mark.parametrize("seed", range(40))
def test_flops_are_twice_the_multiply_accumulates(seed: int):
    work, text = random_work(seed), 1 + seed % 7
    text_tokens = {row: text + i for i, row in enumerate(work[0].rows)}
    cost = request_cost(work, SHAPE, text_tokens)
    assert cost.flops == 2 * multiply_accumulates(work, text_tokens)
    assert cost.tokens == sum(r.head_tokens for w in work for (_, is_cond), r in w.rows.items() if is_cond)
    ran = [w for w in work if w.grid_tokens]
    stored = sum(sum(r.block_tokens) for w in ran[:-1] for r in w.rows.values())
    assert cost.kv_bytes == stored * 2 * 8 * 4


def test_cost_without_text():
    work = [ScaleWork(scale=0, grid_tokens=1, rows={(0, True): RowWork(block_tokens=(1,), head_tokens=1)})]
    linear = 4 * 64 + 2 * 8 * 20
    assert request_cost(work, BARE, {(0, True): 1}).flops == 2 * (linear + 2 * 8 + 8 * 6)


def test_bytes_follow_the_element_size():
    row = {(0, True): RowWork(block_tokens=(3, 2), head_tokens=3)}
    work = [ScaleWork(scale=s, grid_tokens=3, rows=row) for s in range(2)]
    cost = [request_cost(work, SHAPE, {(0, True): 4}, size) for size in (4, 2)]
    assert cost[0].kv_bytes == 2 * cost[1].kv_bytes == 5 * 2 * 8 * 4
    assert cost[0].flops == cost[1].flops


# Guidance


def test_guidance_is_needed_until_its_last_weight_that_is_not_one():
    guidance = GuidanceSchedule(weights=(1.0, 3.0, 1.0, 1.0))
    assert [guidance.is_needed(s) for s in range(4)] == [True, True, False, False]


def test_guidance_of_both_families():
    assert GuidanceSchedule.from_infinity(3.0, 4).weights == (3.0,) * 4
    assert GuidanceSchedule.from_infinity([1.0, 2.0, 3.0], 2).weights == (1.0, 2.0)
    assert GuidanceSchedule.from_infinity(3.0, 4, insertions=(-2,), num_blocks=8).hidden_blocks == (6,)
    assert GuidanceSchedule.from_infinity(3.0, 4).hidden_blocks == ()
    assert GuidanceSchedule.from_var(1.5, 4).weights == (1.0, 1.5, 2.0, 2.5)
    assert GuidanceSchedule.from_var(1.5, 1).weights == (1.0,)


@pytest.mark.parametrize("insertion", [1, -8, -9])
def test_guidance_inside_must_name_a_block(insertion: int):
    with pytest.raises(FoveateError, match="insertion_layer must be 0 or -1 ... -7"):
        GuidanceSchedule.from_infinity(3.0, 4, insertions=(insertion,), num_blocks=8)


def test_guidance_list_must_reach_the_last_scale():
    with pytest.raises(FoveateError, match="needs 4 values, one per scale, got 3"):
        GuidanceSchedule.from_infinity([1.0, 2.0, 3.0], 4)
