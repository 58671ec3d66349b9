"""Torch's layers without their random start: constructors allocate zeros, `init_weights` draws.

Weights nearly always come from a file, so drawing them first would cost time, move torch's global generator and, on the
meta device, import torch's compiler. Parameters keep the names that torch gives them.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class HasRandomStart(Protocol):
    """A module with parameters of its own that training starts from random numbers."""

    def init_own_weights(self) -> None:
        """Draws them, those of submodules left out, from torch's global generator."""


@torch.no_grad()
def init_weights(network: nn.Module) -> None:
    """Draws the weights that training starts from, by torch's global generator; constants stay as they are built.

    Args:
        network: Was built on a real device; is changed in place, parents before their parts.
    """
    for module in network.modules():
        if isinstance(module, HasRandomStart):
            module.init_own_weights()


def empty_module(build: Callable[[], M], dtype: torch.dtype, device: torch.device) -> M:
    """Builds a module in a dtype on a device without touching the memory of its parameters.

    Parameters are uninitialised; buffers are zero, as all buffers of our modules are. Gradients are off.
    """
    with torch.device("meta"):
        module = build()
    for owner in module.modules():
        # `Module.to_empty` would ask the meta device for tensors like these, which imports a second's worth of sympy.
        for name, parameter in owner.named_parameters(recurse=False):
            allocated = torch.empty(parameter.shape, dtype=_kept(parameter, dtype), device=device)
            owner.register_parameter(name, nn.Parameter(allocated, requires_grad=False))
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, torch.zeros(buffer.shape, dtype=_kept(buffer, dtype), device=device))
    return module.eval()


def _kept(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype for floating-point tensors; others keep their own."""
    return dtype if tensor.is_floating_point() else tensor.dtype


class Linear(nn.Linear):
    """`torch.nn.Linear`, all zero until it is loaded or initialised."""

    def reset_parameters(self) -> None:
        """Sets all zero; the constructor of torch calls this."""
        _zero(self.weight, self.bias)

    def init_own_weights(self) -> None:
        """Draws as torch does by default."""
        super().reset_parameters()


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, all zero until it is loaded or initialised."""

    def reset_parameters(self) -> None:
        """Sets all zero; the constructor of torch calls this."""
        _zero(self.weight, self.bias)

    def init_own_weights(self) -> None:
        """Draws as torch does by default."""
        super().reset_parameters()


class Embedding(nn.Embedding):
    """`torch.nn.Embedding`, all zero until it is loaded or initialised."""

    def reset_parameters(self) -> None:
        """Sets all zero; the constructor of torch calls this."""
        _zero(self.weight)

    def init_own_weights(self) -> None:
        """Draws as torch does by default."""
        super().reset_parameters()


def _zero(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)
