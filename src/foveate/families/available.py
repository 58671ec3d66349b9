"""How many bytes this process may still take, on the compute device: the least of what the system would give.

On a CPU that is free memory, the room in every control group above the process (containers), and its own limit of
address space; Linux says all of them, elsewhere nothing is known. On a GPU it is what the driver has and what torch
holds for later.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Bytes that could be taken now, or None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    rooms = [room for room in (_free_memory(), _address_space(), *_group_rooms()) if room is not None]
    return max(0, min(rooms)) if rooms else None


def _free_memory() -> int | None:
    """What the kernel would give without swapping."""
    for line in _read(_PROC / "meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _address_space() -> int | None:
    """What `ulimit -v` leaves; None without a limit."""
    try:
        import resource  # noqa: PLC0415 - Windows has no such module
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = _read(_PROC / "self" / "statm").split()
    if limit == resource.RLIM_INFINITY or not taken:
        return None
    return limit - int(taken[0]) * os.sysconf("SC_PAGE_SIZE")


def _group_rooms() -> Iterator[int]:
    """What is left below the limit of every control group that holds this process, of either version."""
    for line in _read(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, names = (
            (_GROUPS, ("memory.max", "memory.current", "inactive_file"))
            if not controllers
            else (_GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
        )
        place = root / path.lstrip("/")
        # In a container the path may be one of the host, so that only the root is there.
        for folder in (place, *(parent for parent in place.parents if parent.is_relative_to(root))):
            room = _room(folder, *names)
            if room is not None:
                yield room


def _room(folder: Path, limit_name: str, taken_name: str, cache_name: str) -> int | None:
    """Limit less what is taken; pages of files that were not read lately would be dropped first, so they are free."""
    limit, taken = _read(folder / limit_name).strip(), _read(folder / taken_name).strip()
    if not limit.isdecimal() or not taken.isdecimal():
        return None
    statistics = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return int(limit) - int(taken) + int(statistics.get(cache_name, 0))


def _read(path: Path) -> str:
    """A file's text, nothing where it cannot be read."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""
