"""Where a pipeline computes and in which dtype: what the names mean, and what a device or a pipeline cannot do."""

import torch

from foveate.core.errors import FoveateError
from foveate.kernels.gpu import launch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_dtype(dtype: str | torch.dtype, name: str = "dtype") -> torch.dtype:
    """The dtype of a name, `bfloat16` or `torch.bfloat16`.

    Raises:
        FoveateError: There is no such dtype, or no model computes in it; `name` is the argument that the error names.
    """
    known = {**DTYPES, **{str(value): value for value in DTYPES.values()}}
    if str(dtype) not in known:
        raise FoveateError(f"{name} must be one of {', '.join(DTYPES)}, got {dtype}")
    return known[str(dtype)]


def one_dtype(dtype: str | torch.dtype | None, torch_dtype: str | torch.dtype | None) -> torch.dtype:
    """What a model computes in, by the option or its alias; float32 where neither is given.

    Raises:
        FoveateError: Both are given, or there is no such dtype.
    """
    if dtype is not None and torch_dtype is not None:
        raise FoveateError("give dtype or its alias torch_dtype, not both")
    if torch_dtype is not None:
        return find_dtype(torch_dtype, "torch_dtype")
    return torch.float32 if dtype is None else find_dtype(dtype)


def find_device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        FoveateError: There is none of this name, or not on this machine.
    """
    found: torch.device | None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or (found.type != "cuda" and str(found) != "cpu"):
        raise FoveateError(f'device must be "cpu", "cuda" or "cuda:N", got {str(device)!r}')
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise FoveateError(f'device {device} needs a CUDA build of torch and a GPU, there is none; use "cpu"')
        count = torch.cuda.device_count()
        if found.index is not None and found.index >= count:
            there = ", ".join(f"cuda:{i}" for i in range(count))
            raise FoveateError(f"device {device} does not exist; there are {there}")
    return found


def is_same_device(one: torch.device, other: torch.device) -> bool:
    """Whether both are one device; `cuda` without a number is the current GPU."""
    if one.type != other.type:
        return False
    if one.type == "cuda" and None in (one.index, other.index):
        current = torch.cuda.current_device()
        return (current if one.index is None else one.index) == (current if other.index is None else other.index)
    return one == other


def refuse_offload(device: torch.device) -> None:
    """Refuses offload where there is no device to save the memory of.

    Raises:
        FoveateError: The device is the CPU.
    """
    if device.type == "cpu":
        raise FoveateError(
            "offload needs a pipeline on a GPU; this one computes on the CPU, with all modules in main memory: load it "
            'with device="cuda", or leave offload out'
        )


def wants_triton(kernels: str | None, device: torch.device) -> bool:
    """Whether Triton kernels were asked for.

    Raises:
        FoveateError: Other kernels were, or the device or the installation has none.
    """
    if kernels not in (None, "triton"):
        raise FoveateError(f'kernels must be None or "triton", got {kernels!r}')
    if kernels is None:
        return False
    if device.type == "cpu":
        raise FoveateError('Triton kernels need a pipeline on a GPU; load it with device="cuda", or leave kernels out')
    if not launch.has_triton():
        raise FoveateError("triton is not installed; install it, or leave kernels out for plain torch")
    return True


def refuse_other_dtype(dtype: str | torch.dtype, loaded: torch.dtype) -> None:
    """Refuses a dtype that is not the one of a loaded model.

    Raises:
        FoveateError: It would round weights that were rounded before, or nothing at all.
    """
    wanted = find_dtype(dtype)
    if wanted != loaded:
        name = str(wanted).removeprefix("torch.")
        raise FoveateError(
            f"to() moves a pipeline and keeps its dtype, {str(loaded).removeprefix('torch.')}; load it with "
            f'dtype="{name}", which reads the weights in it'
        )


def refuse_move(
    device: torch.device, *, has_offload: bool, has_graphs: bool, uses_triton: bool, quantization: str | None
) -> None:
    """Refuses to move a pipeline to another device where something of it belongs to the one that it is on.

    Raises:
        FoveateError: It names that, and how to have the pipeline on the device.
    """
    again = f'load a pipeline with device="{device}"'
    for is_there, reason in (
        (has_offload, "offload moves the modules itself, so to() would undo it: leave to() out, or"),
        (has_graphs, "captured CUDA graphs belong to the device they were captured on:"),
        (uses_triton and device.type == "cpu", "Triton kernels run on a GPU:"),
        (quantization is not None, f"{quantization} weights are laid out for the device they were loaded on:"),
    ):
        if is_there:
            raise FoveateError(f"{reason} {again}" + (" and without offload" if has_offload else ""))
