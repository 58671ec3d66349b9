"""Bounds how many compiled operators oneDNN and torch keep, 1024 each by default.

oneDNN compiles a matmul for every number of rows, and packed batches have any number of them. Each takes about 0.2 MB
in either cache, and between freed tensors they fragment the heap. Compiling one takes less than a millisecond.
"""

import os

_CAPACITIES = {
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"): 256,
    ("LRU_CACHE_CAPACITY",): 256,
}
"""What oneDNN reads before its first operator, and torch's own cache before its first matmul by oneDNN; the first name
of each is set. An image of one size needs about 60 operators."""


def bound_primitive_caches() -> None:
    """Sets the environment variables of both caches; one that is set already stays as it is.

    They hold for the process and for those that it starts, and count only if no such operator has run yet.
    """
    for names, capacity in _CAPACITIES.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = str(capacity)
