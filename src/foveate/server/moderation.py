"""The operator's own check of prompts and images, a function of theirs by its dotted name.

It is called as `function(prompt, image)` in worker threads: first with None for the image, then with every image that
would be sent, partial ones too. None lets it pass; a text refuses it, and is what the client reads. An error refuses as
well, and so does a check that takes too long, so that a broken one lets nothing pass and holds up nobody else.
"""

import importlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from PIL import Image

from foveate.core.errors import FoveateError
from foveate.server.errors import SERVER, ApiError

logger = logging.getLogger("foveate.server")

Check = Callable[[str, Image.Image | None], Any]

_MOST_HANGING = 8
"""Calls that were given up and have not ended; while there are so many, the next ones are refused at once."""

_NO_RETRY = {"x-should-retry": "false"}


class ModerationTimeoutError(Exception):
    """The operator's check took too long."""


class TimedCheck:
    """A check that is given up when it takes too long; each call has a thread of its own, which nothing can end.

    Attributes:
        check: The operator's function.
    """

    def __init__(self, check: Check, seconds: float) -> None:
        self.check, self._seconds = check, seconds
        self._lock = threading.Lock()
        self._hanging: set[Future[Any]] = set()

    def __call__(self, prompt: str, image: Image.Image | None) -> Any:  # noqa: ANN401 - whatever the operator returns
        """What the check returns or raises.

        Raises:
            ModerationTimeoutError: It took too long, or several earlier calls still hang.
        """
        with self._lock:
            if len(self._hanging) >= _MOST_HANGING:
                raise ModerationTimeoutError(f"{_MOST_HANGING} earlier calls of the moderation check hang")
        future: Future[Any] = Future()
        threading.Thread(target=self._run, args=(future, prompt, image), name="foveate-moderation", daemon=True).start()
        if not wait([future], self._seconds).done:
            with self._lock:
                if not future.done():
                    self._hanging.add(future)
            raise ModerationTimeoutError(f"the moderation check took longer than {self._seconds:g} s")
        return future.result()

    def __reduce__(self) -> tuple[type["TimedCheck"], tuple[Check, float]]:
        """Travels to another process as the function and its time; calls that hang stay here."""
        return TimedCheck, (self.check, self._seconds)

    def _run(self, future: Future[Any], prompt: str, image: Image.Image | None) -> None:
        try:
            future.set_result(self.check(prompt, image))
        except BaseException as error:  # raised where the call waits
            future.set_exception(error)
        with self._lock:
            self._hanging.discard(future)


def load_check(name: str) -> Check:
    """The function of a dotted name, `package.module:function`.

    Raises:
        FoveateError: There is none, or it cannot be called.
    """
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise FoveateError(f"--moderation must be package.module:function, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise FoveateError(f"--moderation {name}: {error}") from None
    if not callable(found):
        raise FoveateError(f"--moderation {name} is no function, but {type(found).__name__}")
    return found


def moderate(check: Check | None, prompt: str, image: Image.Image | None = None) -> None:
    """Asks the operator's check.

    Raises:
        ApiError: It refused, or took too long.
        RuntimeError: It failed; of any error, so that none reads as one of the server, such as a client that is gone.
        TypeError: It returned something that is neither None nor a text.
    """
    if check is None:
        return
    try:
        reason = check(prompt, image)
    except ModerationTimeoutError as error:
        logger.error("%s; what it should have checked was refused", error)
        message = "the check of this server did not answer in time; try again later"
        raise ApiError(503, message, kind=SERVER, code="moderation_timeout", headers=_NO_RETRY) from None
    except Exception as error:
        raise RuntimeError("the moderation check failed") from error
    if reason is None:
        return
    if not isinstance(reason, str):
        raise TypeError(f"the moderation check must return None or a text, got {type(reason).__name__}")
    what = "prompt" if image is None else "image"
    raise ApiError(400, f"the {what} was refused: {reason}", param="prompt", code="moderation_blocked")
