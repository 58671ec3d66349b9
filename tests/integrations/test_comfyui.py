"""The nodes of ComfyUI on a stand-in of its interface: widgets, errors before a run, images, previews, cancelling."""

import inspect
import json
import math
import os
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.cli.options import ModelOptions
from foveate.core.version import __version__
from foveate.engine.state import RequestState
from foveate.families.loading import model_names
from foveate.pipeline.options import OPTIONS, checked
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.policies.registry import PRESETS, all_policies
from tests.integrations.comfy_stand_in import Graph, Host, Interrupted
from tests.integrations.workflows import FOLDER, graphs, texts


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(FOLDER, monkeypatch)


def edited(graph: Graph, **changes: Any) -> Graph:
    """A copy of a graph with other inputs, as n4_seed=8."""
    found: Graph = json.loads(json.dumps(graph))
    for key, value in changes.items():
        node_id, name = key[1:].split("_", 1)
        found[node_id]["inputs"][name] = value
    return found


@pytest.fixture
def graph(toy_folder: Path) -> Graph:
    """The example that compares two policies, on the toy."""
    path: dict[str, Any] = {"n1_model": "path or hub", "n1_path": str(toy_folder)}
    return edited(graphs()["compare_policies"], **path, n3_prompt="a red cat", n4_prompt="a red cat")


def test_every_option_that_a_form_can_hold_is_a_widget(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    node = host.nodes["FoveateGenerate"]

    def names() -> set[str]:
        declared = node.INPUT_TYPES()
        return set(declared["required"]) | set(declared["optional"])

    own = {"pipeline", "prompt", "previews"}
    wanted = {name for name, option in OPTIONS.items() if option.is_kept or "generate" in option.commands}
    assert names() == own | wanted
    # One that is declared tomorrow is a widget without another line.
    monkeypatch.setitem(OPTIONS, "sharpness", replace(OPTIONS["top_p"], name="sharpness"))  # type: ignore[index]
    assert names() == own | wanted | {"sharpness"}
    loading = host.nodes["FoveateLoadModel"].INPUT_TYPES()
    assert set(loading["optional"]) == {field.name for field in fields(ModelOptions)} - {"model", "threads"}
    taken = set(inspect.signature(Pipeline.from_pretrained).parameters)
    assert set(loading["optional"]) - taken == {"cuda_graphs"}
    assert loading["required"]["model"][0] == [*model_names(), "path or hub"]
    assert host.nodes["FoveatePolicy"].INPUT_TYPES()["required"]["policy"][0] == [*all_policies(), *PRESETS, "spec"]


def test_widgets_say_what_the_declaration_says(host: Host) -> None:
    declared = host.nodes["FoveateGenerate"].INPUT_TYPES()
    inputs = {**declared["required"], **declared["optional"]}
    kinds = {name: kind for name, (kind, *_) in inputs.items()}
    assert kinds["rng"] == ["keyed", "reference"]
    assert kinds["more_smooth"] == ["default", "on", "off"]
    assert (kinds["trace"], kinds["width"], kinds["budget"], kinds["guidance_scale"]) == (
        *("BOOLEAN", "INT", "FLOAT", "STRING"),
    )
    assert inputs["seed"][1]["control_after_generate"] is True
    for name, option in OPTIONS.items():
        if name in inputs and name not in ("policy", "seed"):
            assert inputs[name][1]["tooltip"].startswith(option.help)
    loading = host.nodes["FoveateLoadModel"].INPUT_TYPES()["optional"]
    assert loading["dtype"][0] == ["float32", "bfloat16", "float16"]
    assert loading["quantization"][0] == ["default", "int8", "fp8"]
    assert loading["dtype"][1] == {"default": "float32", "tooltip": "Dtype of the model, whatever its files hold."}


def test_widgets_left_as_they_are_change_nothing(host: Host) -> None:
    widgets = host.module("widgets")
    held = {name: widget.default for name, widget in widgets.call_widgets().items()}
    assert checked(widgets.call_options(held)) == checked({"seed": 0})
    defaults = inspect.signature(Pipeline.from_pretrained).parameters
    for name, value in widgets.loading_options({}).items():
        if name not in ("cuda_graphs", "dtype", "device"):
            assert value == defaults[name].default, name


@pytest.mark.parametrize(
    ("name", "held", "value"),
    [
        ("guidance_scale", " 2.5 ", 2.5),
        ("guidance_scale", "1, 2,3", [1.0, 2.0, 3.0]),
        ("top_k", "3", 3),
        ("more_smooth", "off", False),
        ("width", 256, 256),
        ("budget", 0.5, 0.5),
        ("aspect_ratio", " 4:3 ", "4:3"),
        ("seed", 0, 0),
        ("trace", True, True),
        ("negative_prompt", "a dog\n", "a dog"),
    ],
)
def test_values_of_widgets(host: Host, name: str, held: object, value: object) -> None:
    found = host.module("widgets").call_options({name: held})
    assert found == {name: value}
    assert type(found[name]) is type(value)


def test_a_graph_generates_what_the_pipeline_does(host: Host, graph: Graph, toy_pipe: Pipeline) -> None:
    outputs = host.run(graph)
    for node_id, policy in (("3", "full"), ("4", "drop-branch:count=1")):
        images, result, report = outputs[node_id]
        wanted = stack_uint8(toy_pipe("a red cat", seed=7, policy=policy).images)
        assert np.array_equal((images * 255).round().to(torch.uint8).numpy(), wanted)
        assert np.array_equal(result.images, wanted)
        assert report.splitlines()[:2] == [f"policy {policy}", "seeds 7"]
    # Real coarse images, and the last one is the image itself.
    assert [(done, total) for done, total, _ in host.previews] == [(n + 1, 7) for n in range(7)] * 2
    shown = [np.asarray(image) for _, _, image in host.previews]
    assert np.array_equal(shown[6], outputs["4"][1].images[0])
    assert np.array_equal(shown[13], outputs["3"][1].images[0])
    assert not np.array_equal(shown[5], shown[6])
    fidelity, difference = outputs["5"]
    assert fidelity.startswith("image 0: PSNR ")
    assert "identical" not in fidelity
    apart = np.abs(outputs["4"][1].images.astype(int) - outputs["3"][1].images.astype(int))
    assert np.allclose(difference.numpy(), np.clip(apart * 4 / 255, 0, 1))
    assert outputs["6"][0].shape[0] == 1
    assert outputs["2"] == ("drop-branch:count=1", "drop-branch:count=1")

    # The same graph runs nothing, another seed runs what follows from it, and the model stays.
    host.run(graph)
    assert host.ran == []
    same = host.run(edited(graph, n3_seed=7, n5_reference=["4", 0], n4_previews=0))
    assert sorted(map(int, host.ran)) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert same["5"][0].endswith("identical")
    assert not same["5"][1].any()


def test_the_report_says_warnings_and_a_batch_has_all_images(host: Host, graph: Graph, toy_pipe: Pipeline) -> None:
    node = host.nodes["FoveateGenerate"]()
    images, _, report = node.generate(
        toy_pipe, "a red cat", 3, num_images_per_prompt=2, guidance_scale="1", negative_prompt="a dog", previews=0
    )
    assert images.shape == (2, 256, 256, 3)
    assert "\nseeds 3, 4\n" in report
    assert "\nwarning: negative_prompt has no effect without guidance" in report


def test_cancelling_ends_the_run_and_leaves_nothing(
    host: Host, graph: Graph, monkeypatch: pytest.MonkeyPatch, toy_pipe: Pipeline
) -> None:
    released: list[RequestState] = []
    real = RequestState.release
    monkeypatch.setattr(RequestState, "release", lambda state: (released.append(state), real(state))[1])
    node = host.nodes["FoveateGenerate"]()
    host.cancel_after = 2
    with pytest.raises(Interrupted):
        node.generate(toy_pipe, "a red cat", 7)
    assert len(host.previews) == 2
    assert len(released) == 1
    host.cancel_after = None
    images, *_ = node.generate(toy_pipe, "a red cat", 7, previews=1)
    wanted = stack_uint8(toy_pipe("a red cat", seed=7).images)
    assert np.array_equal((images * 255).round().to(torch.uint8).numpy(), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n1_path": ""}, "path goes with model 'path or hub', got model 'path or hub' and path ''"),
        ({"n1_path": "/no/model"}, "no model at /no/model: no such file or folder; "),
        ({"n1_model": "nope"}, "model must be one of emoji, "),
        ({"n1_device": "mps"}, 'device must be "cpu", "cuda" or "cuda:N", got \'mps\''),
        ({"n1_dtype": "half"}, "dtype must be one of float32, bfloat16, float16, got 'half'"),
        ({"n1_offload": True}, "offload needs a pipeline on a GPU; "),
        ({"n1_kernels": "triton"}, "Triton kernels need a pipeline on a GPU; "),
        ({"n1_cuda_graphs": True}, "cuda_graphs needs weights that stay on a GPU; "),
        ({"n2_fields": "cuont=1"}, "no field of drop-branch 'cuont'; did you mean count? "),
        ({"n2_fields": "count=many"}, "drop-branch: count must be an int, got 'many'"),
        ({"n2_policy": "nope"}, "policy must be one of full, "),
        ({"n2_policy": "spec", "n2_fields": ""}, "fields must hold the whole spec where policy is 'spec'"),
        ({"n2_policy": "spec", "n2_fields": "full|nope"}, "no policy 'nope'; "),
        ({"n3_prompt": "  "}, "prompt must not be empty; say what to generate"),
        ({"n3_guidance_scale": "1,x"}, "guidance_scale must be a number, or several with commas, got 'x'"),
        ({"n3_top_p": "1.5"}, "top_p must be in [0, 1], got 1.5"),
        ({"n3_temperature": "1,0"}, "temperature must be above "),
        ({"n3_width": 256}, "give both height and width, or an aspect_ratio"),
        ({"n3_seed": -1}, "seed must be in [0, 9007199254740991], got -1"),
        ({"n3_num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number, 1 or more, got 0"),
        ({"n3_rng": "dice"}, "rng must be one of keyed, reference, got 'dice'"),
        ({"n3_budget": 2.0}, "budget must be in (0, 1], got 2.0"),
        ({"n3_previews": 65}, "previews must be in [0, 64], got 65"),
    ],
)
def test_what_is_wrong_is_said_of_its_node_before_anything_runs(
    host: Host, graph: Graph, change: dict[str, Any], message: str
) -> None:
    (node_id,) = {key[1] for key in change}
    found = host.errors(edited(graph, **change))
    assert list(found) == [node_id]
    assert found[node_id].startswith(message)
    assert "\n" not in found[node_id]


def test_linked_inputs_are_not_judged_before_they_are_known(host: Host, graph: Graph) -> None:
    linked: dict[str, Any] = {"n3_prompt": ["2", 1], "n3_guidance_scale": ["2", 1], "n1_model": "emoji", "n1_path": ""}
    assert host.errors(edited(graph, **linked)) == {}


def test_a_size_that_the_model_has_not_is_refused_before_its_first_scale(host: Host, toy_pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="^size must be one of 256x256"):
        host.nodes["FoveateGenerate"]().generate(toy_pipe, "a red cat", 7, width=100, height=100)
    assert host.previews == []


def test_what_changed_runs_again(host: Host, tmp_path: Path) -> None:
    load, policy = host.nodes["FoveateLoadModel"].IS_CHANGED, host.nodes["FoveatePolicy"].IS_CHANGED
    generate: Callable[..., Any] = host.nodes["FoveateGenerate"].IS_CHANGED
    model, settings = tmp_path / "model", tmp_path / "tuned.yaml"
    model.mkdir()
    cases: list[tuple[Path, Callable[[], object]]] = [
        (model / "config.json", lambda: load(path=str(model))),
        (settings, lambda: policy(fields=str(settings))),
    ]
    for place, changed in cases:
        place.write_text("{}")
        before = changed()
        assert changed() == before != ""
        os.utime(place, ns=(1, 1))
        assert changed() != before
    assert load(model="emoji", path="") == policy(policy="full", fields="") == generate(seed=1) == ""
    assert math.isnan(generate(latency_budget_ms=100.0)), "equals nothing, so it runs again"


def test_images_without_three_channels_are_refused(host: Host) -> None:
    compare = host.nodes["FoveateCompare"]().compare
    with pytest.raises(ValueError, match=r"^images must be RGB, \[B, H, W, 3\], got \[1, 8, 8, 4\]; remove the alpha"):
        compare(torch.zeros(1, 8, 8, 4), torch.zeros(1, 8, 8, 3), 1.0)
    with pytest.raises(ValueError, match=r"must have one shape, got \[1, 16, 16\] and \[2, 16, 16\]$"):
        compare(torch.zeros(1, 16, 16, 3), torch.zeros(2, 16, 16, 3), 1.0)
    # Too small for SSIM, and said by its absence.
    text, _ = compare(torch.zeros(1, 8, 8, 3), torch.ones(1, 8, 8, 3), 1.0)
    assert text == "image 0: PSNR 0.00 dB, foreground PSNR 0.00 dB"


def test_a_map_needs_a_trace_and_an_image(host: Host, toy_pipe: Pipeline) -> None:
    draw = host.nodes["FoveateComputeMap"]().draw
    plain = toy_pipe("a red cat", seed=1, output_type="np")
    with pytest.raises(ValueError, match="the trace has no maps; generate with trace=True"):
        draw(plain, 0)
    with pytest.raises(ValueError, match="^index must be from 0 to 0, got 1$"):
        draw(plain, 1)


def test_example_workflows_are_those_of_todays_widgets(host: Host) -> None:
    wanted = texts(host.nodes)
    assert {path: path.read_text(encoding="utf-8") for path in wanted} == wanted, (
        "python -m tests.integrations.workflows"
    )
    for graph in graphs().values():
        assert host.errors(graph) == {}


def test_the_package_is_one_that_the_registry_takes() -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == __version__
    assert project["project"]["dependencies"] == (FOLDER / "requirements.txt").read_text(encoding="utf-8").split()
    assert project["project"]["dependencies"] == [f"foveate[eval]=={__version__}"]
    assert set(project["tool"]["comfy"]) >= {"PublisherId", "DisplayName"}
