"""Names that the header Host may have: against web pages whose own name is made to point at this machine.

A browser lets such a page read what a server on loopback answers (DNS rebinding), but the header still says the page's
own name.
"""

import re

from starlette.datastructures import Headers

from foveate.core.errors import FoveateError
from foveate.server.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What a server on loopback is called."""

_NAME = re.compile(r"(?:\[(?P<bracketed>[\w.:%-]+)\]|(?P<name>[\w.-]+))(?::\d+)?", re.ASCII)
_ADDRESS = re.compile(r"[\w.%-]*:[\w.%-]*:[\w.:%-]*", re.ASCII)
"""IPv6 as it is written outside of urls."""


def check_host(headers: Headers, allowed: tuple[str, ...] | None) -> None:
    """Lets a request pass whose Host is one of these, with any port; None lets all pass.

    Args:
        headers: Of the request.
        allowed: As `allowed_name` returns them.

    Raises:
        ApiError: It has another name, none, or several.
    """
    if allowed is None:
        return
    given = headers.getlist("host")
    if len(given) == 1 and host_name(given[0]) in allowed:
        return
    raise ApiError(403, "this server has another name; its --allowed-host adds one", code="host_not_allowed")


def allowed_name(given: str) -> str:
    """The name or address that an operator allows: without port and brackets, in lower case.

    Raises:
        FoveateError: No header could have such a name.
    """
    if _ADDRESS.fullmatch(given):
        return given.lower()
    found = _NAME.fullmatch(given)
    if found is None:
        message = f"--allowed-host must be a name or address, such as images.example or [::1]:8000, got {given!r}"
        raise FoveateError(f"{message}; leave out https:// and paths, and give every name by itself")
    return (found["bracketed"] or found["name"]).lower()


def host_name(host: str) -> str:
    """The name or address in a Host header: without port and brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
