"""What a scale takes: the fit, when packing pays, and which scales have partial images."""

import numpy as np
import pytest

from foveate.core.schedule import ScaleSchedule
from foveate.server.forecasts import Forecast
from foveate.server.rates import LEAST_GAIN, Rates


def test_the_fit_finds_a_constant_and_a_rate() -> None:
    rng, rates = np.random.default_rng(), Rates()
    for gflops in rng.uniform(0.1, 50, 20):
        rates.note(gflops * 1e9, 12.0 + 3.0 * gflops)
    rates.fit()
    assert rates.ms(10e9) == pytest.approx(42.0)


@pytest.mark.parametrize("points", [[(1.0, 10.0), (10.0, 5.0)], [(1.0, 1.0), (10.0, 30.0)]])
def test_neither_number_is_negative(points: list[tuple[float, float]]) -> None:
    rates = Rates()
    rates.fit(points)
    assert rates.fixed_ms is not None
    assert rates.ms_per_gflop is not None
    assert rates.fixed_ms >= 0
    assert rates.ms_per_gflop >= 0
    assert rates.fixed_ms + rates.ms_per_gflop > 0


def test_small_is_what_gains_from_company() -> None:
    rates = Rates()
    assert rates.is_small(1e15), "nothing is known yet"
    rates.fit([(1.0, 10 + 2.0), (100.0, 10 + 200.0)])
    limit = max(float(g) for g in np.linspace(0, 100, 2001) if rates.is_small(float(g) * 1e9))
    in_turns, packed = 2 * rates.ms(limit * 1e9), rates.ms(2 * limit * 1e9)
    assert in_turns / packed == pytest.approx(LEAST_GAIN, rel=0.01)
    assert not rates.is_small((limit + 1) * 1e9)


def test_partial_images_come_nearest_to_their_shares() -> None:
    counts = [h * w for h, w in ScaleSchedule.from_template(1.0, "0.25M").grids]
    forecast = Forecast(flops=tuple(map(float, counts)), flops_full=tuple(map(float, counts)))
    # 2,521 tokens: 121 (.048) behind the fifth scale, 521 (.207) behind the seventh, 1,497 (.594) behind the ninth.
    assert forecast.partial_scales(3) == (4, 6, 8)
    assert forecast.partial_scales(2) == (4, 8)
    assert forecast.partial_scales(1) == (6,)
    assert forecast.partial_scales(0) == ()


def test_short_schedules_have_fewer_partial_images() -> None:
    forecast = Forecast(flops=(1.0, 4.0, 16.0), flops_full=(1.0, 4.0, 16.0))
    assert forecast.partial_scales(3) == (0, 1)
