"""Fields of a policy and the values that they shall take: `count=1..3`, `keep_ratio=0.3..0.9:0.1`, `fill=base,zero`."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from foveate.core.errors import FoveateError
from foveate.core.fields import split, written
from foveate.core.policy import Policy
from foveate.policies.registry import join, load_policy

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?::({_NUMBER}))?")
_MOST = 10_000
"""Values of a range: more is a typing error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Over:
    """One field and what it ranges over.

    Attributes:
        field: Its name, with that of its part and a dot in front where several parts have it.
        values: As specs write them; empty for a range without steps.
        low: First number of a range, None for a list of values.
        high: Last number of a range, included.
    """

    field: str
    values: tuple[str, ...]
    low: Decimal | None = None
    high: Decimal | None = None

    @classmethod
    def parse(cls, text: str) -> "Over":
        """Reads `FIELD=LOW..HIGH[:STEP]` or `FIELD=VALUE,VALUE...`; whole numbers have the step 1.

        Raises:
            FoveateError: It is written otherwise, or the range is empty.
        """
        field, equals, rest = text.partition("=")
        if not equals or not field.strip() or not rest.strip():
            raise FoveateError(f"--over is written FIELD=LOW..HIGH[:STEP] or FIELD=VALUE,VALUE, got {text!r}")
        name = field.strip().replace("-", "_")
        match = _RANGE.fullmatch(rest.strip())
        if match is None:
            return cls(field=name, values=tuple(dict.fromkeys(value.strip() for value in split(rest, ","))))
        low, high = Decimal(match[1]), Decimal(match[2])
        is_whole = low == low.to_integral_value() and high == high.to_integral_value() and "." not in match[1]
        step = Decimal(match[3]) if match[3] else Decimal(1) if is_whole else None
        if low > high or (step is not None and step <= 0):
            raise FoveateError(f"--over {text}: a range goes up, in steps above 0")
        if step is None:
            return cls(field=name, values=(), low=low, high=high)
        count = int((high - low) / step) + 1
        if count > _MOST:
            raise FoveateError(f"--over {text}: {count} values; take a larger step")
        values = tuple(_plain(low + step * i) for i in range(count))
        return cls(field=name, values=values, low=low, high=high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One point of a grid: the values of its fields as specs write them, and the policy with them."""

    values: Mapping[str, str]
    policy: Policy


def read_overs(over: Sequence[str] | Mapping[str, Sequence[object]]) -> tuple[Over, ...]:
    """Ranges as texts, or as a mapping of fields to values.

    Raises:
        FoveateError: There is none, one is written otherwise, or a field comes twice.
    """
    if isinstance(over, Mapping):
        found = [Over(field=name, values=tuple(written(v) for v in values)) for name, values in over.items()]
    else:
        found = [Over.parse(text) for text in over]
    fields = [one.field for one in found]
    if not found or len(set(fields)) < len(fields) or not all(one.values or one.low is not None for one in found):
        raise FoveateError(f"a sweep needs fields to range over, each once and with values, got {fields}")
    return tuple(found)


def grid(policy: Policy, overs: Sequence[Over]) -> tuple[Setting, ...]:
    """Every combination of the values; settings that are the same policy come once.

    Raises:
        FoveateError: A field that the policy does not have, a value that it refuses, or a range without steps.
    """
    endless = next((one for one in overs if not one.values), None)
    if endless is not None:
        raise FoveateError(
            f"--over {endless.field}={endless.low}..{endless.high} needs a step: "
            f"{endless.field}={endless.low}..{endless.high}:STEP"
        )
    found: dict[str, Setting] = {}
    for values in itertools.product(*(one.values for one in overs)):
        chosen = dict(zip((one.field for one in overs), values, strict=True))
        changed = with_values(policy, chosen)
        found.setdefault(changed.fingerprint, Setting(values=chosen, policy=changed))
    return tuple(found.values())


def with_values(policy: Policy, values: Mapping[str, str]) -> Policy:
    """The policy with some fields changed, each by its name or as `part.field`.

    Raises:
        FoveateError: No part or several parts have the field, or the value is refused.
    """
    parts = list(policy.parts_of())
    for field, value in values.items():
        index, name = _place(parts, field)
        part = parts[index]
        settings = {key: written(old) for key, old in part.settings().items()} | {name: value}
        parts[index] = load_policy(f"{part.name}:" + ",".join(f"{key}={text}" for key, text in settings.items()))
    return join(parts)


def _place(parts: Sequence[Policy], field: str) -> tuple[int, str]:
    """Which part a field belongs to, and its name there."""
    part_name, dot, name = field.rpartition(".")
    found = list(_having(parts, part_name.replace("_", "-") if dot else None, name))
    if len(found) == 1:
        return found[0], name
    there = ", ".join(f"{part.name}.{key}" for part in parts for key in part.settings()) or "none"
    if not found:
        raise FoveateError(f"no field {field!r} in {'|'.join(part.name for part in parts)}; there are {there}")
    raise FoveateError(f"several parts have {field}; name one of {there}")


def _having(parts: Sequence[Policy], part_name: str | None, name: str) -> Iterator[int]:
    for index, part in enumerate(parts):
        if part_name in (None, part.name) and name in part.settings():
            yield index


def _plain(number: Decimal) -> str:
    """A number without an exponent; whole ones without a point, which whole fields need."""
    is_whole = number == number.to_integral_value()
    return str(int(number)) if is_whole else format(number.normalize(), "f")
