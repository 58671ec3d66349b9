"""Time of every scale: the host's clock on a CPU, CUDA events on a GPU.

Events cost the device microseconds and the host no wait; the time between them is read once, when all scales have run.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch


class Clock(ABC):
    """Times the scales of one request, one after the other."""

    @abstractmethod
    def start(self) -> None:
        """Begins a scale, or, called twice in a row, begins it anew."""

    @abstractmethod
    def stop(self) -> float:
        """Ends the scale; its milliseconds, or 0.0 where they are not known yet."""

    @abstractmethod
    def read(self) -> list[float]:
        """Milliseconds of all scales that were timed; waits for the last one."""


class HostClock(Clock):
    """The host's clock, for devices without an asynchronous queue."""

    def __init__(self) -> None:
        """Starts without any times."""
        self._began, self._ms = 0.0, list[float]()

    def start(self) -> None:
        """Reads the clock."""
        self._began = time.perf_counter()

    def stop(self) -> float:
        """The milliseconds since `start`."""
        self._ms.append(1e3 * (time.perf_counter() - self._began))
        return self._ms[-1]

    def read(self) -> list[float]:
        """What every `stop` returned."""
        return list(self._ms)


@runtime_checkable
class Mark(Protocol):
    """An event in a device's stream, as `torch.cuda.Event(enable_timing=True)`."""

    def record(self, stream: Any) -> None:  # noqa: ANN401 - of the event's own type
        """Records the event at the end of a stream."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has reached the event."""
        ...

    def elapsed_time(self, end_event: Any) -> float:  # noqa: ANN401 - as above
        """Milliseconds from this event to a later one; both must have been reached."""
        ...


class DeviceClock(Clock):
    """Events in the stream of a device."""

    def __init__(self, make_mark: Callable[[], Mark], stream: object, waits: bool) -> None:
        """Starts without any times.

        Args:
            make_mark: Makes an event that was not recorded yet.
            stream: The queue.
            waits: Whether every `stop` waits for the device, so that it knows.
        """
        self._make_mark, self._stream, self._waits = make_mark, stream, waits
        self._began = make_mark()
        self._scales: list[tuple[Mark, Mark]] = []

    def start(self) -> None:
        """Records an event in the stream."""
        self._began = self._make_mark()
        self._began.record(self._stream)

    def stop(self) -> float:
        """Records an event in the stream; waits for it if asked to."""
        end = self._make_mark()
        end.record(self._stream)
        self._scales.append((self._began, end))
        if not self._waits:
            return 0.0
        end.synchronize()
        return self._began.elapsed_time(end)

    def read(self) -> list[float]:
        """Waits for the last event."""
        if self._scales:
            self._scales[-1][1].synchronize()
        return [begin.elapsed_time(end) for begin, end in self._scales]


def clock_of(device: torch.device, waits: bool) -> Clock:
    """The clock for a device; see `DeviceClock` about `waits`."""
    if device.type != "cuda":
        return HostClock()
    return DeviceClock(partial(torch.cuda.Event, enable_timing=True), torch.cuda.current_stream(device), waits)
