"""Our network over the weights of an official module: the same storage, no copy.

What our network would compute otherwise than the module, or could not see, is refused with a reason: wrappers, shards,
hooks, replaced forwards, settings that leave no trace in weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from foveate.core.errors import CheckpointError, FoveateError, UnsupportedError
from foveate.weights.key_map import check_fit
from foveate.weights.stored import State

M = TypeVar("M", bound=nn.Module)
N = TypeVar("N")

_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "parametrizations")
"""Parts of names below which wrappers keep the weights; data parallelism has `module` in front instead."""
_PLAIN = (Tensor, nn.Parameter)


def attribute(owner: object, path: str) -> Any:  # noqa: ANN401 - other people's classes have no types here
    """An attribute of an attribute, such as `quantize.quant_resi_ratio`.

    Raises:
        FoveateError: There is none.
    """
    value = owner
    for name in path.split("."):
        if not hasattr(value, name):
            raise FoveateError(f"{type(owner).__name__} lacks {path}, which every object of the official class has")
        value = getattr(value, name)
    return value


def require_settings(owner: object, wanted: Mapping[str, object]) -> None:
    """Refuses an object whose settings are not those that our network has.

    Raises:
        FoveateError: A setting is missing.
        UnsupportedError: It has another value.
    """
    for path, value in wanted.items():
        found = attribute(owner, path)
        if found != value:
            raise UnsupportedError(f"{type(owner).__name__}.{path} must be {value}, as published; got {found}")


def named_weights(owner: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, as they are; hooks that gather shards are never called.

    Raises:
        UnsupportedError: The module is wrapped, or something else happens in it than its own code says.
    """
    kind = type(owner).__name__
    weights: dict[str, Tensor] = dict(owner.named_parameters(remove_duplicate=False))
    weights |= dict(owner.named_buffers(remove_duplicate=False))
    for name in weights:
        parts = name.split(".")
        wrapper = next((part for part in parts if part in _WRAPPERS), "module" if parts[0] == "module" else None)
        if wrapper is not None:
            raise UnsupportedError(f"{kind} keeps weights below {wrapper}: it is wrapped; give the module inside")
    for name, part in owner.named_modules():
        # The forward of the outermost module is not used for generating.
        if not name:
            continue
        if "forward" in vars(part):
            raise UnsupportedError(f"{name}.forward of {kind} was replaced, and would not run; undo that first")
        if part._forward_hooks or part._forward_pre_hooks:
            raise UnsupportedError(f"{name} of {kind} has forward hooks, which would not run; remove them first")
    return weights


def share(build: Callable[[], M], tensors: State, what: str) -> M:
    """Builds a module over tensors that belong to others.

    Args:
        build: Makes the module; what its parameters hold is never used.
        tensors: Under the names of the module's own; they are not changed, and need no gradient there.
        what: Names the module in errors.

    Raises:
        CheckpointError: A weight is missing, unknown or of another shape.
        UnsupportedError: A weight is not a plain tensor of floats in memory, or they lie on several devices.
    """
    with torch.device("meta"):
        module = build()
    check_fit(module, tensors, what)
    _refuse_unshareable(tensors)
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        alias = nn.Parameter(tensor.detach(), requires_grad=False)
        module.get_submodule(parent).register_parameter(leaf, alias)
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            beside = next(part.parameters())
            # All buffers of our modules are constant zeros.
            zeros = torch.zeros(buffer.shape, dtype=beside.dtype, device=beside.device)
            part.register_buffer(name, zeros, persistent=False)
    return module.eval()


def _refuse_unshareable(tensors: State) -> None:
    for name, tensor in tensors.items():
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            raise UnsupportedError(f"{name} must be a plain tensor to be shared, got a {type(tensor).__name__}")
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device; load the weights first")
        if not tensor.is_floating_point():
            raise UnsupportedError(f"{name} is quantised to {tensor.dtype}; only floats can be shared")
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1:
        raise UnsupportedError(f"the weights lie on {' and '.join(devices)}; move them to one device")


def refuse_mixed(module: nn.Module) -> None:
    """Refuses weights of several dtypes outside of autocast.

    Raises:
        FoveateError: There are, and autocast is off.
    """
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()})
    device = next(module.parameters()).device.type
    if len(dtypes) > 1 and not torch.is_autocast_enabled(device):
        raise FoveateError(f"the weights are in {' and '.join(dtypes)}; call under torch.autocast, or give all one")


class Follower(Generic[N]):
    """What is built over a module's weights; built again when they have moved, changed dtype or were replaced."""

    def __init__(self, build: Callable[[nn.Module, State], N]) -> None:
        """Builds nothing yet.

        Args:
            build: Makes it from the module and its named weights.
        """
        self._build = build
        self._stamp: tuple[object, ...] = ()
        self._built: N | None = None

    def over(self, owner: nn.Module) -> N:
        """What belongs to the module as it is now."""
        weights = named_weights(owner)
        # Our aliases keep the storage alive, so another tensor cannot come to lie at the same address unnoticed.
        where = [(name, t.data_ptr(), t.dtype, t.device, t.shape) for name, t in weights.items() if type(t) in _PLAIN]
        stamp = (owner, len(weights), *where)
        if self._built is None or stamp != self._stamp:
            self._built = self._build(owner, weights)
            self._stamp = stamp
        return self._built
