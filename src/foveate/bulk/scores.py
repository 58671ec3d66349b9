"""Reads what the scorers of evaluation sets write, as figures overall and per category."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.bulk.set_files import HPS_STYLES
from foveate.core.errors import FoveateError
from foveate.core.text_file import lines_of, read_text

SCORE = "score"
"""Name of the figure that a set is known by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Figures of one run, as its scorer gave them.

    Attributes:
        scorer: What the figures are of, in lower case, such as `geneval`.
        overall: By name; `score` is the set's own.
        categories: The same of every category that the scorer knows.
    """

    scorer: str
    overall: Mapping[str, float]
    categories: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """All figures by dotted name, such as `geneval.score` and `geneval.color_attr.score`."""
        own = {f"{self.scorer}.{name}": value for name, value in self.overall.items()}
        for category, values in self.categories.items():
            own |= {f"{self.scorer}.{slug(category)}.{name}": value for name, value in values.items()}
        return own

    def labels(self) -> dict[str, str]:
        """What people read for each of `figures`."""
        own = {f"{self.scorer}.{name}": f"{self.scorer}{_told(name)}" for name in self.overall}
        for category, values in self.categories.items():
            own |= {f"{self.scorer}.{slug(category)}.{n}": f"{self.scorer}, {category}{_told(n)}" for n in values}
        return own


ScoreReader = Callable[[Path], Scores]


def read_geneval(path: Path) -> Scores:
    """One line an image: `tag` and `correct`; the score is the mean over tags of the share of correct images.

    Source: djghosh13/geneval, evaluation/evaluate_images.py writes the file, evaluation/summary_scores.py sums it up.
    """
    tags: dict[str, list[bool]] = {}
    prompts: dict[int, bool] = {}
    for number, record in _records(path):
        tag, is_correct = record.get("tag"), record.get("correct")
        if not isinstance(tag, str) or not isinstance(is_correct, bool):
            raise FoveateError(f"{path} line {number} has no tag or no correct; give what evaluate_images.py wrote")
        tags.setdefault(tag, []).append(is_correct)
        prompt = hash(str(record.get("metadata", record.get("prompt"))))
        prompts[prompt] = prompts.get(prompt, False) or is_correct
    if not tags:
        raise FoveateError(f"{path} has no images; give what evaluate_images.py wrote")
    shares = {tag: sum(found) / len(found) for tag, found in tags.items()}
    images = [one for found in tags.values() for one in found]
    return Scores(
        scorer="geneval",
        overall={
            SCORE: sum(shares.values()) / len(shares),
            "correct_images": sum(images) / len(images),
            "correct_prompts": sum(prompts.values()) / len(prompts),
        },
        categories={tag: {SCORE: share} for tag, share in shares.items()},
    )


_DPG_LINE = re.compile(r"(?:\t(?P<category>[^:]+)|DPG-Bench score): (?P<value>nan|[\d.]+(?:e-?\d+)?)\s*")


def read_dpg(path: Path) -> Scores:
    """The text that ends with the score; above it, categories of both levels in per cent.

    Source: TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py (`output` in `main`).
    """
    total: float | None = None
    categories: dict[str, dict[str, float]] = {}
    for match in map(_DPG_LINE.fullmatch, lines_of(read_text(path, "scores from"))):
        if match is None:
            continue
        if match["category"] is None:
            total = float(match["value"])
        else:
            categories[match["category"].strip()] = {SCORE: float(match["value"])}
    if total is None or not math.isfinite(total):
        raise FoveateError(f"{path} has no DPG-Bench score; give what compute_dpg_bench.py wrote, to its end")
    return Scores(scorer="dpg", overall={SCORE: total}, categories=categories)


_HPS_LINE = re.compile(rf"(?P<model>.*) (?P<style>{'|'.join(HPS_STYLES)}|Average)\s+(?P<mean>-?\d+\.\d+)(?:\s.*)?")


def read_hps(path: Path) -> Scores:
    """What `hpsv2.evaluate` prints, saved as a file: a line a style, and one of their average.

    Source: tgxs002/HPSv2, hpsv2/evaluation.py (`evaluate_benchmark`).
    """
    found: dict[str, dict[str, float]] = {}
    for match in map(_HPS_LINE.fullmatch, lines_of(read_text(path, "scores from"))):
        if match is not None:
            found.setdefault(match["model"], {})[match["style"]] = float(match["mean"])
    if len(found) != 1:
        there = f"several models ({', '.join(found)})" if found else "no model"
        raise FoveateError(f"{path} has scores of {there}; give what hpsv2.evaluate printed for one")
    (values,) = found.values()
    if "Average" not in values:
        raise FoveateError(f"{path} has no line Average; give what hpsv2.evaluate printed, to its end")
    total = values.pop("Average")
    return Scores(scorer="hps", overall={SCORE: total}, categories={name: {SCORE: v} for name, v in values.items()})


def read_imagereward(path: Path) -> Scores:
    """A list with the mean score of every prompt; the score is their mean.

    Source: THUDM/ImageReward, test-benchmark.py, `<benchmark>-benchmark-<model>-result.json`; other benchmarks of that
    script, such as CLIP, have figures of their own name.
    """
    try:
        records = json.loads(read_text(path, "scores from"))
        means = [float(one["mean_score"]) for one in records]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, FoveateError):
            raise
        raise FoveateError(f"{path} has no mean_score for every prompt; give ...-result.json of one model") from None
    if not means or not all(map(math.isfinite, means)):
        raise FoveateError(f"{path} has no scores, or some that are no numbers; run the scorer again")
    benchmark = path.name.partition("-benchmark-")[0] if "-benchmark-" in path.name else "ImageReward-v1.0"
    scorer = "imagereward" if benchmark.startswith("ImageReward") else slug(benchmark)
    return Scores(scorer=scorer, overall={SCORE: sum(means) / len(means)})


def read_parti(path: Path) -> Scores:
    """A table of any scorer, as `read_table`; PartiPrompts has no scorer of its own."""
    return read_table(path, "parti", ("Category", "Challenge"))


def read_drawbench(path: Path) -> Scores:
    """A table of any scorer, as `read_table`; DrawBench has no scorer of its own."""
    return read_table(path, "drawbench", ("Category",))


def read_table(path: Path, scorer: str, categories: tuple[str, ...]) -> Scores:
    """One row an image, as csv or lines of JSON; every column of numbers is a figure, the mean of its values.

    Args:
        path: With the columns of the layout's metadata.jsonl, or some of them, beside those of the scorer.
        scorer: What the figures are of.
        categories: Columns that figures are also given for each value of.

    Raises:
        FoveateError: It cannot be read, or no column holds numbers only.
    """
    known = {"file_name", "row", "id", "image", "prompt", "seed", "note", *(name.lower() for name in categories)}
    sums: dict[str, dict[str, list[float]]] = {}
    rejected: set[str] = set()
    for _, record in _records(path):
        groups = ["", *(str(record[name]) for name in categories if record.get(name))]
        for name, value in record.items():
            if str(name).lower() in known or name in rejected:
                continue
            number = _number(value)
            if number is None:
                rejected.add(name)
                continue
            for group in groups:
                sums.setdefault(group, {}).setdefault(slug(name), []).append(number)
    dropped = {slug(name) for name in rejected}
    means = {
        group: {name: sum(v) / len(v) for name, v in found.items() if name not in dropped}
        for group, found in sums.items()
    }
    if not means.get(""):
        raise FoveateError(f"{path} has no column of numbers; write one row an image with its scores")
    return Scores(scorer=scorer, overall=means.pop(""), categories=means)


def slug(name: str) -> str:
    """A name in lower case with underscores, as bounds take it."""
    found = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return found if found[:1].isalpha() else f"_{found}"


def _told(name: str) -> str:
    return "" if name == SCORE else f", {name.replace('_', ' ')}"


def _number(value: object) -> float | None:
    """A finite number, also one that is written as text."""
    if isinstance(value, bool):
        return float(value)
    try:
        number = float(value)  # type: ignore[arg-type]  # what is no number raises
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Objects of a file of lines of JSON, or rows of a csv; one in memory at a time."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                yield from enumerate(csv.DictReader(file, restkey="", restval=""), start=2)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"line {number} is no object")
                    yield number, record
    except OSError as error:
        raise FoveateError(f"cannot read scores from {path}: {error.strerror or error}") from None
    except (ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, FoveateError):
            raise
        raise FoveateError(f"cannot read scores from {path}: {error}; give a file of lines of JSON, or a csv") from None
