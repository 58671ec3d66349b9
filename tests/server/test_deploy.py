"""What operators copy: every metric, file and flag that it names is there, and Prometheus takes the rules."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from foveate.pipeline.pipeline import Pipeline
from foveate.server.metrics import Metrics, Outcome, Reason
from tests.server.observed import IDLE, events_of, request

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/foveate.json"

METRIC = re.compile(r"\b(?:foveate|process)_[a-z_]+\b")
MATCHER = re.compile(r'\b(outcome|reason|part)(=~|!~|!=|=)"([^"]*)"')


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return group["rules"]


def queries() -> Iterator[tuple[str, str]]:
    """Everything that is asked of Prometheus, and where."""
    for panel in dashboard()["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for variable in dashboard()["templating"]["list"]:
        yield variable["name"], variable["query"]
    yield from ((rule["alert"], rule["expr"]) for rule in rules())


@pytest.fixture(scope="module")
def known(toy_pipe: Pipeline) -> frozenset[str]:
    """The names of all samples of a server that has done everything once."""
    metrics = Metrics(lambda: IDLE)
    work = request(toy_pipe)
    listener = metrics.watch(work, lambda _: None)
    for event in events_of(toy_pipe, work):
        listener(event)
    metrics.rejected("rate")
    metrics.finished(200, "full", 1.0)
    return frozenset(sample.name for family in metrics.registry.collect() for sample in family.samples)


def test_every_metric_that_is_asked_for_exists(known: frozenset[str]) -> None:
    asked = {(where, name) for where, query in queries() for name in METRIC.findall(query)}
    assert len({name for _, name in asked}) > 15
    assert not sorted((where, name) for where, name in asked if name not in known)


def test_every_value_of_a_label_that_is_asked_for_exists() -> None:
    values = {"outcome": get_args(Outcome), "reason": get_args(Reason), "part": ("run", "saved")}
    matched = [(where, *found) for where, query in queries() for found in MATCHER.findall(query)]
    assert len(matched) > 5
    for where, label, _, text in matched:
        assert set(text.split("|")) <= set(values[label]), where


def test_the_dashboard_is_whole() -> None:
    """Panels have numbers and places of their own and ask the source that is provisioned."""
    found = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text(encoding="utf-8"))
    (source,) = found["datasources"]
    panels, taken = dashboard()["panels"], set[tuple[int, int]]()
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": source["type"], "uid": source["uid"]}


def test_an_image_is_built_from_files_that_are_there() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (DEPLOY / name).read_text(encoding="utf-8").replace("\\\n", " ")
        copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY") and "--from" not in line]
        for path in (path for paths in copied for path in paths):
            assert (ROOT / path).exists(), path
            assert any(fnmatch(path, pattern) for pattern in allowed), path
        named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert {named["readme"], *named["license-files"]} <= {path for paths in copied for path in paths}
        assert re.findall(r"^USER (\d+)", text, re.M) == ["10001"]


def test_compose_mounts_files_that_are_there() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    mounted = [volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]]
    paths = [path for path in mounted if path.startswith("./")]
    assert len(paths) == 4
    for path in paths:
        assert (DEPLOY / path).exists(), path
    assert {path for path in mounted if not path.startswith("./")} == set(compose["volumes"])
    (server,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert server["static_configs"][0]["targets"] == ["foveate:8000"]


def run(program: str, package: str, *arguments: str | Path) -> str:
    """Runs a program of Debian in the folder; what it said."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        pytest.skip(f"{program} is missing: apt-get install {package}")
    ran = subprocess.run([path, *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.soak
@pytest.mark.parametrize(
    "arguments", ["check rules alerts.yml", "check config prometheus.yml", "test rules alerts_test.yml"]
)
def test_prometheus_takes_the_rules_and_each_fires_when_it_shall(arguments: str) -> None:
    assert "SUCCESS" in run("promtool", "prometheus", *arguments.split())
    tested = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    for case in tested:
        assert {test["alertname"] for test in case["alert_rule_test"]} == {rule["alert"] for rule in rules()}


@pytest.mark.soak
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    key, certificate = tmp_path / "privkey.pem", tmp_path / "fullchain.pem"
    made = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-keyout", key, "-out", certificate)
    run("openssl", "openssl", *made)
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    (tmp_path / "foveate.conf").write_text(text.replace("/etc/ssl/foveate", str(tmp_path)), encoding="utf-8")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    main = (
        f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; {folders} include foveate.conf; }}"
    )
    (tmp_path / "nginx.conf").write_text(main, encoding="utf-8")
    said = run("nginx", "nginx-light", "-t", "-e", "stderr", "-p", tmp_path, "-c", tmp_path / "nginx.conf")
    assert "test is successful" in said
    assert "[warn]" not in said


@pytest.mark.soak
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "foveate.service").read_text(encoding="utf-8")
    unit = tmp_path / "foveate.service"
    unit.write_text(text.replace("/opt/foveate/bin/foveate", sys.executable), encoding="utf-8")
    assert run("systemd-analyze", "systemd", "verify", unit) == ""
    said = run("systemd-analyze", "systemd", "security", "--offline=true", "--threshold=20", unit)
    assert "Overall exposure level" in said
