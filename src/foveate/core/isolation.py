"""What a caller may have switched on in its thread, switched off while foveate computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """Computes without gradients and in the dtypes that the code says, whatever the caller's thread has set.

    Autocast would change products, and a caller's settings are restored behind. Default dtypes and devices need no
    guard, as every tensor that foveate makes says its own.
    """
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        if device.type == "cpu":
            yield
            return
        with torch.autocast("cpu", enabled=False):
            yield
