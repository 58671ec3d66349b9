"""Isolates foveate from the caller's thread: autocast and gradients are off while it computes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """Computes without gradients and in the dtypes that the code says, whatever the caller's thread has set.

    Autocast would change matmuls, and a caller's settings are restored behind. Default dtypes and devices need no
    guard, as every tensor that foveate makes says its own.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
