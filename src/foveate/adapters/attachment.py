"""Runs a model loaded by its official code on our engine: `with attach(model, policy): ...`.

Only one name of that one object changes, its generating method; the weights are shared. Detaching restores the name.
"""

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from foveate.adapters.adapter import METHOD, Adapter, draw
from foveate.adapters.sharing import named_weights
from foveate.core.errors import FoveateError, UnsupportedError
from foveate.core.policy import Policy
from foveate.core.trace import Trace
from foveate.engine.report import Report
from foveate.families import registry
from foveate.families.family import Family
from foveate.policies.registry import load_policy
from foveate.weights.key_map import KINDS, kind_of


class Attachment:
    """A policy on one object; a context manager that detaches at its end.

    Attributes:
        adapter: The object and our networks over its weights.
        policy: What the next call obeys; attaching again sets it.
        report: What the latest call cost, None before the first one.
        trace: What ran in the latest call, None before the first one.
    """

    def __init__(self, adapter: Adapter, policy: Policy) -> None:
        """Changes nothing yet."""
        self.adapter, self.policy = adapter, policy
        self.report: Report | None = None
        self.trace: Trace | None = None
        self._stand_in: StandIn | None = None
        self._before: dict[str, Any] = {}

    @property
    def is_attached(self) -> bool:
        """Whether the object generates with our engine."""
        return self._stand_in is not None

    def install(self) -> None:
        """Puts the stand-in in front of the object's method.

        Raises:
            FoveateError: The method does not take the arguments that it has in the official code.
        """
        attributes, original = vars(self.adapter.model), getattr(self.adapter.model, METHOD)
        missing = [name for name in self.adapter.reads if name not in inspect.signature(original).parameters]
        if missing:
            kind = type(self.adapter.model).__name__
            raise FoveateError(f"{METHOD} of {kind} does not take {', '.join(missing)}; it is not the official one")
        self._before = {METHOD: attributes[METHOD]} if METHOD in attributes else {}
        self._stand_in = attributes[METHOD] = StandIn(self, original)

    def detach(self) -> None:
        """Restores the object's own method; does nothing if already detached.

        Raises:
            FoveateError: Somebody replaced the method meanwhile; it is left as it is.
        """
        if self._stand_in is None:
            return
        attributes = vars(self.adapter.model)
        if attributes.get(METHOD) is not self._stand_in:
            raise FoveateError(f"{METHOD} was replaced after attach; undo that first, then detach")
        del attributes[METHOD]
        attributes.update(self._before)
        self._stand_in, self._before = None, {}

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.detach()

    def draw(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """One call of the method; an exception leaves the object as it was, save for a generator that was read.

        Args:
            signature: Of the official method.
            args: As it was called.
            kwargs: As it was called.
        """
        call = signature.bind(*args, **kwargs)
        known = {*self.adapter.reads, *self.adapter.ignores}
        for name, value in call.arguments.items():
            if name not in known and not _is_default(value, signature.parameters[name]):
                raise UnsupportedError(f"{METHOD}: the argument {name} is not supported; leave it out")
        call.apply_defaults()
        engine = self.adapter.engine(call.arguments)
        drawn = draw(engine, self.adapter.request(call.arguments, engine), self.policy)
        self.report, self.trace = drawn.report, drawn.trace
        return self.adapter.answer(drawn.pixels_B3YX)


class StandIn:
    """Replaces the object's method, with the same name and signature."""

    def __init__(self, attachment: Attachment, original: Callable[..., object]) -> None:
        self.attachment, self.signature = attachment, inspect.signature(original)
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        """Generates under the attached policy."""
        return self.attachment.draw(self.signature, args, kwargs)


def attach(model: object, policy: str | Path | Policy = "full") -> Attachment:
    """Makes an Infinity or VAR object, as its official code loads it, generate with our engine under a policy.

    The object's weights are shared, not copied. With the policy `full` a seed gives the same codes as before.

    Args:
        model: The object. Its method `autoregressive_infer_cfg` is replaced until `detach`, or until the `with` ends.
        policy: Name, spec, YAML file or object. Attaching again replaces it; one `detach` still restores the object.

    Raises:
        FoveateError: The object is of another class; the message says what is missing.
        UnsupportedError: It is, but wrapped, sharded, hooked or set up in a way that our networks do not have.
    """
    chosen = load_policy(policy)
    kind = type(model).__name__
    families = [family for family in registry.FAMILIES if family.adapter is not None]
    titles = " or ".join(family.title for family in families)
    taken = f"attach takes an {titles} object of the official code, got {kind}"
    if not isinstance(model, nn.Module):
        raise FoveateError(taken)
    current = vars(model).get(METHOD)
    if isinstance(current, StandIn):
        current.attachment.policy = chosen
        return current.attachment
    whose = kind_of(named_weights(model))
    family = next((family for family in families if family.transformer.kind == whose), None)
    if family is None:
        marks = " nor ".join(KINDS[known.transformer.kind].marks[0] for known in families)
        found = f"it has neither {marks}" if whose is None else f"its weights are {whose}'s"
        raise FoveateError(f"{taken}: {found}")
    if not callable(getattr(model, METHOD, None)):
        raise FoveateError(f"{kind} has no method {METHOD}, which every object of the official class has")
    attachment = Attachment(_adapter_of(family)(model), chosen)
    attachment.install()
    return attachment


def _adapter_of(family: Family) -> Callable[[nn.Module], Adapter]:
    """The adapter's class, which nothing imports before an object needs it."""
    module, _, name = str(family.adapter).partition(":")
    found: type[Adapter] = getattr(import_module(module), name)
    return found


def _is_default(value: object, parameter: inspect.Parameter) -> bool:
    """Whether an argument has its default value, or is an empty list of further ones."""
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        return not value
    default = parameter.default
    return value is default or (
        type(value) is type(default) and isinstance(value, bool | int | float | str) and value == default
    )
