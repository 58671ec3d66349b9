"""Shape and type checks that run once per signature: what passed with these types, dtypes and shapes passes again.

A run on a toy makes eight thousand checked calls, nearly all with shapes seen before; checking each of them anew takes
three times as long as the run itself. A call is known by its function and, per argument and for its result, by type,
dtype and shape; strings count with their value, containers with their length and first elements. Everything else that
is new is checked in full by jaxtyping and beartype; what fails is never remembered.
"""

import dataclasses
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy
import torch

FIRST = 4
"""Elements of a container that count; beartype itself looks at one, at random."""

_known_by_type: set[type] = set()
"""Types whose values differ in nothing that a check looks at."""

_checked: Callable[..., Any] = jaxtyping.jaxtyped


def install() -> None:
    """Replaces the decorator that jaxtyping's import hook applies, in modules imported from now on."""
    jaxtyping.jaxtyped = once


def known_by(value: object) -> object:
    """Whatever a check of this value can depend on, as something that can be hashed."""
    kind = type(value)
    if kind in _known_by_type:
        return kind
    if kind is torch.Tensor or isinstance(value, (torch.Tensor, numpy.ndarray)):
        return kind, value.shape, value.dtype
    if kind is str:
        return value
    if kind is tuple or kind is list:
        return kind, len(value), *map(known_by, value[:FIRST])
    if kind is dict and value:
        return kind, *map(known_by, next(iter(value.items())))
    if kind is not dict:
        _known_by_type.add(kind)
    return kind


def once(function: Any = None, *, typechecker: Any) -> Any:
    """The decorator of jaxtyping, for functions and dataclasses, that checks each signature once."""
    if function is None:
        return functools.partial(once, typechecker=typechecker)
    if isinstance(function, types.FunctionType):
        return _function(function, typechecker)
    if isinstance(function, type):
        plain = vars(function).get("__init__")
        if dataclasses.is_dataclass(function) and plain and not hasattr(plain, "__wrapped__"):
            function.__init__ = _function(plain, typechecker)
        return function
    return _checked(function, typechecker=typechecker)


def _function(function: types.FunctionType, typechecker: Any) -> Callable[..., Any]:
    """Checks arguments before the call and the result after it, where either is new."""
    results: dict[int, object] = {}
    seen: set[object] = set()

    def call(*args: object, **kwargs: object) -> object:
        """Calls the function, or hands out the result that this thread already has."""
        ident = get_ident()
        return results.pop(ident) if ident in results else function(*args, **kwargs)

    get_ident = threading.get_ident

    @functools.cache
    def full() -> Callable[..., Any]:
        """The checks themselves, made at the first call: most functions of a module are not called by most tests."""
        # With the globals of the function, in which its annotations are resolved.
        same = types.FunctionType(call.__code__, function.__globals__, function.__name__, None, call.__closure__)
        return _checked(functools.update_wrapper(same, function), typechecker=typechecker)

    @functools.wraps(function)
    def checked_once(*args: object, **kwargs: object) -> object:
        __tracebackhide__ = True
        called: object = (*map(known_by, args),)
        if kwargs:
            called = (called, *kwargs, *map(known_by, kwargs.values()))
        if called not in seen:
            result = full()(*args, **kwargs)
            seen.update((called, (called, known_by(result))))
            return result
        result = function(*args, **kwargs)
        if (called, known_by(result)) not in seen:
            results[get_ident()] = result
            try:
                full()(*args, **kwargs)
            finally:
                results.pop(get_ident(), None)
            seen.add((called, known_by(result)))
        return result

    return checked_once
