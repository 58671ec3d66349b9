"""The nodes. `VALIDATE_INPUTS` refuses before anything runs what can be known to be wrong then.

ComfyUI repeats a text that `VALIDATE_INPUTS` returns for every input that it takes. An error that it raises is said
once, in its own line, so these raise. Inputs that come through a link are None there.
Each class is as ComfyUI's interface for nodes wants it: `INPUT_TYPES`, `RETURN_TYPES`, `FUNCTION`.
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from foveate.core.errors import FoveateError
from foveate.core.hub import is_like_a_path, is_repository, no_such_file
from foveate.families.loading import Precision, model_names
from foveate.pipeline.options import Options, checked
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.placement import find_device, find_dtype, refuse_offload, wants_triton
from foveate.policies.registry import PRESETS, all_policies, load_policy
from foveate.viz.maps import compute_map

from .host import Progress, check_cancelled
from .images import difference, fidelity, to_bytes, to_image
from .widgets import (
    Widget,
    call_options,
    call_widgets,
    check_per_scale,
    loading_options,
    loading_widgets,
)

PIPELINE, POLICY, RESULT = "FOVEATE_PIPELINE", "FOVEATE_POLICY", "FOVEATE_RESULT"
"""Types of links."""

CATEGORY = "foveate"
ELSEWHERE, SPEC = "path or hub", "spec"
"""Choices that take the text beside them."""

_MOST_PREVIEWS = 64
_ALL_SCALES = 16

Inputs = dict[str, dict[str, tuple[Any, ...]]]


class LoadModel:
    """Loads a model. It stays loaded until an input or a file changes."""

    DESCRIPTION = "Loads a next-scale image model: a registered name, a folder, a file of weights, or owner/name."
    CATEGORY = CATEGORY
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802 - ComfyUI's name, here and below
        """The model, and the options of loading."""
        return {"required": _declared(_model_widgets()), "optional": _declared(loading_widgets())}

    @classmethod
    def VALIDATE_INPUTS(cls, **held: Any) -> bool:  # noqa: N802
        """Refuses names, paths, devices and combinations that cannot be loaded; nothing is read or fetched.

        Raises:
            FoveateError: It names the input.
        """
        for name, widget in _model_widgets().items():
            if held.get(name) is not None:
                widget.check(name, held[name])
        if held.get("model") is not None and held.get("path") is not None:
            _check_place(_name_of(held["model"], held["path"]))
        options = loading_options(held)
        place = find_device(options["device"] or "cpu")
        Precision(dtype=find_dtype(options["dtype"]), quantization=options["quantization"])
        wants_triton(options["kernels"], place)
        if options["offload"]:
            refuse_offload(place)
        if options["cuda_graphs"] and (place.type == "cpu" or options["offload"]):
            raise FoveateError("cuda_graphs needs weights that stay on a GPU; set device to cuda and offload to off")
        return True

    @classmethod
    def IS_CHANGED(cls, **held: Any) -> str:  # noqa: N802
        """Changes with the files of the model, where they are on this disk."""
        named = (held.get("path"), held.get("autoencoder"), held.get("text_encoder"))
        return " ".join(_stamp(str(name)) for name in named if name)

    def load(self, model: str, path: str, **held: Any) -> tuple[Pipeline]:
        """The pipeline.

        Raises:
            FoveateError: As `Pipeline.from_pretrained`.
        """
        options = loading_options(held)
        has_graphs, device = options.pop("cuda_graphs"), options.pop("device")
        # ComfyUI runs nodes in inference mode, whose tensors could not be moved or quantised later.
        with torch.inference_mode(mode=False):
            pipe = Pipeline.from_pretrained(_name_of(model, path), device=device or "cpu", **options)
            if has_graphs:
                pipe.enable_cuda_graphs()
        pipe.set_progress_bar_config(disable=True)
        return (pipe,)


class ChoosePolicy:
    """A policy, checked."""

    DESCRIPTION = "Decides which tokens, blocks and guidance branches run."
    CATEGORY = CATEGORY
    RETURN_TYPES = (POLICY, "STRING")
    RETURN_NAMES = ("policy", "spec")
    FUNCTION = "choose"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """The policies of this installation, and a text."""
        return {"required": _declared(_policy_widgets())}

    @classmethod
    def VALIDATE_INPUTS(cls, **held: Any) -> bool:  # noqa: N802
        """Refuses policies and fields that there are not.

        Raises:
            FoveateError: As `load_policy`.
        """
        if None not in (held.get("policy"), held.get("fields")):
            _policy_of(held["policy"], held["fields"])
        return True

    @classmethod
    def IS_CHANGED(cls, **held: Any) -> str:  # noqa: N802
        """Changes with a policy file."""
        return _stamp(str(held.get("fields") or ""))

    def choose(self, policy: str, fields: str) -> tuple[str, str]:
        """The policy as a call takes it, and its whole spec.

        Raises:
            FoveateError: As `load_policy`.
        """
        text = _policy_of(policy, fields)
        return text, load_policy(text).spec


class Generate:
    """Generates images and shows them as they form."""

    DESCRIPTION = "Generates images; the preview is the real coarse image after every scale."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE", RESULT, "STRING")
    RETURN_NAMES = ("images", "result", "report")
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """A pipeline, a prompt, and the options of a call."""
        widgets = call_widgets()
        seed = {"seed": widgets.pop("seed")}
        return {
            "required": {"pipeline": (PIPELINE,), **_declared(_prompt_widgets()), **_declared(seed)},
            "optional": {"policy": (POLICY,), **_declared(widgets), **_declared(_preview_widgets())},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, **held: Any) -> bool:  # noqa: N802
        """Refuses what no model could take; the rest is refused when the node runs, before its first scale.

        Raises:
            FoveateError: It names the input.
        """
        if held.get("prompt") is not None and not str(held["prompt"]).strip():
            raise FoveateError("prompt must not be empty; say what to generate")
        if held.get("previews") is not None:
            _preview_widgets()["previews"].check("previews", held["previews"])
        options = call_options(held)
        checked(cast(Options, options))
        check_per_scale(options)
        return True

    @classmethod
    def IS_CHANGED(cls, **held: Any) -> float | str:  # noqa: N802
        """The same inputs give the same images, but with a time to keep: NaN, which equals nothing, runs it again."""
        return float("nan") if held.get("latency_budget_ms") else ""

    def generate(
        self,
        pipeline: Pipeline,
        prompt: str,
        seed: int,
        policy: str | None = None,
        previews: int = _ALL_SCALES,
        **held: Any,
    ) -> tuple[torch.Tensor, PipelineOutput[np.ndarray], str]:
        """The images, what the call returned, and a report.

        Raises:
            FoveateError: As `Pipeline.__call__`.
        """
        check_cancelled()
        options = {**call_options({**held, "seed": seed}), **({} if policy is None else {"policy": policy})}
        bar = Progress(len(pipeline.job(prompt, cast(Options, options)).schedule))
        output = None
        with closing(pipeline.stream(prompt, previews, **{**options, "output_type": "np"})) as events:
            for event in events:
                shown = None if event.images is None else Image.fromarray(np.asarray(event.images)[0])
                bar.show(event.scale + 1, shown)
                output = event.output
        assert output is not None, "the last event carries the output"
        return to_image(output.images), output, _report(output)


class Compare:
    """How near images come to a reference."""

    DESCRIPTION = "PSNR, SSIM and a map of the difference of two batches of images, such as of two policies."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("fidelity", "difference")
    FUNCTION = "compare"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Two batches."""
        return {"required": {"images": ("IMAGE",), "reference": ("IMAGE",), **_declared(_gain_widgets())}}

    def compare(self, images: torch.Tensor, reference: torch.Tensor, gain: float) -> tuple[str, torch.Tensor]:
        """A line per image, and the distance of every pixel.

        Raises:
            FoveateError: Both batches have not one shape.
        """
        one, other = to_bytes(images), to_bytes(reference)
        return fidelity(one, other), difference(one, other, gain)


class ComputeMap:
    """What ran at every scale."""

    DESCRIPTION = "Which tokens ran at every scale, how deep and in which branches; needs trace at Generate."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("map",)
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """The result of a call."""
        index = Widget(kind="INT", default=0, help="Which image.", settings=(("min", 0), ("max", 4095)))
        return {"required": {"result": (RESULT,), **_declared({"index": index})}}

    def draw(self, result: PipelineOutput[np.ndarray], index: int) -> tuple[torch.Tensor]:
        """One sheet.

        Raises:
            FoveateError: The call had no trace, or there is no such image.
        """
        if not 0 <= index < len(result.images):
            raise FoveateError(f"index must be from 0 to {len(result.images) - 1}, got {index}")
        sheet = compute_map(Image.fromarray(result.images[index]), result.trace, index)
        return (to_image(np.asarray(sheet)[None]),)


def _declared(widgets: Mapping[str, Widget]) -> dict[str, tuple[Any, ...]]:
    return {name: widget.declared() for name, widget in widgets.items()}


def _model_widgets() -> dict[str, Widget]:
    names = (*model_names(), ELSEWHERE)
    tip = "Folder, file of transformer weights, or owner/name on the hub; read where model is "
    return {
        "model": Widget(kind=names, default="emoji" if "emoji" in names else names[0], help="A registered name."),
        "path": Widget(kind="STRING", default="", help=f"{tip}'{ELSEWHERE}'."),
    }


def _policy_widgets() -> dict[str, Widget]:
    names = (*all_policies(), *PRESETS, SPEC)
    tip = "Its fields, as count=2,fill=zero. Where policy is 'spec': the whole, as drop-branch|skip-scales:count=2."
    return {
        "policy": Widget(kind=names, default=names[0], help="foveate policies NAME says what each does."),
        "fields": Widget(kind="STRING", default="", help=tip),
    }


def _prompt_widgets() -> dict[str, Widget]:
    settings = (("multiline", True), ("dynamicPrompts", True))
    return {"prompt": Widget(kind="STRING", default="", help="What to generate.", settings=settings)}


def _preview_widgets() -> dict[str, Widget]:
    tip = "How many of the last scales are shown as they finish; each runs the decoder. 0 shows none."
    bounds = (("min", 0), ("max", _MOST_PREVIEWS))
    return {"previews": Widget(kind="INT", default=_ALL_SCALES, help=tip, settings=bounds)}


def _gain_widgets() -> dict[str, Widget]:
    bounds = (("min", 0.0), ("max", 255.0), ("step", 0.5))
    return {"gain": Widget(kind="FLOAT", default=4.0, help="Makes small differences visible.", settings=bounds)}


def _name_of(model: str, path: str) -> str:
    """What to load.

    Raises:
        FoveateError: A path is given beside a name, or none where one is asked for.
    """
    if (model == ELSEWHERE) != bool(path.strip()):
        raise FoveateError(f"path goes with model '{ELSEWHERE}', got model {model!r} and path {path!r}")
    return path.strip() or model


def _check_place(name: str) -> None:
    if name not in model_names() and not Path(name).exists() and (is_like_a_path(name) or not is_repository(name)):
        raise no_such_file("model", name)


def _policy_of(policy: str, fields: str) -> str:
    """A policy as a call takes it.

    Raises:
        FoveateError: As `load_policy`.
    """
    _policy_widgets()["policy"].check("policy", policy)
    fields = fields.strip()
    if policy == SPEC and not fields:
        raise FoveateError("fields must hold the whole spec where policy is 'spec', such as skip-scales:count=2")
    text = fields if policy == SPEC else f"{policy}:{fields}" if fields else policy
    load_policy(text)
    return text


def _stamp(name: str) -> str:
    """Names, sizes and times of the files at a path; empty where there are none."""
    path = Path(name)
    if not name or not path.exists():
        return ""
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    stats = ((file, file.stat()) for file in files)
    return ",".join(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)


def _report(output: PipelineOutput[Any]) -> str:
    """What was saved and what it took, a line each."""
    report = output.report
    return "\n".join(
        (
            f"policy {output.config['policy']['spec']}",
            f"seeds {', '.join(map(str, output.seeds))}",
            f"FLOPs {100 * report.flops_ratio:.1f} % of the full run",
            f"time {report.ms.total / 1e3:.2f} s, of which transformer {report.ms.transformer / 1e3:.2f} s",
            *(f"warning: {warning.message}" for warning in report.warnings),
        )
    )


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "FoveateLoadModel": LoadModel,
    "FoveatePolicy": ChoosePolicy,
    "FoveateGenerate": Generate,
    "FoveateCompare": Compare,
    "FoveateComputeMap": ComputeMap,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "FoveateLoadModel": "foveate load model",
    "FoveatePolicy": "foveate policy",
    "FoveateGenerate": "foveate generate",
    "FoveateCompare": "foveate compare",
    "FoveateComputeMap": "foveate compute map",
}
