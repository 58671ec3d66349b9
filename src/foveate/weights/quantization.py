"""Int8 and fp8 weights of the blocks' linear layers, through torchao, which is an extra.

Weights alone are quantised, one scale per output; a layer widens them for every call and computes in its own dtype, so
this saves memory and no time. Head, embeddings, norms and modulation keep their dtype.
"""

import logging
from collections.abc import Iterable, Iterator
from importlib import util
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from foveate.core.errors import FoveateError, unknown

QUANTIZATIONS: dict[str, int] = {"int8": 5, "fp8": 4}
"""Kinds, and the bytes that they take for an output beside one for every weight: a scale, and for int8 a zero point."""

_MODULATION = "ada_lin"


def check_quantization(kind: str) -> None:
    """Refuses a quantisation that cannot work, before anything is loaded.

    Raises:
        FoveateError: There is no such quantisation, or torchao is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise unknown("quantization", kind, tuple(QUANTIZATIONS))
    if util.find_spec("torchao") is None:
        raise FoveateError('quantization needs torchao, which is not installed: pip install "foveate[quantize]"')


def linears_of(block: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers of a block that are quantised: all but those that make its modulation."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and _MODULATION not in name.split("."):
            yield module


def quantize_blocks(blocks: Iterable[nn.Module], kind: str) -> None:
    """Quantises the linear layers of blocks in place, layer by layer, so that one layer at most exists twice.

    Args:
        blocks: Transformer blocks; their other parts are left as they were.
        kind: One of `QUANTIZATIONS`: whole numbers of 8 bits, or floating point of 8 bits (e4m3).

    Raises:
        FoveateError: torchao is missing, or cannot do this for the dtype and device of the weights.
    """
    check_quantization(kind)
    config, quantize = _torchao(kind)
    for block in blocks:
        for linear in linears_of(block):
            try:
                quantize(linear, config)
            except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
                weight = linear.weight
                what = f"{str(weight.dtype).removeprefix('torch.')} weights on {weight.device.type}"
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise FoveateError(
                    f"torchao cannot make {what} {kind}; take another dtype, or leave quantization out ({reason})"
                ) from error


def _torchao(kind: str) -> tuple[Any, Any]:
    """The torchao configuration, and what applies it; imported here, as it takes a second and is an extra."""
    level = logging.root.manager.disable
    # It warns of every kernel for a GPU that this build of torch has no use for.
    logging.disable(logging.WARNING)
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_  # noqa: PLC0415
    finally:
        logging.disable(level)
    configs = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}
    return configs[kind](set_inductor_config=False), quantize_


def quantized_bytes(blocks: Iterable[nn.Module], kind: str) -> dict[str, int]:
    """What the linear layers of blocks take: `parameters` of them, and `bytes` once they are quantised."""
    linears = [linear for block in blocks for linear in linears_of(block)]
    parameters = sum(linear.weight.numel() for linear in linears)
    outputs = sum(linear.out_features for linear in linears)
    return {"parameters": parameters, "bytes": parameters + QUANTIZATIONS[kind] * outputs}


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor holds: where it stands for several inner ones, as a quantised weight does, those of them."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)
