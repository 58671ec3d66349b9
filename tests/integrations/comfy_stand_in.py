"""A small stand-in of the part of ComfyUI that meets nodes, written from its documentation and public interface.

Read: docs.comfy.org (server overview, inputs, datatypes, lazy evaluation) and ComfyUI 0.3.64, commit
a125cd84b054a57729b5eecab930ca9408719832 (`comfy_types/node_typing.py`, `execution.py`, `nodes.py`, `comfy/utils.py`).
None of its code is here. What it does: loads a folder as a package by its path, asks `VALIDATE_INPUTS` before anything
runs (links are None, an error is told of its node), runs nodes in inference mode after what they are linked to, keeps
what a node returned until its inputs or its `IS_CHANGED` change, and shows progress with previews.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

Graph = dict[str, dict[str, Any]]
"""ComfyUI's API format: nodes by id, with `class_type` and `inputs`; a list [id, slot] is a link."""


class Interrupted(Exception):  # noqa: N818 - as ComfyUI's own is no error
    """ComfyUI's `InterruptProcessingException`."""


class PreviewImage:
    """ComfyUI's node that shows images."""

    OUTPUT_NODE, RETURN_TYPES, FUNCTION = True, (), "show"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"images": ("IMAGE",)}}

    def show(self, images: torch.Tensor) -> dict[str, Any]:
        assert images.ndim == 4
        assert images.shape[-1] == 3
        assert images.dtype is torch.float32
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        return {"ui": {"images": [tuple(image.shape) for image in images]}}


class PreviewAny:
    """ComfyUI's node that shows a text."""

    OUTPUT_NODE, RETURN_TYPES, FUNCTION = True, (), "main"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"source": ("*", {})}}

    def main(self, source: Any = None) -> dict[str, Any]:
        return {"ui": {"text": (str(source),)}}


class Host:
    """Loads nodes and runs graphs.

    Attributes:
        previews: Every preview that was shown: done, total, image.
        ran: Ids of the nodes that the last graph ran, in their order.
        ui: What its output nodes showed.
        cancel_after: Previews after which somebody cancels.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.previews: list[tuple[int, int, Image.Image | None]] = []
        self.ran: list[str] = []
        self.ui: dict[str, Any] = {}
        self.cancel_after: int | None = None
        self._is_cancelled = False
        self._kept: dict[str, tuple[object, tuple[Any, ...]]] = {}
        for name, held in self._modules().items():
            module = ModuleType(name)
            vars(module).update(held)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        # As ComfyUI does: the module's name is its path.
        name = str(folder)
        for part in [part for part in sys.modules if part.startswith(f"{name}.")]:
            del sys.modules[part]
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        self.package = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, self.package)
        spec.loader.exec_module(self.package)
        self.nodes: dict[str, Any] = {
            **self.package.NODE_CLASS_MAPPINGS,
            "PreviewImage": PreviewImage,
            "PreviewAny": PreviewAny,
        }

    def module(self, name: str) -> ModuleType:
        """A module of the nodes' folder."""
        return sys.modules[f"{self.package.__name__}.{name}"]

    def _modules(self) -> dict[str, dict[str, Any]]:
        host = self

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                if preview is not None:
                    kind, image, side = preview
                    assert (kind, side) == ("JPEG", 512)
                    assert isinstance(image, Image.Image)
                host.previews.append((value, self.total, None if preview is None else preview[1]))
                if host.cancel_after is not None and len(host.previews) >= host.cancel_after:
                    host._is_cancelled = True

        def throw_exception_if_processing_interrupted() -> None:
            if host._is_cancelled:
                host._is_cancelled = False
                raise Interrupted

        return {
            "comfy": {"__path__": []},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_management": {
                "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
                "InterruptProcessingException": Interrupted,
            },
            "comfy.cli_args": {"args": SimpleNamespace(preview_size=512)},
        }

    def errors(self, graph: Graph) -> dict[str, str]:
        """What is wrong, by node; nothing runs."""
        found = {}
        for node_id, node in graph.items():
            kind = self.nodes[node["class_type"]]
            declared = kind.INPUT_TYPES()
            missing = [name for name in declared["required"] if name not in node["inputs"]]
            assert not missing, f"ComfyUI says: required input is missing, {missing}"
            self._check_links(graph, node)
            validate = getattr(kind, "VALIDATE_INPUTS", None)
            if validate is None:
                continue
            spec = inspect.getfullargspec(validate)
            constants = {name: None if isinstance(value, list) else value for name, value in node["inputs"].items()}
            taken = {name: value for name, value in constants.items() if spec.varkw or name in spec.args}
            try:
                result = validate(**taken)
            except Exception as error:
                found[node_id] = str(error)
            else:
                assert result is True, "a text would be repeated for every input"
        return found

    def _check_links(self, graph: Graph, node: Mapping[str, Any]) -> None:
        declared = self.nodes[node["class_type"]].INPUT_TYPES()
        for name, value in node["inputs"].items():
            wanted = {**declared["required"], **declared.get("optional", {})}[name][0]
            if isinstance(value, list):
                given = self.nodes[graph[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                assert "*" in (given, wanted) or given == wanted, f"{name}: return type mismatch"

    def run(self, graph: Graph) -> dict[str, tuple[Any, ...]]:
        """What every node returned; nodes that are kept do not run again."""
        assert not self.errors(graph)
        self.ran, self.ui = [], {}
        outputs: dict[str, tuple[Any, ...]] = {}
        with torch.inference_mode():
            for node_id in self._order(graph):
                outputs[node_id] = self._one(graph, node_id, outputs)
        return outputs

    def _order(self, graph: Graph) -> list[str]:
        order: list[str] = []

        def visit(node_id: str) -> None:
            for value in graph[node_id]["inputs"].values():
                if isinstance(value, list):
                    visit(value[0])
            if node_id not in order:
                order.append(node_id)

        for node_id, node in graph.items():
            if getattr(self.nodes[node["class_type"]], "OUTPUT_NODE", False):
                visit(node_id)
        return order

    def _one(self, graph: Graph, node_id: str, outputs: Mapping[str, tuple[Any, ...]]) -> tuple[Any, ...]:
        node = graph[node_id]
        kind, inputs = self.nodes[node["class_type"]], node["inputs"]
        signature = self._signature(graph, node_id)
        if node_id in self._kept and self._kept[node_id][0] == signature:
            return self._kept[node_id][1]
        linked = {name: outputs[value[0]][value[1]] for name, value in inputs.items() if isinstance(value, list)}
        function: Callable[..., Any] = getattr(kind(), kind.FUNCTION)
        self.ran.append(node_id)
        result = function(**{**inputs, **linked})
        if isinstance(result, dict):
            self.ui[node_id], result = result["ui"], result.get("result", ())
        assert isinstance(result, tuple)
        assert len(result) == len(kind.RETURN_TYPES)
        self._kept[node_id] = signature, result
        return result

    def _signature(self, graph: Graph, node_id: str) -> tuple[object, ...]:
        """What a node's result depends on: its inputs, those of the nodes before it, and what they say has changed."""
        node = graph[node_id]
        kind, parts = self.nodes[node["class_type"]], []
        constants = {name: None if isinstance(value, list) else value for name, value in node["inputs"].items()}
        changed = kind.IS_CHANGED(**constants) if hasattr(kind, "IS_CHANGED") else False
        for name, value in node["inputs"].items():
            is_link = isinstance(value, list)
            parts.append((name, (self._signature(graph, value[0]), value[1]) if is_link else value))
        # A NaN is a new object every time, so it equals nothing.
        return node["class_type"], changed, tuple(parts)
