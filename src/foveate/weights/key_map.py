"""Loads published weights, shared by all families: shapes, weight kinds, and the checked copy.

Nothing is copied before every key and every shape fits, and the numbers are checked behind; each weight is named.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foveate.core.errors import CheckpointError
from foveate.core.finite import broken_weight, names_of_broken
from foveate.weights.files import some
from foveate.weights.stored import State, Stored, described, renamed

KINDS: dict[str, "WeightKind"] = {}
"""By name; every key map declares its own, so that importing `families.registry` knows all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightKind:
    """A weight kind, as its key map declares it.

    Attributes:
        name: In manifests and messages.
        role: What a file of such weights is, in messages.
        marks: Keys, one of which only weights of this kind hold.
        unless: Keys that weights of this kind do not hold beside a mark.
        is_autoencoder: Whether they are an autoencoder; where a file holds both, the transformer decides.
    """

    name: str
    role: str
    marks: tuple[str, ...]
    unless: tuple[str, ...] = ()
    is_autoencoder: bool = False

    def marks_in(self, state: State) -> bool:
        """Whether weights hold one of the keys in `marks`."""
        return any(mark in state for mark in self.marks) and not any(key in state for key in self.unless)


def declare(kind: WeightKind) -> WeightKind:
    """Makes a weight kind known to all key maps, which refuse each other's weights by its role."""
    KINDS[kind.name] = kind
    return kind


def kind_names() -> list[str]:
    """Every declared weight kind, the transformers first."""
    return [kind.name for kind in sorted(KINDS.values(), key=lambda kind: kind.is_autoencoder)]


def kind_of(state: State) -> str | None:
    """The weight kind of these weights; None if no declared one fits."""
    return next((name for name in kind_names() if KINDS[name].marks_in(state)), None)


def refuse_foreign(state: State, kind: str) -> None:
    """Refuses weights that are clearly of another weight kind.

    Raises:
        CheckpointError: Says whose they are.
    """
    found = kind_of(state)
    if found not in (None, kind):
        raise CheckpointError(
            f"the weights are those of {KINDS[found].role}, expected {KINDS[kind].role}; give the other file"
        )


def without(state: State, names: Sequence[str]) -> Stored:
    """The weights without those whose name ends in one of the given last parts."""
    return renamed(state, {key: key for key in state if key.rpartition(".")[2] not in names})


def count_of(state: State, pattern: str) -> int:
    """One more than the largest number that a pattern finds at the start of a key."""
    matches = [match for match in map(re.compile(pattern).match, state) if match is not None]
    return 1 + max((int(match[1]) for match in matches), default=-1)


def axes_of(state: State, key: str, num_axes: int) -> tuple[int, ...]:
    """The shape of one weight.

    Raises:
        CheckpointError: It is missing, or has another number of axes.
    """
    if key not in state:
        raise CheckpointError(f"the weights lack {key}, so their shape cannot be told; found {some(sorted(state))}")
    shape = tuple(described(state, key).shape)
    if len(shape) != num_axes:
        raise CheckpointError(f"{key} must have {num_axes} axes, got shape {shape}")
    return shape


def autoencoder_shape(state: State) -> dict[str, Any]:
    """What the weights of either autoencoder say under the same names: the fields that both configurations share.

    Raises:
        CheckpointError: A weight that the shape follows from is missing.
    """
    base = axes_of(state, "encoder.conv_in.weight", 4)[0]
    levels = count_of(state, r"encoder\.down\.(\d+)\.")
    widths = [axes_of(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    return {
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "num_res_blocks": count_of(state, r"encoder\.down\.0\.block\.(\d+)\."),
    }


def check_fit(module: nn.Module, tensors: State, what: str) -> None:
    """Refuses weights whose names or shapes are not exactly those of a module.

    Raises:
        CheckpointError: Counts and names the missing and unknown ones, or gives both sides of the first wrong shape.
    """
    own = module.state_dict()
    missing, unknown = [key for key in own if key not in tensors], [key for key in tensors if key not in own]
    if missing or unknown:
        parts = [f"{len(missing)} missing: {some(missing)}"] if missing else []
        parts += [f"{len(unknown)} unknown: {some(unknown)}"] if unknown else []
        raise CheckpointError(f"the weights do not fit this {what}; keys {'; '.join(parts)}")
    wrong = [key for key in own if own[key].shape != described(tensors, key).shape]
    if wrong:
        key = wrong[0]
        wanted, got = tuple(own[key].shape), tuple(described(tensors, key).shape)
        more = f" ({len(wrong)} such keys)" if len(wrong) > 1 else ""
        raise CheckpointError(f"the weights do not fit this {what}; {key} wants {wanted}, got {got}{more}")


def check_floats(tensors: State, what: str) -> None:
    """Refuses weights that are not floating-point, such as quantised ones: a plain copy would lose their scales.

    Raises:
        CheckpointError: Names the first one.
    """
    for key in tensors:
        dtype = described(tensors, key).dtype
        if not dtype.is_floating_point:
            raise CheckpointError(f"the weights do not fit this {what}; {key} wants floats, got {dtype}")


def copy_weights(module: nn.Module, tensors: State, what: str, dtype: torch.dtype | None = None) -> None:
    """Fills a module with weights that fit it and are numbers in its dtype.

    Args:
        module: Is changed; left as it was when names or shapes are refused, and of no use when numbers are.
        tensors: Under the names of the module's own.
        what: Names the module in errors.
        dtype: Changes the module's dtype; None keeps it.

    Raises:
        CheckpointError: A weight is missing, unknown, of another shape or no floating-point number.
        BrokenWeightError: A weight holds NaN or an infinity, or overflows the dtype of the module.
    """
    check_fit(module, tensors, what)
    check_floats(tensors, what)
    if dtype is not None:
        module.to(dtype)
    own = module.state_dict()
    with torch.no_grad():
        for key, own_tensor in own.items():
            own_tensor.copy_(tensors[key])
    broken = names_of_broken(own.items())
    if broken:
        raise broken_weight(broken[0], tensors[broken[0]], own[broken[0]].dtype)
