"""What the page's scripts read: the data of a page as JSON, numbers beside the text that is shown for them."""

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from foveate.viz.metrics import METRICS, PLAIN, TILES, Metric
from foveate.viz.page_data import Chart, Figure, FrontierPoint, PageData, Role, ScaleTime
from foveate.viz.page_images import StoredImages, StoredPair, pair_metrics
from foveate.viz.scale_map import ScaleMap

REFERENCE_NAME = "reference"
"""What the left image is called where no point is the reference."""


def finite(value: int | float | None) -> float | None:
    """The number, or None for what JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(value)


def known_metrics(data: PageData) -> list[Metric]:
    """Metrics of all figures, known ones in the order of the table."""
    names = {name for point in data.points for name in point.figures}
    return [METRICS[name] for name in METRICS if name in names] + [
        data.metric(name) for name in sorted(names - set(METRICS))
    ]


def headline(data: PageData) -> str:
    """Name of the point that is chosen at first."""
    if data.headline is not None:
        return data.headline
    first = next((point for point in data.points if point.role is Role.POLICY), None)
    return (first or data.points[0]).name


def payload(data: PageData, stored: StoredImages) -> str:
    """JSON that may stand inside a script element: no `<` in it."""
    reference = next((point.name for point in data.points if point.role is Role.REFERENCE), REFERENCE_NAME)
    content = {
        "headline": headline(data),
        "referenceName": reference,
        "tiles": TILES,
        "metrics": [_metric(one) for one in known_metrics(data)],
        "points": [_point(data, point) for point in data.points],
        "images": stored.uris,
        "pairs": [_pair(data, one) for one in stored.pairs],
        "pairMetrics": [_metric(data.metric(name)) for name in pair_metrics([one.pair for one in stored.pairs])],
        "times": _times(data.scale_times),
        "charts": [_chart(chart) for chart in (data.lead.charts if data.lead is not None else ())],
    }
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def figure(found: Figure, of: Metric) -> list[float | str | None]:
    """Value, ends of the interval, and both as text."""
    numbers = [finite(found.value), finite(found.low), finite(found.high)]
    return [*numbers, of.print(found.value), of.print_interval(found.low, found.high)]


def _metric(one: Metric) -> dict[str, Any]:
    return {
        "name": one.name,
        "label": one.label,
        "unit": one.unit,
        "axis": one.axis.value,
        "factor": one.factor,
        "isHighGood": one.is_high_good,
        "isAgainstReference": one.is_against_reference,
        "ceiling": one.ceiling,
    }


def _point(data: PageData, point: FrontierPoint) -> dict[str, Any]:
    figures = {name: figure(found, data.metric(name)) for name, found in point.figures.items()}
    return {"name": point.name, "role": point.role.value, "series": point.series, "figures": figures}


def _pair(data: PageData, one: StoredPair) -> dict[str, Any]:
    pair = one.pair
    return {
        "policy": pair.policy,
        "prompt": pair.prompt,
        "seed": pair.seed,
        "isIdentical": pair.is_identical,
        "reference": one.reference,
        "picture": one.picture,
        "flip": one.flip,
        "figures": {name: [finite(value), data.metric(name).print(value)] for name, value in pair.figures.items()},
        "scales": [_scale(scale) for scale in pair.scales],
    }


def _scale(scale: ScaleMap) -> dict[str, Any]:
    return {
        "scale": scale.scale,
        "grid": scale.grid,
        "blocks": scale.num_blocks,
        "depth": packed_depth(scale.depth_hw),
        "caption": scale.caption,
    }


def packed_depth(depth_hw: np.ndarray | None) -> str | int | None:
    """One byte a token, 0 where it did not run; one number where all tokens ran the same."""
    if depth_hw is None:
        return None
    first = int(depth_hw.flat[0])
    if first >= 0 and (depth_hw == first).all():
        return first
    return base64.b64encode((depth_hw + 1).astype(np.uint8).tobytes()).decode("ascii")


def _times(times: Sequence[ScaleTime]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for time in times:
        ms = [finite(value) for value in (time.ms.value, time.ms.low, time.ms.high)]
        found.setdefault(time.policy, []).append({"scale": time.scale, "grid": time.grid, "ms": ms})
    return found


def _chart(chart: Chart) -> dict[str, Any]:
    return {
        "caption": chart.caption,
        "x": chart.x_label,
        "y": chart.y_label,
        "limit": finite(chart.limit),
        "series": [
            {
                "name": one.name,
                "line": "hv" if one.is_step else "straight" if one.is_line else None,
                "points": [
                    {
                        "x": finite(point.x),
                        "y": figure(point.y, PLAIN),
                        "label": point.label,
                        "isFaint": point.is_faint,
                    }
                    for point in one.points
                ],
            }
            for one in chart.series
        ],
    }
