"""A real Prometheus scrapes a real server, and answers every query of the dashboard and of the alerts."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.server.test_deploy import DEPLOY, dashboard, rules

WAIT_S = 60.0

SILENT = ("Server errors", "Refused, late, cancelled, failed")
"""Panels that are empty on a server where nothing went wrong."""


@pytest.fixture
def prometheus(start: Callable[..., Any], tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """A server, and the address of a Prometheus that scrapes it every second."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is missing: apt-get install prometheus")
    server = start()
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    flags += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = subprocess.Popen([program, *flags], stderr=subprocess.DEVNULL)
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def asked(address: str, path: str, **parameters: str) -> Any:
    """What Prometheus answers; None while it does not."""
    try:
        with urllib.request.urlopen(f"{address}{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as response:
            return json.load(response)["data"]
    except OSError:
        return None


def wait(address: str, number: int) -> None:
    """Until Prometheus has seen so many images."""
    until = time.monotonic() + WAIT_S
    while not (asked(address, "/api/v1/query", query=f"sum(foveate_images_total) >= {number}") or {}).get("result"):
        assert time.monotonic() < until, f"{number} images were never scraped"
        time.sleep(0.2)


def numbers(address: str, expression: str) -> list[float]:
    """The values that a query of the dashboard has now."""
    for name, value in {"$instance": ".*", "$__rate_interval": "5m", "$__range": "5m"}.items():
        expression = expression.replace(name, value)
    found = asked(address, "/api/v1/query", query=expression)
    assert found is not None, expression
    return [float(entry["value"][1]) for entry in found["result"]]


@pytest.mark.soak
def test_every_query_is_answered(prometheus: tuple[Any, str]) -> None:
    server, address = prometheus
    for image in range(4):
        # Counters need a value before the increase that a rate shows.
        assert server.generate(stream=True, partial_images=1, seed=image).status == 200
        wait(address, image + 1)
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            found = numbers(address, target["expr"])
            if panel["title"] not in SILENT:
                assert found, (panel["title"], target["expr"])
                assert all(number >= 0 for number in found), (panel["title"], found)
    (group,) = asked(address, "/api/v1/rules")["groups"]
    assert {rule["name"]: rule["health"] for rule in group["rules"]} == {rule["alert"]: "ok" for rule in rules()}
    assert {rule["state"] for rule in group["rules"]} == {"inactive"}
