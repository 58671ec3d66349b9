"""A Ray cluster for the time of a block: one of this machine, or one that runs already. Usage reporting is off."""

import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

from foveate.core.errors import FoveateError

logger = logging.getLogger("foveate")

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # An actor that asks for no GPU sees those of its machine; what follows of that is said once in a warning otherwise.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Set before Ray is imported, and inherited by its processes."""

_STARTS = 2

_REACH_S = 5.0
"""Seconds until a cluster must answer; Ray itself tries for minutes."""

_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Where Ray finds the token that processes of a cluster prove themselves with."""

_SHORT = Path("/tmp")
"""Where Ray has its files too: it puts sockets below, whose paths may have about a hundred characters."""

_DELETE_S = 5.0
"""Seconds in which processes of Ray that end may still write into their folder."""

_MOST_OBJECT_BYTES = 2 << 30
"""Shared memory of a cluster of one machine: what passes through it are images on their way, not data sets."""


@contextmanager
def ray_cluster(*, address: str | None, num_cpus: int, num_gpus: int | None = None) -> Iterator[Any]:
    """Starts Ray on this machine, or connects to a cluster, and hands out the module `ray`; undone at the end.

    On Linux the processes of a started cluster end with the thread that entered the block, so that thread stays in it.
    What they write, logs too, is in a folder that only this user can read, and deleted at the end.

    Args:
        address: Of a running cluster, `auto` for the one of this machine; None starts one of this process.
        num_cpus: That a started cluster gives out; they are numbers for scheduling and bind no process.
        num_gpus: That a started cluster gives out; None lets Ray count them.

    Raises:
        FoveateError: Ray is not installed, is in use already, has no room on the disk, or there is no cluster at the
            address.
    """
    ray = ray_module()
    if ray.is_initialized():
        raise FoveateError("Ray is connected already in this process; call ray.shutdown() first")
    started = {"num_cpus": num_cpus, "num_gpus": num_gpus, "object_store_memory": _object_bytes()}
    running = _started(ray, **started) if address is None else _joined(ray, address)
    # A thread of Ray's prints what it has to say of its cluster to stdout, which is for results.
    with running, redirect_stdout(sys.stderr):
        yield ray


@contextmanager
def _started(ray: Any, **settings: Any) -> Iterator[None]:  # noqa: ANN401
    """A cluster of this machine, with a folder and a token of its own; settings that are None are Ray's."""
    given = {name: value for name, value in settings.items() if value is not None}
    with _own_token(), _own_folder() as folder:
        try:
            # On a machine that is busy a start may take longer than Ray waits.
            _connect(
                ray, "on this machine", _STARTS, address="local", include_dashboard=False, _temp_dir=folder, **given
            )
            logger.info("Ray writes its logs into %s, which is deleted at the end", folder)
            yield
        finally:
            ray.shutdown()


@contextmanager
def _joined(ray: Any, address: str) -> Iterator[None]:  # noqa: ANN401
    """A cluster that runs already."""
    _reach(address)
    try:
        _connect(ray, f"at {address}", 1, address=address)
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Finds out whether anybody listens at an address, where it is host and port.

    Raises:
        FoveateError: Nobody does.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FoveateError(
            f"there is no Ray cluster at {address}: {reason}; start one with ray start --head, or leave --address out"
        ) from None


@contextmanager
def _own_token() -> Iterator[None]:
    """A token for a cluster of this process, unless the user gave one; Ray would write its own into HOME."""
    if any(name in os.environ for name in _TOKENS):
        yield
        return
    os.environ[_TOKENS[0]] = _token()
    try:
        yield
    finally:
        os.environ.pop(_TOKENS[0], None)


@contextmanager
def _own_folder() -> Iterator[str]:
    """A folder for what Ray writes, which only this user can read.

    Raises:
        FoveateError: It cannot be made.
    """
    parent = os.environ.get("RAY_TMPDIR") or (_SHORT if _SHORT.is_dir() else None)
    try:
        folder = Path(tempfile.mkdtemp(prefix="foveate-ray-", dir=parent))
    except OSError as error:
        raise FoveateError(f"Ray needs a folder in {parent}: {error.strerror}; set RAY_TMPDIR to another one") from None
    try:
        # Inside, as Ray lets everybody into the folder that it is given.
        yield str(folder / "ray")
    finally:
        until = time.monotonic() + _DELETE_S
        while folder.exists() and time.monotonic() < until:
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)


def _connect(ray: Any, where: str, attempts: int, **settings: Any) -> None:  # noqa: ANN401
    """Starts Ray or connects, trying so often.

    Raises:
        FoveateError: It did not work.
    """
    for attempt in range(1, attempts + 1):
        try:
            ray.init(log_to_driver=False, configure_logging=False, **settings)
            return
        except Exception as error:  # Ray raises plain ones here
            ray.shutdown()
            if attempt == attempts or isinstance(error, (ConnectionError, ValueError)):
                raise FoveateError(f"cannot use Ray {where}: {_first_line(error)}") from error
            logger.warning("Ray did not start, and is started again: %s", _first_line(error))


def ray_module() -> Any:  # noqa: ANN401 - a module of an extra
    """The module `ray`, imported with usage reporting off.

    Raises:
        FoveateError: It is not installed.
    """
    os.environ.update(_ENVIRONMENT)
    try:
        import ray  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise FoveateError(f'--engine ray needs the extra ray: pip install "foveate[ray]" ({error})') from None
    return ray


def check_room(ray: Any, address: str | None, what: str, *, count: int, cpus: float, gpus: float) -> None:  # noqa: ANN401
    """Says where processes would wait for machines.

    Args:
        ray: The module, connected.
        address: Of the cluster; None where this machine is all that there is.
        what: The processes, as flags call them.
        count: How many.
        cpus: Of each.
        gpus: Of each.

    Raises:
        FoveateError: This machine has not as many CPUs or GPUs; machines of a cluster may still join.
    """
    found = ray.cluster_resources()
    for name, number in {"GPU": count * gpus, "CPU": count * cpus}.items():
        there = found.get(name, 0.0)
        if number <= there:
            continue
        message = f"{count} {what} need {number:g} {name}s, and {there:g} are there"
        if address is None:
            raise FoveateError(f"{message}; lower --num-{what} or --{name.lower()}s-per-{what.removesuffix('s')}")
        logger.warning("%s; they wait for machines that join", message)


def own_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _token() -> str:
    """The same in all clusters of this process, as Ray reads it once."""
    return secrets.token_hex(32)


def _object_bytes() -> int:
    """A tenth of what is free of the shared memory, within bounds that Ray accepts."""
    if not hasattr(os, "statvfs"):
        return _MOST_OBJECT_BYTES // 8
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return _MOST_OBJECT_BYTES // 8
    return max(80 << 20, min(_MOST_OBJECT_BYTES, stat.f_bavail * stat.f_frsize // 10))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
