"""Images that wait, by the key that asked for them: first in, first out within a key, and equal shares between keys.

Start-time fair queueing by FLOPs: the key that was given the least goes next. A key that was idle starts level with
the others, so it neither saves up turns nor waits for those it missed.
Source: P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


@dataclass(kw_only=True, slots=True)
class _Lane(Generic[ItemT]):
    """What waits under one key; `given` is the virtual time that it has reached."""

    given: float
    arrived: int
    items: deque[tuple[ItemT, float]] = field(default_factory=deque)


class FairQueue(Generic[ItemT]):
    """A queue with lanes; not safe from several threads by itself."""

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane[ItemT]] = {}
        self._idle: dict[str, float] = {}
        self._now = 0.0
        self._arrivals = count()

    def __len__(self) -> int:
        return sum(len(lane.items) for lane in self._lanes.values())

    def push(self, key: str, item: ItemT, cost: float, *, in_front: bool = False) -> None:
        """Puts an item behind, or in front of, what waits under its key."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = _Lane(given=max(self._idle.pop(key, 0.0), self._now), arrived=next(self._arrivals))
            self._lanes[key] = lane
        if in_front:
            # It was paid for when it left the queue.
            lane.items.appendleft((item, 0.0))
        else:
            lane.items.append((item, cost))

    def peek(self) -> ItemT | None:
        """What goes next; None where nothing waits."""
        key = self._next({key: lane.given for key, lane in self._lanes.items()})
        return None if key is None else self._lanes[key].items[0][0]

    def pop(self) -> ItemT:
        """Takes out what goes next.

        Raises:
            IndexError: Nothing waits.
        """
        key = self._next({key: lane.given for key, lane in self._lanes.items()})
        if key is None:
            raise IndexError("nothing waits")
        lane = self._lanes[key]
        item, cost = lane.items.popleft()
        self._now, lane.given = lane.given, lane.given + cost
        self._tidy()
        return item

    def remove(self, is_gone: Callable[[ItemT], bool]) -> list[ItemT]:
        """Takes out all items of a kind, in no order."""
        removed = []
        for lane in self._lanes.values():
            removed += [item for item, _ in lane.items if is_gone(item)]
            lane.items = deque((item, cost) for item, cost in lane.items if not is_gone(item))
        self._tidy()
        return removed

    def order(self) -> Iterator[ItemT]:
        """All items, in the order in which they would go if nothing else came."""
        given = {key: lane.given for key, lane in self._lanes.items()}
        places = dict.fromkeys(given, 0)
        for _ in range(len(self)):
            key = self._next({k: at for k, at in given.items() if places[k] < len(self._lanes[k].items)})
            assert key is not None, "items are left"
            item, cost = self._lanes[key].items[places[key]]
            places[key], given[key] = places[key] + 1, given[key] + cost
            yield item

    def _next(self, given: dict[str, float]) -> str | None:
        """Of the lanes with a virtual time the one that goes next; the lane that came first where times are equal."""
        return min(given, key=lambda key: (given[key], self._lanes[key].arrived), default=None)

    def _tidy(self) -> None:
        """Forgets empty lanes, and of their times all that the others have reached."""
        for key in [key for key, lane in self._lanes.items() if not lane.items]:
            self._idle[key] = self._lanes.pop(key).given
        self._idle = {key: given for key, given in self._idle.items() if given > self._now} if self._lanes else {}
        self._now = self._now if self._lanes else 0.0
