"""A Ray cluster for the time of a block: one of this machine, or one that runs already. Usage reporting is off."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
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

_MOST_OBJECT_BYTES = 2 << 30
"""Shared memory of a cluster of one machine: what passes through it are images on their way, not data sets."""


@contextmanager
def ray_cluster(*, address: str | None, num_cpus: int, num_gpus: int | None = None) -> Iterator[Any]:
    """Starts Ray on this machine, or connects to a cluster, and hands out the module `ray`; undone at the end.

    On Linux the processes of a started cluster end with the thread that entered the block, so that thread stays in it.

    Args:
        address: Of a running cluster, `auto` for the one of this machine; None starts one of this process.
        num_cpus: That a started cluster gives out; they are numbers for scheduling and bind no process.
        num_gpus: That a started cluster gives out; None lets Ray count them.

    Raises:
        FoveateError: Ray is not installed, is in use already, or there is no cluster at the address.
    """
    ray = ray_module()
    if ray.is_initialized():
        raise FoveateError("Ray is connected already in this process; call ray.shutdown() first")
    started = {"num_cpus": num_cpus, "num_gpus": num_gpus, "object_store_memory": _object_bytes()}
    if address is None:
        settings = {name: value for name, value in started.items() if value is not None}
        _connect(ray, "on this machine", address="local", include_dashboard=False, **settings)
    else:
        _connect(ray, f"at {address}", address=address)
    try:
        # A thread of Ray's prints what it has to say of its cluster to stdout, which is for results.
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, where: str, **settings: Any) -> None:  # noqa: ANN401
    """Starts Ray or connects; on a machine that is busy a start may take longer than Ray waits, so it is tried twice.

    Raises:
        FoveateError: It did not work.
    """
    for attempt in range(1, _STARTS + 1):
        try:
            ray.init(log_to_driver=False, configure_logging=False, **settings)
            return
        except Exception as error:  # Ray raises plain ones here
            ray.shutdown()
            if attempt == _STARTS or isinstance(error, (ConnectionError, ValueError)):
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


def _object_bytes() -> int:
    """A tenth of what is free of the shared memory, within bounds that Ray accepts."""
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return _MOST_OBJECT_BYTES // 8
    return max(80 << 20, min(_MOST_OBJECT_BYTES, stat.f_bavail * stat.f_frsize // 10))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
