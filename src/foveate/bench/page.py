"""A report as a short table, and as a self-contained page: hardware, versions, command, figures, exclusions."""

from collections.abc import Mapping, Sequence
from typing import Any

from foveate.bench.report import BenchReport, Case, Entry
from foveate.bench.spread import PERCENTILES, Spread, runs_for

_NOTHING = "-"
"""Stands where a row has no figure."""

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Column names and rows."""


def main_table(report: BenchReport) -> Table:
    """One row per size, batch and policy; ratios with their p10-p90, columns without a figure left out."""
    columns, cells = {
        "latency": (_LATENCY, _latency_cells),
        "calibrate": (_LATENCY, _latency_cells),
        "throughput": (_THROUGHPUT, _throughput_cells),
        "memory": (_MEMORY, _memory_cells),
    }[report.kind]
    rows = [(case.title, entry.policy, *cells(entry)) for case in report.cases for entry in case.entries]
    names = ("images", "policy", *columns)
    told = [i for i in range(len(names)) if any(row[i] != _NOTHING for row in rows)]
    return tuple(names[i] for i in told), [tuple(row[i] for i in told) for row in rows]


def scale_table(case: Case) -> Table:
    """Median milliseconds of every scale, one column per policy; a scale that did not run took next to none."""
    columns = ("scale", "grid", *(entry.policy for entry in case.entries))
    rows = [
        (str(scale.scale), f"{scale.grid[1]}x{scale.grid[0]}", *(_ms(e.scales[i].ms.median) for e in case.entries))
        for i, scale in enumerate(case.entries[0].scales)
    ]
    return columns, rows


def _formats(model: Mapping[str, Any]) -> str:
    """The dtype, and what differs from it."""
    parts = [model["dtype"]]
    parts += [f"decoder {model['decoder_dtype']}"] if model["decoder_dtype"] is not None else []
    parts += [f"blocks {model['quantization']}"] if model["quantization"] is not None else []
    return ", ".join(parts)


def facts(report: BenchReport) -> list[tuple[str, str]]:
    """What was measured, on what, and how: names and values."""
    model, settings = report.model, report.settings
    rounds = sorted({case.rounds for case in report.cases})
    counted = "-".join(str(count) for count in dict.fromkeys((rounds[0], rounds[-1])))
    found = [
        ("model", f"{model['name']}, {model['weights']} weights, {_formats(model)}, {model['device']}"),
        ("weights", ", ".join(f"{part} {_mb(float(size))} MB" for part, size in report.weights_bytes.items())),
        ("machine", f"{report.machine['used']}, {settings['threads']} threads"),
        ("rounds", f"{counted} counted, {settings['warmup']} for warm-up; policies alternate, spread is p10-p90"),
    ]
    if report.peak is not None:
        rate = f"{report.peak.flops_per_s / 1e9:.1f} GFLOP/s in {report.peak.dtype}"
        found.append(("matmul peak", f"{rate}, squares of {report.peak.size}"))
    missing = [f"p{p} needs {runs_for(p)}" for p in PERCENTILES if rounds[-1] < runs_for(p)]
    if missing and report.kind == "throughput":
        found.append(("percentiles", f"left out, too few rounds: {', '.join(missing)}"))
    if report.stopped is not None:
        found.append(("stopped", f"{report.stopped}: only complete rounds before that are in here"))
    return found


def markdown(report: BenchReport, plot: str | None) -> str:
    """The page.

    Args:
        report: What was found.
        plot: Name of the plot beside the page, if there is one.
    """
    versions = [f"{name} {number}" for name, number in report.machine["versions"].items() if number is not None]
    devices = ", ".join(report.machine["devices"])
    given = [*facts(report), ("processor", _processor(report)), ("devices", devices), ("versions", ", ".join(versions))]
    lines = [f"# foveate bench {report.kind}", "", "```text", report.command, "```", ""]
    lines += [f"- {name}: {value}" for name, value in given]
    lines += ["", *markdown_table(main_table(report))]
    lines += ["", f"![{report.kind}]({plot})"] if plot is not None else []
    for case in report.cases:
        if report.kind == "latency":
            lines += ["", f"Median milliseconds per scale, {case.title}:", "", *markdown_table(scale_table(case))]
    lines += ["", "How it was measured:", "", *(f"- {line}" for line in report.method)]
    lines += ["", "Not part of any figure:", "", *(f"- {line}" for line in report.excluded)]
    return "\n".join(lines) + "\n"


_LATENCY = (
    "ms", "spread", "text", "transformer", "refiner", "decoder", "speedup", "end to end", "FLOP-bound", "efficiency",
    "of peak",
)  # fmt: skip
_THROUGHPUT = ("images/s", "ms", "spread", "speedup", *(f"p{p} ms" for p in PERCENTILES))
_MEMORY = ("KV MB", "caches MB", "activations MB", "transformer MB", "call MB", "spread", "peak MB", "call ratio")


def _latency_cells(entry: Entry) -> tuple[str, ...]:
    text, transformer, refiner, decoder = (
        _ms(entry.figures[f"ms.{part}"].median) for part in ("text", "transformer", "refiner", "decoder")
    )
    parts = (text, transformer, refiner if entry.figures["ms.refiner"].median else _NOTHING, decoder)
    measured = (_speedup(entry, part) for part in ("transformer", "end_to_end"))
    names = (("speedup.by_flops", "{:.2f}x"), ("efficiency", "{:.0%}"), ("peak_share", "{:.0%}"))
    others = (_ratio(entry.figures.get(name), form) for name, form in names)
    total = entry.figures["ms.total"]
    return (_ms(total.median), f"{_ms(total.p10)}-{_ms(total.p90)}", *parts, *measured, *others)


def _throughput_cells(entry: Entry) -> tuple[str, ...]:
    total = entry.figures["ms.total"]
    percentiles = (entry.numbers.get(f"single_stream_ms.p{p}") for p in PERCENTILES)
    return (
        f"{entry.numbers['images_per_s']:.3g}",
        _ms(total.median),
        f"{_ms(total.p10)}-{_ms(total.p90)}",
        _speedup(entry, "end_to_end"),
        *(_NOTHING if value is None else _ms(value) for value in percentiles),
    )


def _memory_cells(entry: Entry) -> tuple[str, ...]:
    medians = [_median_mb(entry.figures, part) for part in ("kv", "caches", "activations", "transformer", "call")]
    call = entry.figures.get("bytes.call")
    spread = _NOTHING if call is None else f"{_mb(call.p10)}-{_mb(call.p90)}"
    ratio = _ratio(entry.figures.get("ratio.call"), "{:.2f}")
    return (*medians, spread, _median_mb(entry.figures, "peak"), ratio)


def _median_mb(figures: Mapping[str, Spread], part: str) -> str:
    found = figures.get(f"bytes.{part}")
    return _NOTHING if found is None else _mb(found.median)


def _speedup(entry: Entry, part: str) -> str:
    found = entry.figures.get(f"speedup.{part}")
    return _NOTHING if found is None else f"{found.median:.2f}x ({found.p10:.2f}-{found.p90:.2f})"


def _ratio(spread: Spread | None, form: str) -> str:
    return _NOTHING if spread is None else form.format(spread.median)


def _ms(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three digits


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def _processor(report: BenchReport) -> str:
    cpu = report.machine["cpu"]
    bf16 = "with" if cpu["has_bf16_instructions"] else "without"
    kind = f"{cpu['name']}, {cpu['cores']} cores, {cpu['capability']}, {bf16} bfloat16 instructions"
    return f"{kind}; kernels: {cpu['kernels']}"


def markdown_table(table: Table) -> list[str]:
    """Lines of a table in Markdown."""
    columns, rows = table

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *(line(row) for row in rows)]
