"""LD-Pruning against plain Python loops: the energy, how much of it is kept, what dropped tokens commit, and when
the unconditional branch stops."""

import logging
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.errors import FoveateError
from foveate.core.plan import Base
from foveate.core.policy import Directive
from foveate.core.schedule import ScaleSchedule
from foveate.core.selection import keep_by_mass
from foveate.core.signals import BranchLogits, Signal, Signals
from foveate.policies.ld_pruning import LDPruning, branch_gap, detail_energy, haar_energy
from foveate.policies.registry import load_policy
from tests.engine.naive import codes_of
from tests.randomness import normal
from tests.toys import SEEDS, Result, cached_run, checked, make_request, run, same_bits, toy

LHEP = LDPruning(sats=False)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return normal(*shape, stream=seed)


def signs(seed: int, channels: int, h: int, w: int) -> torch.Tensor:
    return noise(seed, 1, channels, h, w).sign() * channels**-0.5


# Slow twins


def loop_haar(residual_Zhw: list[list[list[float]]]) -> list[list[float]]:
    h, w = len(residual_Zhw[0]), len(residual_Zhw[0][0])
    energy = [[0.0] * math.ceil(w / 2) for _ in range(math.ceil(h / 2))]
    for i, row in enumerate(energy):
        for j in range(len(row)):
            y, x = 2 * i, 2 * j
            below = y + 1 if y + 1 < h else max(h - 2, 0)
            right = x + 1 if x + 1 < w else max(w - 2, 0)
            for channel in residual_Zhw:
                a, b, c, d = channel[y][x], channel[y][right], channel[below][x], channel[below][right]
                details = (-a + b - c + d, -a - b + c + d, -a + b + c - d)
                row[j] += sum((detail / 2) ** 2 for detail in details)
    return energy


def loop_smooth(energy: list[list[float]]) -> list[list[float]]:
    h, w = len(energy), len(energy[0])
    out = [[0.0] * w for _ in range(h)]
    for i in range(h):
        for j in range(w):
            near = [energy[y][x] for y in range(i - 1, i + 2) for x in range(j - 1, j + 2) if 0 <= y < h and 0 <= x < w]
            out[i][j] = sum(near) / len(near)
    return out


def loop_enlarge(energy: list[list[float]], grid: tuple[int, int]) -> list[list[float]]:
    def place(i: int, size: int, source: int) -> tuple[int, int, float]:
        centre = max((i + 0.5) * source / size - 0.5, 0.0)
        low = min(int(centre), source - 1)
        return low, min(low + 1, source - 1), centre - low

    out = []
    for i in range(grid[0]):
        y0, y1, dy = place(i, grid[0], len(energy))
        row = []
        for j in range(grid[1]):
            x0, x1, dx = place(j, grid[1], len(energy[0]))
            top = energy[y0][x0] * (1 - dx) + energy[y0][x1] * dx
            row.append(top * (1 - dy) + (energy[y1][x0] * (1 - dx) + energy[y1][x1] * dx) * dy)
        out.append(row)
    return out


def loop_kept(energy: list[float], share: float) -> list[bool]:
    held, total = 0.0, 0.0
    for value in sorted(energy, reverse=True):
        total += value
    if total == 0 or share == 1:
        return [True] * len(energy)
    for value in sorted(energy, reverse=True):
        held += value
        if held >= share * total:
            return [e >= value for e in energy]
    raise AssertionError("a share below one is always reached")


# Energy


@settings(deadline=None, max_examples=25)
@given(h=st.integers(1, 7), w=st.integers(1, 7), grow=st.integers(0, 5), seed=st.integers(0, 1000))
def test_energy_equals_the_loops(h: int, w: int, grow: int, seed: int):
    """On even, odd and one-wide grids."""
    residual = noise(seed, 2, 3, h, w)
    grid = (h + grow, w + 2 * grow)
    ours = detail_energy(residual, grid)
    for image in range(2):
        raw = loop_haar(residual[image].double().tolist())
        assert torch.allclose(haar_energy(residual)[image], torch.tensor(raw).double(), atol=1e-6)
        expected = torch.tensor(loop_enlarge(loop_smooth(raw), grid)).double()
        assert torch.allclose(ours[image], expected, atol=1e-6)


def test_energy_of_codes_is_zero_three_or_four_per_channel():
    """2x2 patches of +-1/sqrt(d): flat 0, one odd corner 3/d, two and two 4/d."""
    values = haar_energy(signs(0, 1, 32, 32))
    assert set(values.unique().tolist()) == {0.0, 3.0, 4.0}
    many = haar_energy(signs(1, 8, 16, 16)) * 8
    assert torch.allclose(many, many.round(), atol=1e-5)


def test_energy_adds_channels_and_leaves_the_mean_out():
    residual = noise(0, 1, 4, 6, 6)
    parts = [haar_energy(residual[:, c : c + 1]) for c in range(4)]
    assert torch.allclose(haar_energy(residual), sum(parts))
    assert torch.allclose(haar_energy(residual + 3.0), haar_energy(residual), atol=1e-5)
    assert not haar_energy(torch.full((1, 4, 6, 6), 2.0)).any()


def test_repeated_areas_look_flatter_at_every_scale():
    """Why areas once skipped tend to stay skipped: of the energy of random codes repetition leaves less each time."""
    residual, shares = signs(0, 32, 32, 32), []
    energy = haar_energy(residual).mean()
    for size in (40, 48, 64):
        residual = F.interpolate(residual, size=(size, size), mode="nearest")
        shares.append(float(haar_energy(residual).mean() / energy))
    assert shares[:2] == pytest.approx([0.85, 0.74], abs=0.02)
    assert shares[2] < 0.6


# How much is kept


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), size=st.integers(1, 60), share=st.floats(0.01, 0.99))
def test_kept_tokens_equal_the_loop_and_stay_under_the_share(seed: int, size: int, share: float):
    energy = noise(seed, 1, size).square().double()
    kept = keep_by_mass(energy, share)[0].tolist()
    assert kept == loop_kept(energy[0].tolist(), share)
    assert 1 <= sum(kept) <= math.ceil(share * size)


def test_repeated_energies_tie_and_are_all_kept():
    energy = torch.tensor([[3.0, 1.0]]).repeat_interleave(4, -1)
    assert keep_by_mass(energy, 0.3)[0].tolist() == [True] * 4 + [False] * 4
    assert int(keep_by_mass(energy, 0.3).sum()) > math.ceil(0.3 * 8)


def test_textured_half_is_kept():
    residual = torch.full((1, 8, 8, 8), 8**-0.5)
    residual[..., 4:] = signs(3, 8, 8, 4)
    energy = detail_energy(residual, (12, 12))
    kept = keep_by_mass(energy.flatten(1), 0.5)[0].view(12, 12)
    assert not kept[:, :4].any()
    assert kept[:, 6:].sum() > 20


def test_everything_is_kept_of_a_flat_map_and_at_share_one():
    flat = detail_energy(torch.ones(1, 8, 4, 4), (6, 6)).flatten(1)
    assert keep_by_mass(flat, 0.1).all()
    assert keep_by_mass(noise(0, 2, 9).square(), 1.0).all()


# In the engine


def replayed(result: Result, name: str, policy: LDPruning) -> None:
    """Redoes every commit of a run from its codes alone, and every decision from what was committed."""
    subject = toy(name)
    patch, num_scales = subject.schedule.patch, len(subject.schedule)
    for image in range(len(SEEDS)):
        f_hat = torch.zeros_like(result.f_hat[:1])
        residual, memory = torch.zeros(1, 8, 1, 1), None
        for scale, (h, w) in enumerate(subject.schedule.grids):
            size, choice = (h * patch, w * patch), result.choices[scale]
            kept = choice.positions(image, h * w)
            if scale >= num_scales - policy.lhep_scales:
                energy = loop_enlarge(loop_smooth(loop_haar(residual[0].double().tolist())), size)
                tokens = F.avg_pool2d(torch.tensor(energy, dtype=torch.float64)[None], patch).flatten().tolist()
                if memory is not None and policy.energy_from == "last_computed":
                    before, ran, (bh, bw) = memory
                    old = [e for row in loop_enlarge(before, (h, w)) for e in row]
                    ran_there = [(r * bh // h) * bw + c * bw // w in ran for r in range(h) for c in range(w)]
                    tokens = [new if did else was for new, was, did in zip(tokens, old, ran_there, strict=True)]
                assert_same_but_ties(kept, tokens, policy.energy_share)
                memory = ([tokens[r * w : (r + 1) * w] for r in range(h)], set(kept), (h, w))
            else:
                assert kept == list(range(h * w))
            whole = torch.zeros(h * w, choice.symbols[image].shape[-1], dtype=torch.long)
            whole[kept] = choice.symbols[image]
            codes, mask = codes_of(whole, (h, w), patch)[None], torch.zeros(h * w)
            mask[kept] = 1
            mask = F.interpolate(mask.view(1, 1, h, w), size=size, mode="nearest")
            base = F.interpolate(residual, size=size, mode="nearest") if policy.fill == "base" else torch.zeros(1)
            residual = codes * mask + base * (1 - mask)
            f_hat = f_hat + F.interpolate(residual, size=f_hat.shape[-2:], mode="bilinear", align_corners=False)
            assert torch.allclose(result.f_hats[scale][image], f_hat[0], atol=1e-5)


def assert_same_but_ties(kept: list[int], energy: list[float], share: float):
    """The loop's sums differ from ours in the last digit, which may break ties with the last kept token."""
    expected = loop_kept(energy, share)
    edge = min(e for e, is_kept in zip(energy, expected, strict=True) if is_kept)
    for token, value in enumerate(energy):
        if abs(value - edge) > 1e-9 * edge:
            assert (token in kept) == expected[token]
    ties = {token in kept for token, value in enumerate(energy) if abs(value - edge) <= 1e-12 * edge}
    assert True in ties


@pytest.mark.in_turn("policy", "name")
@pytest.mark.parametrize("name", ["square", "wide", "odd", "patches"])
@pytest.mark.parametrize(
    "policy",
    [LHEP, LHEP.replace(energy_share=0.8, fill="zero"), LHEP.replace(energy_from="last_computed", lhep_scales=2)],
    ids=["default", "zero", "last_computed"],
)
def test_commits_and_decisions_replay_from_the_codes(policy: LDPruning, name: str):
    """Dropped tokens repeat the previous residual, and the next energy reads the map with them in it."""
    result = run(toy(name), policy)
    replayed(result, name, policy)
    assert any(choice.kept is not None for choice in result.choices.values())


def test_only_the_last_scales_are_pruned_and_blocks_see_kept_tokens_alone():
    result = run(toy("square"), LHEP)
    for scale in result.trace.scales:
        for (image, _), row in scale.work.rows.items():
            kept = len(result.choices[scale.scale].symbols[image])
            assert row.block_tokens == (kept,) * 5
            assert row.head_tokens == kept
            assert kept == scale.work.grid_tokens or scale.scale >= 2


def test_a_larger_share_keeps_more():
    counts = []
    for share in (0.2, 0.5, 0.8, 1.0):
        bound = LHEP.replace(energy_share=share).bind(toy("square").schedule, toy("square").model.shape)
        signals = Signals(scale=3, grid=(6, 6), residual_BZhw=noise(0, 1, 8, 6, 6))
        keep_Bl = bound.plan(4, signals, bound.start())[0].keep(1, 64)
        counts.append(64 if keep_Bl is None else int(keep_Bl.sum()))
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[2] < counts[3] == 64


# When guidance stops


def both(seed: int, gap: float, tokens: int = 4) -> BranchLogits:
    """Logits of the branches whose root-mean-square difference is `gap`."""
    difference = noise(seed, tokens, 6)
    difference *= gap / difference.square().mean().sqrt()
    cond = noise(seed + 1, tokens, 6)
    return BranchLogits(cond_kV=cond, uncond_kV=cond - difference)


def test_gap_is_a_root_mean_square_or_the_literal_norm():
    logits = both(0, 2.0)
    values = (logits.cond_kV - logits.uncond_kV).flatten().tolist()
    assert float(branch_gap(logits, "rms")) == pytest.approx(math.sqrt(sum(v * v for v in values) / len(values)))
    assert float(branch_gap(logits, "rms")) == pytest.approx(2.0, rel=1e-5)
    assert float(branch_gap(logits, "l2")) == pytest.approx(math.sqrt(sum(v * v for v in values)))


def decisions(
    gaps: list[list[float | None]], policy: LDPruning, hears_all: bool = False
) -> list[tuple[bool, ...] | None]:
    """Branches that a plan asks for at each scale, given every image's gap at the scale before.

    With `hears_all` it is told of every scale, as it is where another part of a composition asked for more.
    """
    schedule = ScaleSchedule.from_grids([(n, n) for n in range(1, 8)])
    bound, plans = policy.bind(schedule, toy("square").model.shape), []
    state, signals = bound.start(), None
    for scale in range(7):
        plan, state = bound.plan(scale, signals, state)
        is_free = plan.guided_B is None or bool(plan.guided_B.all())
        plans.append(None if is_free else tuple(plan.guided_B.tolist()))
        logits = tuple(BranchLogits(cond_kV=noise(1, 4, 6)) if gap is None else both(scale, gap) for gap in gaps[scale])
        wanted = hears_all or Signal.LOGITS in bound.record(scale)
        signals = Signals(scale=scale, grid=schedule.grids[scale], logits=logits if wanted else None)
    return plans


SATS = LDPruning(lhep=False)


def test_branch_stops_after_the_first_small_change_and_never_returns():
    """SATS watches the last 4 of 7 scales, so it measures from scale 2 and acts from scale 4 on."""
    gaps = [[1.0], [1.0], [1.0], [2.0], [2.2], [9.0], [90.0]]
    assert decisions(gaps, SATS) == [None] * 5 + [(False,), (False,)]
    early = [[1.0], [1.0], [1.0], [1.1], [9.0], [1.0], [1.0]]
    assert decisions(early, SATS) == [None] * 4 + [(False,)] * 3


def test_gaps_before_the_first_watched_scale_do_not_count():
    gaps = [[1.0], [1.0], [1.0], [2.0], [4.0], [8.0], [16.0]]
    assert decisions(gaps, SATS) == decisions(gaps, SATS, hears_all=True) == [None] * 7
    wider = SATS.replace(sats_scales=6)
    assert decisions(gaps, wider) == [None] * 2 + [(False,)] * 5


def test_every_image_decides_for_itself():
    gaps = [[1.0, 1.0]] * 3 + [[1.0, 2.0], [None, 4.0], [None, 4.1], [None, None]]
    assert decisions(gaps, SATS) == [None] * 4 + [(False, True), (False, True), (False, False)]


@pytest.mark.parametrize(("change", "stops"), [(0.1499, True), (0.1501, False), (-0.1499, True), (-0.1501, False)])
def test_threshold_is_relative_and_in_both_directions(change: float, stops: bool):
    gaps = [[4.0]] * 3 + [[4.0 * (1 + change)], [99.0], [1.0], [50.0]]
    assert (decisions(gaps, SATS)[4] == (False,)) == stops


def test_threshold_zero_never_stops():
    assert decisions([[1.0]] * 7, SATS.replace(sats_threshold=0.0)) == [None] * 7


def test_running_engine_stops_each_image_where_the_logits_say():
    """Gaps recomputed from the model's own outputs; the threshold lies between the images' first changes."""
    subject = toy("square")
    changes = watched_changes(run_with_logits(subject, SATS.replace(sats_threshold=1e-9))[1])
    first = sorted(changes[image][0] for image in range(3))
    threshold = (first[0] + first[1]) / 2
    assert first[0] < threshold < first[1]
    result, logits = run_with_logits(subject, SATS.replace(sats_threshold=threshold))
    for image in range(3):
        is_on = True
        for scale in range(5):
            assert ((image, False) in result.trace.scales[scale].work.rows) == is_on
            if is_on and 1 <= scale < 4:
                gap, before = (rms(logits[s], image) for s in (scale, scale - 1))
                is_on = abs(gap - before) / before >= threshold
    assert sum((image, False) in result.trace.scales[2].work.rows for image in range(3)) == 2


def run_with_logits(subject, policy: LDPruning) -> tuple[Result, list[tuple]]:
    result = run(subject, policy)
    return result, [signals.logits for signals in result.bound.signals[1:]] + [()]


def rms(logits: tuple, image: int) -> float:
    pairs = zip(logits[image].cond_kV.flatten().tolist(), logits[image].uncond_kV.flatten().tolist(), strict=True)
    squares = [(a - b) ** 2 for a, b in pairs]
    return math.sqrt(sum(squares) / len(squares))


def watched_changes(logits: list[tuple]) -> list[list[float]]:
    gaps = [[rms(logits[scale], image) for scale in range(4)] for image in range(3)]
    return [[abs(b - a) / a for a, b in pairwise(g)] for g in gaps]


def test_recorded_logits_are_those_that_guidance_combines():
    result = run(toy("square"), SATS.replace(sats_threshold=1e-9))
    request = make_request(toy("square").schedule)
    for scale in range(4):
        both_branches = result.bound.signals[scale + 1].logits[1]
        weight, temperature = request.guidance.weights[scale], request.temperatures[scale]
        difference = both_branches.cond_kV - both_branches.uncond_kV
        guided = (both_branches.uncond_kV + weight * difference) / temperature
        assert torch.allclose(result.choices[scale].logits[1].flatten(1), guided, atol=1e-4)


# Settings


def test_signals_are_recorded_only_where_a_later_scale_reads_them():
    schedule = ScaleSchedule.from_template(1.0, "1M")
    bound = LDPruning().bind(schedule, toy("square").model.shape)
    assert [s for s in range(13) if Signal.LOGITS in bound.record(s)] == [8, 9, 10, 11]
    assert [s for s in range(13) if Signal.RESIDUAL in bound.record(s)] == [9, 10, 11]
    assert bound.directives == (Directive.BRANCH, Directive.TOKENS)
    assert not bound.is_static


def test_draft_preset_leaves_the_last_two_scales_out():
    schedule = ScaleSchedule.from_template(1.0, "1M")
    bound = load_policy("ld-pruning-draft").bind(schedule, toy("square").model.shape)
    signals = Signals(scale=9, grid=(32, 32), residual_BZhw=noise(0, 1, 4, 32, 32))
    runs = [bound.plan(s, signals, bound.start())[0].runs for s in range(13)]
    assert runs == [True] * 11 + [False] * 2
    plan = bound.plan(10, signals, bound.start())[0]
    assert plan.base is Base.PREVIOUS
    assert 0 < int(plan.keep(1, 1600).sum()) < 1600
    assert bound.directives == (Directive.SCALES, Directive.BRANCH, Directive.TOKENS)


def test_draft_warns_where_little_is_left(caplog: pytest.LogCaptureFixture):
    policy, shape = LDPruning(skip_last=2), toy("square").model.shape
    with caplog.at_level(logging.WARNING, logger="foveate"):
        policy.bind(ScaleSchedule.from_template(1.0, "1M"), shape)
        assert not caplog.records or "leaves" in caplog.text
        caplog.clear()
        policy.bind(ScaleSchedule.from_template(1.0, "0.06M"), shape)
    assert "leaves 121 of 521 tokens" in caplog.text


@pytest.mark.parametrize(
    "policy",
    [
        LDPruning(lhep=False, sats=False),
        LDPruning(energy_share=1.0, sats_threshold=0.0),
        LDPruning(lhep_scales=0, sats_scales=0),
        LDPruning(energy_share=1.0, sats=False),
    ],
)
def test_switched_off_is_full(policy: LDPruning):
    result = run(toy("odd"), policy)
    assert same_bits(result, cached_run("full", "odd"))
    assert result.bound.directives == ()
    assert all(not result.bound.record(scale) for scale in range(5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("energy_share", 0.0), ("energy_share", 1.1), ("energy_share", math.nan), ("sats_threshold", -0.1),
        ("lhep_scales", -1), ("sats_scales", -1), ("skip_last", -1), ("fill", "none"), ("energy_from", "f_hat"),
        ("gap_norm", "l1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(field: str, value: object):
    with pytest.raises(FoveateError, match=f"{field} must be .* got {value}"):
        checked(LDPruning(), field, value)


def test_skipping_every_scale_is_refused():
    with pytest.raises(FoveateError, match="skip_last must be less than the 5 scales, got 5"):
        LDPruning(skip_last=5).bind(toy("square").schedule, toy("square").model.shape)


def test_a_rule_that_is_off_reads_no_logits_of_a_neighbour():
    """Signals are shared in a composition: the part without SATS must not stop the branch on another part's logits."""
    subject = toy("square")
    strict = "ld-pruning:lhep=false,sats_threshold=0.01"
    alone = run(subject, load_policy(strict))
    composed = run(subject, load_policy(f"ld-pruning:lhep=false,sats=false|{strict}"))
    assert same_bits(alone, composed)
    assert not same_bits(run(subject, load_policy("ld-pruning:lhep=false,sats_threshold=9.0")), alone)
