"""The metrics of all processes as one page for Prometheus: those of a replica have the label `replica`.

Requests are counted by the front, where they arrive, without that label; what a scheduler does is counted where it
runs. Numbers of a replica that has ended are gone with it, as those of any process are.
"""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


def merged(front: bytes, replicas: Sequence[tuple[str, bytes]]) -> bytes:
    """One page of several.

    Args:
        front: The page of the front, which stays as it is.
        replicas: Names and pages.
    """
    registry = CollectorRegistry()
    registry.register(_Merged(front, replicas))
    return generate_latest(registry)


class _Merged(Collector):
    """Families of all pages, each once."""

    def __init__(self, front: bytes, replicas: Sequence[tuple[str, bytes]]) -> None:
        self._families: dict[str, Metric] = {}
        self._add(front, {})
        for name, page in sorted(replicas):
            self._add(page, {LABEL: name})

    def collect(self) -> Iterator[Metric]:
        """In the order in which they were found."""
        yield from self._families.values()

    def _add(self, page: bytes, labels: dict[str, str]) -> None:
        for family in text_string_to_metric_families(page.decode()):
            known = self._families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                known.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
