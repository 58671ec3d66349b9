"""Evaluation sets: how the file that a project publishes is read, laid out for its scorer, and scored.

A set is one declaration. Its file is given by the user; none is part of this library.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from foveate.bulk import layouts, scores, set_files
from foveate.bulk.layouts import Layout
from foveate.bulk.output import OutputFolder
from foveate.bulk.rows import BadRow, Row
from foveate.bulk.scan import Scan
from foveate.bulk.scores import ScoreReader, Scores
from foveate.bulk.set_files import Reader
from foveate.core.errors import FoveateError, unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """A set of prompts with a scorer.

    Attributes:
        name: As `--prompts-set` takes it.
        title: As people write it.
        file: What the user gives, in words.
        num_images: Of a prompt, where nobody says otherwise: as many as the project's scorer is used with.
        read: Reads the file.
        layout: The folder that the scorer reads.
        read_scores: Reads what the scorer wrote.
    """

    name: str
    title: str
    file: str
    num_images: int
    read: Reader
    layout: Layout
    read_scores: ScoreReader


_FOLDER = Layout(files=layouts.image_folder_files, describes=layouts.image_folder_line)

SETS = {
    one.name: one
    for one in (
        EvaluationSet(
            name="geneval",
            title="GenEval",
            file="evaluation_metadata.jsonl",
            num_images=4,
            read=set_files.read_geneval,
            layout=Layout(files=layouts.geneval_files),
            read_scores=scores.read_geneval,
        ),
        EvaluationSet(
            name="dpg",
            title="DPG-Bench",
            file="the folder dpg_bench/prompts, or dpg_bench.csv",
            num_images=4,
            read=set_files.read_dpg,
            layout=Layout(files=layouts.dpg_files, needs_all=True),
            read_scores=scores.read_dpg,
        ),
        EvaluationSet(
            name="parti",
            title="PartiPrompts",
            file="PartiPrompts.tsv",
            num_images=1,
            read=set_files.read_parti,
            layout=_FOLDER,
            read_scores=scores.read_parti,
        ),
        EvaluationSet(
            name="drawbench",
            title="DrawBench",
            file="the spreadsheet as .csv, or drawbench.json",
            num_images=1,
            read=set_files.read_drawbench,
            layout=_FOLDER,
            read_scores=scores.read_drawbench,
        ),
        EvaluationSet(
            name="hps",
            title="HPSv2",
            file="the folder of anime.json, concept-art.json, paintings.json and photo.json, or one of them",
            num_images=1,
            read=set_files.read_hps,
            layout=Layout(files=layouts.hps_files),
            read_scores=scores.read_hps,
        ),
        EvaluationSet(
            name="imagereward",
            title="ImageReward",
            file="benchmark-prompts.json",
            num_images=10,
            read=set_files.read_imagereward,
            layout=Layout(files=layouts.imagereward_files, needs_all=True, needs_all_rows=True),
            read_scores=scores.read_imagereward,
        ),
    )
}
"""By name."""


class SetSource:
    """A `Source` whose rows are in memory: published sets have some thousand at most."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        """Takes the rows in order.

        Args:
            name: Of the file, without where it lies.
            rows: All of them.
        """
        self.name, self._rows = name, tuple(rows)

    def read(self, start: int, stop: int) -> Iterator[Row | BadRow]:
        """The rows from one index to another, the end excluded; those that do not exist are left out."""
        yield from self._rows[max(start, 0) : max(stop, 0)]


def find_set(name: str) -> EvaluationSet:
    """A set by its name.

    Raises:
        FoveateError: There is none.
    """
    if name not in SETS:
        raise unknown("prompt set", name, list(SETS))
    return SETS[name]


def open_set(name: str, path: Path, limit: int | None = None) -> tuple[SetSource, Scan]:
    """Reads the file of a set, as `open_source` does any other.

    Args:
        name: Of the set.
        path: What the project publishes.
        limit: Leaves out all rows behind the first so many.

    Raises:
        FoveateError: There is no such set or file, or the file is not of the set's form.
    """
    if limit is not None and limit < 1:
        raise FoveateError(f"the limit must be 1 row or more, got {limit}")
    found = find_set(name)
    if not path.exists():
        raise FoveateError(f"there is no {path}; {found.title} reads {found.file}, which its project publishes")
    rows = set_files.rows_of(found.read(path), path)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.prompt, dict(row.extra)], sort_keys=True).encode())
    rows = rows[:limit]
    columns = dict.fromkeys(name for row in rows for name in row.extra)
    scan = Scan(
        num_rows=len(rows),
        num_bad=0,
        sha256=digest.hexdigest(),
        extra_columns=tuple(columns),
        unused_columns=(),
        notes=(),
    )
    return SetSource(path.absolute().name, rows), scan


def write_layout(
    name: str | EvaluationSet,
    output: OutputFolder,
    into: Path,
    warn: Callable[[str], object] | None = None,
) -> int:
    """Writes the folder that a set's scorer reads, from what a run has published; what is there whole is kept.

    Args:
        name: The set, or its name.
        output: The run, finished or not.
        into: The folder.
        warn: Is told in one line how many rows are left out.

    Returns:
        Rows that the folder now holds whole.

    Raises:
        FoveateError: The run is not of this set, the folder holds something else, or the scorer cannot take the
            images.
    """
    found = find_set(name) if isinstance(name, str) else name
    made_for = output.config.get("set")
    if made_for != found.name:
        what = "no set" if made_for is None else f"the set {made_for}"
        raise FoveateError(f"{output.path} was generated from {what}; a layout of {found.name} needs --prompts-set")
    return layouts.write_files(found.layout, found.name, output, into, warn)


def read_scores(name: str | EvaluationSet, path: Path) -> Scores:
    """Reads what a set's scorer wrote.

    Raises:
        FoveateError: It cannot be read, or is not what the scorer writes.
    """
    found = find_set(name) if isinstance(name, str) else name
    return found.read_scores(path)
