"""LateBfloat16 against the plain loop with blocks of a bfloat16 copy of the model, bit for bit, on bits and on ids."""

import copy

import pytest
import torch
import torch.nn.functional as F

from foveate.core.conditions import ClassLabel
from foveate.core.errors import FoveateError
from foveate.core.protocols import BlockContext
from foveate.core.rows import Rows
from foveate.engine.executor import Engine
from foveate.engine.forecast import forecast, full_cost
from foveate.engine.state import Request
from foveate.kernels.attention import attend_group
from foveate.policies.late_bfloat16 import LateBfloat16
from foveate.policies.registry import load_policy
from tests.engine.naive import added, codes_of, sample_bits
from tests.policies.twins import sample_ids
from tests.toys import (
    SEEDS,
    SpyBound,
    Toy,
    cached_run,
    checked,
    label_request,
    make_request,
    run,
    same_bits,
    toy,
    toy_var,
)


class RoundingSlot:
    """Keys and values of one block in the cache's dtype, grown by concatenation, read in that of the queries."""

    def __init__(self, num_rows: int, dtype: torch.dtype) -> None:
        self.num_rows, self.dtype = num_rows, dtype
        self.past: tuple[torch.Tensor, ...] = ()

    def attend(self, q_nND, k_nND, v_nND, scale):
        own = [x.unflatten(0, (self.num_rows, -1)).transpose(1, 2) for x in (k_nND, v_nND)]
        past = self.past or [part[:, :, :0] for part in own]
        k, v = (torch.cat((old.to(new.dtype), new), dim=2) for old, new in zip(past, own, strict=True))
        self.past = tuple(
            torch.cat((old.to(self.dtype), new.to(self.dtype)), dim=2) for old, new in zip(past, own, strict=True)
        )
        return attend_group(q_nND, k, v, scale)


@torch.inference_mode()
def generate(subject: Toy, request: Request, first_narrow: int, first_block: int):
    """Latents and symbols of every scale, all images in one dense batch; every scale after the first is guided."""
    model, num_scales = subject.model, len(subject.schedule)
    half = copy.deepcopy(model).to(torch.bfloat16)
    prepared = model.prepare(request.conditions, True)
    num_rows, is_bits = 2 * request.num_images, not isinstance(request.conditions[0], ClassLabel)
    slots = [RoundingSlot(num_rows, model.compute_dtype) for _ in range(subject.num_blocks)]
    f_hat = torch.zeros(request.num_images, 8, *subject.schedule.latent_grid(num_scales - 1))
    f_hats, chosen = [], []
    for scale, grid in enumerate(subject.schedule.grids):
        num_tokens, patch = grid[0] * grid[1], subject.schedule.patch
        if scale:
            x = model.embed(subject.tokenizer.next_input(f_hat, grid), scale).repeat(2, 1, 1).flatten(0, 1)
        else:
            x = model.start(prepared).clone()
        rows, rotation = Rows((num_tokens,) * num_rows), model.positions(subject.schedule, scale).repeat(num_rows, 1)
        for index in range(subject.num_blocks):
            block = (half if scale >= first_narrow and index >= first_block else model).block(index)
            context = BlockContext(rows=rows, prepared=prepared, rotation_nD=rotation, slot=slots[index])
            for sublayer in range(block.num_sublayers):
                x = x + added(block.change(sublayer, x, context), rows)
        cond, uncond = model.head_logits(model.head_input(x, rows, prepared)).chunk(2)
        guide, inverse = request.guidance.weights[scale], 1 / request.temperatures[scale]
        logits = guide * (cond * inverse) + (1 - guide) * (uncond * inverse)
        parts = zip(SEEDS, logits.unflatten(0, (request.num_images, -1)), strict=True)
        sample = sample_bits if is_bits else sample_ids
        symbols = [
            sample(part, range(num_tokens), num_tokens, seed, scale, request.filters[scale]) for seed, part in parts
        ]
        if is_bits:
            codes = torch.stack([codes_of(bits, grid, patch) for bits in symbols])
            f_hat = f_hat + F.interpolate(codes, size=f_hat.shape[-2:], mode="bilinear", align_corners=False)
        else:
            f_hat = subject.tokenizer.add(
                f_hat, subject.tokenizer.residual(torch.stack(symbols), grid), scale, num_scales
            )
        f_hats.append(f_hat)
        chosen.append(symbols)
    return f_hats, chosen


def subject_of(name: str) -> tuple[Toy, Request]:
    if name == "var":
        return toy_var(), label_request(toy_var().schedule)
    return toy(name), make_request(toy(name).schedule)


@pytest.mark.parametrize("name", ["odd", "patches", "var"])
@pytest.mark.parametrize(
    "policy", [LateBfloat16(), LateBfloat16(count=1), LateBfloat16(count=2, first_block=3)], ids=lambda p: p.spec
)
def test_run_equals_blocks_of_a_copy_bit_for_bit(policy: LateBfloat16, name: str):
    subject, request = subject_of(name)
    result = run(subject, policy, request)
    first = 5 - policy.count
    f_hats, symbols = generate(subject, request, first, policy.first_block)
    for scale in range(5):
        assert torch.equal(result.f_hats[scale], f_hats[scale])
        assert all(torch.equal(a, b) for a, b in zip(result.choices[scale].symbols, symbols[scale], strict=True))
    full = run(subject, load_policy("full"), request)
    assert torch.equal(result.f_hats[first - 1], full.f_hats[first - 1])
    assert not torch.equal(result.choices[first].logits[0], full.choices[first].logits[0])
    # Rounding moves the logits a little: these are the same blocks and no others.
    error = result.choices[first].logits[0] - full.choices[first].logits[0]
    assert error.abs().max() < 0.2 * full.choices[first].logits[0].std()


@pytest.mark.parametrize("name", ["square", "odd"])
def test_only_named_blocks_of_the_last_scales_run_narrow(name: str):
    result = cached_run("late-bfloat16:count=2,first_block=3", name)
    assert [scale.narrow_dtype for scale in result.trace.scales] == [None] * 3 + ["bfloat16"] * 2
    for plan, is_narrow in zip(result.bound.plans, [False] * 3 + [True] * 2, strict=True):
        dtypes = [plan.dtype_of(block) for block in range(5)]
        assert dtypes == ([None] * 3 + [torch.bfloat16] * 2 if is_narrow else [None] * 5)


def test_nothing_is_saved_but_time():
    """FLOPs, tokens and the cache are those of the full run: keys are stored in the model's dtype."""
    subject, request = toy("wide"), make_request(toy("wide").schedule)
    bound = LateBfloat16().bind(subject.schedule, subject.model.shape)
    result, full = run(subject, bound, request), cached_run("full", "wide")
    assert result.trace.cost == full.trace.cost == full_cost(request, subject.model.shape)
    assert forecast(bound, request, subject.model.shape) == result.trace.cost
    assert result.trace.peak_kv_bytes == full.trace.peak_kv_bytes
    assert bound.is_static


def test_model_keeps_its_weights_and_copies_are_made_once():
    subject = toy("square")
    engine = Engine(subject.model, subject.tokenizer)
    before = [p.clone() for p in subject.model.parameters()]
    made = []
    for _ in range(2):
        bound = SpyBound(LateBfloat16(first_block=2).bind(subject.schedule, subject.model.shape))
        list(engine.run(bound, make_request(subject.schedule)))
        made.append(dict(engine._narrowed))
    assert set(made[0]) == {(block, torch.bfloat16) for block in (2, 3, 4)}
    assert all(made[0][key] is made[1][key] for key in made[0])
    for old, new in zip(before, subject.model.parameters(), strict=True):
        assert new.dtype is torch.float32
        assert torch.equal(old, new)


def test_composes_with_what_drops_tokens():
    """Dropped tokens and narrow blocks: the bits of the two settings given apart in one plan."""
    result = cached_run("random-tokens:num_scales=1,keep_ratio=0.5|late-bfloat16:count=1", "odd")
    assert {d.value for d in result.trace.fired()} == {"drop tokens", "run blocks in a narrower dtype"}
    assert result.trace.unfired == ()
    plain = cached_run("random-tokens:num_scales=1,keep_ratio=0.5", "odd")
    assert torch.equal(result.f_hats[3], plain.f_hats[3])
    close, other = result.choices[4].logits[0], plain.choices[4].logits[0]
    assert not torch.equal(close, other)
    assert (close - other).abs().max() < 0.2 * other.std()


# Promises


def test_model_that_computes_in_bfloat16_reports_no_effect():
    subject = toy("square", torch.bfloat16)
    result = run(subject, LateBfloat16(), make_request(subject.schedule))
    assert result.trace.unfired == ("run blocks in a narrower dtype",)
    assert same_bits(result, run(subject, load_policy("full"), make_request(subject.schedule)))
    assert cached_run("late-bfloat16", "square").trace.unfired == ()


@pytest.mark.parametrize("policy", [LateBfloat16.neutral(), LateBfloat16(first_block=5), LateBfloat16(first_block=99)])
def test_no_scale_or_no_block_is_full_and_promises_nothing(policy: LateBfloat16):
    result = run(toy("square"), policy)
    assert same_bits(result, cached_run("full", "square"))
    assert result.bound.directives == ()
    assert all(not plan.dtypes for plan in result.bound.plans)


def test_a_larger_count_narrows_every_scale():
    result = run(toy("square"), LateBfloat16(count=99))
    assert [scale.narrow_dtype for scale in result.trace.scales] == ["bfloat16"] * 5


@pytest.mark.parametrize("field", ["count", "first_block"])
def test_wrong_settings_are_refused_by_name(field: str):
    with pytest.raises(FoveateError, match=f"{field} must be 0 or more, got -1"):
        checked(LateBfloat16(), field, -1)
