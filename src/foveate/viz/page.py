"""The report as one self-contained HTML page: frontier, images in pairs, times, table, configuration.

It opens offline: styles, scripts and images are inside, and its content security policy forbids every request and every
script and style but these. What needs no script (tiles, tables, configuration) is there without one.
"""

import base64
import hashlib
import html
import json
import re
from functools import cache
from importlib.resources import files

from foveate.viz.metrics import PLAIN, TILES, Metric, metric
from foveate.viz.page_data import Cell, Figure, FrontierPoint, Lead, PageData, Role, ScaleTime, Table
from foveate.viz.page_images import StoredImages, store
from foveate.viz.page_payload import finite, headline, known_metrics, payload

MAX_BYTES = 14_000_000
"""Of the embedded images; the worst pairs are kept."""
STYLES = ("theme.css", "view.css", "plot.css", "page.css", "gallery.css", "table.css")
SCRIPTS = ("dom.js", "maps.js", "plot.js", "bars.js", "view.js", "table.js", "gallery.js", "page.js")
"""In the order of their imports."""

_IMPORT = re.compile(r"^import .*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const|let) )", re.MULTILINE)
_LOGO = (
    '<svg width="22" height="22" viewBox="0 0 22 22" fill="none" stroke="currentColor" aria-hidden="true">'
    '<circle cx="11" cy="11" r="10" stroke-opacity=".3"/><circle cx="11" cy="11" r="6.5" stroke-opacity=".6"/>'
    '<circle cx="11" cy="11" r="3" fill="currentColor"/></svg>'
)
_NO_SCRIPT = (
    "<noscript><p class='pg-notes'>The plots and images need JavaScript; tables and settings do not.</p></noscript>"
)


def asset(name: str) -> str:
    """A style sheet or script of the page, as text."""
    return files("foveate.viz").joinpath("assets", name).read_text("utf-8")


@cache
def bundle() -> str:
    """All scripts as one module: imports between them are left out, as everything is in one scope."""
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", asset(name))) for name in SCRIPTS)


def render(data: PageData, *, max_bytes: int = MAX_BYTES) -> str:
    """The page.

    Args:
        data: Everything on it.
        max_bytes: Size of the embedded images at most; the worst pairs of every policy are kept, and the page says so.
    """
    stored = store(data.pairs, max_bytes)
    style, script = "\n".join(map(asset, STYLES)), bundle()
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    sections = _sections(data, stored)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}">{content}</section>' for name, _, content in sections)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="foveate"><title>{html.escape(data.title)}</title><style>{style}</style></head>
<body><a class="pg-skip" href="#pg-main">Skip to the content</a>
<header class="pg-head"><div class="pg-brand">{_LOGO}<span>foveate report</span></div>
<h1>{html.escape(data.title)}</h1><p class="pg-summary">{html.escape(data.summary)}</p>
{_notes(data.notes)}{_NO_SCRIPT}</header>
<div class="pg-bar" role="region" aria-label="Page controls"><div class="pg-bar-inside">
<nav aria-label="Sections">{links}</nav>
<label class="pg-choice">Policy <select id="pg-policy"></select></label>
<button type="button" class="pg-button" id="pg-theme">Light / dark</button>
</div></div>
<main id="pg-main">{body}</main><footer>Made by foveate. This file is complete: it loads nothing.</footer>
<script type="application/json" id="pg-data">{payload(data, stored)}</script>
<script type="module">{script}</script></body></html>
"""
    return page.encode("utf-8", "replace").decode("utf-8")


def _hash(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _sections(data: PageData, stored: StoredImages) -> list[tuple[str, str, str]]:
    """Name, title and content of every section that there is something for."""
    found = [("figures", "Figures", _tiles(data))]
    if data.lead is not None:
        found.insert(0, ("lead", html.escape(data.lead.heading), _lead(data.lead)))
    if _has_axes(data):
        found.append(("frontier", "Frontier", _FRONTIER))
    if stored.pairs:
        found.append(("images", "Images", _images(data, len(stored.pairs))))
    if data.scale_times:
        found.append(("time", "Time per scale", _times(data.scale_times)))
    found.append(("policies", "All policies", _policies(data)))
    found.append(("again", "Get this again", _again(data)))
    return found


def _has_axes(data: PageData) -> bool:
    axes = {one.axis for one in known_metrics(data)}
    return {"cost", "fidelity"} <= axes


def _notes(notes: tuple[str, ...]) -> str:
    lines = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f'<ul class="pg-notes" aria-label="Notes">{lines}</ul>' if notes else ""


def _tiles(data: PageData) -> str:
    point = next(one for one in data.points if one.name == headline(data))
    tiles = "".join(_tile(metric(name), point.figures[name]) for name in TILES if name in point.figures)
    return f'<h2 class="pg-hidden">Figures</h2><div class="pg-tiles" id="pg-tiles" aria-live="polite">{tiles}</div>'


def _tile(of: Metric, found: Figure) -> str:
    interval = of.print_interval(found.low, found.high) or "&nbsp;"
    return (
        f'<div class="pg-tile"><span class="pg-tile-name">{html.escape(of.label)}</span><b>{of.print(found.value)}</b>'
        f"<small>{interval}</small></div>"
    )


_FRONTIER = """<h2>Frontier</h2><p>A useful policy lies beyond the dashed line of the best controls. Thin bars are
intervals. Choose a point with a click, or with Tab, arrows and Enter.</p>
<div class="pg-card"><div class="pg-controls"><label>Cost <select id="pg-x"></select></label>
<label>Fidelity <select id="pg-y"></select></label></div><foveate-plot id="pg-frontier"></foveate-plot>
<div class="pg-legend" id="pg-legend"></div></div>"""


def _images(data: PageData, num_shown: int) -> str:
    num_all = max(len(data.pairs), data.num_pairs)
    left_out = f" The page holds the worst {num_shown} of {num_all} pairs." if num_shown < num_all else ""
    return f"""<h2>Images</h2><p>{html.escape(data.pairing)}{left_out}</p>
<div class="pg-card" id="pg-gallery"><div class="pg-viewer"><foveate-view></foveate-view>
<div class="pg-details" data-part="details"></div>
<div class="pg-list"><div class="pg-controls"><label>Images of <select data-part="filter"></select></label>
<label>Order <select data-part="sort"></select></label><span data-part="count" role="status"></span></div>
<div class="pg-thumbs" data-part="thumbs" role="group" aria-label="Pairs of images"></div></div>
</div></div>"""


def _times(times: tuple[ScaleTime, ...]) -> str:
    names = list(dict.fromkeys(time.policy for time in times))
    cells = {(time.scale, time.policy): time for time in times}
    scales = sorted({time.scale for time in times})
    grids = {time.scale: time.grid for time in times}
    rows = tuple(
        (f"{s}: {grids[s][0]} x {grids[s][1]}", *(cells[s, n].ms if (s, n) in cells else None for n in names))
        for s in scales
    )
    table = Table(caption="Median milliseconds per scale", columns=("scale and grid", *names), rows=rows)
    return f"""<h2>Time per scale</h2><p>Milliseconds of each scale, the chosen policy beside the reference.</p>
<div class="pg-card"><foveate-bars id="pg-bars"></foveate-bars><div class="pg-legend" id="pg-bars-legend"></div></div>
<details><summary>As a table, all policies</summary>{_table(table)}</details>"""


def _policies(data: PageData) -> str:
    columns = known_metrics(data)
    heads = "".join(_head(one.label, "descending" if one.is_high_good else "ascending") for one in columns)
    rows = "".join(_policy_row(point, columns) for point in data.points)
    return f"""<h2>All policies</h2><p>A column's head sorts, best first. A name chooses that policy for the page.</p>
<div class="pg-scroll" tabindex="0" role="region" aria-label="All policies"><table id="pg-policies" data-sorts>
<thead><tr>{_head("policy", "ascending")}{heads}</tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _head(label: str, first: str) -> str:
    """A column's head, and in which order its first click sorts."""
    button = f'<button type="button" class="pg-sort">{html.escape(label)}</button>'
    return f'<th scope="col" data-first="{first}">{button}</th>'


def _policy_row(point: FrontierPoint, columns: list[Metric]) -> str:
    name = html.escape(point.name)
    role = [point.role.value] if point.role in (Role.CONTROL, Role.REFERENCE) else []
    told = html.escape(", ".join([*role, *(f"{key} {text}" for key, text in point.details.items())]))
    cells = "".join(_figure_cell(point.figures.get(one.name), one) for one in columns)
    return (
        f'<tr data-name="{name}"><th scope="row" data-value="{name}">'
        f'<button type="button" class="pg-name" data-choose="{name}">{name}</button>'
        f'<span class="pg-role">{told}</span></th>{cells}</tr>'
    )


def _figure_cell(found: Figure | None, of: Metric) -> str:
    if found is None:
        return '<td data-value="">n/a</td>'
    value = finite(found.value)
    interval = of.print_interval(found.low, found.high)
    small = f"<small>{interval}</small>" if interval else ""
    return f'<td data-value="{"" if value is None else repr(value)}">{of.print(found.value)}{small}</td>'


def _table(table: Table) -> str:
    """Any other table; its heads sort, too."""
    heads = "".join(_head(name, "descending") for name in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    caption = html.escape(table.caption)
    return (
        f'<div class="pg-scroll" tabindex="0" role="region" aria-label="{caption}"><table data-sorts>'
        f"<caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f'<td class="pg-text" data-value="{html.escape(cell)}">{html.escape(cell)}</td>'
    if isinstance(cell, int):
        return f'<td data-value="{cell}">{cell}</td>'
    return _figure_cell(cell if isinstance(cell, Figure) else Figure(value=cell), PLAIN)


def _lead(lead: Lead) -> str:
    text = f"<p>{html.escape(lead.text)}</p>" if lead.text else ""
    charts = "".join(
        f'<div class="pg-card pg-chart"><h3>{html.escape(chart.caption)}</h3>'
        f'<foveate-plot id="pg-chart-{i}"></foveate-plot><div class="pg-legend" id="pg-chart-legend-{i}"></div></div>'
        for i, chart in enumerate(lead.charts)
    )
    copies = "".join(_copied(f"pg-file-{i}", name, content) for i, (name, content) in enumerate(lead.files.items()))
    tables = "".join(map(_table, lead.tables))
    return f'<h2>{html.escape(lead.heading)}</h2>{text}<div class="pg-charts">{charts}</div>{tables}{copies}'


def _copied(name: str, title: str, content: str, kind: str = "") -> str:
    """Text with a button that copies it."""
    return (
        f'<div class="pg-copy"><h3>{html.escape(title)}</h3>'
        f'<button type="button" class="pg-button" data-copy="{name}">Copy</button></div>'
        f'<pre id="{name}" class="{kind}" tabindex="0">{html.escape(content)}</pre>'
    )


def _again(data: PageData) -> str:
    facts = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in data.facts.items())
    config = json.dumps(data.config, indent=2, ensure_ascii=False, default=str)
    return f"""<h2>Get this again</h2><p>What ran, on what, and every setting.</p>
{f'<dl class="pg-facts">{facts}</dl>' if facts else ""}
{_copied("pg-command", "Command", data.command, "pg-command")}{_copied("pg-config", "Configuration", config)}"""
