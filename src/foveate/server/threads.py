"""Calls in threads that do not keep the process alive: loading a model, or closing a scheduler, may take minutes.

The interpreter waits at its end for the threads of `ThreadPoolExecutor`, whatever `shutdown` was told.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_Task = tuple[Future[Any], Callable[[], Any]]


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


class DaemonPool(Executor):
    """A few such threads that take calls in turn; they are started as they are needed."""

    def __init__(self, threads: int, name: str) -> None:
        """Starts nothing yet."""
        self._most, self._name = threads, name
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._is_over = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Has a call made in a thread.

        Raises:
            RuntimeError: It is shut down.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._is_over:
                raise RuntimeError(f"{self._name} is shut down and takes no more calls")
            self._tasks.put((future, lambda: fn(*args, **kwargs)))
            if len(self._threads) < self._most:
                name = f"{self._name}-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more calls; threads end behind those that were submitted and not cancelled."""
        with self._lock:
            self._is_over = True
            if cancel_futures:
                self._cancel_waiting()
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _cancel_waiting(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                return
            if task is not None:
                task[0].cancel()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # raised where the call is awaited
                future.set_exception(error)
            # What is held until the next call may be images.
            del task, future, call
