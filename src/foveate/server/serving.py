"""Runs the application with uvicorn: loads and warms up while it already answers, and ends without losing a request.

The first SIGTERM or SIGINT begins the end: no new requests, every accepted one is finished or answered, and the process
exits within the seconds of grace. A second one ends at once.
"""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import uvicorn
from fastapi import FastAPI

from foveate.core.errors import FoveateError
from foveate.pipeline.pipeline import Pipeline
from foveate.server.app import create_app
from foveate.server.limits import Limits
from foveate.server.protocol import timed_protocol
from foveate.server.scheduler import Scheduler
from foveate.server.service import Service
from foveate.server.settings import ServerSettings
from foveate.server.threads import in_daemon

logger = logging.getLogger("foveate.server")

Load = Callable[[], tuple[Pipeline, Scheduler]]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AT_ONCE = 2
"""Signals that end it without waiting."""

_BACKLOG = 512
_KEEP_ALIVE_S = 30
_SHARE_FOR_SENDING, _LEAST_FOR_SENDING_S, _MOST_FOR_SENDING_S = 0.2, 0.5, 3.0
"""Of the seconds of grace, what is left for sending what was finished last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a server listens, and how long it takes to end.

    Attributes:
        host: Address.
        port: 0 takes a free one.
        grace_s: Seconds from the first signal to the end of the process.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        """Refuses what no server can have."""
        if not 0 <= self.port < 2**16:
            raise FoveateError(f"port must be 0 to {2**16 - 1}, got {self.port}")
        if self.grace_s <= 0:
            raise FoveateError(f"grace must be above 0 seconds, got {self.grace_s:g}")


class _Server(uvicorn.Server):
    """uvicorn's, without signal handlers of its own, which would cut streams off."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


def server_of(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """A server of an application, which ends when its `should_exit` is set; it knows no signals."""
    config = uvicorn.Config(
        app,
        http=timed_protocol(limits),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    return _Server(config)


@runtime_checkable
class Served(Protocol):
    """What is behind an application: a model in this process, or replicas in others."""

    @property
    def app(self) -> FastAPI:
        """The application; it answers from the beginning."""

    @property
    def limits(self) -> Limits:
        """Of requests."""

    async def open(self) -> dict[str, Any]:
        """Loads and warms up; from then on requests are taken. What the log says of it comes back.

        Raises:
            FoveateError: It cannot be loaded.
        """

    async def close(self, grace_s: float) -> bool:
        """Takes no more; every accepted request is finished or answered. Whether everything was finished."""

    def answer_all(self) -> None:
        """Answers whatever still runs with an error, as no time is left."""

    def stop_now(self) -> None:
        """Ends what still runs as soon as possible, while `close` waits for it."""

    def release(self) -> None:
        """Frees everything; may be called twice."""


def serve_locally(load: Load, settings: ServerSettings, place: Place) -> bool:
    """Serves a model of this process until a signal ends it.

    Args:
        load: Loads the model and makes its scheduler, not yet started; called in a thread.
        settings: How it runs.
        place: Where.

    Returns:
        Whether every accepted request was finished.

    Raises:
        FoveateError: The address is taken, or the model cannot be loaded.
    """
    return serve_until_signal(lambda: _Local(load, settings), place)


def serve_until_signal(make: Callable[[], Served], place: Place) -> bool:
    """Serves until a signal ends it.

    Args:
        make: Makes what is served; called once the address is known to be free.
        place: Where.

    Returns:
        Whether every accepted request was finished.

    Raises:
        FoveateError: The address is taken, or nothing can be loaded.
    """
    with _listening(place) as listener:
        return asyncio.run(_Run(make(), place, listener).run())


class _Local:
    """A model in this process."""

    def __init__(self, load: Load, settings: ServerSettings) -> None:
        self._load, self.limits = load, settings.limits
        self.app: FastAPI = create_app(None, None, settings)
        self._service: Service = self.app.state.service

    async def open(self) -> dict[str, Any]:
        """Loads and warms up."""
        began = time.perf_counter()
        pipe, scheduler = await in_daemon(self._load, "foveate-load")
        scheduler.start()
        warm_s = await in_daemon(scheduler.warm_up, "foveate-warm-up")
        self._service.open(pipe, scheduler)
        load_s = time.perf_counter() - began - warm_s
        return {"model": pipe.model.spec.name, "load_s": round(load_s, 2), "warm_up_s": round(warm_s, 2)}

    async def close(self, grace_s: float) -> bool:
        """Finishes or answers what was accepted."""
        return await self._service.close(grace_s)

    def answer_all(self) -> None:
        """Answers what still runs."""
        self._service.answer_all()

    def stop_now(self) -> None:
        """Ends what still runs at its next scale."""
        self._service.stop_now()

    def release(self) -> None:
        """Ends the threads and deletes what is stored."""
        self._service.release()


class _Run:
    """One life of a server."""

    def __init__(self, served: Served, place: Place, listener: socket.socket) -> None:
        self._served, self._place, self._listener = served, place, listener
        self._server = server_of(served.app, served.limits)
        self._signals: list[int] = []
        self._before: dict[int, Any] = {}
        self._stop = asyncio.Event()

    async def run(self) -> bool:
        """Serves until it is over."""
        self._hear_signals()
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        loading = asyncio.create_task(self._open())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and loading.exception() is None:
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return await self._end(serving, loading)
        finally:
            self._ignore_signals()
            for task in (loading, stopping):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            # Once more, as a second signal leaves the application no time for it.
            self._served.release()

    async def _open(self) -> None:
        """Loads and warms up; from then on requests are taken."""
        found = await self._served.open()
        # Libraries that were loaded may have taken them.
        self._hear_signals()
        host, port = self._listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        logger.info("ready", extra={"fields": {"url": url, **found}})

    async def _end(self, serving: asyncio.Task[None], loading: asyncio.Task[None]) -> bool:
        """Answers what was accepted, and ends the server; an error of loading is raised behind it."""
        until = time.monotonic() + self._place.grace_s
        for_sending = min(_MOST_FOR_SENDING_S, _SHARE_FOR_SENDING * self._place.grace_s)
        closing = asyncio.create_task(self._served.close(self._place.grace_s - for_sending))
        await asyncio.wait({closing}, timeout=self._place.grace_s - for_sending / 2)
        if not closing.done():
            self._served.answer_all()
        left = max(_LEAST_FOR_SENDING_S, until - time.monotonic())
        self._server.config.timeout_graceful_shutdown = left  # type: ignore[assignment]  # any number of seconds
        self._server.should_exit = True
        await serving
        if self._server.force_exit and self._server.started:
            # uvicorn leaves it out then, and the application's end would be logged as an error.
            await self._server.lifespan.shutdown()
        if not closing.done():
            logger.error("the end of a scale did not come within the seconds of grace")
        is_done = closing.done() and closing.result() and len(self._signals) < _AT_ONCE
        closing.cancel()
        if loading.done() and not loading.cancelled() and (error := loading.exception()) is not None:
            raise error
        return is_done

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            try:
                loop.add_signal_handler(number, self._on_signal, number)
            except NotImplementedError:  # on Windows
                before = signal.signal(number, lambda got, _: loop.call_soon_threadsafe(self._on_signal, got))
                # None where it was not set from Python.
                self._before.setdefault(number, before or signal.SIG_DFL)

    def _ignore_signals(self) -> None:
        """Leaves signals to those who heard them before."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if number in self._before:
                signal.signal(number, self._before[number])
            else:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        self._stop.set()
        if len(self._signals) >= _AT_ONCE:
            self._server.force_exit = True
            self._served.stop_now()


@contextmanager
def _listening(place: Place) -> Iterator[socket.socket]:
    """A bound socket, so that a taken address is known before a model is loaded.

    Raises:
        FoveateError: There is no such address, or it is taken.
    """
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FoveateError(f"cannot listen on {place.host} port {place.port}: {reason}; try another --port") from None
    with listener:
        listener.setblocking(False)
        yield listener
