"""A comparison as one self-contained HTML page: figures, and the images in pairs.

Axes: Y pixel rows, X columns.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2f6f4f; }
@media (prefers-color-scheme: dark) { :root { --accent: #7fd0a5; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h1 code { color: var(--accent); }
p.sub { margin: 0 0 1.5rem; opacity: .75; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.tile { background: var(--soft); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.tile span { font-size: .85rem; opacity: .75; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; margin: 2rem 0; }
figure { border: 1px solid var(--line); border-radius: .6rem; margin: 0; overflow: hidden; }
figure div { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
figure img { display: block; height: auto; width: 100%; }
figcaption { padding: .5rem .75rem .65rem; } figcaption small { display: block; opacity: .75; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td { padding: .15rem 1.5rem .15rem 0; }
details { border-top: 1px solid var(--line); padding: .75rem 0; } pre { overflow-x: auto; font-size: .85rem; }
"""

_TILES = {
    "speedup.end_to_end": "times faster, end to end",
    "speedup.transformer": "times faster, transformer",
    "flops_ratio": "of the full FLOPs",
    "psnr.mean": "dB PSNR, mean",
    "yardstick_psnr": "dB PSNR of another seed",
    "ssim.p10": "SSIM, 10th percentile",
    "identical": "identical images",
    "n": "images",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pair:
    """Two images of one prompt and seed, uint8 (Y, X, 3), and what is said about them."""

    title: str
    note: str
    reference: np.ndarray
    picture: np.ndarray


def render(policy: str, against: str, figures: Mapping[str, str], pairs: Sequence[Pair], config: str) -> str:
    """The page.

    Args:
        policy: Spec of what is judged; its images stand on the right.
        against: Spec of what it is judged by.
        figures: Every number by its dotted name, printed.
        pairs: The images.
        config: How they were generated, as JSON.
    """
    tiles = "".join(
        f'<div class="tile"><b>{figures[name]}</b><span>{text}</span></div>'
        for name, text in _TILES.items()
        if name in figures
    )
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{value}</td></tr>" for name, value in figures.items())
    ours, other = html.escape(policy), html.escape(against)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{ours} against {other}</title><style>{_STYLE}</style></head><body>
<h1><code>{ours}</code> against <code>{other}</code></h1>
<p class="sub">Left {other}, right {ours}; the same prompts, seeds and randomness.
The yardstick is the PSNR between two seeds.</p>
<div class="tiles">{tiles}</div>
<div class="pairs">{"".join(_figure(pair) for pair in pairs)}</div>
<details><summary>All figures</summary><table>{rows}</table></details>
<details><summary>How the images were generated</summary><pre>{html.escape(config)}</pre></details>
</body></html>
"""


def _figure(pair: Pair) -> str:
    title, note = html.escape(pair.title), html.escape(pair.note)
    left, right = _source(pair.reference), _source(pair.picture)
    return (
        f'<figure><div><img src="{left}" alt="{title}, reference"><img src="{right}" alt="{title}"></div>'
        f"<figcaption>{title}<small>{note}</small></figcaption></figure>\n"
    )


def _source(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
