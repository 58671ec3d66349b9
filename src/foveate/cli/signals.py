"""Signals that ask a command to end, raised like Ctrl-C, so that every `with` cleans up."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

FIRST_CODE = 128
"""Exit codes of commands that a signal ended begin here, as in every shell: 143 for SIGTERM."""

_NAMES = ("SIGTERM", "SIGHUP")


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end; whoever handles Ctrl-C handles it too."""


@contextmanager
def signals_raised() -> Iterator[list[int]]:
    """Raises `Terminated` for SIGTERM and SIGHUP inside, and lists those that came.

    A signal that the caller ignores stays ignored, as under nohup; outside the main thread nothing changes.
    """
    came: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise Terminated

    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
        before = {number: handler for number, handler in before.items() if handler == signal.SIG_DFL}
    for number in before:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
