"""What all handlers share: settings, threads, the store, and the model once it is loaded."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from fastapi import Request
from PIL import Image

from foveate.pipeline.pipeline import Pipeline
from foveate.server.errors import closing, loading
from foveate.server.limits import RateLimiter
from foveate.server.logs import RequestLog
from foveate.server.metrics import Metrics
from foveate.server.moderation import moderate
from foveate.server.settings import ServerSettings
from foveate.server.spans import Spans
from foveate.server.store import ImageStore, Store
from foveate.server.threads import DaemonPool, in_daemon
from foveate.server.work import Scheduling, Stats

P = ParamSpec("P")
T = TypeVar("T")

_ADMITTERS = 2
"""Threads that check requests, which takes tens of milliseconds at most."""

_CHECKERS = 8
"""Calls of the operator's check at once. They may hang, so they take no thread that anything else needs."""

_STORE_S = 1.0
"""Seconds for storing what was finished last for clients that went away."""

_NOTHING = Stats(
    queued_requests=0,
    queued_images=0,
    running_images=0,
    max_images=0,
    reserved_bytes=0,
    budget_bytes=0,
    images_per_s=None,
    restarts=0,
    is_closing=False,
)


class Service:
    """One server, from the event loop's side; the loop itself waits for no computation.

    Attributes:
        settings: How it runs.
        store: Finished images behind urls.
        rate: Requests of each key.
        metrics: What is counted.
        log: Lines about requests.
        spans: Where an OpenTelemetry SDK is configured.
        is_closing: Whether it takes no more requests.
    """

    def __init__(self, settings: ServerSettings, store: Store | None = None, *, has_model: bool = True) -> None:
        """Nothing is loaded yet.

        Args:
            settings: How it runs.
            store: In place of one of the server's own.
            has_model: Whether a model will be opened; False where others generate the images.

        Raises:
            FoveateError: The store's folder cannot be made.
        """
        self.settings = settings
        self.store: Store = ImageStore(settings.store) if store is None else store
        self.rate = RateLimiter(settings.limits.requests_per_minute)
        self.metrics = Metrics(self.stats if has_model else None)
        self.log = RequestLog(shows_prompts=settings.shows_prompts)
        self.spans = Spans()
        self.is_closing = False
        self._opened: tuple[Pipeline, Scheduling] | None = None
        self._admitters = DaemonPool(_ADMITTERS, "foveate-admit")
        self._encoders = DaemonPool(settings.encoders, "foveate-encode")
        self._checkers = DaemonPool(_CHECKERS, "foveate-check")
        self._tasks: set[asyncio.Task[None]] = set()
        self._enders: set[Callable[[], None]] = set()

    def open(self, pipe: Pipeline, scheduler: Scheduling) -> None:
        """From now on requests are taken."""
        self._opened = (pipe, scheduler)

    @property
    def is_loaded(self) -> bool:
        """Whether there is a model."""
        return self._opened is not None

    def opened(self) -> tuple[Pipeline, Scheduling]:
        """The model and its scheduler.

        Raises:
            ApiError: It is not ready yet, or stops.
        """
        if self.is_closing:
            raise closing()
        if self._opened is None:
            raise loading()
        return self._opened

    def stats(self) -> Stats:
        """Of the scheduler; zeros while there is none."""
        return _NOTHING if self._opened is None else self._opened[1].stats()

    async def admit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs what checks or submits a request in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._admitters, lambda: call(*args, **kwargs))

    async def encode(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs what encodes images in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoders, lambda: call(*args, **kwargs))

    async def check(self, prompt: str, image: Image.Image | None = None) -> None:
        """Asks the operator's check, where there is one, in a thread.

        Raises:
            ApiError: It refused, or took too long.
            RuntimeError: It failed.
            TypeError: It returned something that is neither None nor a text.
        """
        check = self.settings.moderation
        if check is not None:
            await asyncio.get_running_loop().run_in_executor(self._checkers, moderate, check, prompt, image)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Lets a coroutine run beyond the request that began it; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, grace_s: float) -> bool:
        """Takes no more; every accepted request is finished or answered, within `grace_s` seconds.

        Returns:
            Whether everything was finished.
        """
        self.is_closing = True
        if self._opened is None:
            return True
        scheduler = self._opened[1]
        is_done = await in_daemon(lambda: scheduler.close(grace_s), "foveate-close")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STORE_S)
        return is_done

    def begins(self, end: Callable[[], None]) -> None:
        """Notes how an exchange is answered where the server cannot wait for it; on the event loop."""
        self._enders.add(end)

    def ends(self, end: Callable[[], None]) -> None:
        """The exchange is over."""
        self._enders.discard(end)

    def answer_all(self) -> None:
        """Answers whatever still runs with an error, as no time is left to wait for the end of a scale."""
        for end in tuple(self._enders):
            end()

    def stop_now(self) -> None:
        """Ends what still runs at its next scale, while `close` waits for it."""
        if self._opened is not None:
            threading.Thread(target=self._opened[1].close, args=(0.0,), name="foveate-stop", daemon=True).start()

    def release(self) -> None:
        """Ends the threads, once they are done, and deletes what is stored; the process waits for none of them."""
        self._admitters.shutdown(wait=False, cancel_futures=True)
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._checkers.shutdown(wait=False, cancel_futures=True)
        self.store.close()


def service_of(request: Request) -> Service:
    """The service of the app that a request came to."""
    found: Service = request.app.state.service
    return found
