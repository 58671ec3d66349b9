"""Calls in threads that do not keep the process alive: loading a model, or closing a scheduler, may take minutes."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_daemon(call: Callable[[], T], name: str) -> T:
    """What a call in a thread of its own returns or raises; who no longer waits does not stop it."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised where the call is awaited
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(future)
