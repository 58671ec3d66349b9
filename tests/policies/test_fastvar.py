"""FastVAR against a plain twin that goes row by row, and its rules of where it acts."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.plan import KeepOutputs, Unit
from foveate.core.protocols import BlockContext
from foveate.core.rows import Rows
from foveate.core.schedule import BUDGETS, TEMPLATES, Grid, ScaleSchedule
from foveate.engine.forecast import forecast
from foveate.engine.state import bounds_of
from foveate.policies.fastvar import BoundFastVAR, FastVAR
from foveate.policies.registry import load_policy
from tests.engine.naive import RowSlot, added, logits_of
from tests.toys import (
    Result,
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

SHAPE = toy("square").model.shape
LATE = "fastvar:skip_last=0,reference_scale=2,first_block=1,last_block=3,keep_first=0.6,keep_second=0.3"
"""Prunes the last two scales of a toy, blocks 1 to 3 of its five."""
EARLY = "fastvar:skip_last=1,reference_scale=-4,first_block=3,keep_first=0.75,keep_second=0.5"
"""Prunes scales 2 and 3 in blocks 3 and 4 and leaves the last scale out."""

NO_EFFECT = (1.25, 1.333, 2.0, 3.0, 0.8, 0.571, 0.5, 0.333)
"""Ratios whose grids have none of the published widths."""
CRASHES = {1.5: "fills from", 1.75: "fills from", 2.5: "fills from", 0.4: "fills from", 0.75: "run", 0.666: "run"}
"""Ratios on which the published code crashes: it prunes without a kept 24x24, or runs a scale behind a skipped one."""


# The twin


@dataclass(kw_only=True)
class Layout:
    """What one row does, said scale by scale: nothing of it is read from the policy."""

    pruned: dict[int, float]
    source: int
    blocks: tuple[int, ...]
    unguided: tuple[int, ...] = ()
    survivors: dict[int, list[int]] = field(default_factory=dict)


def area(map_lC: Tensor, source: Grid, grid: Grid) -> Tensor:
    """Each target cell is the mean of the source cells that it touches."""
    cells = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            ys = range(y * source[0] // grid[0], math.ceil((y + 1) * source[0] / grid[0]))
            xs = range(x * source[1] // grid[1], math.ceil((x + 1) * source[1] / grid[1]))
            cells.append(torch.stack([map_lC[i * source[1] + j] for i in ys for j in xs]).double().mean(0))
    return torch.stack(cells).float()


def best(x_kC: Tensor, count: int) -> list[int]:
    """The tokens that lie farthest from the mean, in grid order."""
    mean_C = sum(x_kC.double()) / len(x_kC)
    scores = [float(((x_C.double() - mean_C) ** 2).sum()) for x_C in x_kC]
    return sorted(sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:count])


class TwinRow:
    """One image in one branch."""

    def __init__(self, subject: Toy, prepared: object, layout: Layout) -> None:
        self.subject, self.prepared, self.layout = subject, prepared, layout
        self.slots = [RowSlot() for _ in range(subject.num_blocks)]
        self.kept: dict[tuple[int, int], Tensor] = {}

    def run(self, scale: int, x_lC: Tensor) -> Tensor:
        """Logits of the tokens that run this scale."""
        model, grids = self.subject.model, self.subject.schedule.grids
        survivors = self.layout.survivors.get(scale, list(range(len(x_lC))))
        rotation_kD = model.positions(self.subject.schedule, scale)[survivors]
        num_tokens, x_kC = len(x_lC), x_lC[survivors]
        for block in range(self.subject.num_blocks):
            for sublayer in range(model.block(block).num_sublayers):
                ran = list(range(len(survivors)))
                full_kC = torch.zeros_like(x_kC)
                if scale in self.layout.pruned and block in self.layout.blocks:
                    pruned = 1 - self.layout.pruned[scale]
                    ran = best(x_kC, num_tokens - int(pruned * num_tokens + 1e-9))
                    kept_lC = self.kept[(block, sublayer)]
                    full_kC = area(kept_lC, grids[self.layout.source], grids[scale])[survivors]
                context = BlockContext(
                    rows=Rows((len(ran),)),
                    prepared=self.prepared,
                    rotation_nD=rotation_kD[ran],
                    slot=self.slots[block],
                )
                full_kC[ran] = added(model.block(block).change(sublayer, x_kC[ran], context), context.rows)
                if scale == self.layout.source:
                    self.kept[(block, sublayer)] = full_kC
                x_kC = x_kC + full_kC
        return logits_of(model, x_kC, Rows((len(x_kC),)), self.prepared)


@torch.inference_mode()
def twin_logits(subject: Toy, result: Result, request, image: int, layout: Layout) -> dict[int, Tensor]:
    """Guided logits of one image at every scale that ran, on the latents that the engine had."""
    model = subject.model
    both = model.prepare([request.conditions[image]], True)
    cond, uncond = (TwinRow(subject, both.keep([row]), layout) for row in (0, 1))
    found = {}
    for scale, grid in enumerate(subject.schedule.grids):
        if scale not in result.choices:
            continue
        logits = []
        for row in (cond, uncond)[: 1 if scale in layout.unguided else 2]:
            if scale:
                input_BZhw = subject.tokenizer.next_input(result.f_hats[scale - 1][image : image + 1], grid)
                x_lC = model.embed(input_BZhw, scale)[0]
            else:
                x_lC = model.start(row.prepared)
            logits.append(row.run(scale, x_lC))
        guide = 1.0 if len(logits) == 1 else request.guidance.weights[scale]
        guided = guide * logits[0] + ((1 - guide) * logits[1] if len(logits) > 1 else 0)
        found[scale] = guided / request.temperatures[scale]
    return found


def assert_equals_twin(subject: Toy, spec: str, layout: Layout, request) -> Result:
    result = run(subject, load_policy(spec), request)
    for image in range(request.num_images):
        found = twin_logits(subject, result, request, image, layout)
        assert found.keys() == result.choices.keys()
        for scale, logits_kV in found.items():
            engine_kV = result.choices[scale].logits[image].flatten(1)
            assert torch.allclose(logits_kV, engine_kV, atol=2e-4, rtol=1e-4), (image, scale)
    return result


def two_images(subject: Toy):
    return make_request(subject.schedule, (3, 7), (5, 9))


LATE_LAYOUT = Layout(pruned={3: 0.6, 4: 0.3}, source=2, blocks=(1, 2, 3))


@pytest.mark.parametrize("name", ["square", "odd", "patches"])
def test_equals_a_plain_twin(name: str):
    subject = toy(name)
    assert_equals_twin(subject, LATE, LATE_LAYOUT, two_images(subject))


def test_equals_a_plain_twin_with_skipped_scales_and_the_first_reference():
    subject = toy("square")
    layout = Layout(pruned={2: 0.75, 3: 0.5}, source=1, blocks=(3, 4))
    result = assert_equals_twin(subject, EARLY, layout, two_images(subject))
    assert [scale.ran for scale in result.trace.scales] == [True, True, True, True, False]
    assert torch.equal(result.f_hats[4], result.f_hats[3])


def test_equals_a_plain_twin_in_a_model_of_ids():
    subject = toy_var()
    assert_equals_twin(subject, LATE, LATE_LAYOUT, label_request(subject.schedule, (3, 7), (1, 4)))


def test_the_twin_notices_other_settings():
    subject = toy("square")
    request = two_images(subject)
    for spec in (LATE + ",resize=bilinear", LATE.replace("0.3", "0.35"), LATE.replace("=2,", "=1,", 1)):
        with pytest.raises(AssertionError):
            assert_equals_twin(subject, spec, LATE_LAYOUT, request)


# Counts and cost


def test_counts_are_those_of_the_published_rounding():
    result = cached_run(LATE, "square")
    for scale, num_tokens, count in ((2, 16, 16), (3, 36, 22), (4, 64, 20)):
        rows = result.trace.scales[scale].work.rows
        assert len(rows) == 6
        for row in rows.values():
            assert row.block_tokens == (num_tokens,) * 5
            assert row.head_tokens == num_tokens
            narrowed = dict.fromkeys((1, 2, 3), (count,) * 3) if count < num_tokens else {}
            assert row.sublayer_tokens == narrowed
    bound = FastVAR().bind(ScaleSchedule.from_template(1.0, "1M"), SHAPE)
    counts = [bound.plan(scale, None, None)[0].sublayers[0].count for scale in (9, 10)]
    assert counts == [1024 - int(0.4 * 1024), 1600 - int(0.5 * 1600)]


@pytest.mark.parametrize("spec", ["fastvar", LATE, EARLY, f"{EARLY}|drop-branch:count=2", f"{LATE}|skip-scales"])
def test_forecast_is_what_was_counted(spec: str):
    subject = toy("odd")
    request = make_request(subject.schedule)
    result = cached_run(spec, "odd")
    bound = load_policy(spec).bind(subject.schedule, SHAPE)
    assert bound.is_static
    assert forecast(bound, request, SHAPE) == result.trace.cost
    assert result.trace.cost.flops < cached_run("full", "odd").trace.cost.flops
    assert not result.trace.unfired


def test_keys_and_fills_are_held_at_a_bound():
    subject = toy("square")
    limits = bounds_of(load_policy(LATE).bind(subject.schedule, SHAPE), make_request(subject.schedule), SHAPE)
    before = 1 + 4 + 16
    assert limits.capacities == (before + 36, *(before + 22,) * 3, before + 36)
    assert limits.fill_values == 6 * SHAPE.width * 16 * 3 * 3
    assert cached_run(LATE, "square").trace.peak_cache_bytes >= 4 * limits.fill_values


def test_an_image_alone_is_the_same():
    subject = toy("square")
    together = cached_run(LATE, "square")
    alone = run(subject, load_policy(LATE), make_request(subject.schedule, (7,), (9,)))
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone.f_hats, together.f_hats, strict=True))


# Where it acts


def places_of(bound: BoundFastVAR, schedule: ScaleSchedule) -> tuple[dict[int, int], list[int], list[int]]:
    """From plans alone: counts by scale, scales that do not run, scales whose sublayers are kept."""
    plans = [bound.plan(scale, None, None)[0] for scale in range(len(schedule))]
    counts = {scale: plan.sublayers[0].count for scale, plan in enumerate(plans) if plan.sublayers}
    keeps = [scale for scale in range(len(schedule)) if bound.keeps(scale)]
    assert all(plans[scale].fill.source == keeps[0] for scale in counts)
    return counts, [scale for scale, plan in enumerate(plans) if not plan.runs], keeps


@pytest.mark.parametrize("ratio", list(TEMPLATES))
def test_index_acts_alike_at_every_ratio(ratio: float):
    schedule = ScaleSchedule.from_template(ratio, "1M")
    counts, skipped, keeps = places_of(FastVAR().bind(schedule, SHAPE), schedule)
    tokens = [scale.num_tokens for scale in schedule.scales]
    assert counts == {9: math.ceil(0.6 * tokens[9] - 1e-9), 10: math.ceil(0.5 * tokens[10])}
    assert (skipped, keeps) == ([11, 12], [8])


def test_index_counts_from_the_end_of_every_budget():
    for budget, num_scales in BUDGETS.items():
        schedule = ScaleSchedule.from_template(0.571, budget)
        counts, skipped, keeps = places_of(FastVAR().bind(schedule, SHAPE), schedule)
        places = (list(counts), skipped, keeps)
        assert places == ([num_scales - 4, num_scales - 3], [num_scales - 2, num_scales - 1], [num_scales - 5])


def test_width_is_the_same_as_index_on_the_square():
    for budget in ("0.60M", "1M"):
        schedule = ScaleSchedule.from_template(1.0, budget)
        wide = places_of(FastVAR(match="width").bind(schedule, SHAPE), schedule)
        skip = BUDGETS[budget] - 11
        index = FastVAR(skip_last=skip, reference_scale=8).bind(schedule, SHAPE)
        assert wide == places_of(index, schedule) == ({9: 615, 10: 800}, list(range(11, BUDGETS[budget])), [8])
    schedule = ScaleSchedule.from_template(1.0, "1M")
    assert places_of(FastVAR(match="width", skip_last=1).bind(schedule, SHAPE), schedule)[1] == [12]
    assert places_of(FastVAR(match="width", skip_last=0).bind(schedule, SHAPE), schedule)[1] == []


@pytest.mark.parametrize("ratio", NO_EFFECT)
def test_width_has_no_effect_on_most_ratios_and_says_so(ratio: float):
    schedule = ScaleSchedule.from_template(ratio, "1M")
    bound = FastVAR(match="width").bind(schedule, SHAPE)
    assert places_of(bound, schedule) == ({}, [], [])
    assert [d.value for d in bound.directives] == ["skip sublayers", "skip scales"]
    assert "match=index" in bound.notes[0]


@pytest.mark.parametrize("ratio", list(CRASHES))
def test_width_is_refused_where_the_published_code_crashes(ratio: float):
    schedule = ScaleSchedule.from_template(ratio, "1M")
    with pytest.raises(FoveateError, match=f"{CRASHES[ratio]}.*published code crashes.*use match=index"):
        FastVAR(match="width").bind(schedule, SHAPE)


def test_every_ratio_is_either():
    assert {*NO_EFFECT, *CRASHES, 1.0} == set(TEMPLATES)


def test_a_policy_without_effect_changes_nothing_and_is_reported():
    result = cached_run("fastvar:match=width", "wide")
    assert same_bits(result, cached_run("full", "wide"))
    assert result.trace.unfired == ("skip sublayers", "skip scales")
    deep = run(toy("wide"), load_policy("fastvar:first_block=5,last_block=9,skip_last=0"))
    assert same_bits(deep, cached_run("full", "wide"))
    assert deep.trace.unfired == ("skip sublayers",)
    assert cached_run(LATE, "wide").trace.unfired == ()


def test_neutral_and_halves():
    schedule = toy("square").schedule
    assert FastVAR.neutral().bind(schedule, SHAPE).directives == ()
    assert FastVAR.neutral().bind(schedule, SHAPE).notes == ()
    second = FastVAR(keep_first=1.0, skip_last=0).bind(schedule, SHAPE)
    assert places_of(second, schedule) == ({4: 32}, [], [0])
    skips = FastVAR(keep_first=1.0, keep_second=1.0).bind(schedule, SHAPE)
    assert places_of(skips, schedule) == ({}, [3, 4], [])
    assert [d.value for d in skips.directives] == ["skip scales"]


def test_only_the_pruned_blocks_are_kept():
    bound = load_policy(LATE).bind(toy("square").schedule, SHAPE)
    assert bound.keeps(2) == {KeepOutputs(unit=Unit.SUBLAYER, blocks=(1, 2, 3))}
    assert FastVAR().bind(toy("square").schedule, SHAPE).keeps(0) == {KeepOutputs(unit=Unit.SUBLAYER, blocks=(3, 4))}


@pytest.mark.parametrize(
    ("policy", "num_scales", "message"),
    [
        (FastVAR(), 4, r"reference_scale must be in \[-4, -5\]|lower skip_last"),
        (
            FastVAR(skip_last=0),
            4,
            r"reference_scale must be in \[-4, -3\], before the first pruned scale 2 of 4, got -5",
        ),
        (FastVAR(reference_scale=-2), 7, r"reference_scale must be in \[-7, -5\].* 3 of 7, got -2"),
        (FastVAR(reference_scale=3), 7, r"reference_scale must be in \[-7, -5\].* got 3"),
        (FastVAR(), 3, "fills from one before these, got 3 scales; lower skip_last, or set keep_first=1"),
        (FastVAR(skip_last=5), 5, "skip_last must be less than the 5 scales, got 5"),
    ],
)
def test_short_schedules_are_refused_by_name(policy: FastVAR, num_scales: int, message: str):
    schedule = ScaleSchedule.from_grids(TEMPLATES[1.0][:num_scales])
    with pytest.raises(FoveateError, match=message):
        policy.bind(schedule, SHAPE)


def test_a_width_skipped_between_scales_that_run_is_refused():
    schedule = ScaleSchedule.from_grids(((1, 1), (20, 48), (24, 56), (30, 64)))
    with pytest.raises(FoveateError, match="leaves out scale 1, 48 wide, in front of scales that run"):
        FastVAR(match="width").bind(schedule, SHAPE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_first", 0.0), ("keep_first", 1.01), ("keep_first", math.nan), ("keep_second", -1.0), ("skip_last", -1),
        ("first_block", -1), ("last_block", 2), ("resize", "cubic"), ("match", "grid"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(field: str, value: object):
    with pytest.raises(FoveateError, match=f"^{field} must be .*got {value}"):
        checked(FastVAR(), field, value)


def test_width_skips_two_widths_at_most():
    with pytest.raises(FoveateError, match="skip_last must be 0 to 2 with match=width, got 3"):
        FastVAR(match="width", skip_last=3)


# Composition


def test_skip_scales_goes_together():
    result = cached_run(f"{EARLY}|skip-scales:count=2", "square")
    assert [scale.ran for scale in result.trace.scales] == [True, True, True, False, False]
    assert torch.equal(result.f_hats[2], cached_run(EARLY, "square").f_hats[2])


@pytest.mark.parametrize("spec", [f"{LATE}|drop-branch:count=1", f"drop-branch:count=1|{LATE}"])
def test_drop_branch_goes_together(spec: str):
    subject = toy("wide")
    layout = Layout(pruned=LATE_LAYOUT.pruned, source=2, blocks=(1, 2, 3), unguided=(4,))
    result = assert_equals_twin(subject, spec, layout, two_images(subject))
    assert [len(scale.work.rows) for scale in result.trace.scales] == [4, 4, 4, 4, 2]


@pytest.mark.parametrize("order", [0, 1])
def test_selection_ranks_the_tokens_that_survive(order: int):
    """A random three quarters of the last scale run; of these, and of no others, the best 20 run each sublayer."""
    subject, drop = toy("square"), "random-tokens:keep_ratio=0.75,num_scales=1,fill=zero"
    request = two_images(subject)
    kept = cached_run(drop, "square").choices[4].kept[0].tolist()
    layout = Layout(pruned=LATE_LAYOUT.pruned, source=2, blocks=(1, 2, 3), survivors={4: kept})
    result = assert_equals_twin(subject, f"{drop}|{LATE}" if order else f"{LATE}|{drop}", layout, request)
    row = result.trace.scales[4].work.rows[(0, True)]
    assert row.block_tokens == (48,) * 5
    assert row.sublayer_tokens == dict.fromkeys((1, 2, 3), (20, 20, 20))
    assert not result.bound.is_static


def test_fewer_survivors_than_it_would_keep_all_run():
    result = run(toy("square"), load_policy(f"{LATE}|random-tokens:keep_ratio=0.25,num_scales=1"))
    row = result.trace.scales[4].work.rows[(0, True)]
    assert row.block_tokens == (16,) * 5
    assert not row.sublayer_tokens


@pytest.mark.parametrize("spec", ["fastvar|depthvar", "depthvar|fastvar"])
def test_two_fills_are_refused(spec: str):
    schedule = ScaleSchedule.from_template(1.0, "1M")
    with pytest.raises(PlanConflictError, match=r"two fills, the output of each .* keep one"):
        load_policy(spec).bind(schedule, SHAPE)
