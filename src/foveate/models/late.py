"""Blocks for the last scales, whose linear layers multiply in eight bits; everything else of them is the model's own.

The last scales hold most of the tokens and decide least of the picture, so they bear a coarse product best. What is
held in addition is one byte per weight.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from foveate.core.errors import FoveateError
from foveate.kernels.fp8 import Fp8Weight
from foveate.models.quantization import linears_of

_LEAST_CAPABILITY = (8, 9)
_TEXT_LAYERS = ("mat_kv", "to_kv")
"""Read when a request is prepared, and never at a scale."""


def check_fp8(dtype: torch.dtype, device: torch.device) -> None:
    """Says what is wrong before anything is loaded.

    Raises:
        FoveateError: The dtype is not bfloat16, or the GPU has no such products.
    """
    if dtype is not torch.bfloat16:
        raise FoveateError(f"fp8_scales needs dtype bfloat16, got {str(dtype).removeprefix('torch.')}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        raise FoveateError("fp8_scales needs a GPU of compute capability 8.9 or later (Ada, Hopper); leave it out")


def late_blocks(blocks: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Twins of blocks that share every parameter but the weights of the linear layers, which are rounded.

    Args:
        blocks: Left as they were; they stay on their device while the twins are used.
    """
    return tuple(_twin(block, set(linears_of(block))) for block in blocks)


def _twin(module: nn.Module, linears: set[nn.Linear], name: str = "") -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    twin._modules = {key: _twin(child, linears, key) for key, child in module._modules.items() if child is not None}
    if module in linears and name not in _TEXT_LAYERS:
        twin._parameters = {key: value for key, value in module._parameters.items() if key != "weight"}
        twin.__dict__["weight"] = Fp8Weight.of(module.get_parameter("weight").detach())
    return twin
