"""Which replica a request goes to: the one with the fewest FLOPs on their way.

The front hands all requests on, so it knows what every replica holds; Serve's own router asks two replicas how many
requests they have, and a request may be one draft or ten large images. What a request costs is known to a replica once
it was checked there: the front remembers it by what was asked.
"""

import json
import math
import random
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

_FIELDS = ("n", "size", "quality", "policy", "budget", "policy_a", "policy_b")
"""Fields of a body that its cost depends on."""

_KNOWN, _LONGEST = 1000, 2000

_PROMISED_S = 5.0
"""Seconds that a request counts for the replica that was chosen, where nothing is heard of it."""


class Costs:
    """FLOPs of requests by what they ask for; those that were not seen yet take the mean of the others."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, float] = OrderedDict()

    def of(self, asked: str | None) -> float:
        """FLOPs of a request; 0 of one that runs nothing."""
        if asked is None:
            return 0.0
        found = self._known.get(asked)
        if found is not None:
            self._known.move_to_end(asked)
            return found
        return sum(self._known.values()) / len(self._known) if self._known else 1.0

    def note(self, asked: str | None, flops: float) -> None:
        """What a replica said of such a request."""
        if asked is not None and flops > 0:
            self._known[asked] = flops
            self._known.move_to_end(asked)
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)


def asked_for(body: bytes) -> str:
    """What the cost of a request depends on; the same text for all bodies that nothing can be read from."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, dict):
        return ""
    return json.dumps([found.get(name) for name in _FIELDS])[:_LONGEST]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share:
    """What a request adds to a replica; until a time, where the replica has not taken it yet."""

    replica: ReplicaID
    flops: float
    until: float = math.inf


class LeastWork(FIFOMixin, RequestRouter):  # type: ignore[misc]  # the types of an extra are not read
    """A router of Ray Serve, made by it in the process of the front."""

    def initialize_state(self, **_settings: object) -> None:
        """Nothing is on its way."""
        self._lock = threading.Lock()
        self._shares: dict[str, _Share] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, the one that has the least to do first; equal ones in any order."""
        now = time.monotonic()
        with self._lock:
            self._shares = {name: share for name, share in self._shares.items() if share.until > now}
            sums: dict[ReplicaID, float] = {}
            for share in self._shares.values():
                sums[share.replica] = sums.get(share.replica, 0.0) + share.flops
            keys = [(sums.get(replica.replica_id, 0.0), random.random()) for replica in candidate_replicas]
            order = [candidate_replicas[place] for place in sorted(range(len(keys)), key=keys.__getitem__)]
            if pending_request is not None and order:
                # Counted before the replica says that it takes it, as the next request may come sooner.
                share = _Share(replica=order[0].replica_id, flops=_flops_of(pending_request), until=now + _PROMISED_S)
                self._shares[pending_request.metadata.internal_request_id] = share
        if pending_request is not None:
            # Where none takes it, wait a little before the next try.
            pending_request.routing_context.should_backoff = True
        return [[replica] for replica in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """A replica has it, or had it: a short one may be done by now."""
        name = pending_request.metadata.internal_request_id
        with self._lock:
            if name in self._shares:
                self._shares[name] = _Share(replica=replica_id, flops=_flops_of(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It is done, or was broken off; called from any thread."""
        with self._lock:
            self._shares.pop(internal_request_id, None)


def _flops_of(pending_request: PendingRequest) -> float:
    args = pending_request.args
    return float(getattr(args[0], "flops", 0.0)) if args else 0.0
