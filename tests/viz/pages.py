"""A page with everything on it that goes wrong: markup in text, numbers that are none, equal images, missing parts."""

from dataclasses import replace

import numpy as np

from foveate.viz.page_data import (
    Chart,
    ChartPoint,
    ChartSeries,
    Figure,
    FrontierPoint,
    ImagePair,
    Lead,
    PageData,
    Role,
    ScaleTime,
    Table,
)
from foveate.viz.scale_map import ScaleMap

HOSTILE = "</script><img src=x onerror=alert(1)> & \"quotes\" 'and' \u2028 more"
OURS, DEPTH, CONTROL, FULL, SEED = "fovea:share=0.3", "depthvar", "skip-scales:count=2", "full", "another seed"
PROMPTS = ("a red apple", HOSTILE, "an owl")


def picture(seed: int, size: int = 48) -> np.ndarray:
    """Soft random colours, so that a difference is seen and a file is not tiny."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3))
    return coarse.repeat(size // 6, 0).repeat(size // 6, 1).astype(np.uint8)


def scales() -> tuple[ScaleMap, ...]:
    """One scale in full, one in part, one that did not run."""
    part = np.array([[3, -1, 0, 2], [3, 3, -1, -1], [1, 2, 3, 3], [3, 3, 3, 3]], dtype=np.int16)
    return (
        ScaleMap(scale=0, grid=(1, 1), num_blocks=3, depth_hw=np.full((1, 1), 3, np.int16), num_guided=1),
        ScaleMap(scale=1, grid=(4, 4), num_blocks=3, depth_hw=part),
        ScaleMap(scale=2, grid=(6, 6), num_blocks=3, depth_hw=None),
    )


def figures(speedup: float, psnr: float, match: float = 0.6) -> dict[str, Figure]:
    return {
        "speedup.transformer": Figure(value=speedup, low=speedup - 0.05, high=speedup + 0.05),
        "flops_ratio": Figure(value=1 / speedup),
        "psnr.mean": Figure(value=psnr, low=psnr - 1, high=psnr + 1),
        "text_match.mean": Figure(value=match, low=match - 0.1, high=match + 0.1),
        "home_made": Figure(value=1.23456),
    }


POINTS = (
    FrontierPoint(
        name=FULL,
        role=Role.REFERENCE,
        figures={"speedup.transformer": Figure(value=1.0), "flops_ratio": Figure(value=1.0),
                 "text_match.mean": Figure(value=0.7)},
    ),
    FrontierPoint(name=OURS, series="fovea", figures=figures(1.7, 32.0), details={"fingerprint": "abc123"}),
    FrontierPoint(name="fovea:share=0.2", series="fovea", figures=figures(2.1, 29.0)),
    FrontierPoint(name=DEPTH, figures=figures(1.5, float("nan"))),
    FrontierPoint(name=CONTROL, role=Role.CONTROL, figures=figures(1.9, 26.0)),
    FrontierPoint(name="skip-scales:count=1", role=Role.CONTROL, figures=figures(1.4, 28.0)),
    FrontierPoint(name=SEED, role=Role.SEED, figures={"speedup.transformer": Figure(value=1.0),
                                                      "psnr.mean": Figure(value=14.0)}),
)  # fmt: skip


def pairs() -> tuple[ImagePair, ...]:
    """Three prompts by three policies; the worst PSNR of ours belongs to the last prompt."""
    found = []
    for place, policy in enumerate((OURS, DEPTH, CONTROL)):
        for number, prompt in enumerate(PROMPTS):
            is_identical = policy == DEPTH and number == 0
            reference = picture(number)
            other = reference if is_identical else picture(100 * (place + 1) + number)
            psnr = 100.0 if is_identical else 30.0 - 5 * number - place
            found.append(
                ImagePair(
                    policy=policy,
                    prompt=prompt,
                    seed=7,
                    reference=reference,
                    picture=other,
                    figures={"psnr": psnr, "ssim": float("nan") if policy == CONTROL else 0.9 + 0.01 * number},
                    is_identical=is_identical,
                    flip=np.linspace(0, 1, 48 * 48).reshape(48, 48) if policy == OURS else None,
                    scales=scales() if policy != CONTROL else (),
                )
            )
    return tuple(found)


def times() -> tuple[ScaleTime, ...]:
    return tuple(
        ScaleTime(policy=policy, scale=s, grid=(s + 1, s + 1), ms=Figure(value=slow * (s + 1), low=slow * s, high=None))
        for policy, slow in ((FULL, 20.0), (OURS, 11.0), (DEPTH, 13.0))
        for s in range(3)
    )


LEAD = Lead(
    heading="Tuning <now>",
    text="30 trials, 12 of them within the bound.",
    charts=(
        Chart(
            caption="History",
            x_label="trial",
            y_label="milliseconds",
            limit=80.0,
            series=(
                ChartSeries(name="trials", points=tuple(
                    ChartPoint(x=i, y=Figure(value=100.0 - i), label=f"share={i}", is_faint=i % 3 == 0)
                    for i in range(9)
                )),
                ChartSeries(name="best so far", is_line=True, is_step=True, points=tuple(
                    ChartPoint(x=i, y=Figure(value=100.0 - i)) for i in range(9)
                )),
            ),
        ),
    ),
    tables=(Table(caption="Trials", columns=("settings", "psnr", "n"), rows=(("a", 3.0, 2), ("b", None, 10),
                                                                           ("c", float("inf"), 9))),),
    files={"tuned.yaml": "policy: fovea\nshare: 0.3\n"},
)  # fmt: skip


def page() -> PageData:
    """Everything but a lead."""
    return PageData(
        title=f"{OURS} against full",
        summary=HOSTILE,
        points=POINTS,
        headline=OURS,
        pairs=pairs(),
        scale_times=times(),
        facts={"model": "toy", "machine": HOSTILE},
        command="foveate compare --policy 'fovea:share=0.3' --html report.html",
        config={"prompt": HOSTILE, "seed": 7, "size": [48, 48]},
        notes=("a warning about <things>",),
    )


def led_page() -> PageData:
    return replace(page(), lead=LEAD)
