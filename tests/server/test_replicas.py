"""Replicas on Ray: the tests of the single process, and what happens to one replica while others go on."""

import asyncio
import contextlib
import functools
import http.client
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from foveate.core.errors import FoveateError
from foveate.server.limits import Limits
from foveate.server.settings import ServerSettings
from foveate.server.store import StoreSettings
from tests.server import test_api, test_faults, test_keys, test_store, test_streams
from tests.server.conftest import PATH, PROMPT, TIMEOUT_S, Answer, Live, eventually
from tests.server.test_serving import ask, free_port

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray"),
    # Ray's own warnings are not ours.
    pytest.mark.filterwarnings("ignore"),
]

FEW = {
    "test_an_image_is_that_of_the_library",
    "test_null_is_absent",
    "test_compare_has_one_seed_and_two_policies",
    "test_what_is_listed",
    "test_how_it_is",
    "test_a_server_that_loads_says_so",
    "test_headers_for_security",
    "test_nobody_without_a_key_gets_in",
    "test_an_image_belongs_to_its_key",
    "test_requests_of_a_key_are_spread",
    "test_partial_images_come_before_each_image",
    "test_a_client_that_goes_away_stops_its_work",
    "test_bodies_that_are_none_are_refused",
    "test_huge_bodies_are_cut_off",
}
"""What runs in `make test`; the others in `make soak`."""

WITHOUT = {
    # They look into the process of the model, or put something into its place.
    "test_listing_policies_logs_nothing",
    "test_an_error_inside_the_model_tells_nothing",
    "test_a_client_hears_of_a_full_disk",
    "test_urls_of_an_answer_are_all_there",
    "test_what_was_refused_is_not_kept",
    "test_a_key_is_never_logged",
    # Their checks wait for a lock of this process, which does not travel.
    "test_what_a_client_left_while_it_was_encoded_is_kept",
    "test_a_check_that_hangs_holds_up_nobody",
    # Another replica has room.
    "test_a_full_queue_says_when_to_come_again",
    # The store of all replicas is one folder of the front.
    "test_the_store_is_readable_to_its_user_alone",
}


def copied(module: types.ModuleType) -> dict[str, Any]:
    """The tests of a module that talk to a server."""
    found = {}
    for name, test in vars(module).items():
        if not name.startswith("test_") or name in WITHOUT:
            continue
        if not {"live", "start"} & set(inspect.signature(test).parameters):
            continue
        copy = types.FunctionType(test.__code__, test.__globals__, name, test.__defaults__, test.__closure__)
        functools.update_wrapper(copy, test)
        del copy.__wrapped__
        copy.pytestmark = list(getattr(test, "pytestmark", []))
        found[name] = copy if name in FEW else pytest.mark.soak(copy)
    return found


for _module in (test_api, test_faults, test_keys, test_store, test_streams):
    globals().update(copied(_module))


@pytest.fixture(scope="module")
def cluster(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One cluster for the module; Ray is imported only where it runs, as that takes seconds and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.server.replicated import replicated  # noqa: PLC0415

        with replicated(toy_folder, tmp_path_factory.mktemp("stores")) as found:
            yield found


@pytest.fixture(scope="module")
def start(cluster: Any) -> Callable[..., Live]:
    return cluster.start


@pytest.fixture(scope="module")
def live(start: Callable[..., Live]) -> Live:
    return start()


def test_a_server_that_is_ended_while_it_starts_has_nothing_to_finish(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from foveate.server.replicas.serving import RayServed, ReplicaSettings  # noqa: PLC0415

    settings = ServerSettings(keeps_on_disconnect=True, store=StoreSettings(folder=tmp_path))
    served = RayServed(print, settings, ReplicaSettings())  # type: ignore[arg-type]
    assert asyncio.run(served.close(5.0))
    served.stop_now()
    served.release()


def test_what_does_not_pickle_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from foveate.server.replicas.serving import _check_sendable  # noqa: PLC0415

    lock = threading.Lock()
    _check_sendable(print, ServerSettings(moderation=print))  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="the server's settings cannot be sent to replicas .TypeError: .*lock"):
        _check_sendable(print, ServerSettings(moderation=lambda _prompt, _image: lock))  # type: ignore[arg-type]


class Stream(threading.Thread):
    """Reads the events of a stream, each with the time at which it came."""

    def __init__(self, live: Live, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._live, self._fields = live, {"prompt": PROMPT, "stream": True, **fields}
        self.events: list[tuple[float, dict[str, Any]]] = []
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._live.port, timeout=TIMEOUT_S)
        connection.request("POST", PATH, json.dumps(self._fields), {"Content-Type": "application/json"})
        response = connection.getresponse()
        while line := response.readline():
            if line.startswith(b"data: "):
                self.events.append((time.monotonic(), json.loads(line[6:])))
        connection.close()

    @property
    def kinds(self) -> list[str]:
        return [event["type"] for _, event in self.events]


def test_events_come_as_they_are_made(live: Live) -> None:
    stream = Stream(live, seed=7, partial_images=3, size="512x512")
    stream.join(2 * TIMEOUT_S)
    assert stream.kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    times = [at for at, _ in stream.events]
    ms = [scale["ms"] for scale in stream.events[-1][1]["foveate"]["scales"]]
    assert times[-1] - times[0] > 0.5 * ms[-1] / 1e3, "the first one comes before the last scale has run"


def processes() -> dict[int, bytes]:
    """Replicas of this machine, by process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::ServeReplica"):
                found[int(folder.name)] = name
    return found


def page(live: Live) -> str:
    return live.send("/metrics").body.decode()


def names(live: Live) -> set[str]:
    """Of the replicas that answer."""
    return set(re.findall('foveate_running_images{replica="([^"]*)"}', page(live)))


def held(live: Live) -> int:
    """Images that wait or run."""
    stats = live.service.stats()
    return stats.queued_images + stats.running_images


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_one_replica_is_killed_in_the_middle(live: Live) -> None:
    assert len(names(live)) == len(processes()) == 2
    # Two on each, as requests go to the replica with the least to do.
    streams = [Stream(live, seed=seed, size="512x512", n=2, trace=True) for seed in range(2)]
    eventually(lambda: all(len(stream.events) > 2 for stream in streams), "both run")
    whole: list[Answer] = []
    asked = [threading.Thread(target=lambda: whole.append(live.generate(size="512x512"))) for _ in range(2)]
    for thread in asked:
        thread.start()
    eventually(lambda: held(live) >= 6, "they are accepted")
    victim = next(iter(processes()))
    os.kill(victim, signal.SIGKILL)
    for thread in (*streams, *asked):
        thread.join(4 * TIMEOUT_S)
        assert not thread.is_alive(), "nothing hangs"
    ends = sorted(stream.kinds[-1] for stream in streams)
    assert ends == ["error", "image_generation.completed"], [stream.events[-1] for stream in streams]
    (lost,) = (stream.events[-1][1]["error"] for stream in streams if stream.kinds[-1] == "error")
    assert (lost["code"], lost["type"]) == ("replica_lost", "server_error")
    assert [answer.status for answer in whole] == [200, 200], "what had sent nothing was given to the other one"
    assert len({answer.data["data"][0]["b64_json"] for answer in whole}) == 1
    eventually(lambda: len(set(processes()) - {victim}) == 2, "another one is started")
    assert live.generate().status == 200


@pytest.mark.soak
def test_replicas_follow_the_load(cluster: Any) -> None:
    live = cluster.start(replicas=(1, 2), limits=Limits(images=9))
    assert len(names(live)) == 1
    streams: list[Stream] = []
    until = time.monotonic() + 6 * TIMEOUT_S
    while len(names(live)) < 2:
        assert time.monotonic() < until, "another replica is started"
        streams = [stream for stream in streams if stream.is_alive()]
        streams += [Stream(live, size="512x512") for _ in range(4 - len(streams))]
        time.sleep(1.0)
    for stream in streams:
        stream.join(4 * TIMEOUT_S)
        assert stream.kinds == ["image_generation.completed"]


@pytest.mark.soak
def test_a_model_that_cannot_be_loaded_is_told(cluster: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(FoveateError, match="the replicas cannot be started: .*no such file or folder"):
            cluster.start_of(tmp_path / "none")


@pytest.mark.soak
def test_the_command_ends_within_its_grace_and_loses_nothing(toy_folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "foveate", "serve", "--engine", "ray", "--num-replicas", "2", "--model",
               str(toy_folder), "--port", str(port), "--grace", "20", "--cpus-per-replica", "0.5"]  # fmt: skip
    before = set(processes())
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            eventually(lambda: ask(port)[0] in (503, 200), "it answers while it loads", 2 * TIMEOUT_S)
            eventually(lambda: ask(port)[0] == 200, "it is ready", 4 * TIMEOUT_S)
            answers: list[tuple[int, Any]] = []
            bodies = [{"prompt": PROMPT, "seed": seed, "n": 2} for seed in range(8)]
            threads = [threading.Thread(target=lambda b=body: answers.append(ask(port, PATH, b))) for body in bodies]
            for thread in threads:
                thread.start()
            time.sleep(1.0)
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)
            seconds = time.monotonic() - began
            for thread in threads:
                thread.join(TIMEOUT_S)
        finally:
            server.kill()
    assert server.returncode == 0
    assert seconds < 20 + 20, "the grace, and the end of Ray"
    assert [status for status, _ in answers].count(200) > 0
    assert {status for status, _ in answers} <= {200, 503, 0}
    eventually(lambda: not set(processes()) - before, "nothing of Ray is left")
