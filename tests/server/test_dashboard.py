"""The Grafana dashboard against the types that Grafana publishes (grafana-foundation-sdk): names, types and values."""

import copy
import json
from collections.abc import Iterator
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from tests.server.test_deploy import dashboard

models, encoder, plugins = (
    pytest.importorskip(f"grafana_foundation_sdk.{name}", reason="needs grafana-foundation-sdk")
    for name in ("models.dashboard", "cog.encoder", "cog.plugins")
)


def wrong(given: dict[str, Any]) -> list[str]:
    """What no Grafana knows in a dashboard: each field with its place."""
    plugins.register_default_plugins()
    read = models.Dashboard.from_json(copy.deepcopy(given))
    written = json.loads(encoder.JSONEncoder().encode(read))
    return [*lost(given, written, ""), *misfits(read, models.Dashboard, "")]


def lost(given: Any, written: Any, place: str) -> Iterator[str]:
    """Fields that are not in the types, and so are not written again."""
    if isinstance(given, dict) and isinstance(written, dict):
        for name, value in given.items():
            if name in written:
                yield from lost(value, written[name], f"{place}/{name}")
            else:
                yield f"{place}/{name} is unknown"
    elif isinstance(given, list) and isinstance(written, list) and len(given) == len(written):
        for index, (one, other) in enumerate(zip(given, written, strict=True)):
            yield from lost(one, other, f"{place}/{index}")
    elif given != written:
        yield f"{place} is read as {written!r}"


def misfits(value: Any, hint: Any, place: str) -> Iterator[str]:
    """Values that are not of their field's type, or none of its values."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        found = [list(misfits(value, one, place)) for one in inner if value is not None or one is NoneType]
        yield from min(found, key=len, default=[f"{place} is {value!r}"])
    elif not fits(value, origin or hint, inner):
        yield f"{place} is {value!r}"
    for name, one, kind in parts(value, origin, inner):
        yield from misfits(one, kind, f"{place}/{name}")


def parts(value: Any, origin: Any, inner: tuple[Any, ...]) -> Iterator[tuple[Any, Any, Any]]:
    """What a value holds: names, values and their types."""
    if origin is list and isinstance(value, list):
        yield from ((index, one, inner[0]) for index, one in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        yield from ((name, one, inner[1]) for name, one in value.items())
    elif origin is None and type(value).__module__.startswith("grafana_foundation_sdk.models"):
        yield from ((name, getattr(value, name), kind) for name, kind in get_type_hints(type(value)).items())


def fits(value: Any, kind: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is of a type, whatever it holds."""
    if kind is Literal:
        return value in values
    if kind in (Any, object):
        return True
    if issubclass(kind, Enum):
        return value in [one.value for one in kind]
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def test_the_dashboard_is_as_grafana_has_it() -> None:
    assert wrong(dashboard()) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("panels", 0, "options", "graphMode"), "nope"),
        (("panels", 0, "fieldConfig", "defaults", "unitt"), "s"),
        (("panels", 0, "targets", 0, "exprr"), "x"),
        (("panels", 0, "gridPos", "w"), "wide"),
        (("graphTooltip",), 9),
        (("refresh",), 10),
        (("templating", "list", 0, "type"), "nope"),
    ],
)
def test_what_grafana_does_not_know_is_found(path: tuple[Any, ...], value: Any) -> None:
    changed = found = dashboard()
    for name in path[:-1]:
        found = found[name]
    found[path[-1]] = value
    assert len(wrong(changed)) == 1
