"""What the columns of a table mean: the prompt, the id, an option of a call, or something that is only carried along.

Options come from their declarations (`OPTIONS`), under the names of their keyword arguments, flags and aliases; hyphens
and underscores are equal.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, cast

from foveate.bulk.cells import (
    Reader,
    extra_reader,
    id_reader,
    option_reader,
    plain_text,
    prompt_reader,
    quoted,
    size_reader,
)
from foveate.core.errors import FoveateError, unknown
from foveate.pipeline.option_texts import names_of
from foveate.pipeline.options import OPTIONS, Options

PROMPT, ID, SIZE = "prompt", "id", "size"

_OWN, _OPTION, _EXTRA = 0, 1, 2
"""Where the value of a column goes: what bulk generation itself reads, the options, or what is carried along."""

_MOST_NAMES = 1000
"""Names of columns that are remembered, and sets of them: objects of JSON may each have others."""

_NEAR, _SHORTEST = 0.8, 4
"""How like a name a column must be, from 0 to 1, and how long, to be taken for a slip of the pen."""


class Content(NamedTuple):
    """What one row says."""

    id: str | None
    prompt: str
    options: Options
    extra: dict[str, Any]


@cache
def targets() -> Mapping[str, str]:
    """What each known name of a column says: `prompt`, `id`, `size` or a name of `OPTIONS`, the refused ones too."""
    found = {PROMPT: PROMPT, ID: ID, SIZE: SIZE}
    for option in OPTIONS.values():
        for name in (option.name, *names_of(option)):
            found[name.removeprefix("--").removeprefix("-").replace("-", "_")] = option.alias_of or option.name
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The columns of a row, in order: where a value goes, under which name, and how it is read.

    Attributes:
        columns: One entry per column.
        problem: Why no row with these columns can be read; empty if one can.
        id_column: Position and reader of the id.
    """

    columns: tuple[tuple[int, str, Reader], ...]
    problem: str
    id_column: tuple[int, Reader] | None

    def read(self, values: Sequence[Any]) -> Content:
        """What a row says.

        Raises:
            FoveateError: A value cannot be read, two of them contradict, or there is no prompt.
        """
        if self.problem:
            raise FoveateError(self.problem)
        found: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
        for (place, name, read), value in zip(self.columns, values, strict=True):
            if value is not None and (content := read(value)) is not None:
                found[place][name] = content
        own, options, extra = found
        if (prompt := own.get(PROMPT)) is None:
            raise FoveateError("no prompt; say what to generate, or leave the row out")
        if (size := own.get(SIZE)) is not None:
            if both := sorted(size.keys() & options.keys()):
                raise FoveateError(f"size and {both[0]} both say how large the image is; leave one out")
            options.update(size)
        return Content(own.get(ID), prompt, cast(Options, options), extra)

    def id_of(self, values: Sequence[Any]) -> str | None:
        """The id of a row that may be unreadable otherwise, or None."""
        if self.id_column is None:
            return None
        position, read = self.id_column
        try:
            value = values[position]
            return None if value is None else read(value)
        except FoveateError:
            return None


@dataclass(kw_only=True, slots=True)
class Columns:
    """Gives the layout of rows, and remembers what columns it has seen.

    Attributes:
        mapping: Names of columns for what they say, such as prompt: caption.
        are_texts: Whether all cells are texts.
        seen: All columns so far, and what they say or None, in order.
    """

    mapping: Mapping[str, str]
    are_texts: bool
    seen: dict[str, str | None] = field(default_factory=dict)
    _by_column: dict[str, str] = field(default_factory=dict)
    _layouts: dict[tuple[str, ...], Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the mapping.

        Raises:
            FoveateError: It names something that no column can say, or one column or meaning twice.
        """
        for name, column in self.mapping.items():
            if (target := targets().get(name.replace("-", "_"))) is None:
                raise unknown("column", name, [PROMPT, ID, SIZE, *(key for key in OPTIONS if _may_say(key))])
            _refuse(target, name)
            if column in self._by_column or target in self._by_column.values():
                raise FoveateError(f"--column {name}={column}: {column} or {name} is named twice; leave one out")
            self._by_column[column] = target

    def layout(self, names: tuple[str, ...]) -> Layout:
        """The layout of rows with these columns.

        Raises:
            FoveateError: A row cannot say one of them.
        """
        if (found := self._layouts.get(names)) is None:
            if len(self._layouts) >= _MOST_NAMES:
                self._layouts.clear()
            found = self._layouts[names] = self._make(names)
        return found

    def column_of(self, target: str) -> str:
        """The name that the column of a meaning has or should have."""
        return next((column for column, name in self._by_column.items() if name == target), target)

    def missing(self) -> str | None:
        """A column of the mapping that was never seen."""
        return next((column for column in self._by_column if column not in self.seen), None)

    def extra(self) -> tuple[str, ...]:
        """Columns that say nothing and are carried along."""
        return tuple(name for name, target in self.seen.items() if target is None)

    def _target(self, column: str) -> str | None:
        if (target := self._by_column.get(column)) is not None:
            return target
        target = targets().get(column.replace("-", "_"))
        return None if target in self._by_column.values() else target

    def _make(self, names: tuple[str, ...]) -> Layout:
        columns, said, problem, id_column = [], dict[str, str](), "", None
        for position, name in enumerate(names):
            target = self._target(name)
            place, key, read = self._reader(name, target)
            columns.append((place, key, read))
            if target is not None:
                _refuse(target, name)
                if target in said:
                    problem = f"{said[target]} and {name} say the same; leave one out"
                said[target] = name
                id_column = (position, read) if target == ID else id_column
            try:
                plain_text("the name of a column", name)
            except FoveateError as error:
                problem = str(error)
            if name not in self.seen and len(self.seen) < _MOST_NAMES and not problem:
                self.seen[name] = target
        return Layout(columns=tuple(columns), problem=problem, id_column=id_column)

    def _reader(self, column: str, target: str | None) -> tuple[int, str, Reader]:
        if target is None:
            return _EXTRA, column, extra_reader(column, are_texts=self.are_texts)
        own = {PROMPT: prompt_reader, ID: id_reader, SIZE: size_reader}
        if target in own:
            return _OWN, target, own[target](column)
        return _OPTION, target, option_reader(OPTIONS[target], column, are_texts=self.are_texts)


def near_misses(columns: Sequence[str]) -> tuple[str, ...]:
    """What to say of columns that are nearly known names; one line each."""
    known = list(targets())
    found = []
    for column in columns:
        name = column.strip().lower().replace("-", "_").replace(" ", "_")
        close = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR) if len(name) >= _SHORTEST else []
        if close or name in known:
            meant = close[0] if close else name
            found.append(
                f"the column {quoted(column)} sets nothing and is carried along; if you meant {meant}, rename it"
            )
    return tuple(found)


def _may_say(name: str) -> bool:
    return not OPTIONS[name].not_in_rows and OPTIONS[name].alias_of is None


def _refuse(target: str, column: str) -> None:
    option = OPTIONS.get(target)
    if option is not None and option.not_in_rows:
        raise FoveateError(f"a row cannot say {column}: {option.not_in_rows}; leave the column out or rename it")
