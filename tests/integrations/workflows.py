"""Makes the example workflows of the nodes from the graphs in `integrations/comfyui/example_workflows/api`.

A workflow of ComfyUI's editor lists the value of every widget in the order of the node's inputs, so it follows from the
declarations of the options: `python -m tests.integrations.workflows` writes the files anew.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.comfy_stand_in import Graph, Host

FOLDER = Path(__file__).parents[2] / "integrations/comfyui"
WORKFLOWS = FOLDER / "example_workflows"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
WIDTH, HEIGHT, GAP = 320, 130, 40
ROW, PREVIEW = 26, 280


def workflow(graph: Graph, nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The graph as ComfyUI's editor stores it, version 0.4 of its format."""
    links: list[list[Any]] = []
    depth = {node_id: _depth(graph, node_id) for node_id in graph}
    used: dict[int, int] = {}
    found = []
    for order, node_id in enumerate(sorted(graph, key=lambda one: (depth[one], int(one)))):
        kind = nodes[graph[node_id]["class_type"]]
        inputs, values = _inputs(graph, node_id, kind, links)
        top = used.get(depth[node_id], 0)
        shows = {*kind.RETURN_TYPES[:1], *(one["type"] for one in inputs if not kind.RETURN_TYPES)}
        height = HEIGHT + ROW * len(values) + (PREVIEW if "IMAGE" in shows else 0)
        used[depth[node_id]] = top + height + GAP
        found.append(
            {
                "id": int(node_id),
                "type": graph[node_id]["class_type"],
                "pos": [depth[node_id] * (WIDTH + GAP), top],
                "size": [WIDTH, height],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": inputs,
                "outputs": [
                    {"name": name, "type": kind_of, "links": []}
                    for name, kind_of in zip(getattr(kind, "RETURN_NAMES", ()), kind.RETURN_TYPES, strict=True)
                ],
                "properties": {"Node name for S&R": graph[node_id]["class_type"]},
                "widgets_values": values,
            }
        )
    by_id = {node["id"]: node for node in found}
    for link in links:
        by_id[link[1]]["outputs"][link[2]]["links"].append(link[0])
    return {
        "last_node_id": max(by_id),
        "last_link_id": len(links),
        "nodes": found,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _inputs(graph: Graph, node_id: str, kind: Any, links: list[list[Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    declared, given = kind.INPUT_TYPES(), graph[node_id]["inputs"]
    inputs: list[dict[str, Any]] = []
    values: list[Any] = []
    for name, (kind_of, *rest) in {**declared["required"], **declared.get("optional", {})}.items():
        settings = rest[0] if rest else {}
        if isinstance(kind_of, list) or kind_of in WIDGETS:
            values.append(given.get(name, settings.get("default")))
            values += ["fixed"] if settings.get("control_after_generate") else []
            continue
        link = given.get(name)
        if link is not None:
            links.append([len(links) + 1, int(link[0]), link[1], int(node_id), len(inputs), kind_of])
        inputs.append({"name": name, "type": kind_of, "link": None if link is None else len(links)})
    return inputs, values


def _depth(graph: Graph, node_id: str) -> int:
    linked = [value[0] for value in graph[node_id]["inputs"].values() if isinstance(value, list)]
    return 1 + max((_depth(graph, one) for one in linked), default=-1)


def graphs() -> dict[str, Graph]:
    """The graphs by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(WORKFLOWS.glob("api/*.json"))}


def texts(nodes: Mapping[str, Any]) -> dict[Path, str]:
    """What the files of the editor must hold."""
    return {
        WORKFLOWS / f"{name}.json": json.dumps(workflow(graph, nodes), indent=1) + "\n"
        for name, graph in graphs().items()
    }


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        for place, text in texts(Host(FOLDER, patch).nodes).items():
            place.write_text(text, encoding="utf-8")
