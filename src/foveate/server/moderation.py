"""The operator's own check of prompts and images, a function of theirs by its dotted name.

It is called as `function(prompt, image)` in worker threads: first with None for the image, then with every image that
would be sent, partial ones too. None lets it pass; a text refuses it, and is what the client reads. An error refuses as
well, so that a broken check lets nothing pass.
"""

import importlib
from collections.abc import Callable
from typing import Any

from PIL import Image

from foveate.core.errors import FoveateError
from foveate.server.errors import ApiError

Check = Callable[[str, Image.Image | None], Any]


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
        ApiError: It refused.
        RuntimeError: It failed; of any error, so that none reads as one of the server, such as a client that is gone.
        TypeError: It returned something that is neither None nor a text.
    """
    if check is None:
        return
    try:
        reason = check(prompt, image)
    except Exception as error:
        raise RuntimeError("the moderation check failed") from error
    if reason is None:
        return
    if not isinstance(reason, str):
        raise TypeError(f"the moderation check must return None or a text, got {type(reason).__name__}")
    what = "prompt" if image is None else "image"
    raise ApiError(400, f"the {what} was refused: {reason}", param="prompt", code="moderation_blocked")
