"""How much one request may ask for, and how many a key may send."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields

from foveate.core.errors import FoveateError


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request may ask for; None is no limit.

    Attributes:
        body_bytes: Of a request's body.
        prompt_chars: Of a prompt, and of a negative prompt.
        images: `n` of a request.
        pixels: Of one image.
        requests_per_minute: Of one key, evenly spread; a burst may use up a minute's.
        header_seconds: Until all headers of a request must be here.
        body_seconds: Until its whole body must be here.
        send_seconds: A client of a stream that reads nothing for so long has vanished.
        connections: Open at once.
    """

    body_bytes: int = 1 << 20
    prompt_chars: int = 4000
    images: int = 10
    pixels: int | None = None
    requests_per_minute: float | None = None
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    connections: int = 1000

    def __post_init__(self) -> None:
        """Refuses limits that would let nothing in."""
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FoveateError(f"the limit {name} must be above 0, got {value}")


class RateLimiter:
    """Requests of each key, as a bucket of tokens that fills evenly; not safe across threads, and not meant to be.

    Buckets that are full again are forgotten, so that it holds only keys of the last minute.
    """

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_minute` None lets everything pass; `clock` counts seconds."""
        self._rate = None if per_minute is None else per_minute / 60
        self._most = 0.0 if per_minute is None else max(1.0, per_minute)
        self._clock = clock
        self._tokens: dict[str, tuple[float, float]] = {}

    def wait_s(self, key: str) -> float:
        """Takes one request of a key: 0 if it may pass, else the seconds until one may."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        self._tokens = {name: held for name, held in self._tokens.items() if self._now(held, now) < self._most}
        tokens = self._now(self._tokens.get(key, (self._most, now)), now)
        if tokens < 1:
            return (1 - tokens) / self._rate
        self._tokens[key] = (tokens - 1, now)
        return 0.0

    def _now(self, held: tuple[float, float], now: float) -> float:
        tokens, then = held
        assert self._rate is not None, "without a rate nothing is held"
        return min(self._most, tokens + max(0.0, now - then) * self._rate)
