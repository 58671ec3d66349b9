"""LD-Pruning with the energy of the latent beside that of the residual, against plain loops."""

import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signal, Signals
from foveate.policies.ld_pruning import LDPruning, share_of_mean
from tests.policies.test_ld_pruning import assert_same_but_ties, loop_enlarge, loop_haar, loop_smooth, noise
from tests.toys import SEEDS, Result, cached_run, checked, run, same_bits, toy

BOTH = LDPruning(sats=False, energy_of="residual+latent")


def loop_area(channel: list[list[float]], size: tuple[int, int]) -> list[list[float]]:
    """Means over the entries that a larger cell touches: from floor(i n / m) up to ceil((i + 1) n / m)."""

    def touched(i: int, source: int, target: int) -> range:
        return range(i * source // target, -(-(i + 1) * source // target))

    out = []
    for i in range(size[0]):
        row = []
        for j in range(size[1]):
            ys, xs = touched(i, len(channel), size[0]), touched(j, len(channel[0]), size[1])
            row.append(sum(channel[y][x] for y in ys for x in xs) / (len(ys) * len(xs)))
        out.append(row)
    return out


def loop_shares(residual_Zhw: torch.Tensor, grid: tuple[int, int]) -> list[list[float]]:
    """The energy of one image on the coming grid, over its mean."""
    energy = loop_enlarge(loop_smooth(loop_haar(residual_Zhw.double().tolist())), grid)
    mean = sum(map(sum, energy)) / (grid[0] * grid[1])
    return [[e / mean if mean else 0.0 for e in row] for row in energy]


def token_energy(residual_Zhw: torch.Tensor, f_hat_ZHW: torch.Tensor, grid: tuple[int, int], patch: int) -> list[float]:
    """Both shares added, averaged over the latents of each token."""
    size = (grid[0] * patch, grid[1] * patch)
    small = torch.tensor([loop_area(channel, residual_Zhw.shape[-2:]) for channel in f_hat_ZHW.double().tolist()])
    a, b = loop_shares(residual_Zhw, size), loop_shares(small, size)
    return [
        sum(a[y][x] + b[y][x] for y in range(i, i + patch) for x in range(j, j + patch)) / patch**2
        for i in range(0, size[0], patch)
        for j in range(0, size[1], patch)
    ]


def assert_decided(result: Result, name: str, policy: LDPruning) -> int:
    """Every kept set from the signals of the scale before; returns how often the residual alone would keep others."""
    subject, others = toy(name), 0
    for scale in range(5 - policy.lhep_scales, 5):
        grid, signals = subject.schedule.grids[scale], result.bound.signals[scale]
        for image in range(len(SEEDS)):
            residual_Zhw, f_hat_ZHW = signals.residual_BZhw[image], result.f_hats[scale - 1][image]
            kept = result.choices[scale].positions(image, grid[0] * grid[1])
            energy = token_energy(residual_Zhw, f_hat_ZHW, grid, subject.schedule.patch)
            assert_same_but_ties(kept, energy, policy.energy_share)
            alone = policy.replace(energy_of="residual").bind(subject.schedule, subject.model.shape)
            plan = alone.plan(scale, signals, alone.start())[0]
            others += plan.keep(3, grid[0] * grid[1])[image].nonzero().flatten().tolist() != kept
    return others


@pytest.mark.in_turn("policy", "name")
@pytest.mark.parametrize("name", ["square", "wide", "odd", "patches"])
@pytest.mark.parametrize("policy", [BOTH, BOTH.replace(energy_share=0.8, fill="zero")], ids=lambda policy: policy.spec)
def test_decisions_equal_the_loops(policy: LDPruning, name: str):
    assert assert_decided(run(toy(name), policy), name, policy) > 0


def test_both_count_alike_whatever_their_size():
    """A latent a thousand times as loud decides no more: each energy is a share of its mean, image by image."""
    schedule = ScaleSchedule.from_grids(((1, 1), (4, 4), (8, 8)))
    bound = BOTH.replace(lhep_scales=1).bind(schedule, toy("square").model.shape)
    residual, f_hat = noise(0, 2, 8, 4, 4), noise(1, 2, 8, 8, 8)
    loud = f_hat * torch.tensor([1000.0, 0.001])[:, None, None, None]
    plans = [
        bound.plan(2, Signals(scale=1, grid=(4, 4), residual_BZhw=residual, f_hat_BZHW=latent), bound.start())[0]
        for latent in (f_hat, loud)
    ]
    scores = [plan.selections[0].score_Bl for plan in plans]
    assert torch.allclose(*scores, rtol=1e-5)
    assert torch.allclose(scores[0].mean(-1), torch.tensor(2.0).double())


def test_flat_maps_add_nothing():
    flat = share_of_mean(torch.stack([torch.zeros(3, 3), torch.eye(3)]).double())
    assert not flat[0].any()
    assert torch.allclose(flat[1], 3 * torch.eye(3).double())
    bound = BOTH.bind(toy("square").schedule, toy("square").model.shape)
    signals = Signals(scale=3, grid=(6, 6), residual_BZhw=torch.zeros(1, 8, 6, 6), f_hat_BZHW=torch.ones(1, 8, 8, 8))
    assert bound.plan(4, signals, bound.start())[0].keep(1, 64).all()


def test_latent_is_recorded_only_where_it_is_read():
    shape = toy("square").model.shape
    both, alone = (
        BOTH.replace(energy_of=e).bind(toy("square").schedule, shape) for e in ("residual+latent", "residual")
    )
    assert [Signal.F_HAT in both.record(scale) for scale in range(5)] == [False, True, True, True, False]
    assert not any(Signal.F_HAT in alone.record(scale) for scale in range(5))
    off = BOTH.replace(lhep=False).bind(toy("square").schedule, shape)
    assert not any(off.record(scale) for scale in range(5))


def test_default_is_as_it_was():
    policy = LDPruning(energy_of="residual")
    assert policy == LDPruning()
    assert same_bits(run(toy("odd"), policy), cached_run("ld-pruning", "odd"))
    assert policy.spec == "ld-pruning"
    assert BOTH.spec == "ld-pruning:sats=false,energy_of=residual+latent"


def test_memory_of_a_token_keeps_the_sum():
    """With last_computed, a token that was dropped keeps the sum of shares that it had."""
    policy = BOTH.replace(energy_from="last_computed", lhep_scales=2, energy_share=0.4)
    result = run(toy("odd"), policy)
    energy = token_energy(result.bound.signals[4].residual_BZhw[0], result.f_hats[3][0], (9, 7), 1)
    score_l = result.bound.plans[4].selections[0].score_Bl[0]
    kept = set(result.choices[3].kept[0].tolist())
    before = result.bound.plans[3].selections[0].score_Bl[0].view(7, 5).tolist()
    old = [e for row in loop_enlarge(before, (9, 7)) for e in row]
    expected = [energy[t] if t // 7 * 7 // 9 * 5 + t % 7 * 5 // 7 in kept else old[t] for t in range(63)]
    assert torch.allclose(score_l, torch.tensor(expected).double(), rtol=1e-4)
    assert expected != energy


def test_wrong_setting_is_refused_by_name():
    with pytest.raises(FoveateError, match="energy_of must be residual or residual.latent, got latent"):
        checked(LDPruning(), "energy_of", "latent")
