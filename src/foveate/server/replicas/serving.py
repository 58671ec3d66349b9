"""Runs the server over replicas of Ray Serve: a front in this process, and one process or more for each replica.

Serve starts, watches and scales the replicas and gives each request to one; its own HTTP proxy is off, so that all
requests pass one gate, where keys, rates and limits hold for all replicas together.
"""

import asyncio
import logging
import math
import secrets
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from foveate.core.cluster import check_room, own_cpus, ray_cluster
from foveate.core.errors import FoveateError
from foveate.server.app import create_app
from foveate.server.gate import Gate
from foveate.server.replicas.forward import Answer, Forward, Forwarder
from foveate.server.replicas.messages import Call
from foveate.server.replicas.replica import Replica
from foveate.server.replicas.routing import LeastWork
from foveate.server.service import Service
from foveate.server.serving import Load
from foveate.server.settings import ServerSettings
from foveate.server.shared_store import SharedStore

logger = logging.getLogger("foveate.server")

_COUNT_S = 5.0
"""Seconds that a scrape waits for all replicas; Prometheus waits for ten."""
_DRAIN_S = 1.0
"""Behind the seconds of grace, for what replicas say of their end."""
_END_S = 20.0
"""Seconds for ending replicas and Ray, behind the seconds of grace."""
_START_S = 1.0
"""The same where they were not even started."""
_HEALTH_S, _HEALTH_TIMEOUT_S = 5.0, 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSettings:
    """How many replicas there are, and what each one has.

    Attributes:
        address: Of a Ray cluster; None starts one of this machine.
        least: Replicas that always run.
        most: That run under load.
        target_ongoing: Requests of a replica, on average, that the number of replicas is steered to.
        cpus: Of a replica; None divides this machine's among the most there may be.
        gpus: Of a replica; shares are possible.
        grace_s: Seconds that a replica has for its requests when it is ended.
        log_level: Of the replicas' lines.
    """

    address: str | None = None
    least: int = 1
    most: int = 1
    target_ongoing: float = 8.0
    cpus: float | None = None
    gpus: float = 0.0
    grace_s: float = 30.0
    log_level: int = logging.INFO

    def __post_init__(self) -> None:
        """Refuses numbers that no deployment can have."""
        if not 1 <= self.least <= self.most:
            raise FoveateError(f"replicas must be 1 or more, and no fewer at most than at least, got {self.least} to "
                               f"{self.most}")  # fmt: skip
        if self.target_ongoing <= 0:
            raise FoveateError(f"the target of ongoing requests must be above 0, got {self.target_ongoing:g}")
        if self.gpus < 0 or (self.cpus is not None and self.cpus <= 0):
            raise FoveateError(f"a replica needs CPUs above 0 and GPUs of 0 or more, got {self.cpus} and {self.gpus:g}")

    @property
    def cpus_each(self) -> float:
        """CPUs of a replica: as asked, or its share of this machine's."""
        if self.cpus is not None:
            return self.cpus
        return 1.0 if self.address is not None else float(max(1, own_cpus() // self.most))


class RayServed:
    """Replicas behind a front: what `serve_until_signal` serves."""

    def __init__(
        self,
        load: Load,
        settings: ServerSettings,
        replicas: ReplicaSettings,
    ) -> None:
        """Starts nothing yet.

        Args:
            load: Loads a model and makes its scheduler, not yet started; called in every replica.
            settings: How the server runs.
            replicas: How many there are.

        Raises:
            FoveateError: The store's folder cannot be made.
        """
        self.limits = settings.limits
        self._load, self._settings, self._wanted = load, settings, replicas
        self._store = SharedStore.make(settings.store)
        self._replicas = Deployed()
        self._forwarder = Forwarder(self._replicas)
        self._handle: Future[Any] = Future()
        self._draining: asyncio.Future[bool] | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._live, name="foveate-ray", daemon=True)
        self.app: FastAPI = front_of(settings, self._store, self._forwarder)
        self._service: Service = self.app.state.service

    async def open(self) -> dict[str, Any]:
        """Starts the replicas and waits until all of them have warmed up."""
        began = time.perf_counter()
        self._thread.start()
        self._replicas.open(await asyncio.wrap_future(self._handle))
        numbers = {"replicas": self._wanted.least, "most_replicas": self._wanted.most}
        return {"engine": "ray", **numbers, "load_s": round(time.perf_counter() - began, 2)}

    async def close(self, grace_s: float) -> bool:
        """Finishes or answers what was accepted."""
        self._service.is_closing = True
        if not self._settings.keeps_on_disconnect:
            return await self._forwarder.close(grace_s)
        # What clients that went away left is on no way back, and still generated.
        draining = self._draining = asyncio.ensure_future(self._replicas.drained(grace_s))
        try:
            is_done = await self._forwarder.close(grace_s)
            await asyncio.wait({draining})
            return not draining.cancelled() and draining.result() and is_done
        finally:
            draining.cancel()

    def answer_all(self) -> None:
        """Answers what still runs."""
        self._forwarder.answer_all()

    def stop_now(self) -> None:
        """Answers what still runs, and waits for nothing that is left without a client."""
        self._forwarder.answer_all()
        if self._draining is not None:
            self._draining.cancel()

    def release(self) -> None:
        """Ends the replicas, the threads and the store."""
        self._replicas.close()
        self._ending.set()
        if self._thread.is_alive():
            # What hangs behind that, or still starts, is ended with the process, as the thread is a daemon.
            self._thread.join(_END_S if self._handle.done() else _START_S)
        self._service.release()

    def _live(self) -> None:
        """The life of the cluster, in one thread: starts Ray and the replicas, and ends them when it is time."""
        wanted = self._wanted
        cpus = max(own_cpus(), math.ceil(wanted.most * wanted.cpus_each))
        _quiet_logs()
        try:
            with ray_cluster(address=wanted.address, num_cpus=cpus) as ray, ExitStack() as held:
                check_room(ray, wanted.address, "replicas", count=wanted.least, cpus=wanted.cpus_each, gpus=wanted.gpus)
                self._check_machines(ray)
                name, handle = deploy(self._load, self._settings, self._store.folder, wanted)
                if wanted.address is not None:
                    held.callback(undeploy, name)
                self._handle.set_result(handle)
                self._ending.wait()
        except BaseException as error:  # raised where the handle is awaited
            if self._handle.done():
                logger.error("Ray did not end as it should", exc_info=error)
            else:
                self._handle.set_exception(error)

    def _check_machines(self, ray: Any) -> None:  # noqa: ANN401
        """Refuses a store that the replicas of other machines would not see."""
        machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        if len(machines) > 1 and self._settings.store.folder is None:
            raise FoveateError(
                f"the cluster has {len(machines)} machines; give --store a folder that all of them see, for image urls"
            )


def deploy(load: Load, settings: ServerSettings, folder: Path, wanted: ReplicaSettings) -> tuple[str, Any]:
    """Starts replicas on the cluster that this process is connected to, and waits until all have warmed up.

    Args:
        load: Loads a model and makes its scheduler, not yet started; called in every replica.
        settings: How the server runs.
        folder: Of the store that all replicas share.
        wanted: How many replicas there are.

    Returns:
        The name of the application, which is new, so that nothing else of the cluster is replaced; and a handle.

    Raises:
        FoveateError: A replica cannot be started.
    """
    from ray import serve  # noqa: PLC0415 - an extra, and slow to import

    _check_sendable(load, settings)
    _quiet_logs()
    name = f"foveate-{secrets.token_hex(4)}"
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(**_options(wanted, settings.limits.connections))(Replica)
    app = deployment.bind(load, settings, folder, wanted.log_level)
    try:
        handle = serve.run(app, name=name, route_prefix=None)
    except RuntimeError as error:
        reason = _reason(serve, name) or str(error)
        serve.delete(name)
        raise FoveateError(f"the replicas cannot be started: {reason}") from None
    _quiet_logs()
    return name, handle


def undeploy(name: str) -> None:
    """Ends the replicas of an application, and leaves what else there is in the cluster."""
    from ray import serve  # noqa: PLC0415

    serve.delete(name)


def front_of(settings: ServerSettings, store: SharedStore, forwarder: Forwarder) -> FastAPI:
    """The application that clients talk to: the gate, and behind it replicas for all that needs the model.

    Args:
        settings: How the server runs; those of limits and the store that replicas check are theirs.
        store: That all replicas share.
        forwarder: Knows the replicas.
    """

    def outer(app: ASGIApp, service: Service) -> ASGIApp:
        return Gate(Forward(app, service, forwarder), service)

    return create_app(None, None, settings, outer=outer, store=store, has_model=False)


class Deployed:
    """The replicas as the front sees them."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def is_open(self) -> bool:
        """Whether there is a handle."""
        return self._handle is not None

    def open(self, handle: Any) -> None:  # noqa: ANN401 - of Ray Serve
        """From now on requests are handed on."""
        self._handle = handle.options(stream=True)

    def close(self) -> None:
        """No more are."""
        self._handle = None

    def handle(self, call: Call) -> Answer:
        """Gives a request to the replica that Serve's router chooses."""
        found: Answer = self._handle.handle.remote(call)
        return found

    async def drained(self, grace_s: float) -> bool:
        """Has all replicas finish what they hold; whether all did, which they have where there are none yet."""
        found = await self._all("drain", grace_s, timeout_s=grace_s + _DRAIN_S) if self.is_open else []
        return all(found)

    async def counted(self) -> list[tuple[str, bytes]]:
        """Name and metrics of each replica that answers in time; how many do not, the log says."""
        return await self._all("counted", timeout_s=_COUNT_S)

    async def _all(self, method: str, *arguments: object, timeout_s: float) -> list[Any]:
        """What a method of each replica returns."""
        from ray.exceptions import RayError  # noqa: PLC0415
        from ray.serve.exceptions import RayServeException  # noqa: PLC0415

        try:
            # Ray's own timeout leaves an exception behind that nobody retrieves.
            async with asyncio.timeout(timeout_s):
                found = await self._handle.broadcast(method, *arguments).results_async(return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.error("replicas do not answer: %s", str(error) or type(error).__name__)
            return []
        lost = [entry for entry in found if isinstance(entry, BaseException)]
        if lost:
            logger.error("%d of %d replicas do not answer: %s", len(lost), len(found), lost[0])
        return [entry for entry in found if not isinstance(entry, BaseException)]


def _options(wanted: ReplicaSettings, most_ongoing: int) -> dict[str, Any]:
    """Of the deployment. Replicas take all that comes: their own queue says when it is full."""
    from ray.serve.config import RequestRouterConfig  # noqa: PLC0415 - an extra, and slow to import

    found: dict[str, Any] = {
        "name": "Images",
        "ray_actor_options": {"num_cpus": wanted.cpus_each, "num_gpus": wanted.gpus},
        "max_ongoing_requests": most_ongoing,
        "graceful_shutdown_timeout_s": wanted.grace_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": _HEALTH_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        # A model that cannot be loaded cannot be loaded the second time; replicas that ran once are always replaced.
        "max_constructor_retry_count": 1,
        "request_router_config": RequestRouterConfig(request_router_class=LeastWork),
    }
    if wanted.least == wanted.most:
        return {**found, "num_replicas": wanted.least}
    scaling = {
        "min_replicas": wanted.least,
        "max_replicas": wanted.most,
        "target_ongoing_requests": wanted.target_ongoing,
    }
    return {**found, "autoscaling_config": scaling}


def _check_sendable(load: Load, settings: ServerSettings) -> None:
    """Refuses what cannot travel to replicas.

    Raises:
        FoveateError: Something does not pickle.
    """
    from ray import cloudpickle  # noqa: PLC0415 - an extra, and slow to import

    for what, part in {"model's settings": load, "server's settings": settings}.items():
        try:
            cloudpickle.dumps(part)
        except Exception as error:  # of whatever an operator's check holds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise FoveateError(
                f"the {what} cannot be sent to replicas ({reason}); a --moderation function and what it refers to must "
                "pickle, or use --engine local"
            ) from None


def _reason(serve: Any, name: str) -> str | None:  # noqa: ANN401
    """The last line of what the first replica that could not start says."""
    application = serve.status().applications.get(name)
    messages = [entry.message for entry in application.deployments.values()] if application is not None else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return errors[-1].partition("Error: ")[2] if errors else None


def _quiet_logs() -> None:
    """Leaves Ray's records to the handlers of this process, instead of one that writes them as text."""
    for name in ("ray", "ray.serve"):
        log = logging.getLogger(name)
        for handler in tuple(log.handlers):
            log.removeHandler(handler)
        log.propagate = True
