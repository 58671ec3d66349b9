"""Names of weights without what training puts around a module: wrappers inside a name, containers in front of it.

torch.compile, data parallelism, FSDP and activation checkpointing each add a part to the names below the module they
wrap, at any depth. Trainers keep weights below a name of their own, often beside a moving average of them, an optimiser
or a second network. Names of published checkpoints come out as they went in.
"""

import re
from collections.abc import Mapping, Sequence

from foveate.core.errors import CheckpointError
from foveate.weights.key_map import kind_names, kind_of, refuse_foreign, without
from foveate.weights.stored import State, Stored, renamed

_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
)
_CONTAINERS = frozenset(
    (
        "trainer", "checkpoint", "state", "state_dict", "model_state_dict", "model_state", "model_dict", "model",
        "ema_model", "model_ema", "ema", "state_dict_ema", "ema_state_dict", "params", "params_ema", "weights", "net",
        "network", "transformer", "gpt", "gpt_fsdp", "gpt_wo_ddp", "gpt_ema", "var", "var_wo_ddp", "var_ema", "vae",
        "vae_local", "vae_wo_ddp", "vae_ema", "autoencoder", "vqvae",
    )
)  # fmt: skip
"""First parts of names below which trainers keep a network; no network here has a part of such a name itself."""

_CHUNK = re.compile(r"^block_chunks\.(\d+)\.(?=\d+\.)")
_AVERAGE_COUNT = "n_averaged"
"""How often torch's `AveragedModel` has averaged, beside the weights."""


def kind_within(state: State) -> str | None:
    """The weight kind of these weights, also inside containers; None if no declared one fits."""
    kinds = {kind_of(group) for group in _groups(state).values()}
    return next((kind for kind in kind_names() if kind in kinds), None)


def plain_state(state: State, kind: str, constants: Sequence[str] = ()) -> Stored:
    """The weights of one weight kind without nesting and constant buffers; nothing is read.

    Args:
        state: The weights under whatever names a file has.
        kind: The name of a declared kind.
        constants: Last parts of the names of constant buffers, which may be there or not.

    Raises:
        CheckpointError: As `plain_names`, or the weights are of another kind.
    """
    state = plain_names(state, kind)
    refuse_foreign(state, kind)
    return without(state, constants)


def plain_names(state: State, kind: str) -> State:
    """The weights of one weight kind without wrappers and containers; nothing is read.

    Of several containers that hold the kind, those of moving averages are left.

    Args:
        state: The weights under whatever names a file has.
        kind: The name of a declared kind. Where no weights are of it, those of another kind come back, to be refused.

    Raises:
        CheckpointError: Two names become the same one, or two containers hold the kind.
    """
    groups = _groups(state)
    kinds = {container: kind_of(group) for container, group in groups.items()}
    found = [container for container in groups if kinds[container] == kind]
    weights = [container for container in found if not _is_average(container)] or found
    if len(weights) > 1:
        first, second = (f"`{container}`" if container else "the top" for container in weights[:2])
        raise CheckpointError(f"the file holds such weights twice, below {first} and {second}; save one of them alone")
    if not weights:
        # The most telling ones, whose refusal says what is wrong.
        known = [container for name in kind_names() for container in groups if kinds[container] == name]
        weights = known or sorted(groups, key=lambda container: (not container, -len(groups[container])))
    return groups[weights[0]] if weights else state


def put_once(names: dict[str, str], name: str, key: str) -> None:
    """Notes the plain name of a weight, which no other may have.

    Args:
        names: Name in the file by plain name; is changed.
        name: The plain name.
        key: The name in the file.

    Raises:
        CheckpointError: Says both names in the file.
    """
    if name in names:
        raise CheckpointError(f"the weights hold {name} twice, as {names[name]} and as {key}; keep one of them")
    names[name] = key


def _groups(state: State) -> dict[str, State]:
    """The weights below each container, without wrappers; below "" those that are in none."""
    names: dict[str, dict[str, str]] = {}
    for key in state:
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        depth = next((i for i, part in enumerate(parts) if part not in _CONTAINERS), 0)
        name = _CHUNK.sub(r"block_chunks.\1.module.", ".".join(parts[depth:]))
        if name and name != _AVERAGE_COUNT:
            put_once(names.setdefault(".".join(parts[:depth]), {}), name, key)
    return {container: _renamed(state, group) for container, group in names.items()}


def _renamed(state: State, names: Mapping[str, str]) -> State:
    """The state itself where nothing changes: most files are plain."""
    is_same = len(names) == len(state) and all(name == key for name, key in names.items())
    return state if is_same else renamed(state, names)


def _is_average(container: str) -> bool:
    return "ema" in re.split(r"[._]", container)
