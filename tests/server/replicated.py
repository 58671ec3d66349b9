"""A server over replicas on a local Ray cluster, as tests of the single process know it: `live` and `start`.

Fronts are in this process, with settings of their own, over replicas that are started once. Settings that replicas
check need replicas of their own, which takes seconds.
"""

import asyncio
import importlib.util
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from foveate.core.cluster import ray_cluster
from foveate.pipeline.pipeline import Pipeline
from foveate.server.replicas import routing
from foveate.server.replicas.forward import Forwarder
from foveate.server.replicas.serving import Deployed, ReplicaSettings, deploy, front_of, undeploy
from foveate.server.scheduler import Scheduler, SchedulerSettings
from foveate.server.serving import server_of
from foveate.server.settings import ServerSettings
from foveate.server.shared_store import SharedStore
from foveate.server.work import Stats
from tests.server.conftest import TIMEOUT_S, Live, eventually


class Summed:
    """The metrics of a server, with those of all replicas added up."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def render(self) -> bytes:
        """As the page of a single process."""
        registry = CollectorRegistry()
        registry.register(self)  # type: ignore[arg-type]
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Families without the label of the replica."""
        for family in text_string_to_metric_families(self._live.send("/metrics").body.decode()):
            sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
            for sample in family.samples:
                labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "replica"))
                sums[sample.name, labels] = sums.get((sample.name, labels), 0.0) + sample.value
            whole = Metric(family.name, family.documentation, family.type)
            for (name, labels), value in sums.items():
                whole.add_sample(name, dict(labels), value)
            yield whole


@dataclass(kw_only=True)
class Far:
    """What tests ask the service and the scheduler of a single process, asked of the metrics of all replicas."""

    live: Live | None = None
    store: SharedStore
    metrics: Any = None

    def stats(self) -> Stats:
        """Sums over replicas."""
        families = text_string_to_metric_families(self.metrics.render().decode())
        found = {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
        names = {
            "queued_requests": "queue_requests", "queued_images": "queue_images", "running_images": "running_images",
            "max_images": "max_images", "reserved_bytes": "memory_reserved_bytes",
            "budget_bytes": "memory_budget_bytes",
        }  # fmt: skip
        held = {name: int(found.get(f"foveate_{metric}", 0)) for name, metric in names.items()}
        return Stats(**held, images_per_s=None, restarts=0, is_closing=False)


@dataclass(kw_only=True)
class Cluster:
    """Replicas of the toy, and fronts over them."""

    folder: Path
    base: Path
    running: list[tuple[Any, threading.Thread]] = field(default_factory=list)
    deployed: dict[str, tuple[str, Any, SharedStore]] = field(default_factory=dict)

    def start(
        self,
        *,
        is_loaded: bool = True,
        headers: dict[str, str] | None = None,
        send_buffer: int | None = None,
        replicas: tuple[int, int] | None = None,
        **settings: Any,
    ) -> Live:
        """A server with these settings."""
        given = ServerSettings(**settings)
        handle, store = self._replicas(given, replicas) if is_loaded else (None, SharedStore.make(given.store))
        deployed = Deployed()
        if handle is not None:
            deployed.open(handle)
        app = front_of(given, store, Forwarder(deployed))
        server = server_of(app, given.limits)
        listener = socket.create_server(("127.0.0.1", 0))
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        self.running.append((server, thread))
        eventually(lambda: server.started, "the server has started")
        far = Far(store=store)
        port = listener.getsockname()[1]
        live = Live(port=port, service=far, scheduler=far, headers=headers or {})  # type: ignore[arg-type]
        far.live, far.metrics = live, Summed(live)
        return live

    def _replicas(self, settings: ServerSettings, numbers: tuple[int, int] | None) -> tuple[Any, SharedStore]:
        """Those of the module, or, where the settings are such that they matter to replicas, one of their own."""
        name = f"{numbers} {_known_to_replicas(settings)}" if settings.moderation is None else str(len(self.deployed))
        is_usual = name == f"None {_known_to_replicas(ServerSettings())}"
        if name not in self.deployed:
            store = SharedStore.make(replace(settings.store, folder=settings.store.folder or self.base))
            least, most = numbers or ((2, 2) if is_usual else (1, 1))
            wanted = ReplicaSettings(least=least, most=most, cpus=0.1, grace_s=1.0, target_ongoing=1.0)
            app, handle = deploy(_loader(self.folder), settings, store.folder, wanted)
            self.deployed[name] = (app, handle, store)
        _, handle, store = self.deployed[name]
        # Each front is the owner of a store of its own, so this one is lent.
        return handle, SharedStore(store.folder, settings.store)

    def start_of(self, folder: Path) -> Any:
        """A handle to one replica of another model."""
        wanted = ReplicaSettings(cpus=0.1, grace_s=1.0)
        return deploy(_loader(folder), ServerSettings(), self.base, wanted)

    def close(self) -> None:
        """Ends the fronts; the cluster ends with its block."""
        for server, _ in self.running:
            server.should_exit = True
        for _, thread in self.running:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        for app, _, store in self.deployed.values():
            undeploy(app)
            store.close()


def _known_to_replicas(settings: ServerSettings) -> str:
    """Settings but for what only the front looks at."""
    usual = ServerSettings().limits
    of_front = ("body_bytes", "requests_per_minute", "header_seconds", "body_seconds", "send_seconds", "connections")
    limits = replace(settings.limits, **{name: getattr(usual, name) for name in of_front})
    others = (settings.store, settings.aliases, settings.keeps_on_disconnect, settings.encoders)
    return f"{limits} {others}"


def _loader(folder: Path) -> Callable[[], tuple[Pipeline, Scheduler]]:
    """A function without names of this module, as replicas may not import it."""

    def load() -> tuple[Pipeline, Scheduler]:
        pipe = Pipeline.from_pretrained(folder)
        return pipe, Scheduler(pipe, SchedulerSettings(max_images=4, max_queue=8))

    return load


def _unchecked(module: types.ModuleType) -> None:
    """Puts a module without checks of its shapes in the place of the one that has them, as those do not pickle.

    Ray pickles the class of a router by value.
    """
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    sys.modules[module.__name__] = plain


@contextmanager
def replicated(folder: Path, base: Path) -> Iterator[Cluster]:
    """A cluster of this machine; nothing of it is left at the end."""
    _unchecked(routing)
    with ray_cluster(address=None, num_cpus=8):
        cluster = Cluster(folder=folder, base=base)
        try:
            yield cluster
        finally:
            cluster.close()
