"""Reads the prompt files that evaluation sets publish, into rows.

A file must be as its project publishes it, or of the same form: what cannot be read is refused at once with its line,
as a set that lacks a row has other figures. No prompt of these projects is part of this library.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.bulk.rows import Row
from foveate.core.errors import FoveateError
from foveate.core.text_file import lines_of, read_text

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The four files of HPSv2's benchmark, without their ending; also the folders that its scorer reads."""

_DPG_COLUMNS = ("item_id", "text")
_SAFE_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")
"""Ids that name files: scorers cut names at the first dot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetPrompt:
    """One prompt of a set, before it has its place.

    Attributes:
        prompt: The text.
        id: What the file calls it; None counts prompts in five digits.
        extra: What else the file says of it, as JSON values.
    """

    prompt: str
    id: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


Reader = Callable[[Path], list[SetPrompt]]


def rows_of(found: Sequence[SetPrompt], path: Path) -> list[Row]:
    """Gives prompts their places.

    Raises:
        FoveateError: There is none, or two have one id.
    """
    if not found:
        raise FoveateError(f"{path} has no prompts; give the file that the project publishes")
    ids = [f"{index:05d}" if one.id is None else one.id for index, one in enumerate(found)]
    twice = next((name for name, number in _counts(ids).items() if number > 1), None)
    if twice is not None:
        raise FoveateError(f"{path} has the id {twice!r} twice; ids name images, so each must be there once")
    return [
        Row(index=index, id=name, prompt=one.prompt, options={}, extra=one.extra)
        for index, (name, one) in enumerate(zip(ids, found, strict=True))
    ]


def read_geneval(path: Path) -> list[SetPrompt]:
    """Lines of JSON with `tag`, `include`, sometimes `exclude`, and `prompt`.

    Source: djghosh13/geneval, prompts/evaluation_metadata.jsonl; 553 prompts.
    """
    found = []
    for number, line in _lines(path):
        record = _json(line, f"{path} line {number}")
        if not isinstance(record, dict) or not isinstance(record.get("tag"), str):
            raise FoveateError(f"{path} line {number} is no object with a tag; give evaluation_metadata.jsonl")
        prompt = _prompt(record.pop("prompt", None), f"{path} line {number}")
        found.append(SetPrompt(prompt=prompt, extra=record))
    return found


def read_dpg(path: Path) -> list[SetPrompt]:
    """A folder of text files, one prompt each, whose names name the images; or the file of questions.

    Source: TencentQQGYLab/ELLA, dpg_bench/prompts/*.txt (1,065 files), or dpg_bench/dpg_bench.csv, where a prompt has
    a row for each of its questions; columns after its reader, dpg_bench/compute_dpg_bench.py.
    """
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise FoveateError(f"{path} has no .txt files; give the folder dpg_bench/prompts, or dpg_bench.csv")
        return [
            SetPrompt(id=_safe(file.stem, file), prompt=_prompt(read_text(file, "the prompt").strip(), str(file)))
            for file in files
        ]
    found: dict[str, SetPrompt] = {}
    for number, record in _table(path, ",", _DPG_COLUMNS):
        name = record["item_id"]
        if name not in found:
            place = f"{path} row {number}"
            found[name] = SetPrompt(id=_safe(name, place), prompt=_prompt(record["text"], place))
    return list(found.values())


def read_parti(path: Path) -> list[SetPrompt]:
    """Lines of `Prompt`, `Category`, `Challenge` and `Note` between tabs; quotation marks belong to the prompts.

    Source: google-research/parti, PartiPrompts.tsv; 1,632 prompts, one of which begins with a quotation mark.
    """
    return _categorised(path, "\t", "Prompt", ("Category", "Challenge", "Note"))


def read_drawbench(path: Path) -> list[SetPrompt]:
    """A table of `Prompts` and `Category`, or a list of texts as JSON.

    Source: the spreadsheet of the Imagen project as CSV (imagen.research.google), column names after
    shunk031/huggingface-datasets_DrawBench, DrawBench.py; or drawbench.json of tgxs002/HPSv2's benchmark, which has no
    categories. 200 prompts.
    """
    if path.suffix.lower() == ".json":
        return [SetPrompt(prompt=text) for text in _texts(path)]
    return _categorised(path, ",", "Prompts", ("Category",))


def read_hps(path: Path) -> list[SetPrompt]:
    """Lists of texts as JSON: a folder with anime.json, concept-art.json, paintings.json and photo.json, or one file.

    Source: tgxs002/HPSv2, hpsv2/__init__.py (`benchmark_prompts`) and hpsv2/utils.py.
    """
    files = [path / f"{style}.json" for style in HPS_STYLES] if path.is_dir() else [path]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise FoveateError(f"there is no {missing}; give the folder of HPSv2's four prompt files, or one of them")
    if files[0].stem not in HPS_STYLES:
        raise FoveateError(f"{path} must be named after its style: {', '.join(f'{one}.json' for one in HPS_STYLES)}")
    return [
        SetPrompt(id=f"{file.stem}-{index:05d}", prompt=text, extra={"style": file.stem, "style_index": index})
        for file in files
        for index, text in enumerate(_texts(file))
    ]


def read_imagereward(path: Path) -> list[SetPrompt]:
    """A list of objects with `id` and `prompt` as JSON.

    Source: THUDM/ImageReward, benchmark/benchmark-prompts.json; 100 prompts.
    """
    records = _json(read_text(path, "prompts from"), str(path))
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise FoveateError(f"{path} is no list of objects; give benchmark-prompts.json")
    found = []
    for number, record in enumerate(records):
        place = f"{path} item {number}"
        name = _safe(str(record.pop("id", "")), place)
        found.append(SetPrompt(id=name, prompt=_prompt(record.pop("prompt", None), place), extra=record))
    return found


def _categorised(path: Path, delimiter: str, prompt: str, columns: Sequence[str]) -> list[SetPrompt]:
    return [
        SetPrompt(
            prompt=_prompt(record[prompt], f"{path} row {number}"),
            extra={name: record[name] for name in columns if record[name]},
        )
        for number, record in _table(path, delimiter, (prompt, *columns))
    ]


def _table(path: Path, delimiter: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table from 1, with the columns under the names given here, whatever their case in the file."""
    text = io.StringIO(read_text(path, "prompts from"), newline="")
    # Tables with tabs quote nothing: a mark at the beginning of a cell is its first character.
    quotes_nothing = delimiter == "\t"
    reader = csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE if quotes_nothing else csv.QUOTE_MINIMAL)
    try:
        head = [name.strip().lower() for name in next(reader, [])]
        missing = [name for name in columns if name.lower() not in head]
        if missing:
            raise FoveateError(f"{path} has no column {missing[0]}; its first line must name {', '.join(columns)}")
        places = {name: head.index(name.lower()) for name in columns}
        for number, cells in enumerate(reader, start=1):
            if not any(cells):
                continue
            yield number, {name: cells[i].strip() if i < len(cells) else "" for name, i in places.items()}
    except csv.Error as error:
        raise FoveateError(f"cannot read prompts from {path}: {error} near line {reader.line_num}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines_of(read_text(path, "prompts from")), start=1):
        if line.strip():
            yield number, line


def _texts(path: Path) -> list[str]:
    texts = _json(read_text(path, "prompts from"), str(path))
    if not isinstance(texts, list):
        raise FoveateError(f"{path} is no list of texts; give the file that the project publishes")
    return [_prompt(text, f"{path} item {number}") for number, text in enumerate(texts)]


def _json(text: str, place: str) -> Any:  # noqa: ANN401 - whatever the file holds
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FoveateError(f"{place} is not JSON: {error}") from None


def _prompt(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise FoveateError(f"{place} has no prompt; give the file that the project publishes")
    return value


def _safe(name: str, place: object) -> str:
    if _SAFE_ID.fullmatch(name) is None:
        raise FoveateError(f"{place}: the id {name!r} must be letters, digits, - and _, as it names a file")
    return name


def _counts(names: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found
