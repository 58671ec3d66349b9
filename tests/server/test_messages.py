"""What goes to replicas of a request, and what does not."""

from foveate.server.replicas.messages import scope_of


def test_keys_of_clients_stay_at_the_front() -> None:
    headers = [(b"Authorization", b"Bearer x"), (b"cookie", b"y"), (b"x-api-key", b"z"), (b"traceparent", b"00-1-2-01")]
    found = scope_of({"type": "http", "path": "/v1/models", "headers": headers, "state": {}, "app": object()})
    assert found == {"type": "http", "path": "/v1/models", "headers": [(b"traceparent", b"00-1-2-01")]}
