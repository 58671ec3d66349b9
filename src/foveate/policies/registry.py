"""Policies by name, spec string or YAML file; other packages add theirs through the entry point `foveate.policies`."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from foveate.core.composition import Composed
from foveate.core.errors import FoveateError, unknown
from foveate.core.fields import parsed, split, typed, words
from foveate.core.policy import Policy
from foveate.policies.attention_entropy import AttentionEntropyTokens
from foveate.policies.blocks_per_scale import BlocksPerScale
from foveate.policies.cached_guidance import CachedGuidance
from foveate.policies.depthvar import DepthVAR
from foveate.policies.drop_branch import DropBranch
from foveate.policies.fastvar import FastVAR
from foveate.policies.feature_magnitude import FeatureMagnitude
from foveate.policies.fovea import Fovea
from foveate.policies.full import Full
from foveate.policies.kv_eviction import KVEviction
from foveate.policies.late_bfloat16 import LateBfloat16
from foveate.policies.ld_pruning import LDPruning
from foveate.policies.provenance import Provenance, read_policy_file
from foveate.policies.random_tokens import RandomTokens
from foveate.policies.skip_scales import SkipScales
from foveate.policies.skipvar import SkipVAR
from foveate.policies.sparsevar import SparseVAR
from foveate.policies.step_down import StepDown
from foveate.policies.token_variance import TokenVariance
from foveate.policies.uniform_depth import UniformDepth

REGISTRY: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Full,
        Fovea,
        LDPruning,
        DepthVAR,
        FastVAR,
        SkipScales,
        DropBranch,
        RandomTokens,
        UniformDepth,
        BlocksPerScale,
        CachedGuidance,
        KVEviction,
        LateBfloat16,
        SparseVAR,
        SkipVAR,
        AttentionEntropyTokens,
        FeatureMagnitude,
        TokenVariance,
        StepDown,
    )
}
"""Every policy that foveate ships, by name."""

MAX_SPEC, _MAX_PARTS = 500, 8
"""Characters and parts of a spec that comes from elsewhere."""

_FOLDER = Path(__file__).parents[1] / "data" / "presets"

PRESETS: dict[str, Path] = {
    name: _FOLDER / f"{name}.yaml"
    for name in ("ld-pruning-draft", "preset-faithful", "preset-balanced", "preset-draft")
}
"""Names for settings, each a policy file with its provenance."""


def all_policies() -> dict[str, type[Policy]]:
    """The registry and what installed packages add to it.

    Packages are looked up once per process; `plug_ins.cache_clear()` has them looked up anew.
    """
    return REGISTRY | plug_ins()


@functools.cache
def plug_ins() -> dict[str, type[Policy]]:
    """Policies of installed packages by name; callers leave them as they are.

    A plug-in that cannot be imported, or is not a policy, is named in one warning and left out.
    """
    found, broken = {}, []
    for entry in entry_points(group="foveate.policies"):
        try:
            policy = entry.load()
            if not (isinstance(policy, type) and issubclass(policy, Policy)):
                raise TypeError(f"it is not a subclass of foveate.core.policy.Policy: {policy!r}")
            found[policy.name] = policy
        except Exception as error:  # a broken plug-in must not stop the rest
            broken.append(f"policy plug-in {entry.name} ({entry.value}) was left out: {error}")
    for message in broken:
        warnings.warn(message, stacklevel=3)
    return found


def _value(policy: type[Policy], name: str, value: object) -> Any:
    """A field's value from a text or from plain data, by the field's annotation."""
    kind = get_type_hints(policy)[name]
    if kind == tuple[Policy, ...]:
        return _policies(policy, name, value)
    try:
        return typed(kind, value)
    except FoveateError as error:
        raise FoveateError(f"{policy.name}: {name}: {error}") from None
    except ValueError:
        shown = value if kind is bool or get_origin(kind) is Literal else repr(value)
        raise FoveateError(f"{policy.name}: {name} must be {words(kind)}, got {shown}") from None


def _policies(policy: type[Policy], name: str, value: object) -> tuple[Policy, ...]:
    """A field that holds policies, from specs or from the lists that `Policy.stored` makes of their parts."""
    if not isinstance(value, list | tuple) or not all(_holds_policy(entry) for entry in value):
        raise FoveateError(
            f'{policy.name}: {name} must be a list of specs such as ["full","skip-scales"], got {value!r}'
        )
    return tuple(
        entry if isinstance(entry, Policy) else _from_spec(entry) if isinstance(entry, str) else from_stored(entry)
        for entry in value
    )


def _holds_policy(entry: object) -> bool:
    """Whether it is one, a spec, or parts as they are stored."""
    if isinstance(entry, Policy | str):
        return True
    return isinstance(entry, list | tuple) and all(
        isinstance(part, Mapping) and isinstance(part.get("policy"), str) and all(isinstance(key, str) for key in part)
        for part in entry
    )


def _from_spec(text: str) -> Policy:
    return join([_part(part) for part in split(text, "|")])


def _normal(name: str) -> str:
    """A policy's name as it is printed."""
    return name.strip().replace("_", "-")


def _build(name: str, given: dict[str, Any]) -> Policy:
    """A policy from its name and fields, as text or as values."""
    known, name = all_policies(), _normal(str(name))
    if name in PRESETS:
        preset = _from_yaml(PRESETS[name])
        if given and len(preset.parts_of()) > 1:
            raise FoveateError(f"{name} has several parts; to change one, write it out: {preset.spec}")
        return _with(preset, type(preset), given)
    if name not in known:
        raise unknown("policy", name, [*known, *PRESETS])
    return _with(None, known[name], given)


def _with(base: Policy | None, kind: type[Policy], given: dict[str, Any]) -> Policy:
    names = [f.name for f in fields(kind)]
    values: dict[str, Any] = {} if base is None else base.settings()
    for key, value in given.items():
        field_name = key.strip().replace("-", "_")
        if field_name not in names:
            raise unknown(f"field of {kind.name}", field_name, names or ["(none)"])
        values[field_name] = _value(kind, field_name, value)
    return kind(**values)


def _part(text: str) -> Policy:
    name, _, rest = text.partition(":")
    given: dict[str, Any] = {}
    for item in split(rest, ",") if rest.strip() else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise FoveateError(f"policy fields are written name=value, got {item!r} in {text!r}")
        given[key] = parsed(value)
    return _build(name, given)


def _from_yaml(path: Path) -> Policy:
    parts, _ = read_policy_file(path)
    return join([_build(part["policy"], {name: part[name] for name in part if name != "policy"}) for part in parts])


def from_stored(parts: Sequence[Mapping[str, Any]]) -> Policy:
    """A policy from what `Policy.stored` gave for its parts: every field as it was, whatever the defaults are now.

    Raises:
        FoveateError: A policy or field that this installation does not know.
    """
    known, policies = all_policies(), []
    for part in parts:
        name = part["policy"]
        if name not in known:
            raise FoveateError(f"no policy {name!r} in this installation; there are {', '.join(known)}")
        try:
            policies.append(_with(None, known[name], {key: value for key, value in part.items() if key != "policy"}))
        except TypeError as error:
            raise FoveateError(f"policy {name} has other fields in this version: {error}") from None
    return join(policies)


def join(parts: list[Policy]) -> Policy:
    """One policy of several, from left to right; a single one is returned as it is."""
    if not parts:
        raise FoveateError("a policy needs at least one part, got none")
    return parts[0] if len(parts) == 1 else Composed(parts=tuple(p for part in parts for p in part.parts_of()))


def load_policy(policy: str | Path | Policy) -> Policy:
    """A policy from an object, a spec such as `ld-pruning:sats=false|skip-scales:count=2`, or a YAML file.

    Raises:
        FoveateError: An unknown name or field (the closest is named), a value out of range, an unreadable file.
    """
    if isinstance(policy, Policy):
        return policy
    text = str(policy)
    return _from_yaml(Path(text)) if text.endswith((".yaml", ".yml")) else _from_spec(text)


def load_spec(text: str) -> Policy:
    """A policy from names and fields alone: what would be a file to `load_policy` is an unknown name here.

    Raises:
        FoveateError: An unknown name or field (the closest is named), a value out of range, or a spec that is too long.
    """
    if len(text) > MAX_SPEC:
        raise FoveateError(f"a policy must have {MAX_SPEC} characters or less, got {len(text)}")
    if (count := len(split(text, "|"))) > _MAX_PARTS:
        raise FoveateError(f"a policy must have {_MAX_PARTS} parts or less, got {count}; leave some out")
    if text.endswith((".yaml", ".yml")):
        raise unknown("policy", text, [*all_policies(), *PRESETS])
    return _from_spec(text)


def provenance_of(policy: str | Path | Policy) -> Provenance | None:
    """Where a setting comes from, for a preset as it is and a policy file; None for all others.

    Raises:
        FoveateError: The file cannot be read.
    """
    if isinstance(policy, Policy):
        return None
    path = PRESETS.get(_normal(str(policy)))
    if path is None and str(policy).endswith((".yaml", ".yml")):
        path = Path(policy)
    return None if path is None else read_policy_file(path)[1]
