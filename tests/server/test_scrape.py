"""One page of metrics for many processes: what is counted where stays apart, and every family stands once."""

from prometheus_client.parser import text_string_to_metric_families

from foveate.server.metrics import Metrics
from foveate.server.replicas.scrape import merged
from tests.server.observed import IDLE


def test_replicas_have_a_label_and_the_front_has_none() -> None:
    front = Metrics(None)
    front.finished(200, "full", 0.5)
    front.rejected("key")
    page = merged(front.render(), [("b", Metrics(lambda: IDLE).render()), ("a", Metrics(lambda: IDLE).render())])
    families = {family.name: family for family in text_string_to_metric_families(page.decode())}
    assert page.count(b"# TYPE foveate_queue_images gauge") == 1
    waiting = families["foveate_queue_images"].samples
    assert [(sample.labels, sample.value) for sample in waiting] == [({"replica": "a"}, 3), ({"replica": "b"}, 3)]
    (answered,) = (s for s in families["foveate_requests"].samples if s.name == "foveate_requests_total")
    assert (answered.labels, answered.value) == ({"status": "200", "policy": "full"}, 1)
    assert families["foveate_request_seconds"].type == "histogram"
    memory = [sample.labels.get("replica") for sample in families["process_resident_memory_bytes"].samples]
    assert memory == [None, "a", "b"]


def test_a_front_that_stops_says_so() -> None:
    pages = [merged(Metrics(None, lambda stops=stops: stops).render(), []) for stops in (False, True)]
    assert [b"foveate_closing 0.0" in page for page in pages] == [True, False]
    assert b"foveate_closing 1.0" in pages[1]


def test_a_front_without_replicas_still_answers() -> None:
    page = merged(Metrics(None).render(), [])
    assert b"foveate_queue_images" not in page
    assert b"# TYPE foveate_requests_total counter" in page
