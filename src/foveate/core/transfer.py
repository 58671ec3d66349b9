"""From the host to the device without waiting for it.

A plain copy of ordinary memory makes the host wait until the device has done everything before it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copies a host tensor to a device; the host goes on at once. A tensor that is there already is returned as it is.

    Args:
        tensor: On the host, or already on the device.
        device: Where it shall be.
        dtype: Of what is returned; the tensor's own if None.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Only page-locked memory is copied behind the host's back; torch keeps it until the copy is done.
        tensor = tensor.to(dtype or tensor.dtype).pin_memory()
    return tensor.to(device=device, dtype=dtype or tensor.dtype, non_blocking=True)


def numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers of the host as an int64 tensor (n,) on the device, as `to_device` copies."""
    return to_device(torch.tensor(values, dtype=torch.long, device="cpu"), device)
