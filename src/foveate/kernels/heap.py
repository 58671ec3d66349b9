"""Keeps freed memory while a request runs: glibc makes tensors above 32 MB of new pages every time.

A page that is touched for the first time costs a fault, and at 1024 px a feed-forward net touches 50 to 100 MB per
block. Smaller tensors gain nothing. Memory goes back to the system when the last request ends.
"""

import ctypes
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

from foveate.kernels import switches

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
_NEVER = 2**31 - 1
_MMAP_AFTER, _TRIM_AFTER = 32 * 2**20, 64 * 2**20
"""Where glibc's own, moving thresholds end up in a process that frees large blocks."""

_lock = threading.Lock()
_running = 0


@contextmanager
def kept_heap() -> Generator[None, None, None]:
    """Keeps freed memory until the last of all contexts ends; nothing outside of glibc, or with FOVEATE_KEEP_HEAP=0.

    The settings are those of the whole process; at the end they are what glibc's own come to with large blocks.
    """
    global _running  # noqa: PLW0603 - the allocator is one for all requests
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not switches.is_on("FOVEATE_KEEP_HEAP") or library is None or not hasattr(library, "mallopt"):
        yield
        return
    with _lock:
        _running += 1
        if _running == 1:
            library.mallopt(_MMAP_THRESHOLD, _NEVER)
            library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                library.mallopt(_MMAP_THRESHOLD, _MMAP_AFTER)
                library.mallopt(_TRIM_THRESHOLD, _TRIM_AFTER)
                library.malloc_trim(0)
