"""A profile of one machine, model and dtype: what a token costs in a block at several sizes, and the machine's rates.

It is data: nothing is fitted. All figures are those of the full policy.
"""

from typing import Any

from foveate.bench.report import BenchReport, Case

PROFILE_FORMAT = 1


def profile(report: BenchReport, weight_bytes_per_s: float) -> dict[str, Any]:
    """The profile as plain data.

    `ms_per_token_block` is a scale's median time over its tokens times blocks, all rows of the batch counted: what is
    around the blocks (sampling, embedding, the head; at scale 0 also what a call prepares once) is in it. It is None
    where a scale did not run.

    Args:
        report: A `calibrate` measurement.
        weight_bytes_per_s: What `peak.weight_bandwidth` measured in the same process.
    """
    data = report.to_json()
    kept = ("command", "machine", "model", "settings", "matmul_peak", "weights_bytes", "method", "excluded", "stopped")
    return {
        "format": PROFILE_FORMAT,
        **{name: data[name] for name in kept},
        "weight_bytes_per_s": weight_bytes_per_s,
        "sizes": [_size(case) for case in report.cases],
    }


def _size(case: Case) -> dict[str, Any]:
    entry, picture = case.entries[0], case.picture
    return {
        "width": picture.width,
        "height": picture.height,
        "aspect_ratio": picture.aspect_ratio,
        "pixels": picture.pixels,
        "batch": case.batch,
        "rounds": case.rounds,
        "ms": {part: entry.figures[f"ms.{part}"].to_json() for part in ("text", "transformer", "decoder", "total")},
        "scales": [
            {**s.to_json(), "ms_per_token_block": s.ms.median / s.token_blocks if s.token_blocks else None}
            for s in entry.scales
        ],
    }
