"""Names that the header Host may have: against web pages whose own name is made to point at this machine.

A browser lets such a page read what a server on loopback answers (DNS rebinding), but the header still says the page's
own name.
"""

from starlette.datastructures import Headers

from foveate.server.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What a server on loopback is called."""


def check_host(headers: Headers, allowed: tuple[str, ...] | None) -> None:
    """Lets a request pass whose Host is one of these, with any port; None lets all pass.

    Raises:
        ApiError: It has another name, none, or several.
    """
    if allowed is None:
        return
    given = headers.getlist("host")
    if len(given) == 1 and host_name(given[0]) in {name.lower() for name in allowed}:
        return
    raise ApiError(403, "this server has another name; its --allowed-host adds one", code="host_not_allowed")


def host_name(host: str) -> str:
    """The name or address in a Host header: without port and brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
