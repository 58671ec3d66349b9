"""One replica: the application of `foveate serve` behind a call instead of a socket, with a scheduler of its own."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveate.pipeline.pipeline import Pipeline
from foveate.server.app import create_app
from foveate.server.errors import ApiError, api_error, error_response
from foveate.server.gate import state_of
from foveate.server.logs import json_logs
from foveate.server.replicas.messages import Begun, Call, Ended, Known, Parts, Refusal, Said
from foveate.server.scheduler import Scheduler
from foveate.server.service import Service
from foveate.server.settings import ServerSettings
from foveate.server.shared_store import SharedStore

logger = logging.getLogger("foveate.server")

_Messages = asyncio.Queue[Known | Parts | None]


class Replica:
    """What Ray Serve makes a deployment of; it is ready when it is made."""

    def __init__(
        self,
        load: Callable[[], tuple[Pipeline, Scheduler]],
        settings: ServerSettings,
        folder: Path,
        log_level: int = logging.INFO,
    ) -> None:
        """Loads and warms up.

        Args:
            load: Loads the model and makes its scheduler, not yet started.
            settings: Of the server; the front keeps keys and rates.
            folder: Of the store that all replicas share.
            log_level: Of the lines on stderr, which Ray keeps in its folder of logs.
        """
        self._name = _own_name()
        self._held = ExitStack()
        self._held.enter_context(json_logs(log_level))
        pipe, self._scheduler = load()
        self._scheduler.start()
        self._held.callback(self._scheduler.close, 0.0)
        self._scheduler.warm_up()
        store = SharedStore(folder, settings.store)
        self._app = create_app(pipe, self._scheduler, replace(settings, origins=()), outer=_Inner, store=store)
        self._service: Service = self._app.state.service
        self._held.callback(self._service.release)
        self._tasks: set[asyncio.Task[None]] = set()

    async def handle(self, call: Call) -> AsyncIterator[Said]:
        """Answers a request, part by part as they are made; who stops reading is a client that went away."""
        messages: _Messages = asyncio.Queue()
        gone = asyncio.Event()
        bodies = iter([{"type": "http.request", "body": call.body, "more_body": False}])

        async def receive() -> Message:
            for body in bodies:
                return body
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            messages.put_nowait(message)

        def known(policy: str) -> None:
            messages.put_nowait(Known(policy=policy))

        state = {**state_of(call.id), "owner": call.owner, "known": known}
        scope: Scope = {**call.scope, "state": state}
        task = asyncio.create_task(self._run(scope, receive, send, messages))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            yield Begun(replica=self._name)
            while (message := await messages.get()) is not None:
                yield message
            yield _ended(scope)
        finally:
            gone.set()

    async def _run(self, scope: Scope, receive: Receive, send: Send, messages: _Messages) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            messages.put_nowait(None)

    async def drain(self, grace_s: float) -> bool:
        """Takes no more and finishes what it has, within so many seconds; whether everything was."""
        return await self._service.close(grace_s)

    async def counted(self) -> tuple[str, bytes]:
        """The name of this replica, and its metrics in Prometheus' text format."""
        return self._name, self._service.metrics.render()

    def check_health(self) -> None:
        """Called by Ray Serve now and then, which starts another replica in place of one that raises.

        Raises:
            RuntimeError: The scheduler has ended, and `drain` was not called.
        """
        if self._scheduler.stats().is_closing and not self._service.is_closing:
            raise RuntimeError("the scheduler has ended")

    def __del__(self) -> None:
        """Called by Ray Serve at the end; requests are over by then."""
        held = getattr(self, "_held", None)
        if held is not None:
            held.close()


class _Inner:
    """The outermost layer in a replica; the gate of the front has done the rest."""

    def __init__(self, app: ASGIApp, _service: Service) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, answers its errors, and lets its exchange know of its end."""
        state, has_begun = scope["state"], False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if not isinstance(error, ApiError):
                fields = {"request_id": state["id"]}
                logger.error("a request failed", exc_info=error, extra={"fields": fields})
            state["error"] = api_error(error)
            if not has_begun:
                await error_response(state["error"])(scope, receive, send)
        finally:
            if state["leave"] is not None:
                state["leave"]()


def _ended(scope: Scope) -> Ended:
    state = scope["state"]
    error: ApiError | None = state["error"]
    return Ended(
        policy=state["policy"],
        route=getattr(scope.get("route"), "path", None),
        refusal=None if error is None else Refusal.of(error),
        flops=state.get("flops", 0.0),
    )


def _own_name() -> str:
    """Of this replica, unique among those of its deployment."""
    from ray import serve  # noqa: PLC0415 - an extra

    return str(serve.get_replica_context().replica_id.unique_id)
